"""Writes the files of a cache's splits: token ids, where documents start, and what is known of them."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt_lightning.data.block_digests import DigestedFile
from gpt_lightning.data.encoding import EncodedText
from gpt_lightning.data.overlap import DocumentDigests, Dropped, Marked, without
from gpt_lightning.data.text_loss import TextSample, sampled
from gpt_lightning.data.tokenizer import TextTokenizer


class Written(NamedTuple):
    """Holds the counts of the splits that were written, and what was noted of their text."""

    counts: dict[str, Any]
    digests: DocumentDigests
    samples: Mapping[str, TextSample]


def write_text(
    folder: Path,
    read: Marked,
    dropped: Dropped,
    encode: Callable[[Marked], Iterator[EncodedText]],
    vocab_size: int,
) -> Written:
    """Writes the text that is read, but for documents to drop, and notes what `with_notes` tells of it."""
    digests, samples = DocumentDigests(folder), defaultdict[str, TextSample](TextSample)
    encoded = encode(sampled(digests.noted(without(read, dropped)), samples))
    return Written(write_encoded(folder, encoded, vocab_size), digests, samples)


def write_encoded(folder: Path, encoded: Iterable[EncodedText], vocab_size: int) -> dict[str, Any]:
    """Writes each split's text to its files, and returns the counts of the splits that have text."""
    writers: dict[str, _SplitWriter] = {}
    for text in encoded:
        if text.split not in writers:
            writers[text.split] = _SplitWriter(folder, text.split, vocab_size)
        writers[text.split].add(text)
    return {name: writer.finish() for name, writer in writers.items()}


class _SplitWriter:
    """Appends documents to the files of one split."""

    def __init__(self, folder: Path, name: str, vocab_size: int) -> None:
        self._tokens_file = DigestedFile(folder / f"{name}.tokens.bin")
        self._documents_file = DigestedFile(folder / f"{name}.documents.bin")
        self._dtype = "uint16" if vocab_size <= 65536 else "uint32"
        self._n_tokens = self._n_bytes = self._n_documents = self._n_longest = self._last_end = 0
        self._documents_file.write(np.zeros(1, dtype=np.uint64).data)

    def add(self, text: EncodedText) -> None:
        # Not `tofile`, whose error does not say that the disk is full.
        self._tokens_file.write(text.tokens.astype(self._dtype).data)
        ends = text.document_ends + np.uint64(self._n_tokens)
        self._documents_file.write(ends.data)
        if len(ends):
            lengths = np.diff(ends, prepend=np.uint64(self._last_end))
            self._n_longest = max(self._n_longest, int(lengths.max()))
            self._last_end = int(ends[-1])
        self._n_tokens += len(text.tokens)
        self._n_bytes += text.n_bytes
        self._n_documents += len(text.document_ends)

    def finish(self) -> dict[str, Any]:
        """Returns the counts of the split, once its files are written."""
        self._tokens_file.close()
        self._documents_file.close()
        counts = {"n_tokens": self._n_tokens, "n_bytes": self._n_bytes, "n_documents": self._n_documents}
        return {"dtype": self._dtype, **counts, "n_longest": self._n_longest}


def with_notes(
    counts: dict[str, Any],
    digests: DocumentDigests,
    samples: Mapping[str, TextSample],
    tokenizer: TextTokenizer,
) -> dict[str, Any]:
    """Adds to the counts of splits what their documents repeat, and what the tokenizer loses of them."""
    repeated = {name: int(found.sum()) for name, found in digests.repeated().items()}
    if "train" in counts:
        repeated["train"] = digests.n_repeated_in_train()
    return {
        name: {**split, "n_repeated": repeated[name], "lost_share": samples[name].lost_share(tokenizer)}
        for name, split in counts.items()
    }
