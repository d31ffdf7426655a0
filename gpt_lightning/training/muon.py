"""Muon (Jordan et al., 2024): orthogonal updates for the matrices of the blocks, AdamW for everything else.

The arithmetic is that of torch.optim.Muon with `adjust_lr_fn="match_rms_adamw"` and of torch.optim.AdamW.
A matrix that tensor-parallel peers have cut, or that replicas share, gets the update of the whole: that of a
part would be another.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, is_shared
from gpt_lightning.parallel.sharded_replicas import copies_group, local, rows_of, sharing_group
from gpt_lightning.parallel.whole import on_whole, on_whole_once

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
MOST_AT_ONCE = 2**24  # numbers that one call orthogonalises: beyond, nothing is won, and memory lost


@dataclass(frozen=True)
class BlockMatrix:
    """Is the weight of a linear layer, whose rows repeat with the pattern `parts`: q, k and v, for one.

    Where peers have cut it, `shard` says how: `parts` are those of this peer's rows.
    """

    weight: nn.Parameter
    parts: tuple[int, ...]
    shard: Shard | None = None

    def views(self, like_weight: Tensor) -> tuple[Tensor, ...]:
        """Returns of a tensor in the weight's shape each matrix, [repetitions, rows, columns]."""
        return like_weight.unflatten(0, (-1, sum(self.parts))).split(self.parts, dim=1)

    @property
    def shards(self) -> list[Shard | None]:
        """Returns how each matrix is cut."""
        if self.shard is None or self.shard.dim == 1:
            return [self.shard for _ in self.parts]
        sizes = [self.shard.full_size * part // sum(self.parts) for part in self.parts]
        return [replace(self.shard, full_size=size) for size in sizes]

    def add(self, own: Tensor, update: Tensor, factor: float) -> None:
        """Adds to what this rank has of the weight, each matrix's update at the scale of AdamW's."""
        weight = self.weight
        columns = weight.shape[1] if self.shard is None or self.shard.dim == 0 else self.shard.full_size
        n_rows = weight.shape[0] if self.shard is None or self.shard.dim == 1 else self.shard.full_size
        scales = [math.sqrt(max(n_rows * part // sum(self.parts), columns)) for part in self.parts]
        if not is_shared(weight):
            for target, each, scale in zip(self.views(own), self.views(update), scales):
                target.add_(each, alpha=factor * scale)
            return
        of_rows = own.new_tensor(scales).repeat_interleave(torch.tensor(self.parts, device=own.device))
        of_rows = of_rows.repeat(weight.shape[0] // len(of_rows))[:, None] * factor
        own.addcmul_(update.to(own.dtype), rows_of(weight).cut(of_rows))


class MuonWithAdamW(Optimizer):
    """Is one optimizer, as Lightning takes one: AdamW and the groups it has, and a last group of matrices.

    Where `found_inf` is set and 1, a step changes nothing, as with fused AdamW, and the host need not know.
    """

    def __init__(
        self,
        adamw: AdamW,
        matrices: Sequence[BlockMatrix],
        mesh: ParallelMesh | None,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        self._adamw, self._matrices, self._mesh = adamw, matrices, mesh
        weights = [matrix.weight for matrix in matrices]
        own = {"params": weights, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([*adamw.param_groups, own], {})  # no defaults: they would be taken for every group's

    @override
    def __getstate__(self) -> dict[str, Any]:
        # PyTorch copies and pickles what every optimizer has, and a copy could not step.
        own = {name: vars(self)[name] for name in ("_adamw", "_matrices", "_mesh")}
        return {**super().__getstate__(), **own}

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        own = {} if "momentum" in param_group else self._adamw.defaults
        super().add_param_group({**own, **param_group})

    @property
    def matrix_group(self) -> dict[str, Any]:
        return next(group for group in self.param_groups if "momentum" in group)

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        left_out: Tensor | None = getattr(self, "found_inf", None)
        # These are other objects after a state was loaded.
        self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
        self._adamw.state = self.state
        self._adamw.found_inf = left_out  # type: ignore[attr-defined]
        self._adamw.step()
        self._step_matrices(self.matrix_group, left_out)
        return loss

    def _step_matrices(self, group: dict[str, Any], left_out: Tensor | None) -> None:
        lr, momentum = group["lr"], group["momentum"]
        matrices = [matrix for matrix in self._matrices if matrix.weight.grad is not None]
        ahead = [self._ahead(matrix.weight, momentum, left_out) for matrix in matrices]
        for matrix, update in zip(matrices, self._updates(matrices, ahead)):
            weight = local(matrix.weight)
            new = _to_change(weight, left_out).mul_(1 - lr * group["weight_decay"])
            matrix.add(new, update, -lr * 0.2)
            _changed(weight, new, left_out)

    def _ahead(self, weight: nn.Parameter, momentum: float, left_out: Tensor | None) -> Tensor:
        """Returns Nesterov's momentum of what this rank has of a weight."""
        assert weight.grad is not None
        state, gradient = self.state[weight], local(weight.grad)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        own = local(state["momentum_buffer"])
        buffer = _to_change(own, left_out)
        ahead = gradient.lerp(buffer.lerp_(gradient, 1 - momentum), momentum).bfloat16()
        _changed(own, buffer, left_out)
        return ahead

    def _updates(self, matrices: Sequence[BlockMatrix], ahead: Sequence[Tensor]) -> list[Tensor]:
        """Returns what this rank has of each update; a weight that replicas share is dealt to one of them."""
        shared = [weight for matrix in matrices if is_shared(weight := matrix.weight)]
        if not shared:  # all are or none is
            return self._of_replica(matrices, ahead)

        def compute(numbers: list[int], wholes: list[Tensor]) -> list[Tensor]:
            return self._of_replica([matrices[n] for n in numbers], wholes)

        rows, group = [rows_of(weight) for weight in shared], sharing_group(shared[0])
        if (copies := copies_group(shared[0])) is None:
            return on_whole(compute, ahead, rows, group)
        return on_whole_once(compute, ahead, rows, group, copies)

    def _of_replica(self, matrices: Sequence[BlockMatrix], ahead: Sequence[Tensor]) -> list[Tensor]:
        """Returns the update of each weight, of which tensor-parallel peers may have parts."""
        views = [matrix.views(each) for matrix, each in zip(matrices, ahead)]
        pieces = [piece.flatten(0, 1) for each in views for piece in each]
        shards = [shard for matrix in matrices for shard in matrix.shards]
        cut = {index: shard for index, shard in enumerate(shards) if shard is not None}
        whole = [index for index in range(len(pieces)) if index not in cut]
        found = dict(zip(whole, orthogonalized([pieces[index] for index in whole])))
        if cut and self._mesh is not None:
            parts = on_whole(
                lambda _, wholes: orthogonalized(wholes),
                [pieces[index] for index in cut],
                [*cut.values()],
                self._mesh.tp_group,
            )
            found.update(zip(cut, parts))
        updates = [torch.empty_like(each) for each in ahead]
        targets = [view for matrix, each in zip(matrices, updates) for view in matrix.views(each)]
        for index, target in enumerate(targets):
            target.copy_(found[index].view(target.shape))
        return updates


def _to_change(tensor: Tensor, left_out: Tensor | None) -> Tensor:
    """Returns the tensor itself, or a copy where only the device knows whether it is to change."""
    return tensor if left_out is None else tensor.clone()


def _changed(tensor: Tensor, new: Tensor, left_out: Tensor | None) -> None:
    if left_out is not None:
        tensor.copy_(torch.where(left_out > 0, tensor, new))


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Returns the nearest (nearly) orthogonal matrices, those of one shape computed together.

    One by one, small matrices would take the time of the calls.
    """
    results: dict[int, Tensor] = {}
    for indices in _batches(matrices):
        batch = _newton_schulz(torch.stack([matrices[index] for index in indices]))
        results.update(zip(indices, batch))
    return [results[index] for index in range(len(matrices))]


def _batches(matrices: Sequence[Tensor]) -> Iterator[list[int]]:
    by_shape: dict[torch.Size, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(index)
    for shape, indices in by_shape.items():
        n = max(1, MOST_AT_ONCE // shape.numel())
        yield from (indices[start : start + n] for start in range(0, len(indices), n))


def _newton_schulz(batch: Tensor) -> Tensor:
    """Brings the singular values of each matrix, [matrices, rows, columns] in bfloat16, near to 1."""
    batch = batch / torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True).clamp(min=EPS)
    is_tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if is_tall else batch
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)  # `@` would round a batch of one otherwise
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
