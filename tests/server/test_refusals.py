"""What a client sends wrongly is refused by name, in OpenAI's form, and never as a fault of the server's."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette")

from gpt_lightning.server.limits import Limits  # noqa: E402
from tests.server.in_process import serving, small_served  # noqa: E402

LIMITS = Limits(
    max_body_bytes=20_000, max_prompt_tokens=500, max_tokens=64, max_logprobs=1000, max_queue=4
)
# Kinds of bad bodies: the body (text is sent as it is), the status, and the field that is named.
BAD: dict[str, tuple[Any, int, str | None]] = {
    "nothing": ("", 400, None),
    "no JSON": ("{", 400, None),
    "no text at all": (b"\xff\xfe\x00", 400, None),
    "NaN": ('{"temperature": NaN}', 400, None),
    "nested": ("[" * 9000, 400, None),
    "a list": ([], 400, None),
    "too long": ({"prompt": "x" * 30_000}, 413, None),
    "unknown": ({"max_new_tokens": 4}, 400, "max_new_tokens"),
    "an unknown half": ('{"\\ud800": 1}', 400, "?"),
    "one field twice": ('{"prompt": "a", "prompt": "b"}', 400, "prompt"),
    "an unknown model": ({"model": "gpt-9"}, 404, "model"),
    "a model that is no text": ({"model": ["small"]}, 400, "model"),
    "best_of": ({"best_of": 2}, 400, "best_of"),
    "suffix": ({"suffix": "x"}, 400, "suffix"),
    "a number as prompt": ({"prompt": 3}, 400, "prompt"),
    "an object as prompt": ({"prompt": {"text": "x"}}, 400, "prompt"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "an empty prompt of ids": ({"prompt": [[]]}, 400, "prompt"),
    "mixed prompts": ({"prompt": ["x", 1]}, 400, "prompt"),
    "booleans as ids": ({"prompt": [True]}, 400, "prompt"),
    "an id beyond": ({"prompt": [100_000]}, 400, "prompt"),
    "an id below": ({"prompt": [-1]}, 400, "prompt"),
    "a huge id": ({"prompt": [10**30]}, 400, "prompt"),
    "half a character": ('{"prompt": "\\ud800"}', 400, "prompt"),
    "a long prompt": ({"prompt": [1] * 501}, 400, "prompt"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "tokens below": ({"max_tokens": -1}, 400, "max_tokens"),
    "too many tokens": ({"max_tokens": 65}, 400, "max_tokens"),
    "tokens as text": ({"max_tokens": "5"}, 400, "max_tokens"),
    "tokens in part": ({"max_tokens": 1.5}, 400, "max_tokens"),
    "a cold temperature": ({"temperature": -0.1}, 400, "temperature"),
    "a tiny temperature": ({"temperature": 1e-9}, 400, "temperature"),
    "an endless temperature": ('{"temperature": 1e999}', 400, "temperature"),
    "a huge temperature": ({"temperature": 10**400}, 400, "temperature"),
    "top_p above": ({"top_p": 1.1}, 400, "top_p"),
    "min_p above": ({"min_p": 2}, 400, "min_p"),
    "top_k below": ({"top_k": -1}, 400, "top_k"),
    "no repetition": ({"repetition_penalty": 0}, 400, "repetition_penalty"),
    "presence": ({"presence_penalty": 3}, 400, "presence_penalty"),
    "frequency": ({"frequency_penalty": True}, 400, "frequency_penalty"),
    "n above": ({"n": 129}, 400, "n"),
    "n below": ({"n": 0}, 400, "n"),
    "n and prompts": ({"n": 100, "prompt": ["a", "b"]}, 400, "n"),
    "many prompts": ({"prompt": ["a"] * 200}, 400, "prompt"),
    "a full queue": ({"n": 50}, 429, None),
    "an empty stop": ({"stop": [""]}, 400, "stop"),
    "many stops": ({"stop": ["a"] * 17}, 400, "stop"),
    "a stop that is none": ({"stop": 3}, 400, "stop"),
    "a seed in part": ({"seed": 1.5}, 400, "seed"),
    "a huge seed": ({"seed": 2**64}, 400, "seed"),
    "many logprobs": ({"logprobs": 21}, 400, "logprobs"),
    "logprobs of many tokens": ({"logprobs": 20, "max_tokens": 48}, 400, "logprobs"),  # 48 x 21
    "logprobs of a prompt": (
        {"prompt": [1] * 334, "echo": True, "logprobs": 0, "n": 3, "max_tokens": 0}, 400, "logprobs"
    ),
    "logprobs by yes": ({"logprobs": True}, 400, "logprobs"),
    "a bias of no token": ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    "a bias beyond": ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
    "a bias by two names": ({"logit_bias": {"1": 5, "01": -5}}, 400, "logit_bias"),
    "a bias too strong": ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
    "a list of biases": ({"logit_bias": [1]}, 400, "logit_bias"),
    "echo as text": ({"echo": "yes"}, 400, "echo"),
    "stream as number": ({"stream": 1}, 400, "stream"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    "unknown options": ({"stream": True, "stream_options": {"x": 1}}, 400, "x"),
}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving([small_served(limits=LIMITS)], limits=LIMITS) as found:
        yield found


def content_of(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return (body if isinstance(body, str) else json.dumps(body)).encode()


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_named(kind: str, address: str) -> None:
    body, status, param = BAD[kind]
    answer = httpx.post(f"{address}/v1/completions", content=content_of(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert error["message"] and set(error) == {"message", "type", "param", "code"}


def test_as_many_log_probabilities_are_given_as_may_be(address: str) -> None:
    echo = {"prompt": [1] * 500, "echo": True, "logprobs": 1, "max_tokens": 0}
    for body in (echo, {"logprobs": 20, "max_tokens": 47}):  # 500 x 2, and 47 x 21
        assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200


def test_what_changes_nothing_is_taken(address: str) -> None:
    body = {"prompt": "The", "user": "me", "stop": None, "logit_bias": None, "best_of": None, "max_tokens": 2}
    assert httpx.post(f"{address}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/", 405),
        ("GET", "/v1/models/x", 404),
        ("GET", "/health/", 404),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
def test_addresses_that_are_not_are_refused_in_the_same_form(
    method: str, path: str, status: int, address: str
) -> None:
    answer = httpx.request(method, address + path)
    assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_request_to_the_wrong_address_is_told_the_right_one(address: str) -> None:
    told = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "messages": []}).json()
    assert told["error"]["message"].endswith("ask /v1/chat/completions with it")
    told = httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_new_tokens": 2}).json()
    assert told["error"]["message"].endswith("send max_tokens")
    assert "ask /v1/completions" in httpx.post(f"{address}/completions").json()["error"]["message"]
    assert httpx.get(f"{address}/v1/completions").json()["error"]["message"].endswith("send POST")


def test_no_path_of_a_request_is_a_file(address: str) -> None:
    for path in ("/../setup.cfg", "/v1/models/../../../etc/passwd", "/v1/models/%2e%2e%2fetc", "//etc"):
        answer = httpx.get(address + path)
        assert answer.status_code == 404 and "error" in answer.json()
