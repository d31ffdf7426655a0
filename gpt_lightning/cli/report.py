"""Says and logs what a run has come to, when it ends."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.callbacks.terminal import for_readers
from gpt_lightning.cli.errors import say


def tell_how_to_go_on(trainer: Trainer, run_folder: Path, texts: list[str]) -> None:
    """Prints the last samples, and the commands that show the curves and write more."""
    for text in texts:
        print(for_readers(f"\n{text}\n", sys.stdout))
    folder = shlex.quote(str(run_folder.parent))
    say(f"to watch the curves, and to write more:\ntensorboard --logdir {folder}")
    saver: Any = trainer.checkpoint_callback
    if saver is not None and (last := saver.last_model_path or saver.best_model_path):
        path = shlex.quote(os.path.relpath(last))
        say(f"{_program()} predict --ckpt_path {path} --data.prompts '[\"The \"]'")


def log_hyperparameters(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Fills TensorBoard's table of runs: what was chosen, and the loss that came of it."""
    loss = trainer.callback_metrics.get("val/loss")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and loss is not None:
            logger.log_hyperparams(dict(settings), {"val/loss": float(loss)}, trainer.global_step)
            logger.save()


def _program() -> str:
    """Says how this program was called, so that the line works when it is pasted."""
    if Path(sys.argv[0]).name == "gpt-lightning":
        return sys.argv[0]
    on_path = shutil.which("python") == sys.executable
    return f"{'python' if on_path else shlex.quote(os.path.relpath(sys.executable))} -m gpt_lightning"
