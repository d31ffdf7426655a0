"""Reads a folder's tokenizer without transformers, where the files beside tokenizer.json agree with it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Texts by which two tokenizers differ that differ at all, most likely.
_PROBES = (
    "The cat doesn't sit on 1,234 mats; it NAPS.\n\n\tYes  --  (x == y_1)?\r\n",
    "鲁迅写了《呐喊》。 日本語 한국어 Größe Ünïcode e\u0301 ﬁ Ⅷ Привет العربية हिन्दी 👩‍👧 \u00a0\u200b\ufeff x",
    *(" lead", "trail ", "\n", ""),
)
# Endings of a document in the tokenizers of the world, for folders that do not name theirs.
_USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
NAMED = ("eos", "bos", "unk", "sep", "pad", "cls", "mask")  # special tokens
_OPTIONS = {"content", "single_word", "lstrip", "rstrip", "normalized", "special"}  # of an added token
_SEVERAL = ("additional_special_tokens", "extra_special_tokens")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """Returns None where transformers alone knows what the files come to.

    They are tokenizer.json, or vocab.json and merges.txt, as for GPT-2's own.
    """
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if "tokenizer.json" in present:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        return tokenizer if _agrees(folder, tokenizer) else None
    options = options_in(folder / "tokenizer_config.json")
    is_changed = options.get("added_tokens_decoder") or options.get("add_prefix_space")
    if is_changed or "added_tokens.json" in present or not present >= {"vocab.json", "merges.txt"}:
        return None
    return byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))


def byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def named_eos(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (token := options_in(folder / name).get("eos_token")) is not None:
            content = token.get("content") if isinstance(token, dict) else token
            if not isinstance(content, str):
                raise ValueError(f"eos_token={content!r} in its {name} is not text")
            return content
    return None


def same_ids(one: Tokenizer, other: Tokenizer, texts: Iterable[str]) -> bool:
    """Tells whether both give the same ids to these texts and a few more."""
    return all(
        one.encode(text, add_special_tokens=False).ids == other.encode(text, add_special_tokens=False).ids
        for text in (*_PROBES, *texts)
    )


def usual_eos(tokenizer: Tokenizer) -> str | None:
    return next((token for token in _USUAL_EOS if tokenizer.token_to_id(token) is not None), None)


def lost_token(folder: Path, tokenizer: Tokenizer) -> str | None:
    """Returns a token of vocab.txt that is not read, as of a GPT-2 that names no class of tokenizer."""
    path = folder / "vocab.txt"
    if not path.is_file() or (folder / "tokenizer.json").is_file():
        return None
    words = path.read_text(encoding="utf-8").split()
    return next((word for word in words if tokenizer.token_to_id(word) is None), None)


def _agrees(folder: Path, tokenizer: Tokenizer) -> bool:
    """Tells whether all ids and special tokens that the other files name are those of tokenizer.json."""
    config = options_in(folder / "tokenizer_config.json")
    mapped = options_in(folder / "special_tokens_map.json")
    ids = options_in(folder / "added_tokens.json")
    if any(tokenizer.token_to_id(token) != index for token, index in ids.items()):
        return False
    added = tokenizer.get_added_tokens_decoder()
    for index, options in config.get("added_tokens_decoder", {}).items():
        found = added.get(int(index))
        if any(getattr(found, option, None) != options[option] for option in _OPTIONS & options.keys()):
            return False
    special = {token.content for token in added.values() if token.special}
    named = {*_special_tokens(config), *_special_tokens(mapped)}
    kinds = config.keys() & mapped.keys() & {f"{kind}_token" for kind in NAMED}
    return named <= special and all(_content(config[kind]) == _content(mapped[kind]) for kind in kinds)


def _special_tokens(options: dict[str, Any]) -> Iterator[str]:
    named = [options.get(f"{kind}_token") for kind in NAMED]
    for several in map(options.get, _SEVERAL):
        named += several.values() if isinstance(several, dict) else several or []
    return (_content(token) for token in named if token is not None)


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def options_in(path: Path) -> dict[str, Any]:
    """Reads a file of options beside a tokenizer; nothing where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
