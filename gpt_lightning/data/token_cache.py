"""Keeps the corpus as memory-mapped token ids, built once and trusted while it matches its sources.

A cache folder holds, for each split of `train`, `val` and `test` that has text, `<split>.tokens.bin` (uint16,
or uint32 for a vocabulary above 65536), `<split>.documents.bin` (uint64: where each document starts, and the
end), digests of both, and `meta.json`. Every document ends with eos. Opening costs the same for 1 MB and for
1 TB.
"""

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only
from numpy.typing import NDArray

from gpt_lightning.data.block_digests import CheckedFile
from gpt_lightning.data.cache_folder import built_folder, folder_of
from gpt_lightning.data.corpus import Corpus
from gpt_lightning.data.encoding import encode_pieces
from gpt_lightning.data.overlap import DocumentDigests, Dropped
from gpt_lightning.data.parts import SharedWork, parts_folder_of
from gpt_lightning.data.progress import reading
from gpt_lightning.data.token_files import with_notes, write_text
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.data.windows import Ints, document_ids, gather
from gpt_lightning.exit_codes import UserError

_MOST_READ = 10_000_000  # documents whose starts are read to find the longest

_log = logging.getLogger("gpt_lightning")


@dataclass(frozen=True)
class TokenSplit:
    """Holds one split of a cache: its counts, and its arrays, mapped at first use."""

    folder: Path
    name: str
    dtype: str
    n_tokens: int
    n_bytes: int
    n_documents: int
    # Documents that are in train, too, or of train itself those that repeat another; not known of old caches.
    n_repeated: int | None = None
    lost_share: float | None = None  # of its characters, by a sample; not known of old caches
    n_longest: int | None = None  # tokens of the longest document; not known of old caches

    @cached_property
    def tokens(self) -> NDArray[np.integer]:
        # As plain arrays: np.memmap's own indexing takes longer than the rows of a batch.
        return np.asarray(np.memmap(self.folder / f"{self.name}.tokens.bin", dtype=self.dtype, mode="r"))

    @cached_property
    def document_starts(self) -> NDArray[np.uint64]:
        return np.asarray(np.memmap(self.folder / f"{self.name}.documents.bin", dtype=np.uint64, mode="r"))

    @property
    def longest_document(self) -> int | None:
        """Counts its tokens; of an old cache by reading where documents start, unless these are too many."""
        if self.n_longest is None and self.n_documents <= _MOST_READ:
            return int(np.diff(self.document_starts).max())
        return self.n_longest

    @cached_property
    def _checked(self) -> tuple[CheckedFile, CheckedFile]:
        return (
            CheckedFile(self.folder / f"{self.name}.tokens.bin", self.tokens),
            CheckedFile(self.folder / f"{self.name}.documents.bin", self.document_starts),
        )

    def map(self) -> None:
        """Maps the files; refuses others than are described, as a cache of an earlier version may hold."""
        self._checked
        found = (len(self.tokens), len(self.document_starts) - 1, int(self.document_starts[-1]))
        if found != (self.n_tokens, self.n_documents, self.n_tokens):
            problem = f"data.cache_dir: {self.folder} does not hold the {self.n_tokens} tokens it tells of"
            raise UserError(f"{problem}; remove that folder, and it is built anew")

    def check(self, starts: Ints, seq_len: int, *, documents: bool) -> None:
        """Refuses damaged files before windows of `seq_len` targets from `starts` on are read from them."""
        of_tokens, of_documents = self._checked
        of_tokens.check(starts - 1, seq_len + 1)
        if documents and len(starts):
            of_documents.check_sorted(starts, starts + seq_len)
            around_the_end = max(1, int(starts.max()) + seq_len - self.n_tokens)
            of_documents.check_sorted(np.array([0]), np.array([around_the_end]))

    def gather(self, starts: Ints, lengths: Ints, *, rows: int, seq_len: int) -> tuple[Ints, Ints]:
        """Reads inputs and targets [rows, seq_len] of the windows."""
        return gather([self.tokens] * len(starts), starts, lengths, rows=rows, seq_len=seq_len)

    def document_ids(self, starts: Ints, lengths: Ints, *, rows: int, seq_len: int) -> Ints:
        """Tells which document each input is in, counted within its window."""
        sizes = {"n_tokens": self.n_tokens, "rows": rows, "seq_len": seq_len}
        return document_ids(self.document_starts, starts, lengths, **sizes)

    def opening(self, document: int, n_tokens: int) -> list[int]:
        """Returns the first tokens of a document, up to so many."""
        start, end = map(int, self.document_starts[document : document + 2])
        end = min(end, start + n_tokens)
        self.check(np.array([start + 1]), end - start - 1, documents=False)
        found: list[int] = self.tokens[start:end].tolist()
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker maps the files itself; a pickled map would be a copy of the corpus.
        maps = ("tokens", "document_starts", "_checked")
        return {name: value for name, value in self.__dict__.items() if name not in maps}


def prepare_tokens(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    cache_dir: str,
    check_train: Callable[[int], None] = lambda n_tokens: None,
    check_sources: Callable[[list[str]], None] = lambda hashes: None,
    *,
    drop_repeated: bool = False,
    others: Literal["wait", "leave"] | None = None,
) -> dict[str, TokenSplit]:
    """Opens the splits that have tokens, in any process; one builds them where the cache is not fresh.

    With `others`, or where such work was left undone, all processes that come here build it; who has nothing
    left to do waits for the others, or leaves with OthersAtWork. `check_train` hears the number of training
    tokens before a new cache is kept, and may refuse it; `check_sources` the content hashes of
    `corpus.sources`, before one is built. With `drop_repeated` no document is held out that the training text
    has, too.
    """
    dropping = {"drop_repeated": True} if drop_repeated else {}
    settings = {**asdict(corpus), "tokenizer": tokenizer.encoding, **dropping}
    where = cache_dir, "tokens", settings, corpus.sources
    parts_folder = parts_folder_of(cache_folder := folder_of(*where))
    work = SharedWork(cache_folder, corpus, tokenizer, drop_repeated=drop_repeated)
    if is_shared := others is not None or parts_folder.exists():
        work.do(waits=others != "leave")

    def build(folder: Path) -> dict[str, Any]:
        counts = work.join(folder) if is_shared else _write_tokens(folder, corpus, tokenizer, drop_repeated)
        if corpus.train_files:
            with _without_parts(parts_folder):
                check_train(counts["train"]["n_tokens"] if "train" in counts else 0)
        noted = {"is_separated": corpus.is_separated, "windows_files": corpus.n_with_windows_line_ends}
        return {**counts, **noted}

    with built_folder(*where, build, check_sources, known=work.known) as (folder, built):
        splits = _opened(folder, built)
        shutil.rmtree(parts_folder, ignore_errors=True)
    for warning in _warnings(built, corpus):
        rank_zero_only(_log.warning)("warning: %s", warning)
    return splits


@contextmanager
def _without_parts(folder: Path) -> Iterator[None]:
    """Removes what a refused cache was made of."""
    try:
        yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _opened(folder: Path, built: dict[str, Any]) -> dict[str, TokenSplit]:
    """Maps the files before another process may replace the folder: from here on these maps never change."""
    order = ("train", "val", "test")
    splits = {name: TokenSplit(folder, name, **built[name]) for name in order if name in built}
    for split in splits.values():
        split.map()
    return splits


def _warnings(built: dict[str, Any], corpus: Corpus) -> Iterator[str]:
    """Says of a text what may not be meant so, where the cache, if it is not an old one, knows it."""
    if not built.get("is_separated", True):
        yield separator_warning(str(corpus.document_separator))
    if n_files := built.get("windows_files"):
        files = "1 file has" if n_files == 1 else f"{n_files:,} files have"
        yield f"{files} Windows line ends, so the model learns to write \\r; convert, e.g. with dos2unix"
    if n_rows := built.get("empty_rows"):
        rows = "1 row holds" if n_rows == 1 else f"{n_rows:,} rows hold"
        yield f"{rows} no text under data.text_key={corpus.text_key}; they are left out"


def separator_warning(separator: str) -> str:
    """Says of a separator that it occurs nowhere."""
    problem = f"data.document_separator={separator!r} stands in no .txt file, and each is one document"
    escapes = r""" (a line break is $'\n' in a shell, "\n" in a file)""" if "\\" in separator else ""
    return f"{problem}; leave it out, or give what stands between documents{escapes}"


def loss_warning(losing: list[TokenSplit]) -> str:
    """Says of splits that may lack text what their numbers do not mean."""
    known = {split.name: split.lost_share for split in losing if split.lost_share is not None}
    shares = [f"{100 * share:.3g}% of {name}" for name, share in known.items()]
    if not shares:
        folder = losing[0].folder
        problem = f"{folder} does not say how much text the tokenizer loses, so no bpb is shown"
        return f"{problem}; remove it to have that measured"
    problem = f"the tokenizer loses text, by a sample decoded again {', '.join(shares)}"
    return f"{problem}; ppl there is of what is left, and no bpb is shown"


def _repeated(folder: Path, corpus: Corpus) -> Dropped:
    """Reads the text to find what of the held-out text is also in train; refuses to leave nothing of it."""
    digests = DocumentDigests(folder)
    with reading("Comparing documents", corpus.n_bytes) as advance:
        for _ in digests.noted(corpus.read_marked(advance)):
            pass
    return digests.repeated_to_drop()


def _write_tokens(
    folder: Path, corpus: Corpus, tokenizer: TextTokenizer, drop_repeated: bool
) -> dict[str, Any]:
    """Fills the folder of a cache, for `built_folder`."""
    dropped = _repeated(folder, corpus) if drop_repeated else {}
    empty_rows, encode = count(), partial(encode_pieces, tokenizer=tokenizer)
    with reading("Tokenizing", corpus.n_bytes) as advance:
        read = corpus.read_marked(advance, partial(next, empty_rows))
        written = write_text(folder, read, dropped, encode, tokenizer.vocab_size)
    return {**with_notes(*written, tokenizer), "empty_rows": next(empty_rows)}
