"""Checks that prompts come from options and then from the file, and that each rank gets its share."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from gpt_lightning.data.prompts import PromptShare, encode_prompts, read_prompts, special_token_hint
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer


def test_prompts_come_from_both_places_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone \r\n\n  \ntwo\x0c2\n".encode())
    (tmp_path / "b.jsonl").write_text('{"prompt": "line\\nbreak"}\n\n{"prompt": "", "id": 3}\n')
    assert read_prompts("x", str(tmp_path / "a.txt")) == ["x", "one ", "two\x0c2"]
    assert read_prompts(["x", ""], str(tmp_path / "b.jsonl")) == ["x", "", "line\nbreak", ""]
    assert read_prompts(None, None) == [""] and read_prompts([], None) == [""]


@pytest.mark.parametrize("kind", ["bytes", "Unigram"])
def test_special_tokens_in_prompts_are_text_unless_they_are_to_be_parsed(kind: str) -> None:
    tokenizer, end = load_tokenizer("bytes"), "<|endoftext|>"
    if kind == "Unigram":  # whose own vocabulary holds them
        characters = sorted({*"Hithere", *end})
        pieces = [("<unk>", 0.0), (end, 0.0), *((character, -2.0) for character in characters)]
        tokenizer = TextTokenizer(Tokenizer(models.Unigram(pieces, unk_id=0)), end)
    hi, there = tokenizer.encode("Hi"), tokenizer.encode("there")
    prompts, eos = [f"Hi{end}there{end}", "", "Hi"], tokenizer.eos_token_id
    assert encode_prompts(prompts, tokenizer, True) == [[*hi, eos, *there, eos], [eos], hi]
    plain = encode_prompts(prompts, tokenizer)
    assert eos not in plain[0] and plain[1:] == [[eos], hi]
    assert tokenizer.decode(plain[0]).replace(" ", "") == prompts[0]
    shares = [PromptShare(prompts, set(), tokenizer, 0, 1, parses)[0] for parses in (False, True)]
    assert [share.token_ids for share in shares] == [plain, encode_prompts(prompts, tokenizer, True)]
    hint = special_token_hint(prompts, tokenizer, "data.x")
    assert hint is not None and "'<|endoftext|>'" in hint and "data.x true" in hint and "\n" not in hint
    assert special_token_hint(["", "<|endoftext", "<|im_end|>"], tokenizer, "data.x") is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 12])
def test_every_prompt_that_is_not_finished_is_in_the_share_of_one_rank(ranks: int) -> None:
    tokenizer = load_tokenizer("bytes")
    prompts = [f"p{index}" * (index > 0) for index in range(11)]
    shares = [PromptShare(prompts, {1, 2, 9}, tokenizer, rank, ranks)[0] for rank in range(ranks)]
    sizes = [len(share.prompts) for share in shares]
    assert sum(sizes) == 8 and max(sizes) - min(sizes) <= 1
    seen = {
        index: (prompt, ids)
        for share in shares
        for index, prompt, ids in zip(share.indices, share.prompts, share.token_ids, strict=True)
    }
    expected = {index: (prompt, list(prompt.encode()) or [256]) for index, prompt in enumerate(prompts)}
    assert seen == {index: expected[index] for index in (0, 3, 4, 5, 6, 7, 8, 10)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt does not exist; check"),
        ("a.csv", b"x", "a.csv has no known suffix; use .txt"),
        ("a.txt", b"ok\n\xff", "a.txt is not UTF-8 at byte 3; convert"),
        ("a.jsonl", b'{"prompt": "a"}\n{', "a.jsonl, line 2, is not JSON .*; each line"),
        ("b.jsonl", b'\n{"text": "a"}', "b.jsonl, line 2, has no text under the key prompt; write"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"data.prompts_file=.*{message}"):
        read_prompts(None, str(tmp_path / name))
