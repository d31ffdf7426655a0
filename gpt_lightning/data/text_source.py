"""Holds one text of a run: where it lies, how it is read, and the token cache made of it."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only

from gpt_lightning.data.corpus import Corpus, no_train_files
from gpt_lightning.data.corpus_identity import TrainedText
from gpt_lightning.data.prompts import first_words
from gpt_lightning.data.token_cache import TokenSplit, loss_warning, prepare_tokens
from gpt_lightning.data.tokenizer import TextTokenizer

OPENING = 64  # tokens in which a document's first words lie

_log = logging.getLogger("gpt_lightning")


class TextSource:
    """Is all text of a run, or, with a name, one of those that it mixes."""

    def __init__(
        self, patterns: dict[str, list[str] | str | None], settings: dict[str, Any], name: str | None = None
    ) -> None:
        self.name = name
        self.splits: dict[str, TokenSplit] | None = None  # once they are prepared
        self.trained_text = TrainedText()
        self.files = patterns["train_files"]
        self._patterns, self._settings = patterns, settings

    def label(self, option: str) -> str:
        """Names an option as the user gives it."""
        if self.name is None:
            return f"data.{option}"
        return f"data.mixture: of {self.name} {'files' if option == 'train_files' else option}"

    def corpus(self) -> Corpus:
        """Finds the files."""
        return Corpus.find(self._patterns, label=self.label, **self._settings)

    def prepare(
        self,
        tokenizer: TextTokenizer,
        cache_dir: str,
        check_tokens: Callable[["TextSource", int], None],
        **how: Any,
    ) -> None:
        """Opens the token cache, building what is missing or stale, as `prepare_tokens` does."""
        corpus, check = self.corpus(), partial(check_tokens, self)
        if not corpus.sources:
            raise no_train_files()
        splits = prepare_tokens(
            corpus, tokenizer, cache_dir, check, partial(self.trained_text.take, corpus), **how
        )
        if corpus.train_files:
            check(splits["train"].n_tokens)
        self.splits = splits
        if losing := [split for split in splits.values() if not keeps_text(split, tokenizer)]:
            rank_zero_only(_log.warning)("warning: %s", loss_warning(losing))

    def split(self, name: str) -> TokenSplit | None:
        """Finds a split; without test files the validation text is the test text."""
        assert self.splits is not None
        return self.splits.get(name, self.splits.get("val") if name == "test" else None)

    def named_splits(self) -> Iterator[tuple[str, TokenSplit]]:
        """Yields its splits, each with its name and, in a mixture, that of the source."""
        for name, split in (self.splits or {}).items():
            yield name if self.name is None else f"{name}/{self.name}", split


def beginnings(splits: Sequence[TokenSplit], tokenizer: TextTokenizer, count: int) -> list[str]:
    """Returns the first words of up to so many documents, from all over the splits."""
    found = []
    for number, split in enumerate(splits):
        of_this = (count + number) // len(splits)
        chosen = np.unique(np.linspace(0, split.n_documents, of_this, endpoint=False).astype(int))
        openings = (tokenizer.decode(split.opening(document, OPENING)) for document in chosen.tolist())
        found += [*map(first_words, openings)]
    return found


def keeps_text(split: TokenSplit, tokenizer: TextTokenizer) -> bool:
    """Tells whether a split's tokens say all that its text says; else its bits per byte mean nothing."""
    return tokenizer.keeps_text if split.lost_share is None else split.lost_share == 0
