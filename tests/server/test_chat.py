"""Holds /v1/chat/completions to transformers' ids and to the Engine alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")
openai = pytest.importorskip("openai")

from transformers import AutoTokenizer  # noqa: E402

from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer_folder, train_bpe  # noqa: E402
from gpt_lightning.generation.engine import Engine, Request  # noqa: E402
from gpt_lightning.generation.sampling import GenerationConfig  # noqa: E402
from gpt_lightning.generation.text_stream import TextStream  # noqa: E402
from tests.server.in_process import TEXTS, serving, small_model, small_served  # noqa: E402

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('there is no role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>' }}{%- endif %}
{%- endif %}"""
MESSAGES = [
    {"role": "system", "content": "The cat sees 国王。"},
    {"role": "user", "content": "  the <|im_end|> dog 👍🏽 "},
    {"role": "assistant", "content": "naïve"},
    {"role": "user", "content": "从前"},
]


def write_folder(folder: Path, *, in_config: bool = False) -> Path:
    """A tokenizer with special tokens and a template, as a chat model's folder has it."""
    train_bpe(TEXTS, 330).save(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    first = max(content["model"]["vocab"].values(), default=0) + 1
    first = max(first, *(token["id"] + 1 for token in content["added_tokens"]))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    names = ["<|im_start|>", "<|im_end|>", "<|begin|>"]
    content["added_tokens"] += [{"id": first + n, "content": name, **plain} for n, name in enumerate(names)]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"bos_token": "<|begin|>", **({"chat_template": TEMPLATE} if in_config else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if not in_config:
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("chat") / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TextTokenizer:
    return load_tokenizer_folder(folder, "data.tokenizer")


@pytest.fixture(scope="module")
def address(tokenizer: TextTokenizer) -> Iterator[str]:
    with serving([small_served(tokenizer=tokenizer, model=small_model(tokenizer))]) as found:
        yield found


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)


def alone(tokenizer: TextTokenizer, ids: list[int], **settings: Any) -> tuple[str, list[float] | None]:
    config = GenerationConfig(**{"temperature": 0.0, "max_new_tokens": 16, **settings})
    text = TextStream(tokenizer, config.stop)
    engine = Engine(small_model(tokenizer), config, eos_token_id=tokenizer.eos_token_ids, batch_size=1)
    (completion,) = engine.complete([Request(ids, 0, 0, text.add)])
    return text.end(), completion.logprobs


def ids_of(folder: Path, **options: Any) -> list[int]:
    theirs = AutoTokenizer.from_pretrained(folder)
    found = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False, **options)
    return [*found]


@pytest.mark.parametrize("in_config", [False, True])
def test_a_template_survives_checkpoint_and_export(in_config: bool, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "first", in_config=in_config)
    tokenizer = load_tokenizer_folder(folder, "data.tokenizer")
    again = TextTokenizer.from_dict(tokenizer.state).padded(tokenizer.vocab_size + 2)
    again.save(tmp_path / "second")
    assert ids_of(tmp_path / "second") == ids_of(folder)
    assert load_tokenizer_folder(tmp_path / "second", "data.tokenizer").chat["template"] == TEMPLATE
    without = TextTokenizer.from_dict({k: v for k, v in tokenizer.state.items() if k != "chat"})
    assert not without.chat and without.fingerprint == tokenizer.fingerprint  # token caches stay valid


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_messages_become_the_ids_of_transformers(
    options: dict[str, Any], client: Any, folder: Path, tokenizer: TextTokenizer
) -> None:
    ids = ids_of(folder, **options)
    assert tokenizer.parse_batch(["<|im_start|>"])[0][0] in ids
    extra = {"chat_template_kwargs": options} if options else {}
    answer = client.chat.completions.create(model="small", messages=MESSAGES, extra_body=extra)
    text, _ = alone(tokenizer, ids)
    assert answer.choices[0].message.content == text and answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.role == "assistant" and answer.object == "chat.completion"


def test_a_stream_comes_to_what_one_answer_holds(client: Any, folder: Path, tokenizer: TextTokenizer) -> None:
    fields: dict[str, Any] = {"model": "small", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    fields |= {"n": 2, "seed": 4, "temperature": 1.0, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**fields)
    settings: dict[str, Any] = {"logprobs": True, "seed": 4, "temperature": 1.0, "max_new_tokens": 12}
    text, logprobs = alone(tokenizer, ids_of(folder), **settings)
    first = answer.choices[0]
    assert first.message.content == text and first.message.content != answer.choices[1].message.content
    # Two rows are not one to a plain product; `packed` ones of a CPU do not differ.
    assert [token.logprob for token in first.logprobs.content] == pytest.approx(logprobs, abs=1e-5)
    assert all(len(token.top_logprobs) == 2 for token in first.logprobs.content)
    assert b"".join(bytes(token.bytes) for token in first.logprobs.content).decode(errors="ignore") == text
    texts, tokens, reasons, roles = ["", ""], [[], []], ["", ""], ["", ""]  # type: ignore[var-annotated]
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(**fields, stream=True, stream_options=options)
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        reasons[choice.index] = choice.finish_reason
        roles[choice.index] = roles[choice.index] or choice.delta.role
    assert texts == [choice.message.content for choice in answer.choices]
    assert tokens == [choice.logprobs.content for choice in answer.choices]
    assert reasons == [choice.finish_reason for choice in answer.choices] and roles == ["assistant"] * 2
    assert last.usage == answer.usage and not last.choices


BAD = {
    "no messages": ({}, "messages"),
    "none of them": ({"messages": []}, "messages"),
    "a text": ({"messages": "hello"}, "messages"),
    "no object": ({"messages": ["hello"]}, "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content",
    ),
    "another role": ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    "tools": ({"messages": MESSAGES, "tools": [{}]}, "tools"),
    "a form": ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
    "no logprobs": ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    "another template": (
        {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "x"}},
        "chat_template_kwargs",
    ),
    "tools for the template": (
        {"messages": MESSAGES, "chat_template_kwargs": {"return_assistant_tokens_mask": True}},
        "chat_template_kwargs",
    ),
    "half a character": (
        {"messages": MESSAGES, "chat_template_kwargs": {"bos_token": "\ud800"}},
        "chat_template_kwargs",
    ),
    "half a name": ({"messages": [{"role": "user", "content": "x", "\ud800": 1}]}, "?"),
    "two lengths": (
        {"messages": MESSAGES, "max_tokens": 2, "max_completion_tokens": 3},
        "max_completion_tokens",
    ),
    "unknown": ({"messages": MESSAGES, "max_token": 2}, "max_token"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_is_refused_by_name(kind: str, address: str) -> None:
    body, param = BAD[kind]
    answer = httpx.post(f"{address}/v1/chat/completions", content=json.dumps(body).encode())
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_parts_of_text_are_one_text(client: Any) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]
    texts = [
        client.chat.completions.create(model="small", messages=[{"role": "user", "content": content}])
        for content in (parts, "the dog")
    ]
    assert texts[0].choices[0].message.content == texts[1].choices[0].message.content


def test_without_a_template_a_chat_is_refused() -> None:
    with serving([small_served()]) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
        (model,) = httpx.get(f"{address}/v1/models").json()["data"]
        assert model["has_chat_template"] is False


def test_a_template_reaches_no_file_and_nothing_of_python(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "evil")
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include 'tokenizer.json' %}",
        "{{ messages.append(1) }}",
    ):
        (folder / "chat_template.jinja").write_text(template)
        tokenizer = load_tokenizer_folder(folder, "data.tokenizer")
        with serving([small_served(tokenizer=tokenizer)]) as address:
            answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": MESSAGES})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
