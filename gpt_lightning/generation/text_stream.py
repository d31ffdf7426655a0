"""The text of a completion while it is drawn, and where a stop string ends it."""

from collections.abc import Callable

from gpt_lightning.data.tokenizer import TextTokenizer


class TextStream:
    """Takes a completion's ids one at a time and gives the text that is certain by then.

    Held back are the bytes of an unfinished character, and text that may turn out to begin a stop string. The
    pieces and the rest together are the text of all ids, cut before the first stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: list[str]) -> None:
        self._stop = stop
        self._next_piece = tokenizer.pieces()
        self._held = ""
        self.stopped = False  # a stop string came; what comes after it is not part of the text

    def add(self, token_id: int) -> str:
        if self.stopped:
            return ""
        self._held += self._next_piece(token_id)
        self.stopped = any(text in self._held for text in self._stop)
        if self.stopped:
            return self._give(len(cut_at_stop(self._held, self._stop)))
        return self._give(len(self._held) - self._n_of_a_beginning())

    def rest(self) -> str:
        """What was held back, at the completion's end."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, n_characters: int) -> str:
        piece, self._held = self._held[:n_characters], self._held[n_characters:]
        return piece

    def _n_of_a_beginning(self) -> int:
        """Characters at the end of the text that are the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(len(self._held), longest - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)


def stop_test(tokenizer: TextTokenizer, stop: list[str]) -> Callable[[list[int]], bool]:
    """Whether the text so far holds a stop string; it may begin and end inside tokens."""
    # A token with text is at least one byte, so the last token can only complete a stop string within these
    # many, unless more tokens without text than the eight lie among them.
    reach = max((len(text.encode()) for text in stop), default=0) + 8

    def has_stopped(token_ids: list[int]) -> bool:
        end = tokenizer.decode(token_ids[-reach:])
        return any(text in end for text in stop)

    return has_stopped if stop else lambda token_ids: False


def cut_at_stop(text: str, stop: list[str]) -> str:
    return text[: min((text.find(end) for end in stop if end in text), default=len(text))]
