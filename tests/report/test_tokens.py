"""Text is shown token by token and whole, and nothing in it acts."""

import json
from pathlib import Path

import pytest

from gpt_lightning.data.tokenizer import load_tokenizer, train_bpe
from gpt_lightning.generation.surprise import ScoredToken
from gpt_lightning.report.tokens import TokenText, write_tokens
from gpt_lightning.training.scored_text import as_plain, from_plain, shown_tokens
from tests.generation.test_text_stream import byte_fallback
from tests.report.pages import Page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\" onclick='x' &lt; {{ 7*7 }}"


def scored(ids: list[int]) -> list[ScoredToken]:
    return [ScoredToken(index, -float(place), [(ids[0], -0.5)]) for place, index in enumerate(ids)]


@pytest.mark.parametrize("text", ["To be, or not\n\tto be", "我在年青时候也曾经做过许多梦😀", HOSTILE])
def test_the_tokens_together_are_the_text(text: str) -> None:
    for tokenizer in (load_tokenizer("bytes"), train_bpe(["to be or not to be 我在"], 270)):
        ids = tokenizer.encode(text)
        assert "".join(token.text for token in shown_tokens(scored(ids), tokenizer)) == text


def test_tokens_are_named_for_people() -> None:
    tokenizer = load_tokenizer("bytes")
    ids = [*tokenizer.encode("a我們\\xe6"), tokenizer.eos_token_id]
    parts = [f"{character}‹{byte:02x}›" for character in "我們" for byte in character.encode()]
    names = [token.name for token in shown_tokens(scored(ids), tokenizer)]
    assert names == ["a", *parts, *r"\xe6", "<|endoftext|>"]  # of which \xe6 are four letters of the text
    tokenizer = byte_fallback()
    names = [token.name for token in shown_tokens(scored(tokenizer.encode("ca我們\n")), tokenizer)]
    assert names == [" ", "ca", *parts, "\n"]


def test_candidates_are_named_by_what_they_would_make() -> None:
    tokenizer = load_tokenizer("bytes")
    first, second, third = tokenizer.encode("我")
    other, letter = tokenizer.encode("戒")[2], tokenizer.encode("x")[0]
    candidates = [(index, -1.0) for index in (first, third, other, letter)]
    rows = shown_tokens([ScoredToken(index, -1.0, candidates) for index in (first, second, third)], tokenizer)
    names = [[name for name, _ in row.others] for row in rows]
    assert names[0] == names[1] == ["�‹e6›", "�‹91›", "�‹92›", "x"]  # the second of three says no more
    assert names[2] == ["�‹e6›", "我‹91›", "戒‹92›", "x"]


def test_a_character_that_stays_unfinished_has_no_name() -> None:
    tokenizer = load_tokenizer("bytes")
    first, second, _ = tokenizer.encode("我")
    tokens = shown_tokens(scored([first, second]), tokenizer)
    assert [token.name for token in tokens] == ["�‹e6›", "�‹88›"]
    tokens = shown_tokens(scored([first, tokenizer.eos_token_id, *tokenizer.encode("é")]), tokenizer)
    assert [token.name for token in tokens] == ["�‹e6›", "<|endoftext|>", "é‹c3›", "é‹a9›"]


def test_no_text_acts_on_the_page(tmp_path: Path) -> None:
    tokenizer = train_bpe([HOSTILE * 50], 400)
    tokens = shown_tokens(scored(tokenizer.encode(HOSTILE)), tokenizer)
    write_tokens([TokenText(tokens, n_prompt=2)], HOSTILE, path := tmp_path / "page.html")
    page = Page(path)
    assert page.fetches() == [] and page.handlers() == [] and page.scripts == []
    assert "img" not in {tag for tag, _ in page.elements}
    assert HOSTILE in page.text and "49" not in page.text.replace(HOSTILE, "")


def test_tokens_are_read_as_they_were_noted() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = shown_tokens(scored(tokenizer.encode("我a")), tokenizer)
    assert from_plain(json.loads(json.dumps(as_plain(tokens)))) == tokens
    for other in (None, 3, "text", [[1]], [["a", "b", "c", "d"]], {"a": 1}):
        assert from_plain(other) == []


def test_the_average_is_of_what_was_not_given() -> None:
    tokenizer = load_tokenizer("bytes")
    tokens = shown_tokens(scored(tokenizer.encode("abc")), tokenizer)  # 0, 1 and 2 nats
    assert TokenText(tokens, n_prompt=1).bits == pytest.approx(1.5 / 0.6931472)
    assert TokenText(tokens, n_prompt=3).bits is None
    assert [token.name for _, token in TokenText(tokens).most_surprising] == ["c", "b", "a"]
