"""One claim: each kernel computes what its torch expression does, gradients included, in every precision."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.kernels.attention import Attend, Documents, dense_mask
from gpt_lightning.kernels.cpu_attention import BLOCK, attention_in_blocks
from gpt_lightning.kernels.cross_entropy import linear_cross_entropy
from gpt_lightning.kernels.linear import FastLinear, in_compute_dtype
from gpt_lightning.kernels.rms_norm import FastRMSNorm

KERNELS = "gpt_lightning.kernels."
Function = Callable[..., Tensor]


@dataclass
class Case:
    """A kernel, its expression, the shapes of what both are given, and constants of the kernel to change."""

    kernel: Function
    expression: Function
    shapes: list[tuple[int, ...]]
    constants: dict[str, object] = field(default_factory=dict)


def linear_cases() -> Iterator[tuple[str, Case]]:
    shapes = [(3, 5, 7), (11, 7), (11,)]
    constants: dict[str, object] = {"linear._LEAST_WORK": 0}
    yield "linear", Case(fast_linear, F.linear, shapes, constants)
    yield "linear, no bias", Case(fast_linear, F.linear, shapes[:2], constants)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    with torch.device("meta"):
        layer = FastLinear(weight.shape[1], weight.shape[0], bias=bias is not None)
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    output: Tensor = torch.func.functional_call(layer, tensors, x)
    return output


def rms_norm_cases() -> Iterator[tuple[str, Case]]:
    for shape in ((17, 5, 24), (13, 4, 3, 10)):
        yield f"rms norm, {len(shape)} axes", Case(
            lambda x, weight: fast_rms_norm(in_compute_dtype(x), weight),
            lambda x, weight: rms_norm(in_compute_dtype(x), weight),
            [shape, shape[-1:]],
        )


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), 0.01)


def fast_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    with torch.device("meta"):
        layer = FastRMSNorm(len(weight), 0.01)
    output: Tensor = torch.func.functional_call(layer, {"weight": weight}, x)
    return output


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, stays: Tensor | float = 1.0) -> Tensor:
    """Plain products, which round scores and weights in bfloat16; the fused kernel holds them in float32."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # each [B, H, T, K]
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) * stays @ v).transpose(1, 2)


def block_cases() -> Iterator[tuple[str, Case]]:
    """A block alone, on its edges and several, as many rows at a time as given, scores kept or made again."""
    for T in (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 7):
        B = 3 if T > 5 else 17  # in bfloat16 a few numbers err by chance
        for rows, kept in ((1, 2**24), (2, 0), (99, 2**24), (99, 0)):
            constants: dict[str, object] = {
                "cpu_attention._SCORE_BYTES_AT_A_TIME": rows * 8 * T * min(T, BLOCK),
                "cpu_attention._SCORES_KEPT": kept,
            }
            seen = torch.ones(T, T, dtype=torch.bool).tril()
            yield f"blocks, T={T}, rows={rows}, {kept=}", Case(
                lambda *qkv: attention_in_blocks(*map(in_compute_dtype, qkv), 0.0),
                lambda *qkv, seen=seen: attention(*map(in_compute_dtype, qkv), seen),
                [(B, T, 2, 6)] * 3,
                constants,
            )
    for B, T in ((17, 5), (3, BLOCK + 1)):
        yield f"blocks, T={T}, dropout", Case(
            lambda *qkv: attention_in_blocks(*map(in_compute_dtype, seeded(qkv)), 0.25),
            lambda *qkv: with_dropout(*map(in_compute_dtype, seeded(qkv))),
            [(B, T, 2, 6)] * 3,
        )


def seeded(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(3)
    return inputs


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the seed drops, drawn block by block."""
    B, T, H, _ = q.shape
    stays = torch.zeros(B, H, T, T, dtype=q.dtype)
    for start in range(0, T, BLOCK):
        end = min(T, start + BLOCK)
        drawn = torch.empty(B * H, end - start, end, dtype=torch.bool).bernoulli_(0.75)
        stays[:, :, start:end, :end] = drawn.view(B, H, end - start, end)
    return attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril(), stays / 0.75)


def document_cases() -> Iterator[tuple[str, Case]]:
    """Rows of one document and of several: a boundary after the first token, before the last, and between."""
    rows = [[300], [1, 298, 1], [128, 128, 44]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows])
    seen = torch.zeros(3, 1, 300, 300, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        for begin, length in zip(accumulate([0, *lengths]), lengths):
            end = begin + length
            seen[row, 0, begin:end, begin:end] = torch.ones(length, length, dtype=torch.bool).tril()

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Attend(ids, ids, head_dim=6, dropout_p=0.0)(q, k, v, 0.0)

    for way in (dense_mask, Documents):
        yield f"documents, {way.__name__}", Case(
            kernel,
            lambda *qkv: attention(*qkv, seen),
            [(3, 300, 2, 6)] * 3,
            {"attention.document_mask": lambda positions, *rest, way=way: way(positions)},
        )


def cross_entropy_cases() -> Iterator[tuple[str, Case]]:
    """A third is not scored; in chunks of a row, of five with a remainder, and in one, each cut up or not."""
    N, D, V = 23, 12, 101
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(0))
    targets[::3] = -100
    for reduction, chunk, softmax in product(("mean", "sum"), (1, 5, 2**18), (1, 3, 2**18)):
        yield f"cross entropy, {reduction}, {chunk=}, {softmax=}", Case(
            lambda hidden, weight, how=reduction: linear_cross_entropy(hidden, weight, targets, how),
            lambda hidden, weight, how=reduction: F.cross_entropy(
                F.linear(hidden, weight), targets, reduction=how
            ),
            [(N, D), (V, D)],
            {"cross_entropy.CHUNK_BYTES": 4 * V * chunk, "cross_entropy.SOFTMAX_ELEMENTS": V * softmax},
        )


CASES = dict([*linear_cases(), *rms_norm_cases(), *block_cases(), *document_cases(), *cross_entropy_cases()])
OUR_GRADIENTS = [name for name in CASES if not name.startswith("documents")]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    case = CASES[request.param]
    for name, value in case.constants.items():
        monkeypatch.setattr(KERNELS + name, value)
    return case


def make_inputs(case: Case, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in case.shapes]


def output_and_gradients(function: Function, inputs: list[Tensor]) -> list[Tensor]:
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad((output * weights).sum(), [x for x in inputs if x.requires_grad])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-7)])
def test_a_kernel_equals_its_expression(case: Case, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make_inputs(case, dtype)
    ours, expected = (output_and_gradients(function, inputs) for function in (case.kernel, case.expression))
    for actual, wanted in zip(ours, expected, strict=True):
        assert_close(actual, wanted, atol=tolerance, rtol=tolerance, check_dtype=False)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_kernel_errs_in_bfloat16_no_more_than_its_expression(case: Case, autocast: bool) -> None:
    """Measured against float32; and its gradients have the same dtypes."""
    exact = output_and_gradients(case.expression, make_inputs(case))
    inputs = make_inputs(case, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, plain = (output_and_gradients(function, inputs) for function in (case.kernel, case.expression))
    assert [x.dtype for x in ours[1:]] == [x.dtype for x in plain[1:]]
    for actual, other, expected in zip(ours, plain, exact, strict=True):
        # A single token's gradient of q and k is 0, and so is the difference of both from it.
        assert (actual - expected).norm() <= 1.1 * (other - expected).norm() + 1e-6


def test_each_input_may_be_frozen(case: Case) -> None:
    whole = output_and_gradients(case.kernel, make_inputs(case))
    for frozen in range(len(case.shapes)):
        inputs = make_inputs(case)
        inputs[frozen].requires_grad_(False)
        expected = [x for place, x in enumerate(whole) if place != frozen + 1]
        for actual, wanted in zip(output_and_gradients(case.kernel, inputs), expected, strict=True):
            assert_close(actual, wanted)


@pytest.mark.parametrize("case", OUR_GRADIENTS, indirect=True)
def test_a_graph_may_be_traversed_twice(case: Case) -> None:
    inputs = make_inputs(case)
    output = case.kernel(*inputs).sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(output, inputs)))


@pytest.mark.parametrize("case", OUR_GRADIENTS, indirect=True)
def test_a_second_derivative_is_refused(case: Case) -> None:
    inputs = make_inputs(case)
    with pytest.raises(RuntimeError, match="once_differentiable|no second derivative"):
        output = case.kernel(inputs[0].square(), *inputs[1:])
        gradient = torch.autograd.grad(output.square().sum(), inputs[0], create_graph=True)[0]
        gradient.sum().backward()
