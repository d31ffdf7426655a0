"""Texts and log-probabilities are the same bits whoever else is in the batch, however they are read.

So it was found on a processor with AVX-512 and without AMX, with one thread. Elsewhere float32 is held to the
same tokens and to 1e-4, and the others to nothing: a near tie may tip.
"""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from gpt_lightning.generation.engine import Engine
from gpt_lightning.generation.prefill import PIECE
from gpt_lightning.generation.rows import Completion, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.linear import onednn_multiplies
from gpt_lightning.kernels.packed_linear import packed, steady_kernel
from gpt_lightning.model.gpt import GPTModel
from tests.generation.models import make_model
from tests.shapes import SHAPES

SETTINGS = GenerationConfig(max_new_tokens=8, temperature=1.0, top_p=0.95, top_logprobs=3)
IS_STEADY = torch.backends.cpu.get_cpu_capability() == "AVX512" and not torch.cpu._is_amx_tile_supported()
LENGTHS = [3, 170, 1, 90, 40, 17, 16, 200, 5, 64, 33, 128, 129, 2, 252, 77, *range(9, 25)]


def steady_model(shape: str, dtype: str) -> GPTModel:
    """With heads of 64: of narrower ones, a rotary position's cosine depends on its place in a vector."""
    sizes = dict(vocab_size=512, max_position_embeddings=256, n_heads=2, d_model=128)
    changes = {name: value for name, value in SHAPES[shape].items() if name != "d_head"}
    model = make_model(**{**sizes, **changes}).eval()
    model = model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    quantize = "int8" if dtype == "int8" else None
    return packed(model, quantize=quantize, n_rows=32, kernel=steady_kernel(model, quantize=quantize))


def run(
    model: GPTModel, prompts: dict[int, list[int]], n_rows: int, pieces: int | None
) -> dict[int, Completion]:
    """The completions of these prompts, some of which come two steps after the others."""
    engine = Engine(model, SETTINGS, eos_token_id=None, batch_size=n_rows, prefill_tokens=pieces)
    requests = [Request(prompt, number) for number, prompt in prompts.items()]
    steps = []
    for number, request in enumerate(requests):
        engine.add(request)
        if number % 3 == 2:
            steps += engine.step() + engine.step()
    while engine.n_rows or engine.n_waiting:
        steps += engine.step()
    return {step.request.number: step.completion for step in steps if step.completion is not None}


def assert_alike(found: dict[int, Completion], expected: dict[int, Completion]) -> None:
    if IS_STEADY:
        assert found == {number: expected[number] for number in found}
        return
    for number, completion in found.items():
        assert completion.token_ids == expected[number].token_ids
        assert completion.logprobs == pytest.approx(expected[number].logprobs, abs=1e-4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.parametrize("shape, dtype", [*product(SHAPES, ["float32", "bfloat16", "int8"])])
def test_a_row_has_the_same_bits_in_every_batch(shape: str, dtype: str) -> None:
    """Past the context, too; log-probabilities are compared without a tolerance."""
    if dtype != "float32" and not IS_STEADY:
        pytest.skip(f"products in {dtype} are not known to be steady on this processor")
    if dtype == "bfloat16" and not onednn_multiplies(torch.bfloat16):
        pytest.skip("this processor has no products in bfloat16")
    model = steady_model(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(512, (length,), generator=generator) for length in LENGTHS]
    prompts = {number: each.tolist() for number, each in enumerate(ids)}
    whole = run(model, prompts, 32, None)
    first = {number: prompts[number] for number in range(31)}
    assert_alike(run(model, first, 31, PIECE), whole)
    for numbers in ([0], [14], [3, 8], [1, 7, 9, 11, 12, 20, 21]):
        assert_alike(run(model, {n: prompts[n] for n in numbers}, 7, None), whole)
