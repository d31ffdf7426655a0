"""Encodes pieces of documents on all cores, in order, with little text in memory at a time."""

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.documents import Piece, utf8_length
from gpt_lightning.data.tokenizer import Encoder, TextTokenizer
from gpt_lightning.exit_codes import UserError

_BATCH_CHARACTERS = 1 << 18
_LONGEST_WHOLE = 1 << 24  # characters of a document that must be in memory at once


class EncodedText(NamedTuple):
    """Holds consecutive text of one split, in which eos closes each document that ends."""

    split: str
    tokens: NDArray[np.uint32]
    document_ends: NDArray[np.uint64]  # counted in `tokens`
    n_bytes: int


class Encoding:
    """Encodes one text after the other; tiktoken is slow at first on each thread, so these stay."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.encoder = tokenizer, tokenizer.corpus_encoder()
        self.n_threads = available_cores()
        self.pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="encode")

    def pieces(self, marked: Iterable[tuple[str, Piece]]) -> Iterator[EncodedText]:
        """Yields each split's text in its order; all threads are busy while there is more to read."""
        encode = partial(_encode, self.encoder, self.tokenizer.eos_token_id)
        waiting: deque[Future[EncodedText]] = deque()
        try:
            for split, pieces in _batches(marked if self.tokenizer.may_be_cut else _whole_documents(marked)):
                waiting.append(self.pool.submit(encode, split, pieces))
                if len(waiting) > 2 * self.n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # whoever ends early does not wait for what is queued
                future.cancel()


def encode_pieces(marked: Iterable[tuple[str, Piece]], tokenizer: TextTokenizer) -> Iterator[EncodedText]:
    """Encodes a single text, as `Encoding` does."""
    encoding = Encoding(tokenizer)
    try:
        yield from encoding.pieces(marked)
    finally:
        encoding.pool.shutdown()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _whole_documents(marked: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, Piece]]:
    """Joins each document's pieces, for tokenizers to which a cut is a beginning."""
    waiting: defaultdict[str, list[str]] = defaultdict(list)
    for split, piece in marked:
        waiting[split].append(piece.text)
        if sum(map(len, waiting[split])) > _LONGEST_WHOLE:
            problem = f"a document is longer than {_LONGEST_WHOLE:,} characters"
            reason = "and data.tokenizer is of a kind that encodes it as a whole"
            raise UserError(f"{problem}, {reason}; give data.document_separator, or use bpe")
        if piece.ends_document:
            yield split, Piece("".join(waiting.pop(split)), ends_document=True)


def _batches(marked: Iterable[tuple[str, Piece]]) -> Iterator[tuple[str, list[Piece]]]:
    """Groups a split's text so that a turn of a thread is worthwhile, however short the documents are."""
    batches: defaultdict[str, list[Piece]] = defaultdict(list)
    characters: Counter[str] = Counter()
    for split, piece in marked:
        batches[split].append(piece)
        characters[split] += len(piece.text)
        if characters[split] >= _BATCH_CHARACTERS:
            yield split, batches.pop(split)
            characters[split] = 0
    yield from batches.items()


def _encode(encoder: Encoder, eos_token_id: int, split: str, pieces: list[Piece]) -> EncodedText:
    eos = np.array([eos_token_id], dtype=np.uint32)
    parts: list[NDArray[np.uint32]] = []
    document_ends, n_tokens = [], 0
    for piece, ids in zip(pieces, encoder([piece.text for piece in pieces]), strict=True):
        parts.append(ids)
        n_tokens += len(ids)
        if piece.ends_document:
            parts.append(eos)
            n_tokens += 1
            document_ends.append(n_tokens)
    n_bytes = sum(utf8_length(piece.text) for piece in pieces)
    return EncodedText(split, np.concatenate(parts), np.array(document_ends, dtype=np.uint64), n_bytes)
