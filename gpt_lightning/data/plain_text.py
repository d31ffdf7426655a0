"""Keeps text text for any kind of tokenizer: special tokens do not come of it, and cuts change no id."""

import json
import re
import secrets
from typing import Any

from tokenizers import AddedToken, Tokenizer, models
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from gpt_lightning.data.fast_bpe import byte_alphabet

Part = dict[str, Any]  # of a tokenizer.json

# Pre-tokenizers that cut at whitespace and drop it.
_AT_WHITESPACE = {"Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # stands for text, even where it is said to be special
_NORMALIZERS = {"NFC", "NFD", "Lowercase", "StripAccents"}
# The patterns of GPT-4, Llama 3 and Qwen; they differ in how many digits go together.
_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+" % digits
    for digits in ("", "{1,3}")
}


def plain_encoder(tokenizer: Tokenizer) -> tuple[Tokenizer, dict[int, list[int]]]:
    """Returns what gives text its ids, and of which ids then come others, so that none is of a special token.

    `encode_special_tokens` finds none before the model sees the text; but a model takes whatever stands in
    its vocabulary, and some have their special tokens there. In a copy these have names that no text has.
    Where merges make one, others may be made of it: it becomes the two tokens that it was merged from.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    found = {token.content for token in added if token.special and _comes_of_text(tokenizer, token.content)}
    if not found:
        return tokenizer, {}
    description = json.loads(tokenizer.to_str())
    pairs = _merged_from(description["model"])
    unmerged = {token: pairs[token] for token in found & pairs.keys()}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    parts = {ids[token]: [ids[part] for part in _parts(token, unmerged)] for token in unmerged}
    if not (renamed := sorted(found - pairs.keys())):
        return tokenizer, parts
    secret = secrets.token_hex(16)
    _rename(description, {content: f"{secret}{number}" for number, content in enumerate(renamed)})
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    return copy, parts


def _merged_from(model: Part) -> dict[str, list[str]]:
    """Maps what a BPE's merges make to the two tokens of the first such merge."""
    found: dict[str, list[str]] = {}
    prefix = model.get("continuing_subword_prefix") or ""
    for merge in model.get("merges", []):
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        found.setdefault(first + second.removeprefix(prefix), [first, second])
    return found


def _parts(token: str, unmerged: dict[str, list[str]]) -> list[str]:
    if token not in unmerged:
        return [token]
    return [part for half in unmerged[token] for part in _parts(half, unmerged)]


def _comes_of_text(tokenizer: Tokenizer, content: str) -> bool:
    model = tokenizer.model
    if (index := model.token_to_id(content)) is None or _BYTE.fullmatch(content):
        return False
    if not isinstance(model, models.BPE) or model.end_of_word_suffix or model.continuing_subword_prefix:
        return True
    # What merges make anywhere, they make of that text alone, too; a character is no other text.
    return len(content) > 1 and Tokenizer(model).encode(content, add_special_tokens=False).ids == [index]


def _rename(description: Part, names: dict[str, str]) -> None:
    """Gives tokens of a tokenizer.json other names; merges that need one of them never come up."""
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.keys().isdisjoint(pair)]
    for token in description["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    description["post_processor"] = None  # adds nothing to text alone, and knows the old names


def may_be_cut(tokenizer: Tokenizer) -> bool:
    """Tells whether a document's pieces, as `documents` cuts them, surely have the ids of the whole.

    Others put a space before each text, as Metaspace does, or have patterns and rules unknown here.
    """
    steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    rules = _steps(tokenizer.normalizer, "normalizers")
    if any(map(_may_cross, tokenizer.get_added_tokens_decoder().values())):
        return False
    if steps and steps[0]["type"] in _AT_WHITESPACE:  # the others are about one word after the other
        is_alike = all(step.get("prepend_scheme") != "first" for step in steps)
        return is_alike and all(rule["type"] in _NORMALIZERS | {"BertNormalizer"} for rule in rules)
    return (
        all(rule["type"] in _NORMALIZERS for rule in rules)
        and all(_cuts(step) or _is_local(step) for step in steps)
        and any(_cuts(step) for step in steps)
    )


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Tells whether any text surely comes back from its ids: of a byte-level BPE that knows every byte."""
    steps = _steps(tokenizer.pre_tokenizer, "pretokenizers")
    return (
        isinstance(tokenizer.model, models.BPE)
        and tokenizer.normalizer is None
        and all(_cuts(step) or _is_local(step) for step in steps)
        and _AT_WHITESPACE.isdisjoint(step["type"] for step in steps)
        and any(step["type"] == "ByteLevel" for step in steps)
        and tokenizer.get_vocab(with_added_tokens=False).keys() >= set(byte_alphabet())
        and not any(map(_may_cross, tokenizer.get_added_tokens_decoder().values()))
    )


def _steps(component: PreTokenizer | Normalizer | None, key: str) -> list[Part]:
    """Lists what a pre-tokenizer or normalizer is made of, as tokenizer.json has it."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), key)


def _flat(part: Part, key: str) -> list[Part]:
    return [step for each in part[key] for step in _flat(each, key)] if part["type"] == "Sequence" else [part]


def _may_cross(token: AddedToken) -> bool:
    """Tells whether an added token is looked for in text, and could lie on both sides of a cut."""
    is_wide = token.single_word or token.lstrip or token.rstrip
    return not token.special and (is_wide or any(map(str.isspace, token.content)))


def _cuts(step: Part) -> bool:
    """Tells of a pre-tokenizer that it cuts text wherever a document may be cut."""
    if step["type"] == "Split":
        is_known = step["pattern"].get("Regex") in _PATTERNS
        return is_known and step["behavior"] == "Isolated" and not step["invert"]
    is_gpt2 = step["type"] == "ByteLevel" and step["use_regex"] and not step["add_prefix_space"]
    return is_gpt2 or step["type"] in _AT_WHITESPACE


def _is_local(step: Part) -> bool:
    if step["type"] == "Punctuation":
        return bool(step["behavior"] == "Isolated")
    return step["type"] == "Digits" or step["type"] == "ByteLevel" and not step["add_prefix_space"]
