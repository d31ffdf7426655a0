"""A model's plan, submodule pattern -> ParallelStyle, and the parallel layers that it puts into the model."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.linear import is_plain_linear
from gpt_lightning.parallel.dropout import draw_own_numbers
from gpt_lightning.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SequenceParallel,
    SequenceParallelEmbedding,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.shard import Shard, sharded_parameters

Kind = Literal["column", "row", "vocab_embedding", "vocab_head", "sharded_dropout", "sequence"]
LAYERS: dict[Kind, tuple[type[nn.Module], ...]] = {
    "column": (nn.Linear,),
    "row": (nn.Linear,),
    "vocab_embedding": (nn.Embedding,),
    "vocab_head": (nn.Linear,),
    "sharded_dropout": (nn.Module,),
    "sequence": (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Dropout),
}
PARALLEL_LAYERS: dict[Kind, Callable[[Any, ParallelMesh, SequenceParallel], nn.Module]] = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "vocab_embedding": VocabParallelEmbedding,
    "vocab_head": VocabParallelHead,
}


class ParallelStyle(NamedTuple):
    """Says how tensor-parallel peers share a submodule.

    - `column`, `row`: nn.Linear layers sharded along their outputs and, after them, along their inputs.
    - `vocab_embedding`, `vocab_head`: the token embedding (nn.Embedding) and the output layer (nn.Linear
      without bias), sharded along the vocabulary.
    - `sharded_dropout`: a submodule with dropout between a column and a row: each peer drops other elements.
    - `sequence`: a layer norm, a dropout or a position embedding outside of such pairs: replicated and, under
      sequence parallelism, applied to a part of the sequence.

    `units` counts what a peer must have whole, such as heads, and `option` is what users call that number.
    """

    kind: Kind
    units: int | None = None
    option: str | None = None


Plan = Mapping[str, Kind | tuple[Kind, int | None, str | None]]  # the latter most often a ParallelStyle


def plan_of(module: nn.Module) -> Plan:
    """Returns the plan that the module's `tensor_parallel_plan()` makes."""
    make: Callable[[], Plan] | None = getattr(module, "tensor_parallel_plan", None)
    if make is None:
        raise UserError(
            f"{type(module).__name__} has no tensor_parallel_plan(), which a trainer.strategy."
            "tensor_parallel_size above 1 needs; "
            "add the method (submodule pattern -> style), or set the size to 1"
        )
    return make()


def styles_of(module: nn.Module, tp_size: int) -> dict[str, ParallelStyle]:
    """Returns the styles of the module's own plan by submodule; none if no peers share the module."""
    return resolve(module, plan_of(module), tp_size) if tp_size > 1 else {}


def resolve(module: nn.Module, plan: Plan, tp_size: int) -> dict[str, ParallelStyle]:
    """Finds the submodules that the plan's patterns name, and checks the style of each."""
    styles: dict[str, ParallelStyle] = {}
    for pattern, planned in plan.items():
        style = ParallelStyle(planned) if isinstance(planned, str) else ParallelStyle(*planned)
        if style.kind not in LAYERS:
            raise UserError(
                f"tensor_parallel_plan: {pattern!r} has the unknown style {style.kind!r}; "
                f"choose one of {', '.join(get_args(Kind))}"
            )
        names = [name for name, _ in module.named_modules(remove_duplicate=False) if _matches(name, pattern)]
        if not names:
            raise UserError(
                f"tensor_parallel_plan: {pattern!r} names no submodule of {type(module).__name__}; "
                "correct the pattern or remove it"
            )
        for name in names:
            if name in styles:
                raise UserError(
                    f"tensor_parallel_plan: {pattern!r} names {name}, which another pattern names too; "
                    "let one of them name it"
                )
            _check(name, module.get_submodule(name), style, tp_size)
            styles[name] = style
    return styles


def _matches(name: str, pattern: str) -> bool:
    """Matches as file names do: `*` stands for anything within one level of the hierarchy."""
    levels, patterns = name.split("."), pattern.split(".")
    return len(levels) == len(patterns) and all(map(fnmatch.fnmatchcase, levels, patterns))


def _check(name: str, module: nn.Module, style: ParallelStyle, tp_size: int) -> None:
    if not isinstance(module, LAYERS[style.kind]):
        kinds = " or ".join(kind.__name__ for kind in LAYERS[style.kind])
        raise UserError(
            f"tensor_parallel_plan: {name} is a {type(module).__name__}, but the style {style.kind!r} is for "
            f"{kinds}; choose another style, or build the model anew if it was cut before"
        )
    if style.kind in PARALLEL_LAYERS:
        _check_forward(name, module)
    if style.kind in ("column", "row"):
        assert isinstance(module, nn.Linear)
        _check_units(name, module, style, tp_size)
    if style.kind in ("vocab_embedding", "vocab_head"):
        _check_vocabulary(name, module, style, tp_size)


def _check_forward(name: str, module: nn.Module) -> None:
    """Refuses a layer that computes more than the plain one: what takes its place would drop that."""
    is_plain = is_plain_linear(module) or type(module).forward is nn.Embedding.forward
    if not is_plain or is_parametrized(module):
        raise UserError(
            f"tensor_parallel_plan: {name} ({type(module).__name__}) computes more than its parent class; "
            "leave it out of the plan, or use the plain layer"
        )


def _check_units(name: str, linear: nn.Linear, style: ParallelStyle, tp_size: int) -> None:
    outputs = style.kind == "column"
    units = style.units or (linear.out_features if outputs else linear.in_features)
    if units % tp_size:
        option = style.option or f"the {'outputs' if outputs else 'inputs'} of {name}"
        raise UserError(
            f"{option}={units} is not divisible by trainer.strategy.tensor_parallel_size={tp_size}; "
            f"choose a multiple of {tp_size}, or a tensor_parallel_size that divides {units}"
        )


def _check_vocabulary(name: str, module: nn.Module, style: ParallelStyle, tp_size: int) -> None:
    size = module.num_embeddings if isinstance(module, nn.Embedding) else getattr(module, "out_features")
    if Shard(0, size, tp_size - 1, tp_size).sizes[-1] < 1:
        raise UserError(
            f"{style.option or name}={size} is too small to be cut over "
            f"trainer.strategy.tensor_parallel_size={tp_size}; choose a smaller tensor_parallel_size"
        )
    of_embeddings = ["padding_idx", "max_norm", "scale_grad_by_freq", "sparse"]
    for option in of_embeddings if isinstance(module, nn.Embedding) else ["bias"]:
        value = getattr(module, option)
        if value is not None and value is not False:
            raise UserError(
                f"tensor_parallel_plan: {name} has {option}, which the style {style.kind!r} does not know; "
                "build it without"
            )


def check_module(module: LightningModule, *, sequence_parallel: bool) -> None:
    """Raises UserError for a module whose steps or layers no plan can make parallel."""
    if sequence_parallel and not module.automatic_optimization:
        raise UserError(
            "trainer.strategy.sequence_parallel=true cannot tell where a step ends of "
            f"{type(module).__name__}, which optimizes manually; leave it out, or use automatic optimization"
        )
    elsewhere = "or build the model outside of trainer.init_module(empty_init=True)"
    for name, layer in module.named_modules():
        if any(buffer is not None and buffer.is_meta for buffer in layer._buffers.values()):
            raise UserError(
                f"{name} has a buffer on the meta device, without values; create it with device='cpu', "
                f"{elsewhere}"
            )
        parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
        if any(p.is_meta for p in parameters) and not hasattr(layer, "reset_parameters"):
            raise UserError(
                f"{name} is on the meta device and has no reset_parameters(); add the method, {elsewhere}"
            )


def parallelize(
    module: nn.Module,
    styles: Mapping[str, ParallelStyle],
    mesh: ParallelMesh,
    sequence: SequenceParallel | None = None,
    *,
    draw: bool = True,
) -> None:
    """Replaces the submodules named by parallel ones, which keep this rank's part of each parameter.

    Parameters keep their identity, so tied ones stay tied. Those on the meta device are drawn whole, layer by
    layer in the order of `modules()`: they get the values that one process draws, and are never all in
    memory. Without `draw` they get memory alone, for a checkpoint to fill. With `sequence`, activations are
    cut along the sequence while it is on.
    """
    built: dict[nn.Parameter, nn.Parameter] = {}
    cut_already: set[nn.Parameter] = set()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in list(module.named_modules()):
        _materialize(layer, built, draw)
        if name not in styles:
            continue
        parallel = _parallel_version(layer, styles[name].kind, mesh, sequence)
        replaced[layer] = parallel.train(layer.training)
        for parameter, shard in sharded_parameters(parallel).items():
            if parameter not in cut_already:  # a tied one comes twice
                parameter.data = shard.cut(parameter.data).clone(memory_format=torch.contiguous_format)
                cut_already.add(parameter)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # a layer may have several names
            if child in replaced:
                parent._modules[name] = replaced[child]


def _parallel_version(
    layer: nn.Module, kind: Kind, mesh: ParallelMesh, sequence: SequenceParallel | None
) -> nn.Module:
    if kind in PARALLEL_LAYERS:
        return PARALLEL_LAYERS[kind](layer, mesh, sequence or SequenceParallel())
    if kind == "sharded_dropout":
        draw_own_numbers(layer, mesh)
    if kind == "sequence" and sequence is not None:
        if isinstance(layer, nn.Embedding):
            return SequenceParallelEmbedding(layer, mesh, sequence)
        if isinstance(layer, nn.Dropout):
            draw_own_numbers(layer, mesh, lambda: sequence.on)
    return layer


def _materialize(layer: nn.Module, built: dict[nn.Parameter, nn.Parameter], draw: bool) -> None:
    """Gives a layer that was built on the meta device its memory and its initial weights."""
    originals = {key: p for key, p in layer._parameters.items() if p is not None and p.is_meta}
    if any(original not in built for original in originals.values()):
        layer.to_empty(device="cpu", recurse=False)
        if draw:
            getattr(layer, "reset_parameters")()
    for key, original in originals.items():
        drawn = layer._parameters[key]
        assert drawn is not None
        layer._parameters[key] = built.setdefault(original, drawn)  # a tied one was drawn before


def partial_gradients(module: nn.Module, styles: Mapping[str, ParallelStyle]) -> Iterator[nn.Parameter]:
    """Yields the replicated parameters whose gradients, under sequence parallelism, are summands."""
    for name, style in styles.items():
        layer = module.get_submodule(name)
        if style.kind == "sequence":
            yield from layer.parameters()
        elif isinstance(layer, RowParallelLinear) and layer.bias is not None:
            yield layer.bias
