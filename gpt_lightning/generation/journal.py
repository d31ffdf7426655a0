"""Keeps what `predict` has finished so far, beside its output, for a run that goes on after a kill.

Each data-parallel rank appends to a journal of its own: one line of the settings that the completions depend
on, then one line a completion. How many ranks there were does not matter to the run that goes on.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpt_lightning.checkpoint.atomic import release, take_lock
from gpt_lightning.exit_codes import UserError

Settings = dict[str, Any]  # what the completions depend on, by the names of the options
Row = dict[str, Any]

FORMAT = 1
CHECKPOINT, PROMPTS = "checkpoint", "prompts"  # of which the settings hold a digest


def journal_settings(checkpoint_digest: str, prompts: list[str], options: dict[str, Any]) -> Settings:
    """Collects what the completions depend on; `options` are those that change what is generated."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = {"format": FORMAT, CHECKPOINT: checkpoint_digest, PROMPTS: digest, **options}
    return dict(json.loads(json.dumps(settings)))  # as they are read back


@dataclass
class Journal:
    """Belongs to one rank, which alone appends; what was appended outlives the process, however it ends."""

    output: Path
    rank: int
    settings: Settings
    _path: Path | None = field(default=None, init=False)  # until there is a row

    def append(self, row: Row) -> None:
        self._path = self._path or self._begin()
        _append(self._path, row)

    def _begin(self) -> Path:
        # Other settings have other journals: what an interrupted run has finished outlives a try of others.
        digest = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()[:8]
        path = self.output.with_name(f".{self.output.name}.part-{digest}-{self.rank}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and _lines(path)[:1] == [self.settings]:
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # a line that a kill has torn
        else:
            path.write_bytes(b"")
            _append(path, self.settings)
        return path


def _append(path: Path, value: dict[str, Any]) -> None:
    try:
        with path.open("ab") as file:
            file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_journals(output: Path, settings: Settings) -> tuple[list[Row], list[str]]:
    """Returns the rows of the journals of these settings, and in what the others, which stay, differ."""
    rows: list[Row] = []
    differences: set[str] = set()
    for path in _journals(output):
        found, *found_rows = _lines(path) or [settings]
        rows += found_rows if found == settings else []
        differences |= {
            f"other {name}" if name in (CHECKPOINT, PROMPTS) else f"{name} was {found.get(name)}, is {value}"
            for name, value in settings.items()
            if found.get(name) != value
        }
    return rows, sorted(differences)


def remove_journals(output: Path) -> None:
    """Removes those of all settings, and what a kill has left of an unfinished output."""
    left = output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 8}.tmp")
    for path in (*_journals(output), *left):
        path.unlink(missing_ok=True)


def finished_prompts(rows: Iterable[Row], num_samples: int) -> dict[int, list[Row]]:
    """Returns the rows of each prompt that has all its samples, in their order."""
    by_prompt: dict[int, dict[int, Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["index"], {})[row.get("sample", 0)] = row
    return {
        index: [samples[number] for number in sorted(samples)]
        for index, samples in sorted(by_prompt.items())
        if len(samples) == num_samples
    }


def lock_output(output: Path) -> Callable[[], None]:
    """Keeps other processes from writing it, until the function that this returns is called, or the end."""
    lock = take_lock(output.with_name(f".{output.name}.lock"))
    if lock is None:
        raise UserError(f"output={output}: another process is writing it; wait, or give another --output")
    return partial(release, lock)


def _journals(output: Path) -> list[Path]:
    """Lists its own alone: another output's name may begin with this one's."""
    own = re.compile(re.escape(f".{output.name}.part-") + r"[0-9a-f]{8}-\d+")
    found = output.parent.glob(f".{glob.escape(output.name)}.part-*")
    return sorted(path for path in found if own.fullmatch(path.name))


def _lines(path: Path) -> list[Row]:
    """Reads whole lines; one that a crash of the machine has spoiled is left out."""
    lines: list[Any] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]
