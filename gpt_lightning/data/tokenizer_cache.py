"""Has a run's tokenizer ready: trained on its training text, or opened, and kept for the next run."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Any

from gpt_lightning.data.cache_folder import built_folder
from gpt_lightning.data.corpus import Corpus, no_train_files
from gpt_lightning.data.documents import source_bytes, utf8_length
from gpt_lightning.data.progress import reading, waiting
from gpt_lightning.data.text_source import TextSource
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
    name: str,
    sources: Sequence[TextSource],
    cache_dir: str,
    check_tokens: Callable[[TextSource, int], None],
) -> TextTokenizer:
    """Trains or opens the tokenizer that `data.tokenizer` names.

    `check_tokens` hears the most training tokens that a source can have before one is trained, and may refuse
    it.
    """
    if not is_trained_here(name):
        return _opened(name, sources[0].corpus, cache_dir)
    corpora = [source.corpus() for source in sources]
    for source, corpus in zip(sources, corpora, strict=True):
        if not corpus.train_files:
            raise no_train_files()
        # A token has a byte at least; too little text is refused before a tokenizer is made of it.
        if all(file.endswith((".txt", ".jsonl")) for file in corpus.train_files):
            check_tokens(source, sum(map(source_bytes, corpus.train_files)))
    return prepare_tokenizer(corpora, requested_vocab_size(name), cache_dir)


def prepare_tokenizer(corpora: Sequence[Corpus], vocab_size: int | None, cache_dir: str) -> TextTokenizer:
    """Trains a BPE on the training splits alone; without a `vocab_size`, their size decides it."""
    described = [*map(_described, corpora)]
    settings = {**(described[0] if len(described) == 1 else {"sources": described}), "vocab_size": vocab_size}
    files = [file for corpus in corpora for file in corpus.train_files]

    def texts(on_bytes: Callable[[int], None] = lambda n_bytes: None) -> Iterator[str]:
        marked = chain.from_iterable(corpus.read_train(on_bytes) for corpus in corpora)
        return (piece.text for name, piece in marked if name == "train")

    def build(folder: Path) -> dict[str, Any]:
        size = vocab_size or default_vocab_size(sum(map(utf8_length, texts())))
        with ExitStack() as merging:

            def read() -> Iterator[str]:
                n_bytes = sum(map(source_bytes, files))
                with reading("Reading text for the tokenizer", n_bytes) as advance:
                    yield from texts(advance)
                merging.enter_context(waiting("Merging pairs into tokens"))

            train_bpe(read(), size).save(folder)
        return {}

    with built_folder(cache_dir, "tokenizer", settings, files, build) as (folder, _):
        return load_tokenizer(str(folder))


def _described(corpus: Corpus) -> dict[str, Any]:
    """Tells what decides which text a tokenizer is trained on.

    Whatever stands in the validation files, it decides only that nothing else is held out.
    """
    return {**asdict(corpus), "test_files": (), "val_files": bool(corpus.val_files)}


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
