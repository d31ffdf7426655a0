"""A model's plan, submodule pattern -> ParallelStyle, and the parallel layers that it puts into the model."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.linear import is_plain_linear
from gpt_lightning.parallel.dropout import draw_own_numbers
from gpt_lightning.parallel.layers import (
    ColumnParallelLinear,
    ParallelLayer,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    cut_positions,
)
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, sharded_parameters

Kind = Literal["column", "row", "vocab_embedding", "vocab_head", "sharded_dropout", "shared", "sequence"]
# The layers that each style is for, and the parallel layer that takes their place.
LAYERS: dict[Kind, tuple[tuple[type[nn.Module], ...], type[ParallelLayer] | None]] = {
    "column": ((nn.Linear,), ColumnParallelLinear),
    "row": ((nn.Linear,), RowParallelLinear),
    "vocab_embedding": ((nn.Embedding,), VocabParallelEmbedding),
    "vocab_head": ((nn.Linear,), VocabParallelHead),
    "sharded_dropout": ((nn.Module,), None),
    "shared": ((nn.Module,), None),
    "sequence": ((nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Dropout), None),
}
# What their parallel layers cannot do; a vocabulary, unlike other sizes, may be cut unevenly.
UNKNOWN_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "vocab_embedding": ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse"),
    "vocab_head": ("bias",),
}


class ParallelStyle(NamedTuple):
    """Says how tensor-parallel peers share a submodule.

    - `column`, `row`: nn.Linear layers sharded along their outputs and, after them, along their inputs.
    - `vocab_embedding`, `vocab_head`: the token embedding (nn.Embedding) and the output layer (nn.Linear
      without bias), sharded along the vocabulary.
    - `sharded_dropout`: a submodule with dropout between a column and a row: each peer drops other elements.
    - `shared`: a layer of replicated weights between a column and a row, which each peer applies to its part.
    - `sequence`: a layer norm, a dropout or a position embedding outside of such pairs: replicated and, under
      sequence parallelism, applied to a part of the sequence.

    `units` counts what a peer must have whole, such as heads, and `option` is what users call that number.
    """

    kind: Kind
    units: int | None = None
    option: str | None = None


Plan = Mapping[str, Kind | ParallelStyle]


def styles_of(module: nn.Module, tp_size: int) -> dict[str, ParallelStyle]:
    """Returns the styles of the module's own plan by submodule; none if no peers share the module."""
    if tp_size == 1:
        return {}
    make: Callable[[], Plan] | None = getattr(module, "tensor_parallel_plan", None)
    if make is None:
        raise UserError(
            f"{type(module).__name__} has no tensor_parallel_plan(), which a trainer.strategy."
            "tensor_parallel_size above 1 needs; add it (submodule pattern -> style), or set the size to 1"
        )
    return resolve(module, make(), tp_size)


def resolve(module: nn.Module, plan: Plan, tp_size: int) -> dict[str, ParallelStyle]:
    """Finds the submodules that the plan's patterns name, and checks the style of each."""
    styles: dict[str, ParallelStyle] = {}
    for pattern, planned in plan.items():
        style = ParallelStyle(planned) if isinstance(planned, str) else ParallelStyle(*planned)
        named, kinds = f"tensor_parallel_plan: {pattern!r}", ", ".join(LAYERS)
        if style.kind not in LAYERS:
            raise UserError(f"{named} has the unknown style {style.kind!r}; choose one of {kinds}")
        names = [name for name, _ in module.named_modules(remove_duplicate=False) if _matches(name, pattern)]
        if not names:
            whose = type(module).__name__
            raise UserError(f"{named} names no submodule of {whose}; correct the pattern or remove it")
        for name in names:
            if name in styles:
                another = f"{name}, which another pattern names too"
                raise UserError(f"{named} names {another}; let one of them name it")
            _check(name, module.get_submodule(name), style, tp_size)
            styles[name] = style
    return styles


def _matches(name: str, pattern: str) -> bool:
    """Matches as file names do: `*` stands for anything within one level of the hierarchy."""
    levels, patterns = name.split("."), pattern.split(".")
    return len(levels) == len(patterns) and all(map(fnmatch.fnmatchcase, levels, patterns))


def _check(name: str, layer: nn.Module, style: ParallelStyle, tp_size: int) -> None:
    plain, parallel = LAYERS[style.kind]
    named = f"tensor_parallel_plan: {name}"
    if not isinstance(layer, plain):
        raise UserError(
            f"{named} is a {type(layer).__name__}, but the style {style.kind!r} is for "
            f"{' or '.join(kind.__name__ for kind in plain)}; choose another style, or build the model anew "
            "if it was cut before"
        )
    if parallel is None:
        return
    # What takes the layer's place would drop all that it does beside.
    is_plain = is_plain_linear(layer) or type(layer).forward is nn.Embedding.forward
    if not is_plain or is_parametrized(layer):
        raise UserError(
            f"{named} ({type(layer).__name__}) computes more than its parent class; leave it out of the "
            "plan, or use the plain layer"
        )
    for option in UNKNOWN_OPTIONS.get(style.kind, ()):
        value = getattr(layer, option)
        if value is not None and value is not False:
            unknown = f"{option}, which the style {style.kind!r} does not know"
            raise UserError(f"{named} has {unknown}; build it without")
    _check_size(name, getattr(layer, parallel.size), style, tp_size)


def _check_size(name: str, size: int, style: ParallelStyle, tp_size: int) -> None:
    """Refuses a vocabulary too small for each peer to have some, and what else is not divisible."""
    option = f"trainer.strategy.tensor_parallel_size={tp_size}"
    if style.kind in UNKNOWN_OPTIONS:
        if not all(Shard(0, size, 0, tp_size).sizes):
            counted = f"{style.option or name}={size} is too small to be cut over {option}"
            raise UserError(f"{counted}; choose a smaller tensor_parallel_size")
    elif (units := style.units or size) % tp_size:
        counted = style.option or f"the {'outputs' if style.kind == 'column' else 'inputs'} of {name}"
        raise UserError(
            f"{counted}={units} is not divisible by {option}; choose a multiple of {tp_size}, or a "
            f"tensor_parallel_size that divides {units}"
        )


def check_module(module: LightningModule, *, sequence_parallel: bool, shard_replicas: bool = False) -> None:
    """Raises UserError for a module whose steps or layers no plan can make parallel."""
    if (sequence_parallel or shard_replicas) and not module.automatic_optimization:
        option = "sequence_parallel" if sequence_parallel else "shard_replicas"
        raise UserError(
            f"trainer.strategy.{option} cannot tell where a step ends of {type(module).__name__}, which "
            "optimizes manually; leave it out, or use automatic optimization"
        )
    elsewhere = "or build the model outside of trainer.init_module(empty_init=True)"
    for name, layer in module.named_modules():
        if any(buffer.is_meta for buffer in layer.buffers(recurse=False)):
            meta = "a buffer on the meta device, without values"
            raise UserError(f"{name} has {meta}; create it with device='cpu', {elsewhere}")
        on_meta = any(parameter.is_meta for parameter in layer.parameters(recurse=False))
        if on_meta and not hasattr(layer, "reset_parameters"):
            lacking = "is on the meta device and has no reset_parameters()"
            raise UserError(f"{name} {lacking}; add the method, {elsewhere}")


def parallelize(
    module: nn.Module,
    styles: Mapping[str, ParallelStyle],
    mesh: ParallelMesh,
    *,
    cuts_sequence: bool = False,
    draw: bool = True,
) -> None:
    """Replaces the submodules named by parallel ones, which keep this rank's part of each parameter.

    Parameters keep their identity, so tied ones stay tied. Those on the meta device are drawn whole, layer by
    layer in the order of `modules()`: they get the values that one process draws, and are never all in
    memory. Without `draw` they get memory alone, for a checkpoint to fill.
    """
    built: dict[nn.Parameter, nn.Parameter] = {}
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in list(module.named_modules()):
        _materialize(layer, built, draw)
        if name not in styles:
            continue
        parallel = _parallel_version(layer, styles[name].kind, mesh, cuts_sequence)
        replaced[layer] = parallel.train(layer.training)
        for parameter, shard in sharded_parameters(parallel).items():
            if parameter.shape[shard.dim] == shard.full_size:  # else it is tied, and came before
                parameter.data = shard.cut(parameter.data).clone(memory_format=torch.contiguous_format)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # a layer may have several names
            if child in replaced:
                parent._modules[name] = replaced[child]


def _parallel_version(layer: nn.Module, kind: Kind, mesh: ParallelMesh, cuts_sequence: bool) -> nn.Module:
    if (parallel := LAYERS[kind][1]) is not None:
        return parallel(layer, mesh)
    if kind == "sharded_dropout":
        draw_own_numbers(layer, mesh)
    elif cuts_sequence and isinstance(layer, nn.Embedding):
        layer.register_forward_pre_hook(partial(cut_positions, mesh))
    elif cuts_sequence and isinstance(layer, nn.Dropout):
        draw_own_numbers(layer, mesh, lambda: mesh.cuts_sequence)
    return layer


def _materialize(layer: nn.Module, built: dict[nn.Parameter, nn.Parameter], draw: bool) -> None:
    """Gives a layer that was built on the meta device its memory and its initial weights."""
    originals = {key: p for key, p in layer.named_parameters(recurse=False) if p.is_meta}
    if any(original not in built for original in originals.values()):
        layer.to_empty(device="cpu", recurse=False)
        if draw:
            getattr(layer, "reset_parameters")()
    for key, original in originals.items():
        setattr(layer, key, built.setdefault(original, getattr(layer, key)))  # a tied one was drawn before


def partial_gradients(
    module: nn.Module, styles: Mapping[str, ParallelStyle], *, cuts_sequence: bool
) -> Iterator[nn.Parameter]:
    """Yields the replicated parameters whose gradients are summands, some where the sequence is cut."""
    for name, style in styles.items():
        layer = module.get_submodule(name)
        if style.kind == "shared" or style.kind == "sequence" and cuts_sequence:
            yield from layer.parameters()
        elif cuts_sequence and isinstance(layer, RowParallelLinear) and layer.bias is not None:
            yield layer.bias
