"""What `predict` has finished so far, kept beside its output for a run that goes on after a kill.

Each data-parallel rank appends to a journal of its own: one line of what the completions depend on, then one
line a completion. How many ranks there were does not matter to the run that goes on.
"""

import glob
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt_lightning.checkpoint.files import temporary_beside
from gpt_lightning.exit_codes import UserError

Basis = dict[str, Any]  # what the completions depend on, by the names of the options
Row = dict[str, Any]

FORMAT = 1
CHECKPOINT, PROMPTS = "checkpoint", "prompts"  # of which the basis holds a digest


def basis_of(checkpoint_digest: str, prompts: list[str], settings: dict[str, Any]) -> Basis:
    """`settings` are those that change what is generated."""
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    basis = {"format": FORMAT, CHECKPOINT: checkpoint_digest, PROMPTS: digest, **settings}
    as_read_back: Basis = json.loads(json.dumps(basis))
    return as_read_back


class Journal:
    """One rank's, to which it alone appends. What was appended outlives the process, however it ends."""

    def __init__(self, output: Path, rank: int, basis: Basis) -> None:
        # Each basis has journals of its own: what an interrupted run has finished outlives a try of another.
        self._path = output.with_name(f".{output.name}.part-{_digest(basis)}-{rank}")
        self._basis = basis
        self._file: FileIO | None = None  # until there is a row

    def append(self, row: Row) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            _write_line(self._file, row)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _open(self) -> FileIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab", buffering=0)
        if _lines(self._path)[:1] == [self._basis]:
            file.truncate(self._path.read_bytes().rfind(b"\n") + 1)  # a line that a kill has torn
        else:
            file.truncate(0)
            _write_line(file, self._basis)
        return file


def _write_line(file: FileIO, value: dict[str, Any]) -> None:
    line = memoryview(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    while line:
        line = line[file.write(line) :]


def read_journals(output: Path, basis: Basis) -> tuple[list[Row], list[str]]:
    """The rows of the journals of this basis, and what is another in those of others, which stay."""
    rows: list[Row] = []
    differences: list[str] = []
    for path in _journals(output):
        lines = _lines(path)
        if lines and lines[0] == basis:
            rows += lines[1:]
        elif lines:
            differences += _differences(lines[0], basis)
    return rows, sorted(set(differences))


def remove_journals(output: Path) -> None:
    """Those of every basis, and what a kill has left of an output that was just being written."""
    left = output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 8}.tmp")
    for path in (*_journals(output), *left):
        path.unlink(missing_ok=True)


def finished_prompts(rows: Iterable[Row], num_samples: int) -> dict[int, list[Row]]:
    """The rows of each prompt that has all its samples, in their order."""
    by_prompt: dict[int, dict[int, Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["index"], {})[row.get("sample", 0)] = row
    return {
        index: [samples[number] for number in sorted(samples)]
        for index, samples in sorted(by_prompt.items())
        if len(samples) == num_samples
    }


def lock_output(output: Path) -> Callable[[], None]:
    """Keep other processes from writing it, until the function is called that this gives, or the end."""
    with temporary_beside(output) as probe:
        probe.touch()
    lock = FileLock(output.with_name(f".{output.name}.lock"), thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"output={output}: another process is writing it; wait for it, or give another --output"
        ) from None

    def release() -> None:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

    return release


def _digest(basis: Basis) -> str:
    return hashlib.sha256(json.dumps(basis, sort_keys=True).encode()).hexdigest()[:8]


def _journals(output: Path) -> list[Path]:
    """Its own alone: another output's name may begin with this one's."""
    own = re.compile(re.escape(f".{output.name}.part-") + r"[0-9a-f]{8}-\d+")
    found = output.parent.glob(f".{glob.escape(output.name)}.part-*")
    return sorted(path for path in found if own.fullmatch(path.name))


def _lines(path: Path) -> list[Row]:
    """Whole lines; one that a crash of the machine has spoiled is left out."""
    lines: list[Any] = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def _differences(found: Basis, basis: Basis) -> list[str]:
    """For a sentence that says why the one is not taken for the other."""
    if not isinstance(found, dict):
        return []
    return [
        f"other {name}" if name in (CHECKPOINT, PROMPTS) else f"{name} was {found.get(name)}, is {value}"
        for name, value in basis.items()
        if found.get(name) != value
    ]
