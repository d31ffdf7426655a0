"""Samples, log-probabilities, n-grams and the stride of the window, against loops without the engine."""

import dataclasses
import hashlib
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import NoRepeatNGramLogitsProcessor

from gpt_lightning.generation.engine import Engine, generate
from gpt_lightning.generation.processors import forbid_repeated_ngrams
from gpt_lightning.generation.rows import Completion, Request, _uniforms
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.gpt import GPTModel
from tests.generation.models import (
    Counting,
    greedy_of_transformers,
    make_model,
    make_prompts,
    recomputed,
    run_numbered,
    run_until,
    transformers_model,
)
from tests.shapes import SHAPES

SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.2, top_k=40, top_p=0.95)
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_model().eval()


def next_logits(model: GPTModel, tokens: list[int]) -> Tensor:
    """[V], without a cache."""
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ngrams_that_would_come_again_are_those_of_transformers(size: int) -> None:
    """Of random texts of five tokens; some are shorter than an n-gram."""
    generator = torch.Generator().manual_seed(size)
    texts = torch.randint(5, (25, 25), generator=generator)
    logits = torch.randn(25, 5, generator=generator)
    expected = [
        NoRepeatNGramLogitsProcessor(size)(texts[row : row + 1, : 1 + row], logits[row : row + 1])
        for row in range(25)
    ]
    begun = [texts[row, : 1 + row].tolist() for row in range(25)]
    actual = forbid_repeated_ngrams(logits, begun, size)
    assert torch.equal(actual, torch.cat(expected))
    assert logits.isfinite().all()


def test_greedy_text_without_repeated_ngrams_equals_that_of_transformers() -> None:
    model = make_model(tie_embeddings=True)  # of random weights, it repeats itself
    reference = transformers_model(model)
    settings = dataclasses.replace(GREEDY, max_new_tokens=30, no_repeat_ngram_size=2, repetition_penalty=1.1)
    prompts = make_prompts(1, 9, 4)
    unlimited = dataclasses.replace(settings, no_repeat_ngram_size=None)
    free = generate(model, prompts, unlimited, eos_token_id=None)
    completions = generate(model, prompts, settings, eos_token_id=None, batch_size=2)
    assert completions != free
    for prompt, completion in zip(prompts, completions):
        options = {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1}
        assert prompt + completion.token_ids == greedy_of_transformers(reference, prompt, 30, **options)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_text_without_a_token_left_ends(settings: GenerationConfig) -> None:
    model = make_model(vocab_size=7)
    settings = dataclasses.replace(settings, max_new_tokens=20, no_repeat_ngram_size=1, top_k=None, top_p=1.0)
    short, long = generate(model, [[3], [0, 1, 2, 5]], settings, eos_token_id=None)
    assert sorted(short.token_ids) == [0, 1, 2, 4, 5, 6]
    assert sorted(long.token_ids) == [3, 4, 6]
    assert short.finish_reason == long.finish_reason == "exhausted"


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_samples_are_those_of_any_batch_and_the_first_is_the_only_one(
    model: GPTModel, batch_size: int
) -> None:
    prompts = make_prompts(5, 1, 9)
    settings = dataclasses.replace(SAMPLED, num_samples=3)
    samples = generate(model, prompts, settings, eos_token_id=7, batch_size=batch_size)
    assert samples == recomputed(model, prompts, settings, eos_token_id=7)
    assert samples[::3] == generate(model, prompts, SAMPLED, eos_token_id=7)
    assert len({tuple(completion.token_ids) for completion in samples}) == 9
    alone = run_numbered([2], model, prompts[2:], settings, eos_token_id=7)
    assert alone == samples[6:]


def test_samples_of_a_prompt_are_computed_from_one_pass_over_it(model: GPTModel) -> None:
    counting = Counting(model)
    settings = dataclasses.replace(GREEDY, max_new_tokens=2, num_samples=4)
    generate(counting, make_prompts(9), settings, eos_token_id=None, batch_size=3)
    # The fourth sample comes when the first three are done, and finds the prompt in a row that is going on.
    assert counting.shapes[:3] == [(1, 16), (3, 1), (3, 1)]  # 8, padded to a block
    assert sum(rows * length for rows, length in counting.shapes) == 16 + 2 * 3 + 16 + 2 * 1


def test_prompts_of_similar_length_are_computed_together(model: GPTModel) -> None:
    counting = Counting(model)
    settings = dataclasses.replace(GREEDY, max_new_tokens=1)
    prompts = make_prompts(10, 9, 11, 30, 2)
    expected = [generate(model, [prompt], settings, eos_token_id=None)[0] for prompt in prompts]
    assert generate(counting, prompts, settings, eos_token_id=None) == expected
    assert counting.shapes == [(3, 16), (1, 32), (1, 16), (5, 1)]


def test_a_waiting_prompt_takes_the_place_of_a_finished_one(model: GPTModel) -> None:
    """Each step computes rows that go on, and four of them until the last prompts are under way."""
    prompts = make_prompts(*[3] * 20)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=9)

    def stop(new_tokens: list[int]) -> bool:
        return sum(new_tokens) % 5 == 0

    alone = [
        run_until(stop, model, [prompt], settings, numbers=[number])
        for number, prompt in enumerate(prompts)
    ]
    lengths = [len(completion.token_ids) for (completion,) in alone]
    assert len(set(lengths)) > 4
    counting = Counting(model)
    run_until(stop, counting, prompts, settings, batch_size=4)
    rows_of_steps = [rows for rows, length in counting.shapes if length == 1]
    assert sum(rows_of_steps) == sum(lengths)
    assert sum(rows < 4 for rows in rows_of_steps) < max(lengths)


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logprobs_are_the_models_own(model: GPTModel, settings: GenerationConfig) -> None:
    settings = dataclasses.replace(settings, logprobs=True, repetition_penalty=1.3)
    prompts = make_prompts(6, 2)
    for prompt, completion in zip(prompts, generate(model, prompts, settings, eos_token_id=None)):
        tokens = list(prompt)
        for token, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
            expected = next_logits(model, tokens).log_softmax(dim=0)[token]
            assert_close(torch.tensor(logprob), expected, atol=1e-4, rtol=1e-4)
            tokens.append(token)
    without = dataclasses.replace(settings, logprobs=False)
    assert all(c.logprobs is None for c in generate(model, prompts, without, eos_token_id=None))


def test_stride_one_sees_the_last_tokens_that_fit_at_each_step() -> None:
    """As a loop that cuts the text to the context before each token, the way of the first GPT scripts."""
    model = make_model(max_position_embeddings=8).eval()
    settings = dataclasses.replace(GREEDY, max_new_tokens=20, context_stride=1)
    for prompt in make_prompts(3, 8, 21):
        tokens = list(prompt)
        for _ in range(20):
            tokens.append(int(next_logits(model, tokens[-8:]).argmax()))
        assert generate(model, [prompt], settings, eos_token_id=None)[0].token_ids == tokens[len(prompt) :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_cached_decoding_equals_uncached_at_every_stride(stride: int, shape: str) -> None:
    model = make_model(**SHAPES[shape], max_position_embeddings=8)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=21, context_stride=stride)
    prompts = make_prompts(1, 8, 9, 30)
    cached = generate(model, prompts, settings, eos_token_id=None, batch_size=3)
    assert cached == recomputed(model, prompts, settings)
    assert all(len(completion.token_ids) == 21 for completion in cached)


def test_a_stride_above_the_context_is_an_error(model: GPTModel) -> None:
    settings = dataclasses.replace(GREEDY, context_stride=65)
    with pytest.raises(ValueError, match="context_stride=65 is above .*=64; use at most that"):
        generate(model, [[1]], settings, eos_token_id=None)


def test_a_run_gives_each_token_when_it_is_drawn(model: GPTModel) -> None:
    counting = Counting(model)
    prompts = make_prompts(4, 4)
    engine = Engine(counting, SAMPLED, eos_token_id=None)
    for number, prompt in enumerate(prompts):
        engine.add(Request(prompt, number))
    tokens: dict[int, list[int]] = {0: [], 1: []}
    for number, step in enumerate(engine.run()):
        assert step.token_id is not None
        tokens[step.request.number].append(step.token_id)
        assert len(counting.shapes) == 2 + number // 2  # one pass over the prompts, then one a step
    assert [Completion(tokens[row], "length") for row in (0, 1)] == generate(
        model, prompts, SAMPLED, eos_token_id=None
    )


def test_requests_join_between_steps(model: GPTModel) -> None:
    """Those of a longer text than any before too; what others are given does not change."""
    prompts = make_prompts(3, 1, 30, 7)
    engine = Engine(model, SAMPLED, eos_token_id=None, batch_size=3)
    assert engine.step() == []
    completions: dict[int, Completion] = {}
    for number in range(40):
        if number % 3 == 0 and number < 12:
            engine.add(Request(prompts[number // 3], number // 3))
        for step in engine.step():
            if step.completion is not None:
                completions[step.request.number] = step.completion
    assert [completions[n] for n in range(4)] == generate(model, prompts, SAMPLED, eos_token_id=None)


def test_a_run_that_is_closed_leaves_the_model_as_it_was() -> None:
    model = make_model(dropout=0.5).train()
    engine = Engine(model, SAMPLED, eos_token_id=None)
    engine.add(Request(make_prompts(4)[0]))
    steps = engine.run()
    next(steps)
    assert not model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    steps.close()  # type: ignore[attr-defined]
    assert model.training


@pytest.fixture
def half_by_default() -> Iterator[None]:
    """As Lightning's bf16-true has it around each step."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_random_numbers_keep_their_precision_where_half_is_the_default(
    model: GPTModel, half_by_default: None
) -> None:
    prompts = make_prompts(4, 2, 9)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=40, temperature=2.0)
    actual = generate(model, prompts, settings, eos_token_id=None)
    torch.set_default_dtype(torch.float32)
    assert actual == generate(model, prompts, settings, eos_token_id=None)


def test_random_numbers_in_blocks_are_those_of_one_draw() -> None:
    settings = GenerationConfig(max_new_tokens=10**12, seed=3)
    digest = hashlib.blake2b(b"3 5 2", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    expected = torch.rand(3000, generator=generator).tolist()
    assert list(islice(_uniforms(settings, 5, 2), 3000)) == expected
