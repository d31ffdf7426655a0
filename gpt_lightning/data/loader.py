"""Makes batches of windows as tensors, and the loader that asks for them by number."""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from typing_extensions import override

import gpt_lightning.data.windows as windows
from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.exit_codes import UserError

_PR_SET_PDEATHSIG = 1


class TokenBatch(NamedTuple):
    """Holds windows of text; rows that an epoch's last batch does not fill have no targets."""

    input_ids: Tensor  # [B, T]
    targets: Tensor  # [B, T], -100 where nothing is scored
    document_ids: Tensor | None  # [B, T]
    sample_ids: Tensor | None = None  # [B], positions in the training order; -1 for a row that none fills
    step_tokens: int | None = None  # scored by all ranks in all micro-batches of the optimizer step


@dataclass(eq=False)
class WindowBatches(Dataset[TokenBatch]):
    """Makes one rank's batches of a split, by the number of the batch; `seed=None` reads them in order.

    A batch is gathered in one go, and its number is all that a worker is told: what it holds cannot depend on
    how many workers there are. Numbers count from the sample at `start`, over epoch ends.
    """

    split: TokenSplit
    _: KW_ONLY
    seq_len: int
    batch_size: int
    rank: int
    ranks: int
    document_mask: bool
    vocab_size: int
    seed: int | None = None
    start: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        n_tokens, seq_len = self.split.n_tokens, self.seq_len
        self.epochs = windows.Epochs(
            windows.n_windows(n_tokens, seq_len), self.batch_size * self.ranks, self.accumulate
        )
        self._cut = partial(windows.cut_windows, n_tokens=n_tokens, seq_len=seq_len, seed=self.seed)

    def __len__(self) -> int:
        return self.epochs.n_batches(self.epochs.windows)

    def n_targets(self, batches: range) -> int:
        """Counts the targets that all ranks score in these batches."""
        spans = (self.epochs.span(self.start, batch) for batch in batches)
        return sum(int(self._cut(np.arange(*span))[1].sum()) for span in spans)

    def __getitem__(self, batch: int) -> TokenBatch:
        sizes = {"rows": self.batch_size, "seq_len": self.seq_len}
        first, last = self.epochs.span(self.start, batch)
        # Ranks take turns, so the global batch is the same for any number of ranks.
        positions = np.arange(first + self.rank, last, self.ranks)
        starts, lengths = self._cut(positions)
        inputs, targets = windows.gather(self.split.tokens, starts, lengths, **sizes)
        # Any other input is a target too.
        if (largest := max(targets.max(), inputs[:, 0].max())) >= self.vocab_size:
            raise UserError(
                f"data.cache_dir: {self.split.folder} holds token id {largest}, and the tokenizer has "
                f"{self.vocab_size}; remove that folder, and it is built anew"
            )
        document_ids = None
        if self.document_mask:
            document_starts = self.split.document_starts
            document_ids = torch.from_numpy(
                windows.document_ids(document_starts, starts, lengths, n_tokens=self.split.n_tokens, **sizes)
            )
        sample_ids = np.full(self.batch_size, -1)
        sample_ids[: len(positions)] = positions
        return TokenBatch(
            torch.from_numpy(inputs), torch.from_numpy(targets), document_ids, torch.from_numpy(sample_ids)
        )


class BatchNumbers(NamedTuple):
    """Tells the batches still to come in an epoch, and how many the whole epoch has."""

    remaining: range
    epoch_length: int


class BatchNumberSampler(DistributedSampler[int]):
    """Asks for whole batches by number.

    A DistributedSampler by name only: Lightning replaces any other kind by one of its own, which would
    shuffle and deal out again what is already this rank's.
    """

    def __init__(self, dataset: Sequence[Any] | Dataset[Any], numbers: Callable[[], BatchNumbers]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self._numbers = numbers

    def __len__(self) -> int:
        # Lightning counts an epoch's batches from its beginning, also those that were done before a resume.
        return self._numbers().epoch_length

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers().remaining)


class BatchLoader(DataLoader[Any]):
    """Tells Lightning, which would warn, that it can be resumed; the datamodule keeps the position."""

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers or self.pin_memory:
            return super().__iter__()
        # Items are whole batches already, each of which costs less time than PyTorch's own iterator.
        return map(self.dataset.__getitem__, self.sampler)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict


def batch_loader(
    dataset: Sequence[Any] | Dataset[Any],
    numbers: Callable[[], BatchNumbers],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Makes a loader whose items are whole batches already."""
    return BatchLoader(
        dataset,  # type: ignore[arg-type]
        sampler=BatchNumberSampler(dataset, numbers),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_belong_to_the_run,
        # Else each epoch and validation would draw the workers' seed from the stream that dropout draws from.
        generator=torch.Generator(),
    )


def _belong_to_the_run(worker_id: int) -> None:
    """Ignores what a scheduler signals all processes of a job: a run without workers cannot end its step.

    A scheduler signals all processes of a job; without its workers the run could not finish its step. They
    end with the run, also if it is killed while they start, before PyTorch's own watch begins.
    """
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    is_child = multiprocessing.get_start_method(allow_none=True) != "forkserver"
    if is_child and parent is not None and parent.pid != os.getppid():
        os._exit(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def rank_and_ranks(trainer: Any) -> tuple[int, int]:
    """Tells this process's data-parallel rank and how many there are, as the Trainer's strategy has it.

    Only they read different samples: tensor-parallel peers have the same rank.
    """
    kwargs = trainer.distributed_sampler_kwargs
    return (0, 1) if kwargs is None else (kwargs["rank"], kwargs["num_replicas"])


def is_first_of_replica(trainer: Any) -> bool:
    """Tells whether this process speaks for its tensor-parallel peers, which have adjacent ranks."""
    return bool(trainer.global_rank % (trainer.world_size // rank_and_ranks(trainer)[1]) == 0)
