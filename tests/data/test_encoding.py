"""Encoding on many threads: the ids, the order and the counts of one text after the other."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt_lightning.data import encoding
from gpt_lightning.data.documents import Piece
from gpt_lightning.data.encoding import encode_pieces
from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer, train_bpe

PIECES = [
    (split, Piece(f"{'Häuser, 中文 ' if index % 3 else 'plain '}{index} " * (index % 9), index % 4 != 1))
    for index in range(400)
    for split in (["train"] if index % 5 else ["val", "train"])
]


@pytest.mark.parametrize("size", [1, 100, 10**9])
@pytest.mark.parametrize("threads", [1, 3])
def test_equal_to_one_after_the_other(size: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_bpe([piece.text for _, piece in PIECES], 300)
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", size)
    monkeypatch.setattr(encoding, "available_cores", lambda: threads)
    for split in ("train", "val"):
        ids, ends, n_bytes = [], [], 0
        for name, piece in PIECES:
            if name == split:
                ids += tokenizer.encode(piece.text) + [tokenizer.eos_token_id] * piece.ends_document
                ends += [len(ids)] * piece.ends_document
                n_bytes += len(piece.text.encode())
        found = [text for text in encode_pieces(PIECES, tokenizer) if text.split == split]
        assert [index for text in found for index in text.tokens.tolist()] == ids
        assert sum(text.n_bytes for text in found) == n_bytes
        assert ends_of(found) == ends


def ends_of(found: list[encoding.EncodedText]) -> list[int]:
    ends, n_tokens = [], 0
    for text in found:
        ends += [n_tokens + end for end in text.document_ends.tolist()]
        n_tokens += len(text.tokens)
    return ends


def test_tokenizers_that_have_no_fast_way_give_their_own_ids(tmp_path: Path) -> None:
    train_bpe(["a text"] * 3, 300).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    slow = load_tokenizer(str(tmp_path))
    plain = TextTokenizer.from_dict(train_bpe(["a text"] * 3, 300).state)
    (text,) = encode_pieces([("train", Piece("text", True))], slow)
    assert text.tokens.tolist() == [*plain.encode(" text"), slow.eos_token_id]


def test_little_is_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH_CHARACTERS", 1)
    monkeypatch.setattr(encoding, "available_cores", lambda: 2)
    read = []

    def pieces() -> Iterator[tuple[str, Piece]]:
        for index in range(100):
            read.append(index)
            yield "train", Piece("x", True)

    for done, _ in enumerate(encode_pieces(pieces(), load_tokenizer("bytes")), start=1):
        assert len(read) <= done + 4
    assert done == len(read) == 100


def test_what_goes_wrong_in_reading_is_heard() -> None:
    def pieces() -> Iterator[tuple[str, Piece]]:
        yield "train", Piece("x", True)
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        list(encode_pieces(pieces(), load_tokenizer("bytes")))
