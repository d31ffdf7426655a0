"""Keeps text without separators, such as ACGT, from taking all time and memory of a tokenizer's training.

To the training such a stretch is one word. Its time grows with the square of a word's length, and its memory
with the length of all different words, and such text has no others.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

# In bytes: longer than any word of a language.
LONGEST_WORD = 1024
# In characters. So much takes half a minute of one core, and 300 MB.
_MOST = 1 << 23
_WINDOW = 512

_log = logging.getLogger("gpt_lightning")


def train_on_bounded_words(tokenizer: Tokenizer, texts: Iterable[str], trainer: Any) -> None:
    """Trains on words of a longest length, which the tokenizer does not keep to afterwards."""
    words = tokenizer.pre_tokenizer
    parts = pre_tokenizers.FixedLength(length=LONGEST_WORD)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
    tokenizer.train_from_iterator(with_little_endless_text(texts), trainer)
    tokenizer.pre_tokenizer = words


def with_little_endless_text(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts, beyond the first so many characters of such stretches without more of them."""
    found = 0
    for text in texts:
        windows = [first for first in range(0, len(text) - _WINDOW + 1, _WINDOW) if _is_endless(text, first)]
        kept = max(0, _MOST - found) // _WINDOW
        found += len(windows) * _WINDOW
        yield from _without(text, windows[kept:])
    if found > _MOST:
        left_out = f"{found - _MOST:,} of {found:,} characters of text without separators"
        _log.info("%s were left out of the training of the tokenizer", left_out)


def _is_endless(text: str, first: int) -> bool:
    window = text[first : first + _WINDOW]
    # Each ends at the first character that is not of the kind, so is quick.
    is_marks = not any(character.isalnum() or character.isspace() for character in window)
    return window.isalpha() or window.isnumeric() or is_marks


def _without(text: str, windows: list[int]) -> Iterator[str]:
    end = 0
    for first in windows:
        if first > end:
            yield text[end:first]
        end = first + _WINDOW
    if end < len(text):
        yield text[end:] if end else text
