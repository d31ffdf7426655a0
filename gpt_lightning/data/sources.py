"""Finds the files that names, globs and folders stand for, and says which of them are not read."""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from functools import cache
from glob import escape, glob, has_magic
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_only

from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.exit_codes import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst")

_MOST_ENDINGS = 5  # that a line names

_log = logging.getLogger("gpt_lightning")


def resolve_sources(patterns: list[str], option: str) -> list[str]:
    """Lists the files behind file names, globs and folders; `python:docs` stands for itself.

    The order is that of the patterns, sorted within each, without repeats.
    """
    if not patterns:
        raise UserError(f"{option}=[] names no file; give a file, a folder, a glob or {SOURCE_NAME}")
    found: dict[str, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_resolve(pattern, option)))
    return list(found)


def _resolve(pattern: str, option: str) -> list[str]:
    if pattern == SOURCE_NAME:
        return [SOURCE_NAME]
    if not pattern.strip():  # as of a shell's variable that is not set; it would be this very folder
        raise UserError(f"{option}={pattern!r} names no file; give a file, a folder or a glob, such as .")
    path = os.path.abspath(os.path.expanduser(pattern))
    # What is there by just that name is no pattern, whatever brackets and stars it has.
    there = next(name for name in (path, *map(str, Path(path).parents)) if os.path.exists(name))
    beyond = path[len(there) :]
    matches = glob(escape(there) + beyond, recursive=True)
    if os.path.isfile(path) and not path.endswith(SUFFIXES):
        raise UserError(f"{option}={pattern} has no known suffix; use one of {' '.join(SUFFIXES)}")
    if not matches and not has_magic(beyond):
        remedy = _full_width(pattern) or f"check the path, seen from {os.getcwd()}"
        raise UserError(f"{option}={pattern} does not exist; {remedy}")
    found = {file for match in matches for file in _files_under(Path(match))}
    files = {file for file in found if file.name.endswith(SUFFIXES) and file.is_file()}
    others = found - files
    if not files:
        has = f", but {_kinds(others)}" if others else ""
        has += f"; {remedy}" if (remedy := _full_width(pattern)) else ""
        raise UserError(f"{option}={pattern} matches no file that ends in one of {' '.join(SUFFIXES)}{has}")
    if others:
        _say_once(f"{option}={pattern}: {len(others)} of {len(found)} files are not read: {_kinds(others)}")
    return sorted(map(str, files))


def _full_width(pattern: str) -> str:
    """Says what to write for signs of Chinese and Japanese text, which may be meant for those of a list."""
    found = [sign for sign in "，、“”＂‘’【】［］" if sign in pattern]
    return f"it holds {' '.join(found)}, which are no signs of a list; write [\"a\", \"b\"]" if found else ""


@cache
def _say_once(line: str) -> None:
    """Says it in one process of a run, however often that looks for its files."""
    rank_zero_only(_log.warning)("%s (read are %s)", line, " ".join(SUFFIXES))


def _kinds(files: set[Path]) -> str:
    counts = Counter(map(_ending, files))
    most = sorted(counts, key=lambda ending: (-counts[ending], ending))[:_MOST_ENDINGS]
    others = len(files) - sum(counts[ending] for ending in most)
    rest = {0: [], 1: ["1 other"]}.get(others, [f"{others} others"])
    return ", ".join([f"{counts[ending]} {ending}" for ending in most] + rest)


def _ending(path: Path) -> str:
    """Names the kind of a file: `.md`, or with that of what is packed in it, `.tar.gz`."""
    if path.is_dir():
        return "linked folder"
    n = 2 if path.suffix.lower() in (".gz", ".zst") else 1
    return "".join(path.suffixes[-n:]) or "without an ending"


def _files_under(path: Path) -> Iterator[Path]:
    """Yields the file itself, or the files and linked folders in a folder that are not hidden in it."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and (file.is_file() or file.is_symlink() and file.is_dir()):
            yield file
