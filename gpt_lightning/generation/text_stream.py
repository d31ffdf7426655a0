"""Makes the text of a completion while it is drawn, and ends it at a stop string."""

from gpt_lightning.data.tokenizer import TextTokenizer


class TextStream:
    """Takes a completion's ids one at a time; `text` is what is certain by then.

    Held back are the bytes of an unfinished character, and text that may turn out to begin a stop string.
    `end` gives the text of all ids, cut before the first stop string.
    """

    def __init__(self, tokenizer: TextTokenizer, stop: list[str]) -> None:
        self.text = ""
        self._piece = tokenizer.pieces()
        self._stop = stop
        self._held = ""
        self._has_stopped = False

    def add(self, token_id: int) -> bool:
        """Takes the next token; tells whether a stop string has ended the text by now."""
        if not self._stop:
            self.text += self._piece(token_id)
        elif not self._has_stopped:
            self._held += self._piece(token_id)
            ends = [self._held.find(text) for text in self._stop if text in self._held]
            self._has_stopped = bool(ends)
            n = min(ends) if ends else len(self._held) - self._n_of_a_beginning()
            self.text, self._held = self.text + self._held[:n], self._held[n:]
        return self._has_stopped

    def end(self) -> str:
        """Returns the whole text, once no token follows."""
        if not self._has_stopped:
            self.text, self._held = self.text + self._held, ""
        return self.text

    def _n_of_a_beginning(self) -> int:
        """Counts the characters at the end of the held text that may be the beginning of a stop string."""
        longest = max(map(len, self._stop), default=0)
        lengths = range(min(len(self._held), longest - 1), 0, -1)
        return next((n for n in lengths if any(s.startswith(self._held[-n:]) for s in self._stop)), 0)
