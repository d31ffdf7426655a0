"""Cares for runs of several processes, before they start and when they are done."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt_lightning.callbacks.finite_guard import NonFiniteError
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.cli.errors import this_rank
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule


def is_tensor_parallel(settings: Any) -> bool:
    """Tells whether the options of a verb choose TensorParallelDDPStrategy."""
    class_path = getattr(settings.trainer.strategy, "class_path", "")
    return class_path.rpartition(".")[2] == TensorParallelDDPStrategy.__name__


def build_without_memory(module: type[GPTLightningModule], *args: Any, **kwargs: Any) -> GPTLightningModule:
    """Makes the module on the meta device, for the strategy to give each rank its part."""
    with torch.device("meta"):
        return module(*args, **kwargs)


@contextmanager
def leaving_together(rank_guard: RankGuard) -> Iterator[None]:
    """Ends the process groups while all ranks are there: when all is done, or ended by all of them."""
    try:
        yield
    except MisconfigurationException as error:  # Lightning's word for a user's mistake
        raise UserError(str(error)) from error
    except (Stopped, NonFiniteError) as error:  # raised on all ranks, and said by the first
        rank_guard.leave()
        if this_rank():
            sys.exit(error.exit_code)
        raise
    rank_guard.leave()
