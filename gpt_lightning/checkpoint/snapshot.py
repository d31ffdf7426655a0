"""A checkpoint's contents at one moment: copied to host memory, and looked at for what must not be saved."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt_lightning.exit_codes import NON_FINITE

LOOKED_AT = ("state_dict", "optimizer_states")


class NonFiniteCheckpointError(ValueError):
    """The weights or the optimizer's state hold NaN or infinity, from which no run could go on."""

    exit_code = NON_FINITE


class HostMemory:
    """Where snapshots are taken; kept between them, since fresh memory costs several times the copying."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint in memory of its own, the former snapshot's; what shares memory shares it here."""
        tensors = list(tensors_in(checkpoint))
        sources = {source._cdata: source for tensor in tensors if (source := _memory_of(tensor)) is not None}
        keys = {address: (n, source.nbytes()) for n, (address, source) in enumerate(sources.items())}
        # What has no place in this one goes before anything is added: there is never more than one of them.
        self._storages = {key: self._storages[key] for key in keys.values() if key in self._storages}
        for address, source in sources.items():
            if keys[address] not in self._storages:
                self._storages[keys[address]] = torch.UntypedStorage(source.nbytes())
            _copy_bytes(source, self._storages[keys[address]])
        targets = {address: self._storages[key] for address, key in keys.items()}
        copies = {id(tensor): _copied(tensor, targets) for tensor in tensors}
        return copy.deepcopy(checkpoint, copies)


def _memory_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """None for the kinds of tensors that are more than a view of some memory."""
    plain = tensor.layout == torch.strided and type(tensor.detach()) is Tensor
    return tensor.untyped_storage() if plain else None


def _copied(tensor: Tensor, targets: Mapping[int, torch.UntypedStorage]) -> Tensor:
    """The same view of the copied memory."""
    tensor = tensor.detach()
    if (source := _memory_of(tensor)) is None:
        return tensor.cpu().clone()
    view = torch.empty(0, dtype=tensor.dtype)
    return view.set_(targets[source._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())


def _copy_bytes(source: torch.UntypedStorage, target: torch.UntypedStorage) -> None:
    if source.device.type == "cpu":
        # By this thread alone: PyTorch has several wait for each other, ten times as long on busy cores.
        np.copyto(_as_array(target), _as_array(source))
    else:
        target.copy_(source)


def _as_array(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def tensors_in(value: Any) -> Iterator[Tensor]:
    for _, tensor in named_tensors(value, ""):
        yield tensor


def named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers, under the path that leads to each."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from named_tensors(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from named_tensors(entry, f"{name}.{index}" if name else str(index))


def check_finite(checkpoint: Mapping[str, Any]) -> None:
    """Of the weights and the optimizers' state; what else a checkpoint holds may be anything."""
    parts = (named_tensors(checkpoint.get(part, {}), part) for part in LOOKED_AT)
    refuse_non_finite(first_non_finite(itertools.chain.from_iterable(parts)))


def first_non_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first that holds NaN or infinity."""
    return next((name for name, tensor in tensors if not _is_finite(tensor)), None)


def refuse_non_finite(name: str | None) -> None:
    if name is not None:
        raise NonFiniteCheckpointError(
            f"{name} holds NaN or infinity: no checkpoint is written of it, and the former ones are as they "
            "were; go on from one of them with a lower learning rate"
        )


def _is_finite(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
        tensor = tensor.detach()
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return True
    if tensor.element_size() == 1:  # has no arithmetic of its own
        tensor = tensor.float()
    # A finite sum has finite terms, and needs no memory; an infinite one may be an overflow.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
