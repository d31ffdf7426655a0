"""Encodes a byte-level BPE by tiktoken, several times as fast, where the ids are provably the same.

Three things could differ, and each is settled before an id is believed.

*What happens around the merges.* Only GPT-2's plain pipeline is taken (`_is_plain`).

*Which pairs merge.* tokenizers merges the pairs of its list; tiktoken any two neighbours that make a token
it was given. It is given what some merge makes and the BPE also ends with when the text is that token alone.
Let neighbours x, y make such a token t anywhere in a text. No merge has crossed an end of xy, and those
inside were chosen among its pairs by the same rule as if t stood alone, so x, y is a state of t alone: its
last but one, and a listed merge. A listed merge whose result was not given never comes up: it would be the
end of its text alone. So where no two merges make the same given token, both see the same pairs with the same
ranks at every step, and take the lowest, at ties the leftmost. And a piece that is a given token as a whole,
which tiktoken takes at once, ends as that anyway.

*Where text is cut into pieces.* GPT-2's pattern asks of a character only whether it is a letter, a number,
whitespace or none of these. The libraries may know different editions of Unicode, so both are asked about
each character at its first occurrence, and a text with one that they see differently is left to tokenizers.
"""

import json
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models

# The pattern of tokenizers' ByteLevel, with possessive quantifiers where there is nothing to go back for.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Settings that change nothing: every byte is known, so nothing is ever unknown.
_WITHOUT_EFFECT = {"type", "unk_token", "fuse_unk", "byte_fallback", "vocab", "merges"}

# tiktoken searches every text for its special tokens, and is slow without any.
_SPECIAL = "<|special|>"


class FastBPE:
    """Encodes on the calling thread without Python's lock, so that several threads encode at once."""

    def __init__(self, tokenizer: Tokenizer, ranks: dict[bytes, int], ids: NDArray[np.uint32]) -> None:
        self._encoding = _encoding(ranks)
        self._ids = ids
        self._classes = _CharacterClasses(tokenizer)

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32] | None]:
        """Encodes each text; None for one that only `tokenizers` can be trusted with."""
        if self._classes.agree("".join(texts)):
            return [self._encode(text) for text in texts]
        return [self._encode(text) if self._classes.agree(text) else None for text in texts]

    def _encode(self, text: str) -> NDArray[np.uint32] | None:
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million spaces, which its regular expressions cannot remember
            return None
        return self._ids[ranks]


def fast_bpe(tokenizer: Tokenizer) -> FastBPE | None:
    """Makes the encoder; None unless tiktoken's ids, without special tokens, are those of `tokenizer`."""
    description = json.loads(tokenizer.to_str())
    if not (tokenizer.encode_special_tokens and _is_plain(description)):
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    alphabet = byte_alphabet()
    if not vocabulary.keys() >= set(alphabet) or len(set(vocabulary.values())) < len(vocabulary):
        return None
    made = _made_tokens(tokenizer.model, vocabulary, description["model"]["merges"])
    if len(set(made)) < len(made):
        return None
    as_latin = str.maketrans({character: chr(byte) for byte, character in enumerate(alphabet)})
    tokens = [*alphabet, *made]
    ranks = {token.translate(as_latin).encode("latin-1"): rank for rank, token in enumerate(tokens)}
    ids = np.array([vocabulary[token] for token in tokens], dtype=np.uint32)
    return FastBPE(tokenizer, ranks, ids)


def byte_alphabet() -> list[str]:
    """Maps each byte to the printable character that stands for it in byte-level vocabularies (GPT-2's)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _is_plain(description: dict[str, Any]) -> bool:
    """Tells whether text is cut by GPT-2's pattern, merged, and nothing else."""
    model, cutting = description["model"], description["pre_tokenizer"] or {}
    is_bpe = model["type"] == "BPE" and not any(
        value for option, value in model.items() if option not in _WITHOUT_EFFECT
    )
    is_gpt2 = cutting.get("type") == "ByteLevel" and cutting["use_regex"] and not cutting["add_prefix_space"]
    # A special token in text is text (`encode_special_tokens`); any other added one would cut it.
    is_text_alone = all(token["special"] for token in description["added_tokens"])
    # This one moves offsets and no ids.
    after = description["post_processor"] or {"type": "ByteLevel"}
    others = (description[name] for name in ("normalizer", "truncation", "padding"))
    return is_bpe and is_gpt2 and is_text_alone and after["type"] == "ByteLevel" and not any(others)


def _made_tokens(model: models.BPE, vocabulary: dict[str, int], merges: list[str | list[str]]) -> list[str]:
    """Lists the tokens that the merges make, in their order, less those that no text of bytes can become."""
    alphabet = set(byte_alphabet())
    made = ["".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    made = [token for token in made if alphabet.issuperset(token)]
    alone = Tokenizer(model).encode_batch_fast(made, add_special_tokens=False)
    return [token for token, own in zip(made, alone, strict=True) if own.ids == [vocabulary[token]]]


def _encoding(ranks: dict[bytes, int]) -> Any:
    from tiktoken import Encoding

    special = {_SPECIAL: len(ranks)}
    return Encoding("fast_bpe", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special)


class _CharacterClasses:
    """Knows the characters that both libraries take for one kind: letter, number, whitespace or other.

    A character is put after a letter, a number and a sign. The two encoders here merge each of these three
    with any byte after it, if both are in one piece; and that is so only after the character's own kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        alphabet = byte_alphabet()
        merges = [(sign, after) for sign in "a1!" for after in alphabet]
        tokens = [*alphabet, *map("".join, merges)]
        model = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
        self._slow = Tokenizer(model)
        self._slow.pre_tokenizer = tokenizer.pre_tokenizer
        single = [bytes([byte]) for byte in range(256)]
        pairs = [sign + after for sign in (b"a", b"1", b"!") for after in single]
        self._fast = _encoding({token: rank for rank, token in enumerate(single + pairs)})
        self._was_asked = np.zeros(0x110000, dtype=np.bool_)
        self._is_alike = np.zeros(0x110000, dtype=np.bool_)
        self._lock = threading.Lock()
        self._ask(np.arange(128))
        self._is_alike_in_ascii = bool(self._is_alike[:128].all())

    def agree(self, text: str) -> bool:
        if self._is_alike_in_ascii and text.isascii():
            return True
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        if self._is_alike[codes].all():
            return True
        with self._lock:
            self._ask(np.unique(codes[~self._was_asked[codes]]))
        return bool(self._is_alike[codes].all())

    def _ask(self, codes: NDArray[np.integer]) -> None:
        characters = [chr(code) for code in codes]
        alike = self._are_alike(characters)
        self._is_alike[codes] = alike or [self._are_alike([character]) for character in characters]
        self._was_asked[codes] = True

    def _are_alike(self, characters: list[str]) -> bool:
        text = "".join(f"a{character}1{character}!{character}" for character in characters)
        slow = self._slow.encode(text, add_special_tokens=False).ids
        return bool(slow == self._fast.encode_ordinary(text))
