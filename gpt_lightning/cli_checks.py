"""What the options alone show to be wrong, and whose fault an error is."""

import sys
import traceback
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.config import GPTConfig
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig


def check_before_work(settings: Any, *, needs_data: bool) -> None:
    """Raise what can be raised before a tokenizer is trained or a file written."""
    config = GPTConfig(**{**settings.model.config.as_dict(), "vocab_size": 1})
    OptimizerConfig(**settings.model.optimizer.as_dict())
    ScheduleConfig(**settings.model.schedule.as_dict())
    GenerationConfig(**settings.generation.as_dict())
    for name in ("log_every_n_steps", "val_check_interval"):
        if settings.trainer[name] is not None and settings.trainer[name] == 0:
            raise ValueError(f"trainer.{name}=0 is below 1; choose a number of steps, or leave it out")
    if needs_data and settings.data.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"data.seq_len={settings.data.seq_len} is over "
            f"model.config.max_position_embeddings={config.max_position_embeddings}; "
            "lower the one or raise the other"
        )


def warn_of_untrained_positions(seq_len: int, positions: int) -> None:
    """Text longer than the training windows would be generated from positions that were never trained."""
    if seq_len < positions:
        say(
            f"warning: data.seq_len={seq_len} trains only the first {seq_len} of "
            f"model.config.max_position_embeddings={positions} positions; make them equal, unless the rest "
            "comes trained from a checkpoint"
        )


def complaint_in(error: BaseException | None) -> BaseException | None:
    """The error in this chain that was raised on purpose: by this package, or by Lightning on the options.

    None means that it is a fault of the program, whose traceback somebody will want to read.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
        if ours or isinstance(error, MisconfigurationException):
            return error
        error = error.__cause__
    return None


@rank_zero_only
def say(line: str) -> None:
    print(line, file=sys.stderr)
