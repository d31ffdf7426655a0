"""Reads prompts from options and files, and deals each rank of `predict` its share of them."""

import os
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from gpt_lightning.data.charset import not_utf8
from gpt_lightning.data.documents import has_half_character, json_row
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError


class PromptBatch(NamedTuple):
    """Holds prompts to continue; `indices` are their places in the order the user gave."""

    indices: list[int]
    prompts: list[str]
    token_ids: list[list[int]]


def read_prompts(prompts: list[str] | str | None, prompts_file: str | None) -> list[str]:
    """Lists the given prompts, then those of the file; without any, an empty one: the start of a document."""
    given = [prompts] if isinstance(prompts, str) else [*(prompts or [])]
    given = [as_utf8(prompt, f"data.prompts={prompt!r}", "use data.prompts_file") for prompt in given]
    if prompts_file is not None:
        given += _read_file(Path(prompts_file).expanduser())
    return given or [""]


def as_utf8(prompt: str, place: str, remedy: str) -> str:
    """Returns a text that was read in whatever locale; raises UserError if its bytes were not UTF-8."""
    try:
        text = decoded_again(prompt)
        text.encode("utf-8")
    except UnicodeError:
        raise UserError(f"{place} is not UTF-8; {remedy}") from None
    return text


def decoded_again(word: str) -> str:
    """Decodes what Python could not read in the locale's encoding, and kept byte by byte, from UTF-8."""
    if word.isascii() or not any("\udc80" <= character <= "\udcff" for character in word):
        return word
    return os.fsencode(word).decode("utf-8")


@dataclass(frozen=True)
class PromptShare(Dataset[PromptBatch]):
    """Is one batch: a data-parallel rank's share of the prompts that are not finished when asked for."""

    prompts: list[str]
    finished: Set[int]
    tokenizer: TextTokenizer
    rank: int
    ranks: int
    parse_special_tokens: bool = False

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> PromptBatch:
        remaining = [index for index in range(len(self.prompts)) if index not in self.finished]
        indices = remaining[self.rank :: self.ranks]
        texts = [self.prompts[index] for index in indices]
        return PromptBatch(indices, texts, encode_prompts(texts, self.tokenizer, self.parse_special_tokens))


def encode_prompts(
    prompts: list[str], tokenizer: TextTokenizer, parse_special_tokens: bool = False
) -> list[list[int]]:
    """Encodes prompts; an empty one becomes the eos that stands before every document."""
    encode = tokenizer.parse_batch if parse_special_tokens else tokenizer.encode_batch
    return [ids or [tokenizer.eos_token_id] for ids in encode(prompts)]


def first_words(text: str, most: int = 24) -> str:
    """Returns whole words of a text's beginning, up to so many characters; of one long word, that many."""
    text = text.lstrip()
    shown = text[:most]
    if len(text) > most and not text[most].isspace():
        start, space, _ = shown.rpartition(" ")
        shown = start or shown
    return shown.rstrip()


def special_token_hint(prompts: list[str], tokenizer: TextTokenizer, option: str) -> str | None:
    """Says of prompts that are read as plain text that one holds the name of a special token."""
    names = re.compile("|".join(map(re.escape, tokenizer.special_tokens)))
    if (found := next(filter(None, map(names.search, prompts)), None)) is None:
        return None
    return f"a prompt holds {found[0]!r}, which is read as text; with {option} true it is that token"


def _read_file(path: Path) -> list[str]:
    option = f"data.prompts_file={path}"
    if not path.is_file():
        raise UserError(f"{option} does not exist; check the path")
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{option} has no known suffix; use .txt (one prompt a line) or .jsonl (key prompt)")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(option, error.start, error.object)) from None
    # Not splitlines(): it also splits at characters that a prompt may hold, such as a form feed.
    lines = {n: line.removesuffix("\r") for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    if path.suffix == ".txt":
        return [*lines.values()]
    return [_json_prompt(line, f"{option}, line {n},") for n, line in lines.items()]


def _json_prompt(line: str, place: str) -> str:
    row: Any = json_row(line, place)
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f"{place} has no text under the key prompt; write {{\"prompt\": \"...\"}}")
    prompt: str = row["prompt"]
    if has_half_character(prompt):
        raise UserError(f"{place} is not UTF-8; write characters, not half of a surrogate pair")
    return prompt
