"""Knows tokens by their bytes, and which of those that stand for single bytes make characters."""

import codecs
from collections.abc import Mapping

from tokenizers import Tokenizer

from gpt_lightning.data.fast_bpe import byte_alphabet


def fallback_bytes(tokenizer: Tokenizer) -> dict[int, int]:
    """Maps each id that stands for a byte, as <0x0A> does, to it."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {byte: f"<0x{byte:02X}>" for byte in range(256)}
    return {vocabulary[token]: byte for byte, token in tokens.items() if token in vocabulary}


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """Maps each id to its bytes; special tokens have none, other added tokens are written as they are."""
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    found = {
        index: bytes(byte_of[character] for character in token)
        for token, index in tokenizer.get_vocab(with_added_tokens=False).items()
        if byte_of.keys() >= set(token)
    }
    for index, added in tokenizer.get_added_tokens_decoder().items():
        found[index] = b"" if added.special else added.content.encode()
    return found


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
