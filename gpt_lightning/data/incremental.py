"""Token ids to text, one id at a time: the pieces together are what decoding all ids at once gives."""

import codecs
from collections.abc import Callable, Mapping

_CONTEXT = 8  # units that are decoded again with each new one, or up to twice as many

_utf8 = codecs.getincrementaldecoder("utf-8")


class ByteLevel:
    """For vocabularies whose tokens are bytes: a character is given out with its last byte."""

    def __init__(self, bytes_of: Mapping[int, bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = _utf8(errors="ignore")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(self._bytes_of.get(token_id, b""))


class InContext:
    """For all others: what an id adds is what decoding some ids before it gives with it and not without it.

    `decode` may treat the first token of a text otherwise than the rest, such as leave out its space.
    """

    def __init__(self, decode: Callable[[list[int]], str], fallback: "ByteFallback") -> None:
        self._decode, self._fallback = decode, fallback
        self._units: list[list[int]] = []
        self._text = ""  # of the units

    def add(self, token_id: int) -> str:
        unit = self._fallback.add(token_id)
        if not unit:
            return ""
        self._units.append(unit)
        text = self._decode(sum(self._units, []))
        piece = text[len(self._text) :]
        self._text = text
        if len(self._units) >= 2 * _CONTEXT:
            self._shorten()
        return piece

    def _shorten(self) -> None:
        """Forget all but the last units, unless they have no text that could stand for what was before."""
        last = self._units[-_CONTEXT:]
        text = self._decode(sum(last, []))
        if text:
            self._units, self._text = last, text


class ByteFallback:
    """Leaves out tokens that stand for single bytes and of which no character comes.

    A library's decoder leaves out all bytes in a row if there is one such among them.
    """

    def __init__(self, byte_of: Mapping[int, int]) -> None:
        self._byte_of = byte_of
        self._decoder = _utf8(errors="ignore")
        self._pending: list[int] = []

    def add(self, token_id: int) -> list[int]:
        """The ids that are certain by now: this one, all of a character that it ends, or none."""
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
