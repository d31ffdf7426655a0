"""The plan of a parallel model, "submodule pattern -> style", and what it does to the model's modules."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gpt_lightning.exit_codes import UserError
from gpt_lightning.kernels.linear import is_plain_linear
from gpt_lightning.parallel.dropout import let_peers_differ
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

Style = Literal["column", "row", "vocab_embedding", "vocab_head", "sharded_dropout", "sequence"]
KINDS: dict[Style, tuple[type[nn.Module], ...]] = {
    "column": (nn.Linear,),
    "row": (nn.Linear,),
    "vocab_embedding": (nn.Embedding,),
    "vocab_head": (nn.Linear,),
    "sharded_dropout": (nn.Module,),
    "sequence": (nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.Dropout),
}


@dataclass(frozen=True)
class Cut:
    """How tensor-parallel peers share a submodule.

    - `column`, `row`: nn.Linear layers cut along their outputs and, after them, along their inputs.
    - `vocab_embedding`, `vocab_head`: the token table (nn.Embedding) and the output matrix (nn.Linear without
      bias), cut along the vocabulary.
    - `sharded_dropout`: a submodule with dropout between a column and a row: its random numbers differ.
    - `sequence`: a layer norm, a dropout or a table of positions outside of such pairs: replicated, and under
      sequence parallelism at work on a part of the sequence.

    `units` counts what a cut must leave whole, such as heads, and `option` is what users call that number.
    """

    style: Style
    units: int | None = None
    option: str | None = None


Plan = Mapping[str, "Cut | Style"]


def plan_of(module: nn.Module) -> Plan:
    make: Callable[[], Plan] | None = getattr(module, "tensor_parallel_plan", None)
    if make is None:
        raise UserError(
            f"{type(module).__name__} has no tensor_parallel_plan(), which a trainer.strategy."
            "tensor_parallel_size above 1 needs; "
            "add the method (submodule pattern -> style), or set the size to 1"
        )
    return make()


def resolve(module: nn.Module, plan: Plan, tp_size: int) -> dict[str, Cut]:
    """Submodule name -> Cut, checked; patterns are those of file names: `blocks.*.attn`."""
    cuts: dict[str, Cut] = {}
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for pattern, cut in plan.items():
        cut = cut if isinstance(cut, Cut) else Cut(cut)
        if cut.style not in KINDS:
            raise UserError(
                f"tensor_parallel_plan: {pattern!r} has the unknown style {cut.style!r}; "
                f"choose one of {', '.join(get_args(Style))}"
            )
        matches = [name for name in names if _matches(name, pattern)]
        if not matches:
            raise UserError(
                f"tensor_parallel_plan: {pattern!r} names no submodule of {type(module).__name__}; "
                "correct the pattern or remove it"
            )
        for name in matches:
            if name in cuts:
                raise UserError(
                    f"tensor_parallel_plan: {pattern!r} names {name}, which another pattern names too; "
                    "let one of them name it"
                )
            _check(name, module.get_submodule(name), cut, tp_size)
            cuts[name] = cut
    return cuts


def _matches(name: str, pattern: str) -> bool:
    """As file names match: `*` stands for anything within one level of the hierarchy."""
    levels, patterns = name.split("."), pattern.split(".")
    return len(levels) == len(patterns) and all(map(fnmatch.fnmatchcase, levels, patterns))


def _check(name: str, module: nn.Module, cut: Cut, tp_size: int) -> None:
    if not isinstance(module, KINDS[cut.style]):
        kinds = " or ".join(kind.__name__ for kind in KINDS[cut.style])
        raise UserError(
            f"tensor_parallel_plan: {name} is a {type(module).__name__}, but the style {cut.style!r} is for "
            f"{kinds}; choose another style, or build the model anew if it was cut before"
        )
    if cut.style in ("column", "row", "vocab_embedding", "vocab_head"):
        _check_forward(name, module)
    if cut.style in ("column", "row"):
        assert isinstance(module, nn.Linear)
        size = module.out_features if cut.style == "column" else module.in_features
        units = cut.units or size
        if units % tp_size:
            option = cut.option or f"the {'outputs' if cut.style == 'column' else 'inputs'} of {name}"
            raise UserError(
                f"{option}={units} is not divisible by trainer.strategy.tensor_parallel_size={tp_size}; "
                f"choose a multiple of {tp_size}, or a tensor_parallel_size that divides {units}"
            )
    if cut.style in ("vocab_embedding", "vocab_head"):
        _check_vocabulary(name, module, cut, tp_size)


def _check_forward(name: str, module: nn.Module) -> None:
    """Refuse a layer that computes more than the plain one: what takes its place would drop that."""
    is_plain = is_plain_linear(module) or type(module).forward is nn.Embedding.forward
    if not is_plain or is_parametrized(module):
        raise UserError(
            f"tensor_parallel_plan: {name} ({type(module).__name__}) computes more than its parent class; "
            "leave it out of the plan, or use the plain layer"
        )


def _check_vocabulary(name: str, module: nn.Module, cut: Cut, tp_size: int) -> None:
    size = module.num_embeddings if isinstance(module, nn.Embedding) else getattr(module, "out_features")
    if Shard(0, size, tp_size - 1, tp_size).sizes[-1] < 1:
        raise UserError(
            f"{cut.option or name}={size} is too small to be cut over trainer.strategy.tensor_parallel_size="
            f"{tp_size}; choose a smaller tensor_parallel_size"
        )
    table = ["padding_idx", "max_norm", "scale_grad_by_freq", "sparse"]
    for option in table if isinstance(module, nn.Embedding) else ["bias"]:
        value = getattr(module, option)
        if value is not None and value is not False:
            raise UserError(
                f"tensor_parallel_plan: {name} has {option}, which the style {cut.style!r} does not know; "
                "build it without"
            )


def check_module(module: LightningModule, *, sequence_parallel: bool) -> None:
    """Raise for what no plan can help: a step without a known end, layers that cannot be drawn one by one."""
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
    cuts: Mapping[str, Cut],
    mesh: ParallelMesh,
    sequence: SequenceParallel | None = None,
    *,
    draw: bool = True,
) -> None:
    """Replace the submodules named by their parallel versions, which keep this rank's part of each parameter.

    Parameters keep their identity, so ties survive. Those on the meta device are drawn here, layer by layer
    in the order of `modules()` and whole, so that they are what one process draws, yet never all in memory.
    Without `draw` they only get memory, for a checkpoint to fill. With `sequence`, sequences are cut while
    it is on.
    """
    built: dict[nn.Parameter, nn.Parameter] = {}
    cut_already: set[nn.Parameter] = set()
    replaced: dict[nn.Module, nn.Module] = {}
    for name, layer in list(module.named_modules()):
        _materialize(layer, built, draw)
        if name not in cuts:
            continue
        parallel = _parallel_version(layer, cuts[name].style, mesh, sequence)
        replaced[layer] = parallel.train(layer.training)
        for parameter, shard in sharded_parameters(parallel).items():
            if parameter not in cut_already:  # a tied one is met twice
                parameter.data = shard.cut(parameter.data).clone(memory_format=torch.contiguous_format)
                cut_already.add(parameter)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():  # a layer may have several names
            if child in replaced:
                parent._modules[name] = replaced[child]


def _parallel_version(
    layer: nn.Module, style: Style, mesh: ParallelMesh, sequence: SequenceParallel | None
) -> nn.Module:
    switch = sequence or SequenceParallel()
    if style == "column" and isinstance(layer, nn.Linear):
        return ColumnParallelLinear(layer, mesh, switch)
    if style == "row" and isinstance(layer, nn.Linear):
        return RowParallelLinear(layer, mesh, switch)
    if style == "vocab_head" and isinstance(layer, nn.Linear):
        return VocabParallelHead(layer, mesh, switch)
    if style == "vocab_embedding" and isinstance(layer, nn.Embedding):
        return VocabParallelEmbedding(layer, mesh, switch)
    if style == "sharded_dropout":
        let_peers_differ(layer, mesh)
    if style == "sequence" and sequence is not None:
        if isinstance(layer, nn.Embedding):
            return SequenceParallelEmbedding(layer, mesh, sequence)
        if isinstance(layer, nn.Dropout):
            let_peers_differ(layer, mesh, lambda: sequence.on)
    return layer


def _materialize(layer: nn.Module, built: dict[nn.Parameter, nn.Parameter], draw: bool) -> None:
    """Give a layer that was built on the meta device its memory and its initial weights."""
    originals = {key: p for key, p in layer._parameters.items() if p is not None and p.is_meta}
    if any(original not in built for original in originals.values()):
        layer.to_empty(device="cpu", recurse=False)
        if draw:
            getattr(layer, "reset_parameters")()
    for key, original in originals.items():
        drawn = layer._parameters[key]
        assert drawn is not None
        layer._parameters[key] = built.setdefault(original, drawn)  # a tied one was drawn before


def partial_gradients(module: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[nn.Parameter]:
    """Replicated parameters of which, under sequence parallelism, a peer has its own tokens' gradient."""
    for name, cut in cuts.items():
        layer = module.get_submodule(name)
        if cut.style == "sequence":
            yield from layer.parameters()
        elif isinstance(layer, RowParallelLinear) and layer.bias is not None:
            yield layer.bias
