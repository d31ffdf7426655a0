"""A checkpoint's contents at one moment: copied to host memory, and looked at for what must not be saved."""

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LOOKED_AT = ("state_dict", "optimizer_states")


class NonFiniteCheckpointError(ValueError):
    """The weights or the optimizer's state hold NaN or infinity, from which no run could go on."""


class HostMemory:
    """Where snapshots are taken; kept between them, since fresh memory costs several times the copying."""

    def __init__(self) -> None:
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def snapshot(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """The checkpoint in memory of its own, the former snapshot's; what shares memory shares it here."""
        taken: dict[int, torch.UntypedStorage] = {}
        old, self._storages = self._storages, {}
        copies = {id(tensor): self._copied(tensor, taken, old) for tensor in tensors_in(checkpoint)}
        return copy.deepcopy(checkpoint, copies)

    def _copied(
        self,
        tensor: Tensor,
        taken: dict[int, torch.UntypedStorage],
        old: dict[tuple[int, int], torch.UntypedStorage],
    ) -> Tensor:
        tensor = tensor.detach()
        if tensor.layout != torch.strided or type(tensor) is not Tensor:
            return tensor.cpu().clone()
        source = tensor.untyped_storage()
        if source._cdata not in taken:
            key = (len(taken), source.nbytes())
            target = old.pop(key, None)
            if target is None:
                target = torch.UntypedStorage(source.nbytes())
            _copy_bytes(source, target)
            taken[source._cdata] = self._storages[key] = target
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(taken[source._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())


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
