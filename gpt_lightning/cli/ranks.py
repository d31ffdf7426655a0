"""Cares for runs of several processes, before they start and when they are done."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.callbacks.finite_guard import NonFiniteError
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.layers import check_sequence
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule


def this_rank() -> int:
    return getattr(rank_zero_only, "rank", 0)


def is_tensor_parallel(settings: Any) -> bool:
    """Tells whether the options of a verb choose TensorParallelDDPStrategy."""
    class_path = getattr(settings.trainer.strategy, "class_path", "")
    return class_path.rpartition(".")[2] == TensorParallelDDPStrategy.__name__


def build_without_memory(
    class_type: type[GPTLightningModule], *args: Any, **kwargs: Any
) -> GPTLightningModule:
    """Makes the module on the meta device, for the strategy to give each rank its part."""
    with torch.device("meta"):
        return class_type(*args, **kwargs)


def check_topology(strategy: Strategy, module: GPTLightningModule, seq_len: int | None) -> None:
    """Raises what would stop every rank later; `seq_len` is that of the training windows, if any."""
    assert isinstance(strategy, TensorParallelDDPStrategy)
    strategy.check(module)
    if strategy.sequence_parallel and seq_len is not None:
        check_sequence(seq_len, strategy.tensor_parallel_size)


@contextmanager
def leaving_together(rank_guard: RankGuard) -> Iterator[None]:
    """Ends the process groups while all ranks are there: when all is done, or ended by all of them."""
    try:
        yield
    except MisconfigurationException as error:  # Lightning's word for a user's mistake
        raise UserError(str(error)) from error
    except RuntimeError as error:
        rank_guard.explain(error)  # ends here if the error comes of a lost rank
        raise
    except (Stopped, NonFiniteError) as error:  # raised on all ranks, and said by the first
        _end_process_groups(rank_guard)
        if this_rank():
            sys.exit(error.exit_code)
        raise
    _end_process_groups(rank_guard)


def _end_process_groups(rank_guard: RankGuard) -> None:
    """Ends gloo's threads, which at the interpreter's exit abort a process now and then, its work done."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        rank_guard.leave()  # last: the first rank waits for its children, and they for the groups' end
