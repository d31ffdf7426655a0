"""Tells by content which text a run is trained and validated on: a run that goes on must find it again.

With other text another part is held out, and what was held out before would be trained on.
"""

import os
from collections.abc import Sequence
from typing import Any

from gpt_lightning.data.token_cache import Corpus
from gpt_lightning.exit_codes import UserError

_FILES = ("train_files", "val_files")
_CUTTING = ("text_key", "document_separator")


class TrainedText:
    """Knows the text of a datamodule, and refuses other text where a run goes on."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self._corpus: Corpus | None = None

    def take(self, corpus: Corpus, hashes: Sequence[str]) -> None:
        """Takes note of the text before it is used; `hashes` are those of its sources, in order."""
        self._corpus, self.described = corpus, describe_text(corpus, hashes)
        self._check()

    def resume(self, state: dict[str, Any]) -> None:
        """Refuses, now and from now on, other text than that of the run whose datamodule's state this is."""
        self._resumed = state.get("text", {})
        self._check()

    def _check(self) -> None:
        change = text_difference(self._resumed, self.described)
        if change is not None:
            raise UserError(
                f"{change} since the checkpoint was saved, and what it held out could be trained on; "
                "give the text as it was, or train anew"
            )

    def warning(self, state: dict[str, Any], verb: str) -> str | None:
        """Warns that a model may know what it is judged on: another part is held out of another text."""
        assert self._corpus is not None
        own_files = self._corpus.val_files or (verb == "test" and self._corpus.test_files)
        change = None if own_files else text_difference(state.get("text", {}), self.described)
        return change and f"{change} since the checkpoint was saved; what is held out now may be known to it"


def describe_text(corpus: Corpus, hashes: Sequence[str]) -> dict[str, Any]:
    """Describes the text as plain data; `hashes` are those of the training and validation files, in order.

    Where the files lie does not matter, nor what is tested on.
    """
    names = [os.path.basename(file) for file in corpus.train_files + corpus.val_files]
    pairs = [list(pair) for pair in zip(names, hashes, strict=False)]
    n_train = len(corpus.train_files)
    files = {"train_files": pairs[:n_train], "val_files": pairs[n_train:]}
    return {**files, **{option: getattr(corpus, option) for option in _CUTTING}}


def text_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Says what differs, such as `data.train_files: a.txt has changed`; None if nothing known does."""
    if not saved or not now:
        return None
    for option in _FILES:
        problem = _first_other(saved[option], now[option])
        if problem is not None:
            return f"data.{option}: {problem}"
    for option in _CUTTING:
        if saved[option] != now[option]:
            return f"data.{option}={now[option]!r} was {saved[option]!r}"
    return None


def _first_other(before: list[list[str]], after: list[list[str]]) -> str | None:
    old_names, old_hashes = {name for name, _ in before}, [text for _, text in before]
    new_names, new_hashes = {name for name, _ in after}, [text for _, text in after]
    if old_hashes == new_hashes:
        return None
    for name, text in after:
        if text not in old_hashes:
            return f"{name} has changed" if name in old_names else f"{name} was not among them"
    for name, text in before:
        if text not in new_hashes:
            return f"{name} has changed" if name in new_names else f"{name} is missing"
    return "the order of the files has changed"
