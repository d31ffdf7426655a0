"""Has a run's tokenizer ready: trained on its training text, or opened, and kept for the next run."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from gpt_lightning.data.cache_folder import built_folder
from gpt_lightning.data.corpus import Corpus, no_train_files
from gpt_lightning.data.documents import source_bytes, utf8_length
from gpt_lightning.data.progress import reading, waiting
from gpt_lightning.data.tokenizer import (
    TextTokenizer,
    as_transformers_reads,
    default_vocab_size,
    is_trained_here,
    load_tokenizer,
    requested_vocab_size,
    train_bpe,
)


def tokenizer_named(
    name: str, find_corpus: Callable[[], Corpus], cache_dir: str, check_train: Callable[[int], None]
) -> TextTokenizer:
    """Trains or opens the tokenizer that `data.tokenizer` names.

    `check_train` hears the most training tokens that there can be before one is trained, and may refuse it.
    """
    if not is_trained_here(name):
        return _opened(name, find_corpus, cache_dir)
    corpus = find_corpus()
    if not corpus.train_files:
        raise no_train_files()
    # A token has a byte at least; too little text is refused before a tokenizer is made of it.
    if all(file.endswith((".txt", ".jsonl")) for file in corpus.train_files):
        check_train(sum(map(source_bytes, corpus.train_files)))
    return prepare_tokenizer(corpus, requested_vocab_size(name), cache_dir)


def prepare_tokenizer(corpus: Corpus, vocab_size: int | None, cache_dir: str) -> TextTokenizer:
    """Trains a BPE on the training split alone; without a `vocab_size`, the split's size decides it."""
    settings = {**asdict(corpus), "test_files": (), "vocab_size": vocab_size}
    # Whatever stands in the validation files, it decides only that nothing else is held out.
    settings["val_files"] = bool(corpus.val_files)

    def texts(on_bytes: Callable[[int], None] = lambda n_bytes: None) -> Iterator[str]:
        return (piece.text for name, piece in corpus.read_train(on_bytes) if name == "train")

    def build(folder: Path) -> dict[str, Any]:
        size = vocab_size or default_vocab_size(sum(map(utf8_length, texts())))
        with ExitStack() as merging:

            def read() -> Iterator[str]:
                n_bytes = sum(map(source_bytes, corpus.train_files))
                with reading("Reading text for the tokenizer", n_bytes) as advance:
                    yield from texts(advance)
                merging.enter_context(waiting("Merging pairs into tokens"))

            train_bpe(read(), size).save(folder)
        return {}

    with built_folder(cache_dir, "tokenizer", settings, corpus.train_files, build) as (folder, _):
        return load_tokenizer(str(folder))


def _opened(name: str, find_corpus: Callable[[], Corpus], cache_dir: str) -> TextTokenizer:
    """Opens `bytes`, a name on the hub, or a folder.

    A folder is compared once with what transformers makes of it, on some text of the corpus, if there is any.
    """
    folder = Path(os.path.expanduser(name)).absolute()
    if name == "bytes" or not folder.is_dir() or not (corpus := find_corpus()).sources:
        return load_tokenizer(name)
    kinds = (".json", ".txt", ".model")
    files = [str(file) for file in sorted(folder.iterdir()) if file.suffix in kinds and file.is_file()]

    def build(unfinished: Path) -> dict[str, Any]:
        ours = load_tokenizer(name)
        pieces = islice(corpus.read(corpus.sources, lambda n_bytes: None), 64)
        return as_transformers_reads(folder, ours, [piece.text[:1000] for piece in pieces]).state

    with built_folder(cache_dir, "tokenizer", asdict(corpus), files, build) as (_, built):
        return TextTokenizer.from_dict(built)
