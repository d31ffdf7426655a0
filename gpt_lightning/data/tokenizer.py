"""Turns text to token ids and back by a tokenizer of a name or folder, or a byte-level BPE trained here."""

import codecs
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from gpt_lightning.data.byte_fallback import ByteFallback, fallback_bytes, token_bytes
from gpt_lightning.data.chat_template import TEMPLATE_FILE, read_chat
from gpt_lightning.data.endless_text import train_on_bounded_words
from gpt_lightning.data.fast_bpe import byte_alphabet, fast_bpe
from gpt_lightning.data.hub import first_line, from_transformers, is_hub_name
from gpt_lightning.data.plain_text import keeps_text, may_be_cut, plain_encoder
from gpt_lightning.data.tokenizer_folder import (
    byte_level,
    named_eos,
    read_tokenizer,
    same_ids,
    usual_eos,
)
from gpt_lightning.exit_codes import UserError

END_OF_TEXT = "<|endoftext|>"

Encoder = Callable[[list[str]], list[NDArray[np.uint32]]]


class TextTokenizer:
    """Encodes text as plain text: a special token's name in a document is a few letters like any others.

    So the end-of-document id occurs only where this project appends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token: str,
        other_ends: Iterable[int] = (),
        chat: dict[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat = chat or {}  # as read_chat makes it; nothing where there is no template
        self._eos_token = eos_token
        # A token that is not marked special would still be found inside text.
        tokenizer.add_special_tokens([AddedToken(eos_token, special=True, normalized=False)])
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        if eos_token not in vocabulary:  # an empty one is none
            raise UserError(f"eos_token={eos_token!r} cannot be a token; give the tokenizer another")
        self.eos_token_id: int = vocabulary[eos_token]
        self.eos_token_ids = [self.eos_token_id, *sorted({*other_ends} - {self.eos_token_id})]
        self.vocab_size: int = max(vocabulary.values()) + 1

    def encode(self, text: str) -> list[int]:
        return self._text_ids([self._encoder[0].encode(text, add_special_tokens=False)])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes as `encode` does, on all cores."""
        return self._text_ids(self._encoder[0].encode_batch_fast(texts, add_special_tokens=False))

    def parse_batch(self, texts: list[str]) -> list[list[int]]:
        """Encodes text in which the name of a special token stands for the token."""
        return [found.ids for found in self._parser.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _parser(self) -> Tokenizer:
        return Tokenizer.from_str(self.state["tokenizer_json"])  # which is not told to leave them text

    @cached_property
    def special_tokens(self) -> list[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special]

    def _text_ids(self, encodings: list[Encoding]) -> list[list[int]]:
        found, parts = [encoding.ids for encoding in encodings], self._encoder[1]
        if parts:
            found = [[part for index in ids for part in parts.get(index, (index,))] for ids in found]
        if any(self.eos_token_id in ids for ids in found):
            problem = f"eos_token={self._eos_token!r} is also what the tokenizer makes of some text"
            raise UserError(f"{problem}; give it an eos_token that is neither a character nor its unk_token")
        return found

    @cached_property
    def _encoder(self) -> tuple[Tokenizer, dict[int, list[int]]]:
        return plain_encoder(self._tokenizer)

    @cached_property
    def may_be_cut(self) -> bool:
        """Tells whether a long document may be encoded in pieces."""
        return may_be_cut(self._tokenizer)

    @cached_property
    def keeps_text(self) -> bool:
        """Tells whether it is certain, for any text, that decoding gives it back."""
        return self._decoder_types == {"ByteLevel"} and keeps_text(self._tokenizer)

    @cached_property
    def encoding(self) -> str:
        """Is equal where texts get the same ids, also in caches that earlier versions made."""
        # These once encoded the rest in pieces, and with special tokens in text.
        return self.fingerprint if self.may_be_cut and self._is_plain else f"{self.fingerprint}-2"

    @property
    def _is_plain(self) -> bool:
        return self._encoder == (self._tokenizer, {})

    def corpus_encoder(self) -> Encoder:
        """Makes, in a moment, the fastest function known to do as `encode_batch`, for several threads."""
        # A character of texts as their end has to be looked for.
        fast = fast_bpe(self._tokenizer) if len(self._eos_token) > 1 and self._is_plain else None

        def encode(texts: list[str]) -> list[NDArray[np.uint32]]:
            found = fast.encode_batch(texts) if fast is not None else [None] * len(texts)
            others = [text for text, ids in zip(texts, found, strict=True) if ids is None]
            slow = (np.array(ids, dtype=np.uint32) for ids in self.encode_batch(others))
            return [next(slow) if ids is None else ids for ids in found]

        return encode

    def decode(self, ids: list[int]) -> str:
        """Gives whole characters: bytes that make none, as at a cut end, are left out, special tokens too."""
        return "".join(map(self.pieces(), ids))

    def pieces(self) -> Callable[[int], str]:
        """Makes a function that takes one id after the other, and gives the text that is certain by then."""
        if self._decoder_types == {"ByteLevel"}:
            # DecodeStream would hold back a whole character that an unfinished one follows, for ever.
            utf8 = codecs.getincrementaldecoder("utf-8")(errors="ignore")
            return lambda index: utf8.decode(self._token_bytes.get(index, b""))
        fallback, stream = ByteFallback(self._fallback_bytes), decoders.DecodeStream(skip_special_tokens=True)
        return lambda index: "".join(
            stream.step(self._tokenizer, certain) or "" for certain in fallback.add(index)
        ).replace("\ufffd", "")

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for, if it stands for bytes."""
        if self._decoder_types == {"ByteLevel"}:
            return self._token_bytes.get(token_id, b"")
        return bytes([self._fallback_bytes[token_id]] if token_id in self._fallback_bytes else [])

    def name_of(self, token_id: int) -> str:
        return (self._tokenizer.id_to_token(token_id) or "").replace("\u2581", " ")

    @cached_property
    def _decoder_types(self) -> set[str]:
        """Names the parts of the decoder that change what a token says."""
        decoder = json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        return set(re.findall(r'"type": "(\w+)"', decoder)) - {"Sequence", "Fuse"}

    @cached_property
    def _fallback_bytes(self) -> dict[int, int]:
        return fallback_bytes(self._tokenizer) if "ByteFallback" in self._decoder_types else {}

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        return token_bytes(self._tokenizer)

    @cached_property
    def state(self) -> dict[str, Any]:
        """Holds plain data for a checkpoint, which `from_dict` reads."""
        several = {"eos_token_ids": self.eos_token_ids} if len(self.eos_token_ids) > 1 else {}
        chat = {"chat": self.chat} if self.chat else {}
        return {"tokenizer_json": self._tokenizer.to_str(), "eos_token": self._eos_token, **several, **chat}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "TextTokenizer":
        try:
            tokenizer = Tokenizer.from_str(state["tokenizer_json"])
        except Exception as error:  # the Rust side raises bare Exception
            raise UserError(f"the saved tokenizer cannot be read ({first_line(error)})") from None
        if tokenizer.token_to_id(eos_token := state["eos_token"]) is None:
            raise UserError(f"the saved tokenizer has no token {eos_token!r}, its eos_token")
        return cls(tokenizer, eos_token, state.get("eos_token_ids", ()), state.get("chat"))

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], "TextTokenizer"], tuple[dict[str, Any]]]:
        # The tokenizers library pickles its JSON alone, which does not hold how special tokens are read.
        return self.from_dict, (self.state,)

    @cached_property
    def fingerprint(self) -> str:
        """Is equal for tokenizers that encode documents alike, also after a save and load."""
        state = {key: self.state[key] for key in ("tokenizer_json", "eos_token")}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]

    def with_ends(self, ids: Iterable[int]) -> "TextTokenizer":
        """Has the tokens of these ids end a generated text, too; documents end with eos alone."""
        return self.from_dict({**self.state, "eos_token_ids": [*self.eos_token_ids, *ids]})

    def padded(self, n_ids: int) -> "TextTokenizer":
        """Adds special tokens for ids below `n_ids` that a model knows and no text has: some readers ask."""
        padded = self.from_dict(self.state)
        unused = [f"<|unused_{index}|>" for index in range(self.vocab_size, n_ids)]
        padded._tokenizer.add_special_tokens([AddedToken(token, special=True) for token in unused])
        return self.from_dict(padded.state)

    @property
    def _chat_tokens(self) -> dict[str, str]:
        """Names the special tokens that the chat template may ask for, those that there are."""
        named: dict[str, str] = self.chat.get("tokens", {})
        known = {name: self._tokenizer.token_to_id(token) for name, token in named.items()}
        return {name: named[name] for name in known if name != "eos_token" and known[name] is not None}

    def save(self, folder: str | os.PathLike[str], max_length: int | None = None) -> None:
        """Writes a folder that `AutoTokenizer.from_pretrained` and `load_tokenizer` open.

        `max_length` is that of the texts that its model can see. What the tokenizer would put around a text,
        such as [CLS] and [SEP], is left out: no model here was trained with it.
        """
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        if not isinstance(tokenizer.post_processor, processors.ByteLevel):  # which adds nothing
            tokenizer.post_processor = None
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._eos_token,
            "bos_token": self._eos_token,
            "unk_token": self._eos_token,  # as GPT-2's own has it; some readers insist on one
            **self._chat_tokens,
            "clean_up_tokenization_spaces": False,
            **({} if max_length is None else {"model_max_length": max_length}),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if self.chat:
            (folder / TEMPLATE_FILE).write_text(self.chat["template"], encoding="utf-8")
        (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Trains a byte-level BPE in GPT-2's manner: any string can be encoded, and decodes to itself."""
    tokenizer = byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    train_on_bounded_words(tokenizer, texts, trainer)
    return TextTokenizer(tokenizer, END_OF_TEXT)


def is_trained_here(spec: str) -> bool:
    """Tells whether `data.tokenizer` asks for a BPE trained on the corpus: `bpe` or `bpe:8192`."""
    return spec == "bpe" or spec.startswith("bpe:")


def requested_vocab_size(spec: str) -> int | None:
    """Reads the size in `bpe:8192`; None for `bpe`, which leaves it to `default_vocab_size`."""
    if spec == "bpe":
        return None
    size = spec.removeprefix("bpe:")
    if not re.fullmatch("[0-9]{1,8}", size) or int(size) < 257:
        raise UserError(f"data.tokenizer={spec} asks for no size above 256, the bytes alone; try bpe:8192")
    return int(size)


def default_vocab_size(n_bytes: int) -> int:
    """Gives about one token a kilobyte of text, as a power of two between 512 and 32768."""
    return 2 ** min(15, max(9, round(math.log2(max(1, n_bytes) / 1000))))


def load_tokenizer(name: str) -> TextTokenizer:
    """Opens `bytes`, a folder, or a name on the Hugging Face hub; code in either never runs."""
    option = f"data.tokenizer={name}"
    if name == "bytes":
        vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
        return TextTokenizer(byte_level(models.BPE(vocab=vocab, merges=[])), END_OF_TEXT)
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return load_tokenizer_folder(Path(folder), option)
    if not is_hub_name(name):
        raise UserError(f"{option} is not a folder; give the folder that holds tokenizer.json")
    return _ending(*from_transformers(name, option), option)


def load_tokenizer_folder(folder: Path, option: str, eos_token_id: int | None = None) -> TextTokenizer:
    """Opens a folder, called `option` in complaints; its model's `eos_token_id` is taken if it names none."""
    try:
        named, tokenizer, chat = named_eos(folder), read_tokenizer(folder), read_chat(folder)
    except Exception as error:  # the Rust side raises bare Exception
        raise UserError(f"{option} cannot be read ({first_line(error)}); save it anew") from None
    if tokenizer is None:
        tokenizer, usual = from_transformers(str(folder), option)
        named = named and usual  # of two that are named it knows which counts
    else:
        usual = usual_eos(tokenizer)
    of_model = None if eos_token_id is None else tokenizer.id_to_token(eos_token_id)
    return _ending(tokenizer, named or of_model or usual, option, chat)


def as_transformers_reads(folder: Path, ours: TextTokenizer, texts: Iterable[str] = ()) -> TextTokenizer:
    """Returns `ours`, read from that folder, or AutoTokenizer's, if it reads it and gives texts other ids."""
    try:
        tokenizer, eos_token = from_transformers(str(folder), "")
    except UserError:
        return ours
    eos_token = named_eos(folder) and eos_token or ours._eos_token
    theirs = TextTokenizer(tokenizer, eos_token, ours.eos_token_ids[1:], ours.chat)
    is_same = ours.eos_token_id == theirs.eos_token_id and same_ids(ours._tokenizer, theirs._tokenizer, texts)
    return ours if is_same else theirs


def is_read_by_transformers(ours: TextTokenizer, model_type: str) -> bool:
    """Tells whether AutoTokenizer takes it for what it is, saved beside a model of this type."""
    with TemporaryDirectory() as name:
        ours.save(name)
        (Path(name) / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        try:
            theirs, _ = from_transformers(name, "")
        except UserError:
            return False
        return same_ids(Tokenizer.from_file(str(Path(name) / "tokenizer.json")), theirs, ())


def _ending(
    tokenizer: Tokenizer, eos_token: str | None, option: str, chat: dict[str, Any] | None = None
) -> TextTokenizer:
    """Takes the token that ends documents, which there must be."""
    if eos_token is None:
        raise UserError(f"{option} names no end-of-text token; add eos_token to its tokenizer_config.json")
    return TextTokenizer(tokenizer, eos_token, chat=chat)
