"""Holds /v1/completions to the Engine alone, by the client that OpenAI gives its users."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from gpt_lightning.data.tokenizer import TextTokenizer  # noqa: E402
from gpt_lightning.generation.engine import Completion, Engine, Request  # noqa: E402
from gpt_lightning.generation.sampling import GenerationConfig  # noqa: E402
from gpt_lightning.generation.text_stream import TextStream  # noqa: E402
from tests.server.in_process import serving, small_model, small_served, small_tokenizer  # noqa: E402

TOKENIZER = small_tokenizer()
MODEL = small_model(TOKENIZER)
PROMPT = "The cat"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with serving([small_served(model=MODEL, tokenizer=TOKENIZER)]) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def alone(prompt: str, *, number: int = 0, sample: int = 0, **settings: Any) -> tuple[str, Completion]:
    """The text and the completion of one prompt that has the Engine for itself."""
    config = GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 16, **settings})
    text = TextStream(TOKENIZER, config.stop)
    engine = Engine(MODEL, config, eos_token_id=TOKENIZER.eos_token_ids, batch_size=1)
    ids = TOKENIZER.encode(prompt) or [TOKENIZER.eos_token_id]
    (completion,) = engine.complete([Request(ids, number, sample, text.add)])
    return text.end(), completion


def ask(client: Any, **fields: Any) -> Any:
    return client.completions.create(**{"model": "small", "prompt": PROMPT, **fields})


def streamed(client: Any, **fields: Any) -> dict[int, dict[str, Any]]:
    """What the chunks of a stream come to, by choice."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in ask(client, stream=True, **fields):
        for choice in chunk.choices:
            parts = found.setdefault(choice.index, {"text": "", "logprobs": {}, "finish_reason": None})
            assert parts["finish_reason"] is None  # nothing follows an end
            parts["text"] += choice.text
            parts["finish_reason"] = choice.finish_reason
            for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
                parts["logprobs"].setdefault(name, []).extend(values)
    return found


def test_a_greedy_text_is_that_of_the_engine_alone(client: Any) -> None:
    text, completion = alone(PROMPT)
    answer = ask(client)
    assert answer.choices[0].text == text and len(set(completion.token_ids)) > 3
    assert answer.choices[0].finish_reason == "length" and answer.object == "text_completion"
    n_prompt = len(TOKENIZER.encode(PROMPT))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (n_prompt, 16)
    assert answer.usage.total_tokens == n_prompt + 16


SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3, "seed": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.6, "seed": 6},
    "top_k": {"temperature": 1.0, "top_k": 3, "seed": 7},
    "min_p": {"temperature": 1.0, "min_p": 0.2, "seed": 8},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "logit_bias": {"logit_bias": {10: 100.0}},
    "max_tokens": {"max_new_tokens": 3},
}
OURS = ("top_k", "min_p", "repetition_penalty")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_does_what_the_engine_does_by_it(name: str, client: Any) -> None:
    settings = SETTINGS[name]
    sent = {"max_tokens" if key == "max_new_tokens" else key: value for key, value in settings.items()}
    extra = {key: sent.pop(key) for key in OURS if key in sent}
    text, _ = alone(PROMPT, **settings)
    assert text != alone(PROMPT, **({"seed": settings["seed"]} if "seed" in settings else {}))[0]
    assert ask(client, extra_body=extra, **sent).choices[0].text == text
    assert streamed(client, extra_body=extra, **sent)[0]["text"] == text


def test_texts_and_ids_in_lists_are_completed_in_order(client: Any) -> None:
    prompts = ["The", "国王", "e"]
    texts = [alone(prompt)[0] for prompt in prompts]
    ids = [TOKENIZER.encode(prompt) for prompt in prompts]
    assert [choice.text for choice in ask(client, prompt=prompts).choices] == texts
    assert [choice.text for choice in ask(client, prompt=ids).choices] == texts
    assert ask(client, prompt=ids[1]).choices[0].text == texts[1]
    assert ask(client, prompt="").choices[0].text == alone("")[0]


def test_n_texts_are_the_samples_of_predict(client: Any) -> None:
    drawn = {"temperature": 1.2, "seed": 3}
    texts = [alone(p, number=n, sample=s, **drawn)[0] for n, p in enumerate(["The", "cat"]) for s in range(3)]
    assert len(set(texts)) == 6
    answer = ask(client, prompt=["The", "cat"], n=3, **drawn)
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [*range(6)]
    found = streamed(client, prompt=["The", "cat"], n=3, **drawn)
    assert [found[index]["text"] for index in range(6)] == texts


def test_without_a_seed_each_answer_is_another(client: Any) -> None:
    assert len({ask(client, temperature=1.5).choices[0].text for _ in range(4)}) > 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: Any, is_stream: bool) -> None:
    whole, _ = alone(PROMPT)
    stop = whole[6:9]
    assert len(stop) == 3
    text, completion = alone(PROMPT, stop=[stop])
    assert stop not in text and completion.finish_reason == "stop"
    if is_stream:
        found = streamed(client, stop=[stop, "never"])[0]
        assert (found["text"], found["finish_reason"]) == (text, "stop")
    else:
        choice = ask(client, stop=stop).choices[0]
        assert (choice.text, choice.finish_reason) == (text, "stop")


@pytest.mark.parametrize("is_echo", [False, True])
def test_a_stream_comes_to_what_one_answer_holds(client: Any, is_echo: bool) -> None:
    fields: dict[str, Any] = {"prompt": ["The cat", "从前"], "n": 2, "logprobs": 3, "echo": is_echo}
    fields |= {"temperature": 1.0, "seed": 1}
    answer, found = ask(client, **fields), streamed(client, **fields)
    for choice in answer.choices:
        parts = found[choice.index]
        assert parts["text"] == choice.text and parts["finish_reason"] == choice.finish_reason
        assert parts["logprobs"] == choice.logprobs.model_dump()
    assert len(found) == len(answer.choices) == 4


def test_log_probabilities_are_those_of_the_engine(client: Any) -> None:
    text, completion = alone(PROMPT, logprobs=True)
    logprobs = ask(client, logprobs=2).choices[0].logprobs
    assert logprobs.token_logprobs == [round(value, 6) for value in completion.logprobs or []]
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(completion.token_ids)
    for token, own, likeliest in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs):
        assert 2 <= len(likeliest) <= 3 and likeliest[token] == own
        assert list(likeliest.values()) == sorted(likeliest.values(), reverse=True)
    for start, token in zip(logprobs.text_offset, logprobs.tokens):
        assert token.startswith("bytes:") or text[start:].startswith(token)
    assert any(token.startswith("bytes:") for token in logprobs.tokens)


@torch.inference_mode()
def test_echoed_prompts_are_scored_by_a_plain_pass(client: Any) -> None:
    ids = TOKENIZER.encode("The cat sees 国王。")
    expected = MODEL(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    choice = ask(client, prompt=ids, echo=True, logprobs=1, max_tokens=0).choices[0]
    assert choice.text == "The cat sees 国王。" and choice.finish_reason == "length"
    own = choice.logprobs.token_logprobs
    assert own[0] is None and choice.logprobs.top_logprobs[0] is None
    for place in range(1, len(ids)):
        assert math.isclose(own[place], expected[place - 1, ids[place]].item(), abs_tol=1e-4)
        likeliest = choice.logprobs.top_logprobs[place]
        assert math.isclose(max(likeliest.values()), expected[place - 1].max().item(), abs_tol=1e-4)
        assert own[place] in likeliest.values()
    both = ask(client, prompt=ids, echo=True, logprobs=1, max_tokens=4).choices[0]
    assert both.logprobs.token_logprobs[: len(ids)] == own and len(both.logprobs.tokens) == len(ids) + 4
    assert both.text == choice.text + alone(choice.text, max_new_tokens=4)[0]
    assert ask(client, prompt="The", echo=True, max_tokens=2).choices[0].text.startswith("The")


def test_a_streams_chunks_bring_an_echo_with_its_tokens(client: Any) -> None:
    chunks = [*ask(client, prompt="The cat sees the dog.", echo=True, logprobs=0, max_tokens=0, stream=True)]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The cat sees the dog."
    assert len(chunks) > 1
    for chunk in chunks:
        assert chunk.choices[0].text == "".join(chunk.choices[0].logprobs.tokens)


def test_a_streams_last_chunk_tells_the_usage_where_it_is_asked(client: Any) -> None:
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert not last.choices and last.usage == ask(client).usage
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in ask(client, stream=True))


def test_an_eos_ends_a_text_and_is_not_counted() -> None:
    whole, completion = alone(PROMPT)
    end = completion.token_ids[5]
    tokenizer = TextTokenizer.from_dict({**TOKENIZER.state, "eos_token_ids": [TOKENIZER.eos_token_id, end]})
    with serving([small_served(model=MODEL, tokenizer=tokenizer)]) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any")
        answer = ask(client, logprobs=1)
        n = completion.token_ids.index(end)
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens == n
        assert len(answer.choices[0].logprobs.tokens) == n and whole.startswith(answer.choices[0].text)
        # lm_eval asks for one token after an echoed text, and leaves out the last log-probability.
        ids = TOKENIZER.encode(PROMPT) + completion.token_ids[:n]
        for fields in ({"max_tokens": 1}, {"max_tokens": 4}):
            choice = ask(client, prompt=ids, echo=True, logprobs=1, **fields).choices[0]
            assert choice.finish_reason == "stop" and len(choice.logprobs.tokens) == len(ids) + 1
            assert choice.logprobs.token_logprobs[-1] == max(choice.logprobs.top_logprobs[-1].values())
            assert choice.logprobs.tokens[-1] == TOKENIZER.decode([end])


def test_two_models_are_asked_by_name() -> None:
    models = [small_served("one", model=MODEL, tokenizer=TOKENIZER)]
    models.append(small_served("two", model=small_model(TOKENIZER, 1), tokenizer=TOKENIZER))
    with serving(models) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == ["one", "two"]
        assert client.models.retrieve("two").id == "two"
        texts = {name: ask(client, model=name).choices[0].text for name in ("one", "two")}
        assert texts["one"] == alone(PROMPT)[0] != texts["two"]
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, model="three")
        assert refused.value.param == "model" and refused.value.code == "model_not_found"
