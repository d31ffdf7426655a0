"""Makes batches of windows as tensors, and the loader that asks for them by number and optimizer step."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler
from typing_extensions import override

from gpt_lightning.data.mixed_text import MixedSplit
from gpt_lightning.data.token_cache import TokenSplit
from gpt_lightning.data.windows import IGNORED_TARGET, SampleOrder
from gpt_lightning.exit_codes import UserError

_PR_SET_PDEATHSIG = 1


class TokenBatch(NamedTuple):
    """Holds windows of text; rows that an epoch's last batch does not fill have no targets."""

    input_ids: Tensor  # [B, T]
    targets: Tensor  # [B, T], -100 where nothing is scored
    document_ids: Tensor | None = None  # [B, T]
    sample_ids: Tensor | None = None  # [B], positions in the training order; -1 for a row that none fills
    step_tokens: int | None = None  # scored by all ranks in all micro-batches of the optimizer step
    source: str | None = None  # the one text of a mixture that all rows are of, in evaluation

    def scored(self) -> Tensor:
        """Counts the targets that are scored, on the batch's device."""
        return (self.targets != IGNORED_TARGET).sum()


def token_batch(batch: Any) -> TokenBatch:
    """Takes what any loader may give: a TokenBatch, inputs and targets, or a mapping that names them."""
    match batch:
        case TokenBatch():
            return _checked(batch)
        case Mapping():
            found = ", ".join(map(str, batch))
            parts: list[Any] = [batch.get("input_ids"), batch.get("targets")]
        case list() | tuple():
            found, parts = f"{len(batch)} values", list(batch)
        case _:
            found, parts = f"a {type(batch).__name__}", []
    if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
        raise UserError(
            f"a batch holds {found}; give input_ids and targets, the token that follows each: a TokenBatch, "
            "a pair of tensors or a mapping, or write a training_step of your own"
        )
    return _checked(TokenBatch(*parts))


def _checked(batch: TokenBatch) -> TokenBatch:
    """Refuses what a loss would be taken of all the same, each token's of another one's target."""
    shapes = {tuple(part.shape) for part in (batch.input_ids, batch.targets)}
    kinds = {part.dtype for part in (batch.input_ids, batch.targets)}
    if len(shapes) > 1 or batch.input_ids.dim() != 2 or not kinds <= {torch.int32, torch.int64}:
        ids, targets = (f"{tuple(part.shape)} of {part.dtype}" for part in (batch.input_ids, batch.targets))
        raise UserError(
            f"a batch has input_ids {ids} and targets {targets}; give both as rows of as many torch.int64 ids"
        )
    return batch


class StepBatch(NamedTuple):
    """Names a batch by its number, from where the run goes on, and by those of its optimizer step."""

    number: int
    step: range


@dataclass(eq=False, kw_only=True)
class WindowBatches(Dataset[TokenBatch]):
    """Makes one rank's batches of a split, or of those of several texts, each in one go.

    Its name is all that a worker is told: what a batch holds cannot depend on how many workers there are.
    """

    split: TokenSplit | MixedSplit
    epochs: SampleOrder
    rank: int
    ranks: int
    document_mask: bool
    vocab_size: int

    def __len__(self) -> int:
        return self.epochs.epoch_batches

    @property
    def first_batches(self) -> int:
        """Counts those of the epoch in which the order begins."""
        return self.epochs.first_batches

    def __getitem__(self, batch: StepBatch) -> TokenBatch:
        sizes = {"rows": self.epochs.global_batch // self.ranks, "seq_len": self.epochs.seq_len}
        first, last = self.epochs.span(batch.number)
        # Ranks take turns, so the global batch is the same for any number of ranks.
        positions = np.arange(first + self.rank, last, self.ranks)
        starts, lengths = self.epochs.cut(positions)
        self.split.check(starts, self.epochs.seq_len, documents=self.document_mask)
        inputs, targets = self.split.gather(starts, lengths, **sizes)
        # Any other input is a target too.
        if (largest := max(targets.max(), inputs[:, 0].max())) >= self.vocab_size:
            raise UserError(
                f"data.cache_dir: {self.split.folder} holds token id {largest}, and the tokenizer has "
                f"{self.vocab_size}; remove that folder, and it is built anew"
            )
        documents = None
        if self.document_mask:
            documents = torch.from_numpy(self.split.document_ids(starts, lengths, **sizes))
        sample_ids = np.full(len(inputs), -1)
        sample_ids[: len(positions)] = positions
        return TokenBatch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            documents,
            torch.from_numpy(sample_ids),
            self.epochs.n_targets(batch.step),
        )


class HeldOutBatches(Dataset[TokenBatch]):
    """Makes the batches of several texts, each of one, which it names.

    They come in turns by how many each has, so that the first so many have some of every text.
    """

    def __init__(self, parts: Mapping[str | None, WindowBatches]) -> None:
        self._parts = [*parts.items()]
        lengths = [len(part) for part in parts.values()]
        turns = np.concatenate([(np.arange(length) + 0.5) / length for length in lengths])
        order = turns.argsort(kind="stable")
        self._part = np.repeat(np.arange(len(lengths)), lengths)[order]
        self._number = np.concatenate([np.arange(length) for length in lengths])[order]

    def __len__(self) -> int:
        return len(self._part)

    @property
    def first_batches(self) -> int:
        return len(self)

    def __getitem__(self, batch: StepBatch) -> TokenBatch:
        source, part = self._parts[self._part[batch.number]]
        number = int(self._number[batch.number])
        return part[StepBatch(number, range(number, number + 1))]._replace(source=source)


class EpochBatches(NamedTuple):
    """Tells the batches still to come in an epoch, and how Lightning deals an epoch's to optimizer steps."""

    numbers: range
    epoch_length: int
    done: int = 0  # of this epoch, before those to come
    accumulate: int = 1
    trained_length: float = math.inf  # where limit_train_batches ends the epoch, or its end


class BatchSampler(DistributedSampler[StepBatch], SequentialSampler):
    """Asks for whole batches.

    A DistributedSampler by name only: Lightning replaces any other kind by one of its own, which would
    shuffle and deal out again what is already this rank's. With overfit_batches it does so with any that is
    no SequentialSampler.
    """

    def __init__(self, dataset: Dataset[Any], batches: Callable[[], EpochBatches]) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self._batches = batches

    def __len__(self) -> int:
        # Lightning counts an epoch's batches from its beginning, also those that were done before a resume.
        return self._batches().epoch_length

    def __iter__(self) -> Iterator[StepBatch]:  # type: ignore[override]
        """Deals batches to steps: Lightning steps after `accumulate` of an epoch, and after its last.

        It begins when the first batch is asked for: only then has Lightning counted those before a resume.
        """
        batches = self._batches()
        for done, number in enumerate(batches.numbers, start=batches.done):
            first = number - done % batches.accumulate
            end = first + batches.accumulate
            if done < batches.trained_length:  # else Lightning goes on with an epoch that was finished
                end = int(min(end, number + batches.trained_length - done))
            yield StepBatch(number, range(max(0, first), end))


class BatchLoader(DataLoader[Any]):
    """Tells Lightning, which would warn, that it can be resumed; the datamodule keeps the position."""

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self.num_workers or self.pin_memory:
            return self._from_workers()
        # Items are whole batches already, each of which costs less time than PyTorch's own iterator.
        return map(self.dataset.__getitem__, self.sampler)

    def _from_workers(self) -> Iterator[Any]:
        """Begins with the first batch that is asked for; PyTorch has workers begin when they are there."""
        try:
            yield from super().__iter__()
        except UserError as error:  # PyTorch puts the worker's traceback before the one line
            raise UserError(str(error).splitlines()[-1].partition("UserError: ")[2]) from None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert not state_dict


def batch_loader(
    dataset: Dataset[Any],
    batches: Callable[[], EpochBatches],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> BatchLoader:
    """Makes a loader whose items are whole batches already."""
    return BatchLoader(
        dataset,
        sampler=BatchSampler(dataset, batches),
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=_belong_to_the_run,
        # Else each epoch and validation would draw the workers' seed from the stream that dropout draws from.
        generator=torch.Generator(),
    )


def _belong_to_the_run(worker_id: int) -> None:
    """Ignores what a scheduler signals all processes of a job: a run without workers cannot end its step.

    They end with the run, also if it is killed while they start, before PyTorch's own watch begins.
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


def rank_and_ranks(trainer: Any) -> tuple[int, int]:
    """Tells this process's data-parallel rank and how many there are, as the Trainer's strategy has it.

    Only they read different samples: tensor-parallel peers have the same rank.
    """
    kwargs = trainer.distributed_sampler_kwargs
    return (0, 1) if kwargs is None else (kwargs["rank"], kwargs["num_replicas"])


def is_first_of_replica(trainer: Any) -> bool:
    """Tells whether this process speaks for its tensor-parallel peers, which have adjacent ranks."""
    return bool(trainer.global_rank % (trainer.world_size // rank_and_ranks(trainer)[1]) == 0)
