"""Keeps beside the curves, as texts in TensorBoard's events, what a report shows of a run."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# TensorBoard shows texts in the order of their names: what the model writes comes first.
SAMPLES = "samples/"  # with the number of the prompt
FACTS = "the_run/facts"  # with what, of what text and where it is trained
HELD_OUT = "the_run/held_out"  # a beginning of held-out text, token by token
REPETITION = f"{SAMPLES}repeated_4grams"  # a curve
OLD_NAMES = {FACTS: "run/facts", HELD_OUT: "run/held_out"}  # in runs of earlier versions


def note(trainer: "Trainer", tag: str, value: Any) -> None:
    """Writes plain data, which TensorBoard shows as a block of code."""
    from lightning.pytorch.loggers import TensorBoardLogger  # slow to import, and reports read the tags alone

    from gpt_lightning.training.trainer import loggers_may_fail

    text = json.dumps(value, ensure_ascii=False, indent=1 if isinstance(value, dict) else None)
    block = as_block(text)
    with loggers_may_fail(trainer):
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(tag, block, trainer.global_step)
                logger.save()


def as_block(text: str) -> str:
    """Makes of a text a block of code, for TensorBoard renders Markdown, and texts are to stay as they are.

    Lines end at line breaks alone, not at all that Unicode calls one: a text in JSON may hold these.
    """
    return "\n".join("    " + line for line in text.split("\n"))


def part_of(name: str) -> str:
    """Names the part of the model that a parameter belongs to: its first name, or that within a block."""
    words = [word for word in name.split(".") if word != "blocks" and not word.isdecimal()] or [name]
    is_norm = words[0].startswith("ln_") or words[-2:][0].endswith("_norm")
    return "norms" if is_norm else words[0]


def part_of_text(share: float) -> str:
    """Names the part of a split that numbers were taken of; rounding never makes it all."""
    return f"{min(100 * share, 99.9):.3g}% of text"
