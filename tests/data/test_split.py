"""What is held out: disjoint, complete, repeatable, and never more than asked for without need."""

import numpy as np
import pytest

from gpt_lightning.data.documents import Piece
from gpt_lightning.data.split import plan_split, split_pieces


def held_out(sizes: list[int], val_fraction: float, seed: int = 0) -> list[int] | None:
    """Which documents are held out whole; None where each is cut."""
    cuts = plan_split(np.array(sizes, dtype=np.int64), val_fraction, seed)
    if ((cuts > 0) & (cuts < sizes)).any():
        return None
    return np.flatnonzero(cuts == 0).tolist()


def split(pieces: list[Piece], val_fraction: float, seed: int = 0) -> dict[str, list[str]]:
    """Whole documents of each side."""
    sizes, size = [], 0
    for piece in pieces:
        size += len(piece.text.encode())
        if piece.ends_document:
            sizes.append(size)
            size = 0
    sides: dict[str, list[str]] = {"train": [], "val": []}
    unfinished = {"train": "", "val": ""}
    for name, piece in split_pieces(pieces, plan_split(np.array(sizes, dtype=np.int64), val_fraction, seed)):
        unfinished[name] += piece.text
        if piece.ends_document:
            sides[name].append(unfinished[name])
            unfinished[name] = ""
    assert unfinished == {"train": "", "val": ""}
    return sides


@pytest.mark.parametrize("val_fraction", [0.05, 0.1, 0.5, 0.9])
def test_whole_documents_fill_the_fraction_without_exceeding_it(val_fraction: float) -> None:
    sizes = np.random.default_rng(1).integers(1, 1000, 500).tolist()
    chosen = held_out(sizes, val_fraction)
    assert chosen is not None
    share = sum(sizes[index] for index in chosen) / sum(sizes)
    assert val_fraction - 0.01 < share <= val_fraction
    assert chosen == held_out(sizes, val_fraction)
    assert chosen != held_out(sizes, val_fraction, seed=1)


def test_a_document_that_does_not_fit_is_passed_over() -> None:
    for seed in range(20):
        assert held_out([10, 900, 90], 0.01, seed) == [0]


def test_rules_for_few_documents() -> None:
    assert held_out([100, 15, 40], 0.1) == [1]  # target 15
    assert held_out([100, 60, 29], 0.1) == [2]  # target 18: nothing fits, 29 <= 36
    assert held_out([100, 60, 50], 0.1) is None  # target 21: 50 > 42
    assert held_out([100], 0.9) is None
    assert held_out([100, 1], 0.0) == []
    assert held_out([], 0.1) == []


def test_documents_go_to_one_side_whole() -> None:
    pieces = []
    for index in range(50):
        pieces += [Piece(f"<{index}", False), Piece(f"-{index}>", True)]
    sides = split(pieces, 0.2)
    assert sorted(sides["train"] + sides["val"]) == sorted(f"<{index}-{index}>" for index in range(50))
    assert 8 <= len(sides["val"]) <= 10


def test_a_lone_book_is_cut_near_the_end_at_a_line_in_any_pieces() -> None:
    book = "".join(f"line {index} 鲁迅\n" for index in range(1000))
    whole = split([Piece(book, True)], 0.1)
    head, tail = whole["train"][0], whole["val"][0]
    assert head + tail == book and head.endswith("\n")
    assert 0.099 < len(tail.encode()) / len(book.encode()) <= 0.1
    for size in (100, 333, 6000):
        parts = [book[start : start + size] for start in range(0, len(book), size)]
        pieces = [Piece(part, index == len(parts) - 1) for index, part in enumerate(parts)]
        cut = split(pieces, 0.1)
        assert cut["train"][0] + cut["val"][0] == book
        assert 0.09 < len(cut["val"][0].encode()) / len(book.encode()) <= 0.1


def test_a_text_without_lines_is_cut_between_characters() -> None:
    for length in range(20, 40):
        text = "鲁迅🙂é" * length
        sides = split([Piece(text, True)], 0.1)
        assert sides["train"][0] + sides["val"][0] == text
        assert 0.05 < len(sides["val"][0].encode()) / len(text.encode()) <= 0.1


def test_every_book_of_a_few_gives_its_end() -> None:
    books = [Piece(str(index) * 1000, True) for index in range(3)]
    sides = split(books, 0.1)
    assert sides["train"] == [str(index) * 900 for index in range(3)]
    assert sides["val"] == [str(index) * 100 for index in range(3)]
