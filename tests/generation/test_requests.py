"""Requests with settings of their own join, wait, leave and are read in pieces; no text changes by it."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from gpt_lightning.generation.engine import Engine, generate
from gpt_lightning.generation.rows import Completion, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.attention import in_blocks
from gpt_lightning.model.gpt import GPTModel
from tests.generation.models import Counting, make_model, make_prompts
from tests.shapes import SHAPES

GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)
SAMPLED = GenerationConfig(max_new_tokens=12, temperature=1.2, top_k=40, top_p=0.95)
VARIED = [
    GREEDY,
    SAMPLED,
    dataclasses.replace(SAMPLED, max_new_tokens=3),
    dataclasses.replace(SAMPLED, seed=7),
    dataclasses.replace(GREEDY, logprobs=True),
    dataclasses.replace(SAMPLED, top_logprobs=4, max_new_tokens=20),
    dataclasses.replace(GREEDY, top_logprobs=2, presence_penalty=1.5),
    dataclasses.replace(SAMPLED, frequency_penalty=0.8, logit_bias={3: 4.0, 50: -100.0}),
    dataclasses.replace(SAMPLED, repetition_penalty=1.4, min_p=0.05),
    dataclasses.replace(GREEDY, no_repeat_ngram_size=1, max_new_tokens=30),
    dataclasses.replace(GREEDY, context_stride=1, max_new_tokens=20),
]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return make_model().eval()


def run(engine: Engine, requests: list[Request]) -> list[Completion]:
    """The completions, in the order of the requests, after those that other requests may have."""
    for request in requests:
        engine.add(request)
    found: dict[Request, Completion] = {}
    while engine.n_rows or engine.n_waiting:
        found.update((step.request, step.completion) for step in engine.step() if step.completion is not None)
    return [found[request] for request in requests]


def assert_same(actual: list[Completion], expected: list[Completion]) -> None:
    """The same tokens and ends, and the same log-probabilities to 1e-5."""
    for one, other in zip(actual, expected, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert (one.top_logprobs is None) == (other.top_logprobs is None)
        for ours, theirs in zip(one.top_logprobs or [], other.top_logprobs or [], strict=True):
            assert [token for token, _ in ours] == [token for token, _ in theirs]
            assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_requests_of_different_settings_have_the_texts_that_they_have_alone(shape: str) -> None:
    """In one batch that is too small for them, pushed past the context."""
    model = make_model(**SHAPES[shape], max_position_embeddings=16).eval()
    prompts = make_prompts(3, 1, 20, 7, 16, 2, 11, 5, 9, 15, 4)
    alone = [
        run(Engine(model, settings, eos_token_id=7), [Request(prompt, number)])[0]
        for number, (prompt, settings) in enumerate(zip(prompts, VARIED, strict=True))
    ]
    assert len({len(completion.token_ids) for completion in alone}) > 3
    engine = Engine(model, GREEDY, eos_token_id=7, batch_size=6)
    given = [None if settings is GREEDY else settings for settings in VARIED]
    requests = [Request(prompt, n, settings=given[n]) for n, prompt in enumerate(prompts)]
    assert_same(run(engine, requests), alone)


@pytest.mark.parametrize("presence, frequency", [(0.9, 0.0), (0.0, 0.7), (0.6, -0.4)])
def test_penalties_are_of_the_completion_and_bias_is_added(
    model: GPTModel, presence: float, frequency: float
) -> None:
    """As OpenAI defines them: logit[j] - count[j] * frequency - (count[j] > 0) * presence, and + bias[j]."""
    bias = {token: (-1) ** token * 2.0 for token in range(30)} | {60: -100.0}
    settings = dataclasses.replace(
        GREEDY, max_new_tokens=25, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    prompts = make_prompts(9, 2)
    completions = generate(model, prompts, settings, eos_token_id=None)
    for prompt, completion in zip(prompts, completions):
        new: list[int] = []
        for _ in range(25):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new])).logits[0, -1].tolist()
            for token, count in Counter(new).items():
                logits[token] -= count * frequency + presence
            for token, value in bias.items():
                logits[token] += value
            new.append(max(range(101), key=logits.__getitem__))
        assert completion.token_ids == new
    plain = dataclasses.replace(settings, presence_penalty=0.0, frequency_penalty=0.0)
    assert completions != generate(model, prompts, plain, eos_token_id=None)
    assert completions != generate(
        model, prompts, dataclasses.replace(settings, logit_bias={}), eos_token_id=None
    )


def test_a_bias_forbids_or_forces_a_token(model: GPTModel) -> None:
    prompts = make_prompts(9)
    free = generate(model, prompts, GREEDY, eos_token_id=None)[0].token_ids
    forbidden = {token: -100.0 for token in set(free)}
    without = generate(model, prompts, dataclasses.replace(GREEDY, logit_bias=forbidden), eos_token_id=None)
    assert not set(free) & set(without[0].token_ids)
    forced = dataclasses.replace(SAMPLED, logit_bias={42: 100.0})
    assert generate(model, prompts, forced, eos_token_id=None)[0].token_ids == [42] * 12


def test_top_logprobs_are_the_models_own_and_sorted(model: GPTModel) -> None:
    settings = dataclasses.replace(
        SAMPLED, top_logprobs=5, repetition_penalty=1.3, logit_bias={9: 5.0}, presence_penalty=1.0
    )
    prompt = make_prompts(6)[0]
    completion = generate(model, [prompt], settings, eos_token_id=None)[0]
    tokens = list(prompt)
    assert completion.logprobs is not None and completion.top_logprobs is not None
    for token, logprob, likeliest in zip(
        completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
    ):
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(dim=0)
        order = sorted(range(101), key=lambda each: -float(expected[each]))[:5]
        assert [each for each, _ in likeliest] == order
        values = torch.tensor([value for _, value in likeliest])
        torch.testing.assert_close(values, expected[order], atol=1e-4, rtol=1e-4)
        assert dict(likeliest).get(token, logprob) == logprob
        tokens.append(token)


def test_steps_give_what_the_completion_holds(model: GPTModel) -> None:
    settings = dataclasses.replace(SAMPLED, top_logprobs=3)
    engine = Engine(model, GREEDY, eos_token_id=None)
    engine.add(Request(make_prompts(6)[0], settings=settings))
    engine.add(Request(make_prompts(4)[0], 1))
    steps = [step for _ in range(12) for step in engine.step()]
    first, second = steps[::2], steps[1::2]
    completion = first[-1].completion
    assert completion is not None
    assert [step.token_id for step in first] == completion.token_ids
    assert [step.logprob for step in first] == completion.logprobs
    assert [step.top_logprobs for step in first] == completion.top_logprobs
    assert all(step.logprob is None and step.top_logprobs is None for step in second)


@pytest.mark.parametrize("prefill_tokens", [1, 4, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_read_in_pieces_continue_as_if_read_at_once(shape: str, prefill_tokens: int) -> None:
    """Shorter and longer than a piece and the context, pushed past it while others join."""
    model = make_model(**SHAPES[shape], max_position_embeddings=24).eval()
    prompts = make_prompts(3, 30, 1, 12, 24, 17, 8, 25, 10, 11)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=30, top_logprobs=3)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    expected = run(Engine(model, settings, eos_token_id=7, batch_size=4), requests)
    counting = Counting(model).eval()
    engine = Engine(counting, settings, eos_token_id=7, batch_size=4, prefill_tokens=prefill_tokens)
    assert_same(run(engine, requests), expected)
    assert max(length for _, length in counting.shapes) <= in_blocks(prefill_tokens)


def test_others_go_on_while_a_long_prompt_is_read(model: GPTModel) -> None:
    counting = Counting(model).eval()
    short, long = make_prompts(3, 41)
    settings = dataclasses.replace(GREEDY, max_new_tokens=20)
    engine = Engine(counting, settings, eos_token_id=None, prefill_tokens=16)
    engine.add(Request(short))
    engine.step()
    engine.add(Request(long, 1))
    requests = [[step.request.number for step in engine.step()] for _ in range(4)]
    assert requests == [[0], [0], [0, 1], [0, 1]]
    assert counting.shapes[2:] == [(1, 16), (1, 1), (1, 16), (1, 1), (1, 16), (2, 1), (2, 1)]


@pytest.mark.parametrize("n_steps", range(5))
@pytest.mark.parametrize("name", ["blocks.0", "blocks.1", "ln_f", "lm_head"])
def test_a_piece_that_failed_is_read_again(name: str, n_steps: int) -> None:
    model = make_model().eval()
    settings = dataclasses.replace(GREEDY, logprobs=True)
    requests = [Request(prompt, number) for number, prompt in enumerate(make_prompts(3, 33, 4))]
    expected = run(Engine(model, settings, eos_token_id=None), requests)
    engine = Engine(model, settings, eos_token_id=None, prefill_tokens=16)
    engine.add(requests[0])
    steps = engine.step()
    for request in requests[1:]:
        engine.add(request)
    for _ in range(n_steps):
        steps += engine.step()
    layer = model.get_submodule(name)
    with pytest.raises(MemoryError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args: (_ for _ in ()).throw(MemoryError))
        engine.step()
    while engine.n_rows or engine.n_waiting:
        steps += engine.step()
    found = {step.request: step.completion for step in steps if step.completion is not None}
    assert_same([found[request] for request in requests], expected)


@pytest.mark.parametrize("prefill_tokens", [None, 10])
@pytest.mark.parametrize("victims", [[0], [1], [2], [4], [0, 2], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("n_steps", [0, 1, 2, 5])
def test_cancelling_frees_a_row_and_changes_no_other_text(
    model: GPTModel, victims: list[int], n_steps: int, prefill_tokens: int | None
) -> None:
    """Of requests that are continued, read in part, or wait; whoever waits has the row in the next step."""
    prompts = make_prompts(3, 9, 30, 7, 5)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    expected = run(Engine(model, SAMPLED, eos_token_id=None), requests)
    engine = Engine(model, SAMPLED, eos_token_id=None, batch_size=3, prefill_tokens=prefill_tokens)
    for request in requests:
        engine.add(request)
    steps = [step for _ in range(n_steps) for step in engine.step()]
    n_before = engine.n_rows + engine.n_waiting
    assert all(engine.cancel(requests[victim]) for victim in victims)
    assert engine.n_rows + engine.n_waiting == n_before - len(victims)
    assert not any(engine.cancel(requests[victim]) for victim in victims)
    steps += engine.step()
    assert prefill_tokens or engine.n_rows == min(3, 5 - len(victims))
    while engine.n_rows or engine.n_waiting:
        steps += engine.step()
    found = {step.request: step.completion for step in steps if step.completion is not None}
    assert found == {requests[n]: expected[n] for n in range(5) if n not in victims}
    assert not engine.cancel(requests[0])


def test_a_cache_of_a_known_length_is_made_once(model: GPTModel) -> None:
    """A longer request, or one more, neither moves it nor has texts read again."""
    prompts = make_prompts(3, 9, 30, 7)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=20)
    expected = generate(model, prompts, settings, eos_token_id=None)
    counting = Counting(model).eval()
    engine = Engine(counting, settings, eos_token_id=None, cache_length=64)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    steps = []
    places = set()
    for request in requests:
        engine.add(request)
        steps += engine.step() + engine.step()
        places.add(engine._cache._layers[0][0].data_ptr())
    assert len(places) == 1
    while engine.n_rows:
        steps += engine.step()
    found = {step.request: step.completion for step in steps if step.completion is not None}
    assert [found[request] for request in requests] == expected
    assert sum(rows * length for rows, length in counting.shapes if length > 1) == 16 + 16 + 32 + 16


def test_a_cache_that_grows_has_no_text_read_again(model: GPTModel) -> None:
    counting = Counting(model).eval()
    prompts = make_prompts(3, 9, 30)
    settings = dataclasses.replace(SAMPLED, max_new_tokens=20)
    engine = Engine(counting, settings, eos_token_id=None)
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    found: dict[Request, Completion | None] = {}
    for request in requests:
        engine.add(request)
        engine.step()
        engine.step()
    while engine.n_rows:
        found.update((step.request, step.completion) for step in engine.step())
    assert [found[request] for request in requests] == generate(model, prompts, settings, eos_token_id=None)
    assert sum(rows * length for rows, length in counting.shapes if length > 1) == 16 + 16 + 32


@pytest.mark.parametrize(
    "request_of, message",
    [
        ({"prompt": []}, r"prompts\[3\] holds no token; "),
        ({"prompt": [1, 101]}, "from 1 to 101, .* 0 to 100; "),
        ({"settings": {"context_stride": 65}}, "context_stride=65 is above .*=64; "),
        ({"settings": {"logit_bias": {101: 1.0}}}, "logit_bias holds the token id 101, .* 0 to 100; "),
        ({"settings": {"top_logprobs": 102}}, "top_logprobs=102 is above .*vocab_size=101; "),
        ({"settings": {"quantize": "int8"}}, "quantize=int8 is not None, .*; leave it"),
    ],
)
def test_a_request_that_is_refused_leaves_nothing_behind(
    model: GPTModel, request_of: dict[str, Any], message: str
) -> None:
    engine = Engine(model, GREEDY, eos_token_id=None)
    running = Request(make_prompts(5)[0])
    engine.add(running)
    steps = engine.step()
    before = {name: value for name, value in vars(engine).items()}
    settings = dataclasses.replace(GREEDY, max_new_tokens=50, **request_of.get("settings", {}))
    with pytest.raises(ValueError, match=message):
        engine.add(Request(request_of.get("prompt", [1] * 40), 3, settings=settings))
    assert vars(engine) == before and (engine.n_rows, engine.n_waiting) == (1, 0)
    assert len(engine._samplers) == 1
    while engine.n_rows:
        steps += engine.step()
    assert [step.token_id for step in steps] == generate(
        model, [running.prompt], GREEDY, eos_token_id=None
    )[0].token_ids
    assert len(engine._samplers) == 0


def test_limits_of_an_engine_are_positive(model: GPTModel) -> None:
    with pytest.raises(ValueError, match="prefill_tokens=0 is below 1; "):
        Engine(model, GREEDY, eos_token_id=None, prefill_tokens=0)
