"""Tells what a run that goes on must find again: its settings, its tokenizer, and its text, by content.

With other text another part is held out, and what was held out before would be trained on.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError

_DECIDING = ("seed", "val_fraction", "seq_len")  # what is held out, and the order
_CUTTING = ("text_key", "document_separator")


def settings_of_a_run(data: object) -> dict[str, Any]:
    """Collects what a run that goes on, or is judged, must share with its checkpoint."""
    return {name: getattr(data, name) for name in ("tokenizer", *_DECIDING)}


def refuse_other_settings(data: object, saved: dict[str, Any]) -> None:
    """Refuses to go on with another order, or with another part held out; tokenizers are compared."""
    for name in _DECIDING:
        if saved.get(name, own := getattr(data, name)) != own:
            problem = f"data.{name}={own} contradicts the checkpoint, which has {saved[name]}"
            raise UserError(f"{problem}; leave it as it was, or train anew")


def tokenizer_of_checkpoint(own: TextTokenizer | None, saved: dict[str, Any], name: str) -> TextTokenizer:
    """Returns the checkpoint's, whose ids its model knows; refuses another where one is there already."""
    if own is not None and own.state == saved:
        return own
    tokenizer = TextTokenizer.from_dict(saved)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        problem = f"data.tokenizer={name} on this text is not the checkpoint's tokenizer"
        remedy = "train anew, or leave data.tokenizer and the text as they were"
        raise UserError(f"{problem}, whose ids the model knows; {remedy}")
    return tokenizer  # which also knows what else ends a text


class TrainedText:
    """Remembers the text of a datamodule, and refuses another where a run goes on."""

    def __init__(self) -> None:
        self.described: dict[str, Any] = {}
        self._resumed: dict[str, Any] = {}
        self._corpus: Corpus | None = None

    def take(self, corpus: Corpus, hashes: Sequence[str]) -> None:
        """Takes note of the text before it is used; `hashes` are those of its sources, in order.

        Where the files lie does not matter, nor what is tested on.
        """
        self._corpus, hash_of = corpus, dict(zip(corpus.sources, hashes, strict=True))
        self.described = {
            "train_files": [[os.path.basename(file), hash_of[file]] for file in corpus.train_files],
            "val_files": [[os.path.basename(file), hash_of[file]] for file in corpus.val_files],
            **{option: getattr(corpus, option) for option in _CUTTING},
        }
        self._check()

    def resume(self, described: dict[str, Any]) -> None:
        """Refuses, now and from now on, other text than was `described` in a checkpoint."""
        self._resumed = described
        self._check()

    def _check(self) -> None:
        if (change := text_difference(self._resumed, self.described)) is not None:
            problem = f"{change} since the checkpoint was saved, and what it held out could be trained on"
            raise UserError(f"{problem}; give the text as it was, or train anew")

    def warning(self, described: dict[str, Any], verb: str) -> str | None:
        """Warns that a model may know what it is judged on: another part is held out of another text."""
        assert self._corpus is not None
        own_files = self._corpus.val_files or (verb == "test" and self._corpus.test_files)
        change = None if own_files else text_difference(described, self.described)
        return change and f"{change} since the checkpoint was saved; what is held out now may be known to it"


def text_difference(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Says what differs, such as `data.train_files: a.txt has changed`; None if nothing known does."""
    return next(_differences(saved, now), None) if saved and now else None


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for option in ("train_files", "val_files"):
        yield from (f"data.{option}: {change}" for change in _changes(saved[option], now[option]))
    for option in _CUTTING:
        if saved[option] != now[option]:
            yield f"data.{option}={now[option]!r} was {saved[option]!r}"


def _changes(before: list[list[str]], after: list[list[str]]) -> Iterator[str]:
    """Yields how lists of file names and hashes of content differ; names alone do not matter."""
    for here, there, alone in ((after, before, "was not among them"), (before, after, "is missing")):
        names, hashes = {name for name, _ in there}, {content for _, content in there}
        for name, content in here:
            if content not in hashes:
                yield f"{name} has changed" if name in names else f"{name} {alone}"
    if [content for _, content in before] != [content for _, content in after]:
        yield "the order of the files has changed"
