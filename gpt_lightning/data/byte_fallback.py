"""Tells which of the tokens that stand for single bytes, as <0x0A> does, make characters."""

import codecs
from collections.abc import Mapping


class ByteFallback:
    """Leaves out tokens of bytes that make no character.

    A library's decoder leaves out all of several bytes in a row if one of them makes none.
    """

    def __init__(self, byte_of: Mapping[int, int]) -> None:
        self._byte_of = byte_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._pending: list[int] = []

    def add(self, token_id: int) -> list[int]:
        """Gives the ids that are certain by now: this one, all of a character that it ends, or none."""
        if token_id not in self._byte_of:
            self._decoder.reset()
            self._pending = []
            return [token_id]
        self._pending.append(token_id)
        character = self._decoder.decode(bytes([self._byte_of[token_id]]))
        if not character:
            return []
        whole = self._pending[-len(character.encode()) :]
        self._pending = []
        return whole
