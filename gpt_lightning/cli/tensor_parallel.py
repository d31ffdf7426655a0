"""What the program does for runs of several processes, before they start and when they are done."""

from typing import Any

import torch
from lightning.pytorch import Trainer

from gpt_lightning.parallel.layers import check_sequence
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule


def is_tensor_parallel(settings: Any) -> bool:
    """Whether the options of a verb choose the strategy."""
    class_path = getattr(settings.trainer.strategy, "class_path", "")
    return class_path.rpartition(".")[2] == TensorParallelDDPStrategy.__name__


def build_without_memory(
    class_type: type[GPTLightningModule], *args: Any, **kwargs: Any
) -> GPTLightningModule:
    """The module on the meta device, for the strategy to give each rank its part."""
    with torch.device("meta"):
        return class_type(*args, **kwargs)


def check_topology(trainer: Trainer, module: GPTLightningModule, seq_len: int | None) -> None:
    """Raise what would stop every rank later; `seq_len` is that of the training windows, if any."""
    strategy = trainer.strategy
    if isinstance(strategy, TensorParallelDDPStrategy):
        strategy.check(module)
        if strategy.sequence_parallel and seq_len is not None:
            check_sequence(seq_len, strategy.tensor_parallel_size)
