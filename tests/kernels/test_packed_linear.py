"""The copies of a model that a CPU decodes with: the same numbers, or the numbers of 8 bits, row by row."""

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.choose import PIN
from gpt_lightning.kernels.device import is_x86
from gpt_lightning.kernels.packed_linear import FloatLinear, Int8Linear, packed
from gpt_lightning.kernels.products import IntegerProduct, float_kernels, integer_kernels, make_room
from gpt_lightning.model.gpt import MLP, GPTModel, Linear
from tests.generation.models import make_model, make_prompts, recomputed
from tests.shapes import GROUPED, MIXED

FLOAT_KERNELS = list(float_kernels(torch.bfloat16))
INTEGER_KERNELS = list(integer_kernels())
GREEDY = GenerationConfig(max_new_tokens=25, do_sample=False)
SAMPLED = GenerationConfig(max_new_tokens=25, temperature=1.0, top_p=0.95)
IDS = torch.tensor(make_prompts(19, 19, 19))


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_model()


def logits(model: GPTModel) -> Tensor:
    """[B, T, V]."""
    return model.lm_head(model.hidden_states(IDS))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("shape", [{"activation": "gelu"}, {"bias": False}, {}, GROUPED, MIXED])
@pytest.mark.parametrize("n_rows, kernel", [(1, "linear"), (1, "packed"), (3, "packed")])
def test_packed_logits_equal_the_models(
    tie: bool, shape: dict[str, Any], n_rows: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIN, kernel)
    model = make_model(tie_embeddings=tie, **shape)
    copy = packed(model, quantize=None, n_rows=n_rows)
    assert isinstance(copy.lm_head, FloatLinear) and copy.lm_head.kernel == kernel
    with torch.no_grad():
        assert_close(logits(copy), logits(model.eval()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size, shape", [(1, {}), (3, {}), (3, GROUPED)])
@pytest.mark.parametrize("kernel", list(float_kernels(torch.float32)))
def test_packed_text_equals_the_models(
    settings: GenerationConfig,
    batch_size: int,
    shape: dict[str, Any],
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a prompt's tokens do not depend on its mates: whichever kernel is fastest for their number."""
    monkeypatch.setenv(PIN, kernel)
    model = make_model(**shape)
    prompts = make_prompts(3, 1, 20, 7, 16)
    copy = packed(model, quantize=None, n_rows=batch_size)
    expected = recomputed(model, prompts, settings, eos_token_id=7)
    assert generate(copy, prompts, settings, eos_token_id=7, batch_size=batch_size) == expected


@pytest.mark.parametrize("kernel", FLOAT_KERNELS)
def test_bfloat16_and_autocast_pack_in_their_dtype(
    model: GPTModel, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PIN, kernel)
    half = make_model().to(torch.bfloat16).eval()
    with torch.no_grad():
        actual = logits(packed(half, quantize=None, n_rows=2))
        assert actual.dtype == torch.bfloat16
        assert_close(actual, logits(half), atol=0.2, rtol=0.05)
        with torch.autocast("cpu", torch.bfloat16):
            copy = packed(model, quantize=None, n_rows=2)
            assert logits(copy).dtype == torch.bfloat16
            assert_close(logits(copy), logits(model.eval()), atol=0.2, rtol=0.05)


def test_the_model_itself_is_left_as_it_was() -> None:
    model = make_model().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for quantize in (None, "int8"):
        packed(model, quantize=quantize, n_rows=2)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.blocks[0].attn.qkv_proj) is Linear


@pytest.mark.parametrize("kernel", FLOAT_KERNELS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has_bias", [True, False])
def test_bfloat16_products_are_rounded_once(kernel: str, rows: int, has_bias: bool) -> None:
    """To the product in float64 of the same numbers, but for the bias, which may be added afterwards."""
    generator = torch.Generator().manual_seed(4)
    weight, x = torch.randn(50, 36, generator=generator), torch.randn(rows, 1, 36, generator=generator)
    weight, x, bias = weight.bfloat16(), x.bfloat16(), torch.randn(50, generator=generator).bfloat16()
    product = float_kernels(torch.bfloat16)[kernel](weight, bias if has_bias else None, rows)
    expected = x.double() @ weight.double().t() + (bias.double() if has_bias else 0)
    assert_close(product(x).double(), expected, rtol=2**-7, atol=2**-7 if has_bias else 2**-16)


def quantized_by_hand(layer: Linear, x: Tensor) -> Tensor:
    """Weights in 127 steps a side and output feature, inputs in as many a side and row."""
    weight_steps = layer.weight.abs().amax(1) / 127
    steps = x.abs().amax(-1, keepdim=True) / IntegerProduct.greatest
    integers = (layer.weight / weight_steps[:, None]).round().long()
    sums = (x / steps).round().long() @ integers.t()
    return sums * weight_steps * steps + layer.bias


def make_layer() -> Linear:
    torch.manual_seed(0)
    layer = Linear(36, 50, bias=True)
    torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    return layer.requires_grad_(False)


def int8_layer(layer: Linear, kernel: str, n_rows: int = 1) -> Int8Linear:
    make = integer_kernels()[kernel]
    return Int8Linear(layer, lambda integers: make(integers, n_rows, make_room))


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
def test_int8_equals_the_product_of_rounded_numbers(kernel: str) -> None:
    layer = make_layer()
    x = torch.randn(3, 5, 36, generator=torch.Generator().manual_seed(2))
    actual = int8_layer(layer, kernel)(x)
    assert_close(actual, quantized_by_hand(layer, x), atol=1e-5, rtol=1e-5)
    assert 1e-4 < (layer(x) - actual).abs().max() < 0.02


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
@pytest.mark.parametrize(
    "n_inputs, n_outputs, rows", [(17, 33, 1), (768, 50, 5), (3072, 40, 1), (2100, 7, 70)]
)
def test_sums_of_integers_are_exact(kernel: str, n_inputs: int, n_outputs: int, rows: int) -> None:
    """At the full range too, where a sum of neighbours would overflow 16 bits."""
    greatest, generator = IntegerProduct.greatest, torch.Generator().manual_seed(rows)
    integers = torch.randint(-127, 128, (n_outputs, n_inputs), generator=generator, dtype=torch.int8)
    x = torch.randint(-greatest, greatest + 1, (rows, n_inputs), generator=generator)
    integers[0], x[0] = 127, greatest
    integers[1] = -127
    product = integer_kernels()[kernel](integers, rows, make_room)
    expected = x @ integers.long().t()
    assert torch.equal(product(x.float(), torch.ones(rows, 1)), expected.float())


WITHOUT_VNNI = """
import torch
torch.cpu._is_vnni_supported = lambda: False
from tests.kernels.test_packed_linear import INTEGER_KERNELS, test_sums_of_integers_are_exact
for kernel in INTEGER_KERNELS:
    test_sums_of_integers_are_exact(kernel, 768, 50, 5)
print(INTEGER_KERNELS)
"""


@pytest.mark.slow
@pytest.mark.skipif(not is_x86(), reason="of x86's instructions")
def test_sums_of_integers_are_exact_with_avx2_alone() -> None:
    names = ("ONEDNN_MAX_CPU_ISA", "FBGEMM_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
    environment = os.environ | dict(zip(names, ("AVX2", "AVX2", "avx2"), strict=True))
    words = [sys.executable, "-c", WITHOUT_VNNI]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "quantized" in ended.stdout, ended.stderr


@pytest.mark.skipif("qnnpack" not in torch.backends.quantized.supported_engines, reason="needs QNNPACK")
@pytest.mark.skipif(IntegerProduct.greatest < 127, reason="QNNPACK knows the full range alone")
def test_sums_of_integers_are_exact_by_arms_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    test_sums_of_integers_are_exact("quantized", 768, 50, 5)


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
def test_near_ties_are_rounded_the_same_by_every_kernel(kernel: str) -> None:
    """At 1.4999999, for example, to which 128 adds up to 129.5."""
    x = torch.tensor([[-4.5, -3.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 4.5]])
    x = torch.cat([x.nextafter(torch.zeros(())), x.nextafter(2 * x)])[:, None]
    product = integer_kernels()[kernel](torch.eye(9, dtype=torch.int8), 2, make_room)
    assert torch.equal(product(x, torch.ones(2, 1, 1)), x.round())


def test_int8_has_the_same_bits_by_every_kernel() -> None:
    """So that the kernel may be chosen by the number of rows, and no text depends on its mates' number."""
    x = torch.randn(7, 36, generator=torch.Generator().manual_seed(5))
    x[3] = 0
    first, *others = (int8_layer(make_layer(), kernel, n_rows=7)(x) for kernel in INTEGER_KERNELS)
    assert others and all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
def test_int8_rows_do_not_see_each_other(kernel: str) -> None:
    """To the bit, also next to a row a thousand times as large, and one of zeros."""
    layer = int8_layer(make_layer(), kernel)
    x = torch.randn(6, 36, generator=torch.Generator().manual_seed(3))
    x[2] *= 1000
    x[4] = 0
    together = layer(x)
    for row in range(6):
        assert torch.equal(together[row], layer(x[row : row + 1])[0])
    assert together.isfinite().all()


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("shape", [{}, GROUPED])
def test_int8_text_does_not_depend_on_the_batch(settings: GenerationConfig, shape: dict[str, Any]) -> None:
    prompts = make_prompts(3, 1, 20, 7, 16, 2, 11)
    copy = packed(make_model(max_position_embeddings=16, **shape), quantize="int8", n_rows=3)
    alone = generate(copy, prompts, settings, eos_token_id=7, batch_size=1)
    assert generate(copy, prompts, settings, eos_token_id=7, batch_size=3) == alone
    assert alone != generate(
        copy, prompts, dataclasses.replace(settings, repetition_penalty=2.0), eos_token_id=7
    )


class SiLU(MLP):
    """Another activation than any that the configuration knows."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(x)))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_change_of_the_network_is_followed(quantize: str | None) -> None:
    model, other = make_model().eval(), make_model().eval()
    for block in other.blocks:
        block.mlp.__class__ = SiLU
    prompts = make_prompts(3, 9)
    plain = generate(other, prompts, GREEDY, eos_token_id=None)
    assert plain != generate(model, prompts, GREEDY, eos_token_id=None)
    copy = packed(other, quantize=quantize, n_rows=2)
    with torch.no_grad():
        error = (logits(copy) - logits(other)).abs().max()
        assert error < 1e-4 if quantize is None else error < 0.4 * (logits(model) - logits(other)).abs().max()
    if quantize is None:
        assert generate(copy, prompts, GREEDY, eos_token_id=None) == plain


def test_a_layer_that_computes_something_else_is_not_swapped() -> None:
    class Doubling(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = torch.nn.Sequential(torch.nn.Linear(5, 5), Doubling(5, 5))
    assert packed(model, quantize=None, n_rows=1) is model
    with pytest.raises(ValueError, match="generation.quantize=int8 is for a whole model"):
        packed(model, quantize="int8", n_rows=1)


def test_the_copy_shares_every_other_tensor(model: GPTModel) -> None:
    copy = packed(model, quantize=None, n_rows=1)
    others = dict(copy.named_parameters())
    assert "token_embedding.weight" in others and "position_embedding.weight" in others
    assert all(tensor is model.get_parameter(name) for name, tensor in others.items())
    assert copy.blocks[1].ln_2.keywords["bias"] is model.blocks[1].ln_2.bias
    assert not any(module.training for module in copy.modules())


def test_diverged_weights_are_an_error_in_int8_too() -> None:
    model = make_model()
    with torch.no_grad():
        model.blocks[1].mlp.up_proj.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite.*; use an earlier checkpoint"):
        packed(model, quantize="int8", n_rows=1)


@pytest.mark.parametrize("kernel", INTEGER_KERNELS)
def test_a_diverged_norm_is_an_error_in_int8_too(kernel: str) -> None:
    """It leaves the weights of the linear layers finite, and makes NaN of what they multiply."""
    model = make_model()
    with torch.no_grad():
        model.ln_f.weight[3] = torch.nan
    copy = packed(model, quantize="int8", n_rows=1, kernel=kernel)
    with pytest.raises(UserError, match="not finite: its weights diverged; use an earlier checkpoint"):
        generate(copy, [[1, 2, 3]], GenerationConfig(), eos_token_id=None)


def test_int8_is_refused_where_it_does_not_run() -> None:
    with torch.device("meta"):
        model = GPTModel(make_model().config)
    assert packed(model, quantize=None, n_rows=1) is model
    with pytest.raises(ValueError, match="generation.quantize=int8 is for a whole model on a CPU; leave"):
        packed(model, quantize="int8", n_rows=1)


def test_an_int8_copy_serves_without_inference_mode_too() -> None:
    """After it has served in it, as in generation."""
    copy = packed(make_model(), quantize="int8", n_rows=IDS.numel())
    with torch.inference_mode():
        expected = logits(copy)
    with torch.no_grad():
        assert torch.equal(logits(copy), expected)


def test_int8_weights_do_not_depend_on_the_default_dtype() -> None:
    layer, x = make_layer(), torch.randn(3, 36)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = [int8_layer(layer, kernel)(x) for kernel in INTEGER_KERNELS]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(each, int8_layer(layer, "plain")(x)) for each in actual)


@pytest.mark.slow  # a process of its own, in which oneDNN tells what it runs
@pytest.mark.skipif("onednn" not in INTEGER_KERNELS, reason="not on this processor")
def test_integers_of_a_prompt_are_not_multiplied_by_a_reference() -> None:
    """oneDNN's takes a thousand times as long; it is what signed inputs get on a processor without AMX."""
    code = """
import torch
from gpt_lightning.kernels.products import integer_kernels, make_room
x = torch.randn(40, 64)
make = integer_kernels()["onednn"]
make(torch.ones(48, 64, dtype=torch.int8), 1, make_room)(x, x.abs().amax(-1, keepdim=True) / 127)
"""
    environment = {**os.environ, "ONEDNN_VERBOSE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    products = [line for line in run.stdout.splitlines() if ",exec," in line and "matmul" in line]
    assert products, run.stdout + run.stderr
    assert not [line for line in products if ",ref" in line]
