"""Each parallel layer against the dense layer it was cut from: forward, gradients, odd sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor, nn

import gpt_lightning.kernels.cross_entropy as linear_cross_entropy
from gpt_lightning.model.gpt import LMHead
from gpt_lightning.parallel.full_layout import FullLayout, gather_to_first
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.plan import parallelize, resolve
from gpt_lightning.parallel.shard import Shard, sharded_parameters
from tests.distributed import run_ranks

pytestmark = pytest.mark.slow
BATCH, TIME, WIDTH, VOCABULARY = 3, 8, 12, 53


def mesh() -> ParallelMesh:
    dist.init_process_group("gloo")
    return ParallelMesh("cpu", dist.get_world_size(), dist.get_world_size())


def compare(
    make: Callable[[], nn.Module], plan: Any, apply: Callable[[nn.Module, Tensor], Tensor], x: Tensor
) -> None:
    """In a rank: `apply(module, x)` before and after the cut; the value and every gradient."""
    dense, parallel = make(), make()
    groups = mesh()
    parallelize(parallel, resolve(parallel, plan, groups.tp_size), groups)
    results = []
    for module in (dense, parallel):
        own = x.clone().requires_grad_(x.is_floating_point())
        y = apply(module, own)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype)
        (y * weights).sum().backward()
        results.append((y, own.grad))
    (y, x_grad), (parallel_y, parallel_x_grad) = results
    torch.testing.assert_close(parallel_y, y, rtol=1e-5, atol=1e-5)
    if x_grad is not None:
        torch.testing.assert_close(parallel_x_grad, x_grad, rtol=1e-5, atol=1e-5)
    shards = sharded_parameters(parallel)
    assert shards
    for (name, parameter), cut in zip(dense.named_parameters(), parallel.parameters(), strict=True):
        gradient: Tensor | None = cut.grad
        if cut in shards:
            assert cut.numel() < parameter.numel()
            gradient = gather_to_first(cut.grad, shards[cut], groups)
        if gradient is not None:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-5, msg=name)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))
    for layer in (layers[0], layers[2]):
        nn.init.normal_(layer.bias)
    return layers


def test_a_column_and_a_row_are_the_dense_pair() -> None:
    x = torch.randn(BATCH, TIME + 1, WIDTH)
    for size in (2, 4):
        run_ranks(compare, size, mlp, {"0": "column", "2": "row"}, lambda module, x: module(x), x)


class LanguageModel(nn.Module):
    """Token table and head, tied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.head = LMHead(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.table.weight


PLAN = {"table": "vocab_embedding", "head": "vocab_head"}


@pytest.mark.parametrize("size", [2, 4])
def test_an_odd_vocabulary_gives_the_dense_vectors_logits_and_loss(size: int) -> None:
    ids = torch.randint(VOCABULARY, (BATCH, TIME))
    ids[0, :2] = torch.tensor([0, VOCABULARY - 1])
    run_ranks(compare, size, LanguageModel, PLAN, lambda module, ids: module.table(ids), ids)
    hidden = torch.randn(BATCH, TIME, WIDTH)
    run_ranks(compare, size, LanguageModel, PLAN, lambda module, x: module.head(x), hidden)
    targets = ids.clone()
    targets[1, 3:] = -100
    for reduction in ("mean", "sum"):
        run_ranks(compare, size, LanguageModel, PLAN, lambda m, x: m.head.loss(x, targets, reduction), hidden)


def test_the_loss_in_chunks_and_with_great_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK_BYTES", 4 * VOCABULARY)  # a row or two at a time
    hidden = 60 * torch.randn(BATCH, TIME, WIDTH)
    targets = torch.randint(VOCABULARY, (BATCH, TIME))
    run_ranks(compare, 2, LanguageModel, PLAN, lambda m, x: m.head.loss(x, targets, "sum") / 1e3, hidden)


def test_gpt2s_vocabulary_is_cut_without_padding() -> None:
    for size in (2, 4, 8):
        sizes = Shard(0, 50257, 0, size).sizes
        assert sum(sizes) == 50257 and max(sizes) == -(-50257 // size) and min(sizes) > 0
        full = torch.arange(50257)
        assert torch.equal(torch.cat([Shard(0, 50257, r, size).cut(full) for r in range(size)]), full)
        assert all(torch.equal(Shard(0, 50257, r, size).cut(full), full.chunk(size)[r]) for r in range(size))


def strange_ids() -> tuple[Tensor, Tensor]:
    model, groups = LanguageModel(), mesh()
    parallelize(model, resolve(model, PLAN, groups.tp_size), groups)
    ids = torch.tensor([[0, VOCABULARY - 1, VOCABULARY, -1]])
    hidden = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    losses = [float(model.head.loss(hidden[:, i : i + 1], ids[:, i : i + 1], "sum")) for i in range(4)]
    return model.table(ids)[0, :, 0].detach(), torch.tensor(losses)


def test_an_id_that_no_peer_has_is_no_number() -> None:
    """In one process it is an error; here nobody could raise it without waiting for the device."""
    for vectors, losses in run_ranks(strange_ids, 2):
        assert vectors.isnan().tolist() == losses.isnan().tolist() == [False, False, True, True]


def peak_of_the_loss() -> tuple[list[int], int]:
    """The largest tensor that the forward and backward passes of the loss make."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    model, groups = LanguageModel(), mesh()
    parallelize(model, resolve(model, PLAN, 2), groups)
    hidden = torch.randn(40, TIME, WIDTH, requires_grad=True)
    with Watch():
        model.head.loss(hidden, torch.randint(VOCABULARY, (40, TIME)), "mean").backward()
    return list(model.head.weight.shape), largest


def test_the_loss_never_gathers_the_logits() -> None:
    for rank, (shape, largest) in enumerate(run_ranks(peak_of_the_loss, 2)):
        assert shape == [27 - rank, WIDTH]
        assert largest <= 40 * TIME * 27


class Dropping(nn.Module):
    """A dropout among whole tensors and one between a column and a row."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.inside, self.outside = nn.Dropout(0.5), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.inside(torch.ones_like(self.up(x)))
        return hidden, self.outside(torch.ones_like(self.down(hidden)))


def masks(train: bool) -> list[Tensor]:
    model, groups = Dropping(), mesh()
    plan = {"up": "column", "down": "row", "inside": "sharded_dropout"}
    parallelize(model, resolve(model, plan, groups.tp_size), groups)
    torch.manual_seed(7)
    model.train(train)
    x = torch.randn(BATCH, TIME, WIDTH)
    state = torch.get_rng_state()
    first, again = model(x), None
    torch.set_rng_state(state)
    again = model(x)
    assert all(torch.equal(a, b) for a, b in zip(first, again)), "not a function of the common random state"
    return [tensor.detach() for tensor in (*first, *model(x))]


def test_dropout_masks_differ_where_the_tensor_is_cut_and_only_there() -> None:
    ranks = run_ranks(masks, 4, True)
    for rank in ranks[1:]:
        assert torch.equal(rank[1], ranks[0][1])
    assert len({tuple(rank[0].flatten().tolist()) for rank in ranks}) == 4
    assert not torch.equal(ranks[0][0], ranks[0][2]), "every step has the same mask"
    dropped = torch.stack([rank[0] for rank in ranks]).eq(0).float().mean()
    assert 0.4 < dropped < 0.6
    assert all(rank[0].eq(1).all() for rank in run_ranks(masks, 2, False)), "dropout outside of training"


def masks_along_the_sequence(on: bool) -> Tensor:
    model, groups = Dropping(), mesh()
    styles = resolve(model, {"outside": "sequence"}, groups.tp_size)
    parallelize(model, styles, groups, cuts_sequence=True)
    torch.manual_seed(7)
    groups.cuts_sequence = on
    return model.outside(torch.ones(BATCH, TIME, WIDTH))


def test_dropout_masks_differ_along_a_cut_sequence() -> None:
    for on in (True, False):
        one, other = run_ranks(masks_along_the_sequence, 2, on)
        assert torch.equal(one, other) != on


def whole() -> dict[str, Tensor]:
    model, groups = LanguageModel(), mesh()
    parallelize(model, resolve(model, PLAN, groups.tp_size), groups)
    assert model.head.weight is model.table.weight, "the tie was lost"
    return FullLayout(model, groups, TorchCheckpointIO()).model_state()


def test_a_gathered_state_dict_is_the_uncut_one() -> None:
    expected = LanguageModel().state_dict()
    first, *others = run_ranks(whole, 4)
    assert first.keys() == expected.keys() and not any(others)
    assert all(torch.equal(first[name], tensor) for name, tensor in expected.items())
    assert first["head.weight"].data_ptr() == first["table.weight"].data_ptr()


def test_gelu_between_the_pair_sees_whole_features() -> None:
    """The reference of this file, once by hand: the halves of the MLP's features add up to the whole."""
    layers, x = mlp(), torch.randn(BATCH, WIDTH)
    half = [layers[2].weight[:, c] @ F.gelu(layers[0](x))[:, c].t() for c in (slice(0, 10), slice(10, 20))]
    torch.testing.assert_close((half[0] + half[1]).t() + layers[2].bias, layers(x))
