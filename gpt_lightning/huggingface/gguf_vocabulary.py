"""Translates a tokenizer into what llama.cpp knows: a byte-level BPE, and the name of how it cuts text."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens in GGUF
# What a merge is written as where there is none: llama.cpp asks for one, and no text has this.
NO_MERGES = ["<|unused|> <|unused|>"]

_log = logging.getLogger("gpt_lightning")

Part = dict[str, Any]  # of a tokenizer.json


def _byte_level(use_regex: bool) -> Part:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _pattern(digits: str) -> Part:
    """Returns how Llama 3 and Qwen cut text; they differ in how many digits go together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+" % digits
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's name -> the pre-tokenizer, and whether a word of the vocabulary is taken whatever the merges.
CUTS: dict[str, tuple[Part, bool]] = {
    "gpt-2": (_byte_level(True), False),
    "qwen2": (_pattern(""), False),
    "llama-bpe": (_pattern("{1,3}"), True),
    "smollm": ({"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]}, False),
}


@dataclass(frozen=True)
class Vocabulary:
    """Holds what GGUF keeps of a tokenizer; `ends` are the ids that end a text, that of documents first."""

    cut: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    ends: list[int]

    def add_to(self, writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.ends[0])
        for add, index in zip(
            (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), self.ends
        ):
            add(index)
        for add in (writer.add_add_bos_token, writer.add_add_eos_token):  # as in training
            add(False)


def vocabulary_of(tokenizer: TextTokenizer, n_ids: int) -> Vocabulary:
    """Raises UserError where llama.cpp would give a text other ids; ids that no text has are unused."""
    description = json.loads(tokenizer.state["tokenizer_json"])
    if (problem := _problem(description)) is not None:
        raise UserError(
            f"its tokenizer {problem}, which llama.cpp has no byte-level BPE for; export-hf writes it for "
            "other programs"
        )
    cut = _cut(description)
    if description["normalizer"] is not None:
        _log.warning("its tokenizer composes letters and accents (NFC), llama.cpp leaves them as they are")
    if left_out := tokenizer.eos_token_ids[3:]:
        _log.warning("a GGUF file holds three tokens that end a text: these do not there: %s", left_out)
    ids = dict(description["model"]["vocab"])
    kinds = dict.fromkeys(ids.values(), NORMAL)
    for token in description["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    names = {index: name for name, index in ids.items()}
    return Vocabulary(
        cut or "",
        [names.get(index, f"<|unused_{index}|>") for index in range(n_ids)],
        [kinds.get(index, UNUSED) for index in range(n_ids)],
        [" ".join(merge) for merge in description["model"]["merges"]] or NO_MERGES,
        tokenizer.eos_token_ids[:3],
    )


def _cut(description: Part) -> str | None:
    """Returns llama.cpp's name of how words are cut, and whether merges decide; None if it has none."""
    wanted = _plain(description["pre_tokenizer"]), bool(description["model"].get("ignore_merges"))
    return next((name for name, cut in CUTS.items() if cut == wanted), None)


def _plain(part: Any) -> Any:
    """Returns a part without what says nothing of the ids."""
    if isinstance(part, dict):
        return {name: _plain(value) for name, value in part.items() if name != "trim_offsets"}
    return [_plain(each) for each in part] if isinstance(part, list) else part


def _problem(description: Part) -> str | None:
    """Tells what is not as in llama.cpp."""
    model = description["model"]
    if model["type"] != "BPE" or (description["decoder"] or {}).get("type") != "ByteLevel":
        return f"is a {model['type']} of other pieces than bytes"
    if _cut(description) is None:
        return "cuts words in a way of its own"
    if description["normalizer"] not in (None, {"type": "NFC"}):
        return f"changes the text first ({description['normalizer']['type']})"
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            return f"has {name}={model[name]}"
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    if lacking := len(alphabet - model["vocab"].keys()):
        return f"lacks {lacking} of the 256 bytes"
    return next(_problems_of_added(description, alphabet), None)


def _problems_of_added(description: Part, alphabet: set[str]) -> Iterator[str]:
    model = description["model"]
    made = alphabet | {"".join(merge) for merge in model["merges"]}
    pre_tokenizer: Any = Tokenizer.from_str(json.dumps(description)).pre_tokenizer
    for token in description["added_tokens"]:
        content = token["content"]
        is_word = model.get("ignore_merges") and len(pre_tokenizer.pre_tokenize_str(content)) == 1
        if token["special"] and (content in made or is_word):
            yield f"makes its special token {content!r} of text, too"
        if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            yield f"takes what stands around {content!r} with it"
