"""Decides which tokens of single bytes, such as <0x0A>, make characters, as they come one by one."""

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
        """Takes the next id; returns those now certain: this one, all of the character it ends, or none."""
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
