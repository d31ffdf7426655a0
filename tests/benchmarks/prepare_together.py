"""Tokenizing a corpus by several processes of `prepare`, each on one core as if on a machine of its own.

    python tests/benchmarks/prepare_together.py --tokenizer FOLDER

FOLDER holds GPT-2's tokenizer.json. The corpus is drawn sentences, in .jsonl files of about 2 MB or as large
as is said: one of all megabytes is cut for the processes. Each process is new, has its libraries loaded when
the clock starts, and has the whole cache, joined and opened, when it stops. "alone" is `prepare` without
others on one core; every cache is compared with that one's, byte for byte. The last line is the result as
JSON, with the time that opening a cache takes.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Literal

from data import write_corpus

from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.python_docs import SOURCE_NAME
from gpt_lightning.data.token_cache import prepare_tokens
from gpt_lightning.data.tokenizer import load_tokenizer

Others = Literal["wait"] | None


def corpus_of(folder: Path) -> Corpus:
    patterns = {"train_files": [str(folder)], "val_files": None, "test_files": None}
    options = {"val_fraction": 0.1, "seed": 0, "text_key": "text", "document_separator": None}
    return Corpus.find(patterns, **options)


def write_files(folder: Path, sources: list[str], count: int, megabytes: float) -> None:
    """Files of the same documents, but for a number before each, and in another order each."""
    write_corpus(first := folder / "0.jsonl", sources, megabytes)
    rows = first.read_text(encoding="utf-8").splitlines(keepends=True)
    for number in range(1, count):
        own = (row.replace('{"text": "', f'{{"text": "{number} ') for row in rows[number:] + rows[:number])
        (folder / f"{number}.jsonl").write_text("".join(own), encoding="utf-8")


def take_part(core: int, text: Path, cache: Path, tokenizer: str, others: Others, start: Barrier) -> None:
    os.sched_setaffinity(0, {core})
    corpus, loaded = corpus_of(text), load_tokenizer(tokenizer)
    start.wait()
    prepare_tokens(corpus, loaded, str(cache), others=others)


def seconds(cores: list[int], others: Others, text: Path, cache: Path, tokenizer: str) -> float:
    context = get_context("spawn")
    start = context.Barrier(len(cores) + 1)
    processes = [
        context.Process(target=take_part, args=(core, text, cache, tokenizer, others, start))
        for core in cores
    ]
    for process in processes:
        process.start()
    start.wait()
    began = time.perf_counter()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a process has failed")
    return time.perf_counter() - began


def digest_of(cache: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(cache.glob("tokens-*/*.bin*")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def opening_milliseconds(text: Path, cache: Path, tokenizer: str) -> float:
    corpus, loaded = corpus_of(text), load_tokenizer(tokenizer)
    began = time.perf_counter()
    prepare_tokens(corpus, loaded, str(cache))
    return 1000 * (time.perf_counter() - began)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--tokenizer", required=True, help="folder of a tokenizer.json")
    parser.add_argument("--files", nargs="+", default=[SOURCE_NAME], help="whose sentences are drawn")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=96, help="size of the corpus")
    parser.add_argument("--file_megabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))[: options.processes]
    took: dict[str, list[float]] = {"alone": [], "together": []}
    with tempfile.TemporaryDirectory() as name:
        (text := Path(name) / "text").mkdir()
        n_files = round(options.megabytes / options.file_megabytes)
        write_files(text, options.files, n_files, options.file_megabytes)
        found = set()
        for turn in range(options.rounds):
            for title, times in took.items():
                contestants = (cores, "wait") if title == "together" else (cores[:1], None)
                cache = Path(name) / f"{title}{turn}"
                times.append(seconds(*contestants, text, cache, options.tokenizer))
                found.add(digest_of(cache))
        opening = opening_milliseconds(text, cache, options.tokenizer)
    alone, together = (statistics.median(took[title]) for title in ("alone", "together"))
    for title, times in took.items():
        print(f"{title:9} {' '.join(f'{each:.2f}' for each in times)} seconds")
    result = {"processes": len(cores), "times_as_fast": round(alone / together, 2)}
    print(json.dumps({**result, "opening_ms": round(opening, 1), "same_bytes": len(found) == 1}))


if __name__ == "__main__":
    main()
