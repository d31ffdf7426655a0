"""Keeps a folder computed from files: built by one process, renamed when whole, trusted while fresh."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock, Timeout

from gpt_lightning.checkpoint.atomic import naming, written_file, written_folder
from gpt_lightning.data.block_digests import SUFFIX, is_damaged, write_digests
from gpt_lightning.data.python_docs import SOURCE_NAME, python_docs_fingerprint

_FORMAT = 1
_META = "meta.json"

_log = logging.getLogger("gpt_lightning")


class BeingBuilt(Exception):
    """Tells that another process is at a folder that nobody wants to wait for."""


def folder_of(cache_dir: str, kind: str, settings: dict[str, Any], sources: Sequence[str]) -> Path:
    """Names the folder for these settings and sources."""
    key = hashlib.sha256(json.dumps([_FORMAT, settings, sources], sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_dir).absolute() / f"{kind}-{key}"


def is_fresh(folder: Path, sources: Sequence[str]) -> bool:
    """Tells whether a folder is built and needs nothing; waits for who builds it."""
    if not folder.exists():
        return False
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        return _stale_reason(folder, sources) is None


def build_number(folder: Path) -> int | None:
    """Differs after another process has built the folder; None before the first has."""
    try:
        return os.stat(folder).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return None


def sources_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns what a built folder knows of its sources' content, by their names."""
    return {source["source"]: source for source in _read_meta(folder)["sources"]}


def unread(source: str) -> dict[str, Any]:
    """Describes a source for `known` by its size and times: if these change, its content is taken to."""
    return {"source": source, "stat": _stat(source), "hash": None}


@contextlib.contextmanager
def built_folder(
    cache_dir: str,
    kind: str,
    settings: dict[str, Any],
    sources: Sequence[str],
    build: Callable[[Path], dict[str, Any]],
    check_sources: Callable[[list[str]], None] = lambda hashes: None,
    *,
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    waits: bool = True,
    log_level: int = logging.INFO,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yields the folder for these settings, and what `build` returned for it; others wait until it is built.

    `build(folder)` fills an empty folder and returns what to remember of it, as JSON. Nobody replaces the
    folder inside the `with`. `check_sources` hears the content hash of each source before anything is built,
    and may refuse. Of sources that are `known` and still as they were, the content is not read again. Without
    `waits` there is a BeingBuilt where others would wait.
    """
    folder = folder_of(cache_dir, kind, settings, sources)
    made = [parent for parent in folder.parents if not parent.exists()]
    with naming(f"data.cache_dir={cache_dir}", "choose a writable folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock"))
        with contextlib.suppress(Timeout):
            lock.acquire(blocking=waits)
    if not lock.is_locked:
        raise BeingBuilt(str(folder))
    try:
        if (reason := _stale_reason(folder, sources)) is not None:
            does = "rebuilding" if folder.exists() else "building"
            _log.log(log_level, "%s %s: %s", does, folder, reason)
            try:
                # Before they are read: a source that changes meanwhile is found stale the next time.
                described = [_describe(source, known) for source in sources]
                check_sources([source["hash"] for source in described])
                _build(folder, described, build)
            except BaseException:
                _leave_no_trace(folder, made)
                raise
        else:
            check_sources([source["hash"] for source in _read_meta(folder)["sources"]])
        yield folder, _read_meta(folder)["built"]
    finally:
        lock.release()


def _leave_no_trace(folder: Path, made: list[Path]) -> None:
    """Removes, after a failed first build, the lock file and those folders `made` for it that are empty."""
    if folder.exists():
        return
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
    for parent in made:
        if any(parent.iterdir()):
            break
        parent.rmdir()


def _build(folder: Path, described: list[dict[str, Any]], build: Callable[[Path], dict[str, Any]]) -> None:
    try:
        with written_folder(folder) as unfinished:
            built = build(unfinished)
            for path in list(unfinished.iterdir()):
                if not path.name.endswith(SUFFIX) and not path.with_name(path.name + SUFFIX).exists():
                    write_digests(path)
            files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir())}
            _write_meta(unfinished, {"sources": described, "files": files, "built": built})
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from error  # of what could not be written


def _stale_reason(folder: Path, sources: Sequence[str]) -> str | None:
    """Says why the folder must be built; None if it is fresh."""
    if not folder.exists():
        return "not built yet"
    try:
        meta = _read_meta(folder)
        for name, size in (files := meta["files"]).items():
            if (folder / name).stat().st_size != size or name + SUFFIX in files and is_damaged(folder / name):
                return f"{name} is damaged"
        recorded = meta["sources"]
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return "it is damaged"
    if [_stat(source) for source in sources] == [before["stat"] for before in recorded]:
        return None
    described = [_describe(source) for source in sources]
    for now, before in zip(described, recorded, strict=True):
        if now["hash"] != before["hash"]:
            return f"{os.path.relpath(now['source'])} changed"
    _write_meta(folder, {**meta, "sources": described})
    return None


def _describe(
    source: str, known: Mapping[str, dict[str, Any]] = MappingProxyType({})
) -> dict[str, Any]:
    if source in known and known[source]["stat"] == _stat(source):
        return known[source]
    return {"source": source, "stat": _stat(source), "hash": _content_hash(source)}


def _stat(source: str) -> list[int] | str:
    if source == SOURCE_NAME:
        return python_docs_fingerprint()
    status = os.stat(source)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _content_hash(source: str) -> str:
    if source == SOURCE_NAME:
        return python_docs_fingerprint()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
    if meta.pop("digest", _digest(meta)) != _digest(meta):  # earlier versions wrote none
        raise ValueError(f"{_META} is not as it was written")
    return meta


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    with written_file(folder / _META) as file:
        file.write(json.dumps({**meta, "digest": _digest(meta)}, indent=2).encode())


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16).hexdigest()
