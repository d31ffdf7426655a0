"""Checkpoints written so that a good one is always there, while the training goes on."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from gpt_lightning.checkpoint.atomic import remove
from gpt_lightning.checkpoint.checkpoint import check_is_file
from gpt_lightning.checkpoint.contents import read_checked
from gpt_lightning.checkpoint.files import check_finite, named_tensors, write


@dataclass(frozen=True)
class SaveOptions:
    """As `storage_options` of a save: what else happens to the same checkpoint.

    Args:
        background: Write while the training goes on.
        also: Where it is written too, once it is in its place.
        remove: Checkpoints that are removed then.
    """

    background: bool = False
    also: tuple[Path, ...] = ()
    remove: tuple[Path, ...] = ()


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames; never what is not finite.

    Lightning stages in TMPDIR: on another file system the final move is a plain copy, and a crash inside it
    leaves a torn file under the final name.
    """

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._writing: Future[None] | None = None

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: SaveOptions | None = None
    ) -> None:
        """Raises the failure of an earlier save in the background, too."""
        options = storage_options or SaveOptions()
        self.wait()
        self.raise_failure()
        if options.background:
            snapshot = self._memory.snapshot(checkpoint)
            executor = ThreadPoolExecutor(1, "checkpoint writer")
            self._writing = executor.submit(_write_all, snapshot, Path(path), options)
            executor.shutdown(wait=False)  # its thread ends with the save, for which the interpreter waits
        else:
            _write_all(checkpoint, Path(path), options)

    def wait(self) -> None:
        """Return when everything that was to be written is, or has failed."""
        if self._writing is not None:
            wait([self._writing])

    def raise_failure(self) -> None:
        """Raise the error of a save in the background, once."""
        if self._writing is not None and self._writing.done():
            written, self._writing = self._writing, None
            written.result()

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Never runs what a stranger may have put into the file, whatever `weights_only` says."""
        self.wait()
        check_is_file(Path(path))
        return read_checked(path)

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        self.wait()
        remove(Path(path))

    @override
    def teardown(self) -> None:
        self.wait()
        self._memory = HostMemory()
        self.raise_failure()


def _write_all(checkpoint: Mapping[str, Any], path: Path, options: SaveOptions) -> None:
    check_finite(checkpoint)
    for target in (path, *options.also):
        write(checkpoint, target)
    for old in options.remove:  # not earlier: there is no moment without a good file
        remove(old)


class HostMemory:
    """Takes snapshots in memory that is kept between them: fresh memory costs several times the copying."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}

    def snapshot(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        """The checkpoint in memory of its own, the former snapshot's; what shares memory shares it here."""
        tensors = {id(tensor): tensor.detach() for _, tensor in named_tensors(checkpoint)}
        memories = {key: _memory_of(tensor) for key, tensor in tensors.items() if _is_view(tensor)}
        sources = {memory.data_ptr(): memory for memory in memories.values()}
        places = {address: (n, memory.numel()) for n, (address, memory) in enumerate(sources.items())}
        # What has no place in this one goes before anything is added: there is never more than one of them.
        self._buffers = {place: self._buffers[place] for place in places.values() if place in self._buffers}
        for address, source in sources.items():
            if places[address] not in self._buffers:
                self._buffers[places[address]] = torch.empty(source.numel(), dtype=torch.uint8)
            _copy(source, self._buffers[places[address]])
        copies = {}
        for key, tensor in tensors.items():
            if key in memories:
                buffer = self._buffers[places[memories[key].data_ptr()]].view(tensor.dtype)
                copies[key] = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            else:
                copies[key] = tensor.cpu().clone()
        return copy.deepcopy(checkpoint, copies)


def _is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of some memory, and no more than that."""
    return tensor.layout == torch.strided and type(tensor) is Tensor


def _memory_of(tensor: Tensor) -> Tensor:
    """All the bytes that a tensor is a view of."""
    n = tensor.untyped_storage().nbytes() // tensor.itemsize
    return tensor.as_strided((n,), (1,), 0).view(torch.uint8)


def _copy(source: Tensor, target: Tensor) -> None:
    if source.device.type == "cpu":
        # By this thread alone: PyTorch has several wait for each other, ten times as long on busy cores.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
