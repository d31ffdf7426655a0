"""Makes the Trainer of its options, and of what it has against them one line."""

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt_lightning.cli.errors import shorten
from gpt_lightning.cli.ranks import check_environment
from gpt_lightning.exit_codes import UserError
from gpt_lightning.training.trainer import GPTTrainer


def make_trainer(settings: dict[str, Any]) -> GPTTrainer:
    if type(settings["val_check_interval"]) is int:
        # Lightning counts micro-batches here; everything else in a configuration counts optimizer steps.
        settings["val_check_interval"] *= settings["accumulate_grad_batches"]
        settings["check_val_every_n_epoch"] = None
    try:
        trainer = GPTTrainer(**settings)
        check_environment(trainer)
    except RuntimeError as error:
        if "SLURM" in str(error):
            raise UserError(shorten(str(error))) from error
        if "more than one stateful callback" not in str(error):
            raise
        kind, remedy = shorten(str(error)).partition(". ")[0], "+= adds to those of the configuration"
        raise UserError(f"trainer.callbacks: {kind}; name each once, {remedy}") from error
    except (TypeError, ValueError, MisconfigurationException) as error:
        prefix = "" if str(error).startswith("trainer.") else "trainer: "
        raise UserError(prefix + shorten(str(error))) from error
    return trainer
