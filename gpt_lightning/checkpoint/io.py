"""Writes checkpoints so that a good one is always there, and while the training goes on."""

import copy
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from typing_extensions import override

from gpt_lightning.checkpoint.contents import check_readable, read_checked
from gpt_lightning.checkpoint.files import check_finite, named_tensors, remove_checkpoint, write

Memory = dict[tuple[int, int], Tensor]  # buffers, by their number in a snapshot and their size


@dataclass(frozen=True)
class SaveOptions:
    """Says, as `storage_options` of a save, what else happens to the same checkpoint.

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
        self.writing: Future[None] | None = None  # in the background, until `finish`
        self.folders: set[Path] = set()  # in which it writes, and removes what is asked for
        self._memory: Memory = {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: _PATH, storage_options: SaveOptions | None = None
    ) -> None:
        """Saves, and first raises the error of an earlier save that failed in the background."""
        options = storage_options or SaveOptions()
        self.finish()
        check_readable(checkpoint)
        self.folders.add(Path(path).parent)
        if options.background:
            executor = ThreadPoolExecutor(1, "checkpoint writer")
            copied = snapshot(checkpoint, self._memory)
            with suppress(RuntimeError):  # no thread can be started: it is written now
                self.writing = executor.submit(_write, copied, Path(path), options)
            executor.shutdown(wait=False)  # its thread ends with the save, for which the interpreter waits
        if self.writing is None:
            _write(checkpoint, Path(path), options)

    def finish(self) -> None:
        """Waits until all that was to be written is; raises what went wrong in the background, once."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    def wait(self) -> None:
        """Waits as `finish` does, and leaves the error for later."""
        if self.writing is not None:
            wait([self.writing])

    @override
    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads without running what a stranger may have put into the file, whatever `weights_only` says."""
        self.wait()
        return read_checked(Path(path))

    @override
    def remove_checkpoint(self, path: _PATH) -> None:
        """Removes checkpoints where this writes, nothing else: the asking may be in a file's name."""
        self.wait()
        remove_checkpoint(Path(path), self.folders)

    @override
    def teardown(self) -> None:
        self._memory = {}
        self.finish()


def _write(checkpoint: Mapping[str, Any], path: Path, options: SaveOptions) -> None:
    check_finite(checkpoint)
    targets = (path, *options.also)
    for target in targets:
        write(checkpoint, target)
    for old in options.remove:  # not earlier: there is no moment without a good file
        if old not in targets:
            remove_checkpoint(old, [target.parent for target in targets])


def snapshot(checkpoint: Mapping[str, Any], memory: Memory) -> Mapping[str, Any]:
    """Returns a copy in which tensors share memory as they did.

    It lies in the former snapshot's memory: fresh memory costs several times the copying.
    """
    copies: dict[int, Tensor] = {}
    views: dict[int, list[tuple[int, Tensor]]] = {}  # by the address of the memory that they show
    for _, original in named_tensors(checkpoint):
        tensor = original.detach()
        if tensor.layout == torch.strided and type(tensor) is Tensor:
            views.setdefault(tensor.untyped_storage().data_ptr(), []).append((id(original), tensor))
        else:
            copies[id(original)] = tensor.cpu().clone()
    sizes = [tensors[0][1].untyped_storage().nbytes() for tensors in views.values()]
    # What has no place in this one goes before anything is added: there is never more than one of them.
    for place in memory.keys() - {*enumerate(sizes)}:
        del memory[place]
    for place, tensors in zip(enumerate(sizes), views.values()):
        if place not in memory:
            memory[place] = torch.empty(place[1], dtype=torch.uint8)
        _copy_memory(tensors[0][1], memory[place])
        for key, tensor in tensors:
            buffer = memory[place].view(tensor.dtype)
            copies[key] = buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return copy.deepcopy(checkpoint, copies)


def _copy_memory(tensor: Tensor, target: Tensor) -> None:
    """Copies all the bytes that a tensor is a view of."""
    source = tensor.as_strided((target.numel() // tensor.itemsize,), (1,), 0).view(torch.uint8)
    if source.device.type == "cpu":
        # By this thread alone: PyTorch has several wait for each other, ten times as long on busy cores.
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source)
