"""Generation equals what the model says: cached = uncached, batched = one by one, greedy = transformers."""

import dataclasses
import hashlib
from collections.abc import Callable

import pytest
import torch

from gpt_lightning.generation.engine import Engine, generate
from gpt_lightning.generation.prefill import visible_start
from gpt_lightning.generation.processors import penalize_repetition
from gpt_lightning.generation.rows import Completion, Request
from gpt_lightning.generation.sampling import GenerationConfig, pick, top_k_filter, top_p_filter
from gpt_lightning.model.gpt import GPTModel
from tests.generation.models import (
    greedy_of_transformers,
    make_model,
    make_prompts,
    recomputed,
    run_numbered,
    run_until,
    transformers_model,
)
from tests.shapes import SHAPES

SAMPLED = GenerationConfig(max_new_tokens=9, temperature=1.0, top_k=40, top_p=0.95, repetition_penalty=1.1)
GREEDY = GenerationConfig(max_new_tokens=9, do_sample=False)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_model()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cached_decoding_equals_uncached(shape: str, settings: GenerationConfig) -> None:
    model = make_model(**SHAPES[shape])
    prompts = make_prompts(1, 17, 5, 30)
    cached = generate(model, prompts, settings, eos_token_id=None)
    assert cached == recomputed(model, prompts, settings)


@pytest.mark.parametrize(
    "shape, context", [*(("gpt2", n) for n in (1, 2, 7, 12)), ("grouped", 7), ("grouped", 2), ("mixed", 12)]
)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_cached_decoding_equals_uncached_past_the_context(
    shape: str, context: int, settings: GenerationConfig
) -> None:
    """Short, just full and over-long prompts, all of them pushed past the context at least once."""
    model = make_model(**SHAPES[shape], max_position_embeddings=context)
    prompts = make_prompts(1, context, context + 1, 3 * context + 2)
    settings = dataclasses.replace(settings, max_new_tokens=2 * context + 3)
    cached = generate(model, prompts, settings, eos_token_id=None)
    assert cached == recomputed(model, prompts, settings)
    assert [len(completion.token_ids) for completion in cached] == [settings.max_new_tokens] * 4


@pytest.mark.parametrize(
    "shape, batch_size", [*(("gpt2", n) for n in (2, 3, 8)), ("grouped", 3), ("mixed", 8)]
)
@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batched_prompts_equal_one_by_one(shape: str, batch_size: int, settings: GenerationConfig) -> None:
    """Mixed lengths, more prompts than places, rows that end at different times and outgrow the context."""
    model = make_model(**SHAPES[shape], max_position_embeddings=16)
    prompts = make_prompts(3, 1, 20, 7, 16, 2, 11, 5, 9, 15, 4)
    settings = dataclasses.replace(settings, max_new_tokens=20)

    def stop(new_tokens: list[int]) -> bool:
        return sum(new_tokens) % 11 == 4

    def run(batch_size: int) -> list[Completion]:
        return run_until(stop, model, prompts, settings, eos_token_id=7, batch_size=batch_size)

    assert run(batch_size) == run(1)
    assert len({len(completion.token_ids) for completion in run(1)}) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_step_samples_from_the_models_own_distribution(dtype: torch.dtype) -> None:
    """A decoding loop written out with nothing but the model's logits gives the same tokens."""
    model = make_model().to(dtype)
    prompt = make_prompts(7)[0]  # without a near tie, which bfloat16 may tip
    digest = hashlib.blake2b(f"{SAMPLED.seed} 5".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    tokens = list(prompt)
    for uniform in torch.rand(SAMPLED.max_new_tokens, generator=generator):
        with torch.no_grad():
            logits = model.eval()(torch.tensor([tokens])).logits[:, -1].float()
        logits = penalize_repetition(logits, [tokens], SAMPLED.repetition_penalty) / SAMPLED.temperature
        logits = top_p_filter(top_k_filter(logits, 40), SAMPLED.top_p)
        tokens.append(int(pick(logits.softmax(dim=-1), uniform[None])))
    completion = run_numbered([5], model, [prompt], SAMPLED)[0]
    assert completion.token_ids == tokens[7:]


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_transformers_generate(model: GPTModel, penalty: float) -> None:
    reference = transformers_model(model)
    settings = dataclasses.replace(GREEDY, max_new_tokens=25, repetition_penalty=penalty)
    prompts = make_prompts(1, 4, 13)
    completions = generate(model, prompts, settings, eos_token_id=None)
    for prompt, completion in zip(prompts, completions):
        expected = greedy_of_transformers(reference, prompt, 25, repetition_penalty=penalty)
        assert prompt + completion.token_ids == expected


def test_text_depends_on_the_seed_and_the_prompts_number_alone(model: GPTModel) -> None:
    prompt = make_prompts(6)[0]
    settings = dataclasses.replace(SAMPLED, max_new_tokens=20)
    together = generate(model, [prompt] * 4, settings, eos_token_id=None)
    assert len({tuple(completion.token_ids) for completion in together}) == 4
    alone = run_numbered([2], model, [prompt], settings)
    assert alone == together[2:3]
    reordered = run_numbered([3, 0, 2], model, [prompt] * 3, settings)
    assert reordered == [together[3], together[0], together[2]]
    other_seed = generate(model, [prompt] * 4, dataclasses.replace(settings, seed=43), eos_token_id=None)
    # Seed and number are mixed, not added: (43, 0) is not (42, 1).
    assert not {tuple(completion.token_ids) for completion in other_seed} & {
        tuple(completion.token_ids) for completion in together
    }


def test_a_longer_completion_begins_with_the_shorter_one(model: GPTModel) -> None:
    prompts = make_prompts(4, 2)
    short = generate(model, prompts, SAMPLED, eos_token_id=None)
    long = generate(model, prompts, dataclasses.replace(SAMPLED, max_new_tokens=30), eos_token_id=None)
    assert [completion.token_ids[:9] for completion in long] == [completion.token_ids for completion in short]


def test_greedy_text_continues_the_same_from_its_own_prefix() -> None:
    """A prompt longer than the context is cut where the same tokens, generated, would have slid to."""
    model = make_model(max_position_embeddings=7)
    prompt = make_prompts(3)[0]
    settings = dataclasses.replace(GREEDY, max_new_tokens=24)
    whole = generate(model, [prompt], settings, eos_token_id=None)[0].token_ids
    for n_given in range(1, 20):
        rest = generate(model, [prompt + whole[:n_given]], settings, eos_token_id=None)[0].token_ids
        assert rest[: 24 - n_given] == whole[n_given:]


def test_context_slides_to_its_last_half_when_it_is_full() -> None:
    visible = [n_tokens - visible_start(n_tokens, 8) for n_tokens in range(1, 20)]
    assert visible == [1, 2, 3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]
    assert [n_tokens - visible_start(n_tokens, 1) for n_tokens in range(1, 5)] == [1, 1, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_eos_ends_a_row_and_is_not_part_of_it(model: GPTModel, batch_size: int) -> None:
    prompts = make_prompts(3, 8, 2)
    free = [completion.token_ids for completion in generate(model, prompts, SAMPLED, eos_token_id=None)]
    eos = free[1][4]
    completions = generate(model, prompts, SAMPLED, eos_token_id=eos, batch_size=batch_size)
    for tokens, completion in zip(free, completions):
        ends = eos in tokens
        assert completion.token_ids == (tokens[: tokens.index(eos)] if ends else tokens)
        assert completion.finish_reason == ("eos" if ends else "length")


def test_eos_as_the_first_token_leaves_an_empty_completion(model: GPTModel) -> None:
    prompts = make_prompts(3)
    first = generate(model, prompts, GREEDY, eos_token_id=None)[0].token_ids[0]
    assert generate(model, prompts, GREEDY, eos_token_id=first) == [Completion([], "eos")]


def test_should_stop_ends_a_row_with_the_token_that_completed_it(model: GPTModel) -> None:
    prompts = make_prompts(3, 8)
    free = [completion.token_ids for completion in generate(model, prompts, SAMPLED, eos_token_id=None)]
    wanted = free[0][2:4]

    def stop(new_tokens: list[int]) -> bool:
        return new_tokens[-2:] == wanted

    stopped, other = run_until(stop, model, prompts, SAMPLED)
    assert stopped == Completion(free[0][:4], "stop")
    assert other == Completion(free[1], "length")


def test_model_and_global_randomness_are_left_as_they_were() -> None:
    model = make_model(dropout=0.5).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    rng_state = torch.get_rng_state()
    with_dropout = generate(model, make_prompts(4), SAMPLED, eos_token_id=None)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert with_dropout == generate(make_model(), make_prompts(4), SAMPLED, eos_token_id=None)
    assert model(torch.tensor([[1, 2]])).logits.requires_grad


def test_model_is_left_as_it_was_after_an_error() -> None:
    model = make_model().train()

    def fail(new_tokens: list[int]) -> bool:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        run_until(fail, model, make_prompts(4), GREEDY)
    assert model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_prompts_are_not_changed(model: GPTModel) -> None:
    prompts = make_prompts(4, 2)
    before = [list(prompt) for prompt in prompts]
    generate(model, prompts, GREEDY, eos_token_id=None)
    assert prompts == before


def test_no_prompts_give_no_completions(model: GPTModel) -> None:
    assert generate(model, [], GREEDY, eos_token_id=None) == []


def test_diverged_weights_are_an_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.ln_f.bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite.*; use an earlier checkpoint"):
        generate(model, make_prompts(4), GREEDY, eos_token_id=None)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: generate(m, [[1], []], GREEDY, eos_token_id=None), r"prompts\[1\] holds no token; "),
        (lambda m: generate(m, [[1, 101]], GREEDY, eos_token_id=None), "from 1 to 101, .* 0 to 100; "),
        (lambda m: generate(m, [[1]], GREEDY, eos_token_id=None, batch_size=0), "batch_size=0 is below 1; "),
    ],
)
def test_errors_name_value_rule_and_remedy(
    model: GPTModel, call: Callable[[GPTModel], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize("name", ["blocks.1", "ln_f", "lm_head"])
@pytest.mark.parametrize("n_before", [0, 2])
def test_a_step_that_failed_is_taken_again_as_if_it_had_not(n_before: int, name: str) -> None:
    """Such as one without enough memory: of its token some layers hold keys and values, others do not."""
    model = make_model()
    prompt = [1, 2, 3]
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, logprobs=True)
    expected = generate(model, [prompt], settings, eos_token_id=None)[0]
    engine = Engine(model, settings, eos_token_id=None)
    engine.add(Request(prompt, 0, 0))
    steps = [step for _ in range(n_before) for step in engine.step()]
    layer = model.get_submodule(name)
    forward = layer.forward

    def fail(*args: object) -> None:
        raise MemoryError

    layer.forward = fail
    with pytest.raises(MemoryError):
        engine.step()
    layer.forward = forward
    while not steps or steps[-1].completion is None:
        steps += engine.step()
    assert [step.token_id for step in steps] == expected.token_ids
    assert [step.logprob for step in steps] == pytest.approx(expected.logprobs, abs=1e-5)
