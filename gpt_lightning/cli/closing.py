"""Says what a run has come to, when it ends."""

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Column, Table

from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.terminal import printable
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.checkpoint.files import is_sharded
from gpt_lightning.cli.errors import say, shorten
from gpt_lightning.cli.parser import ALLOW_IMPORT
from gpt_lightning.cli.program import called_as
from gpt_lightning.report.events import EVENTS
from gpt_lightning.report.page import REPORT_NAME, write_report
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.notes import part_of_text

NOTICEABLE = 0.01  # nats by which a loss at the end is above the lowest


def tell_of_other_logger(loggers: Any, run_folder: Path) -> None:
    """Says of given loggers, which take the place of the program's own, that no report comes of them."""
    given = loggers if isinstance(loggers, list | tuple) else [loggers]
    places = [Path(each.save_dir) for each in given if isinstance(each, TensorBoardLogger)]
    if not any(_is_in(place, run_folder) for place in places):
        curves = "its curves elsewhere" if places else "no curves"
        what = f"the run has no report, and TensorBoard {curves}"
        say(f"warning: with this trainer.logger {what}; docs/comparing_runs.md shows how to have both")


def _is_in(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def tell_how_to_go_on(trainer: Trainer, run_folder: Path, samples: TextSamples) -> None:
    """Prints the last samples, and the commands that show the curves and write more."""
    if samples.latest:
        print(f"\nwritten at step {samples.step:,}, each after its prompt and a |:")
    for prompt, text in zip(samples.prompts or [], samples.latest):
        print(printable(f"\n{prompt} | {text.removeprefix(prompt)}\n"))
    if places := [Path(each.save_dir) for each in trainer.loggers if isinstance(each, TensorBoardLogger)]:
        place = run_folder.parent if _is_in(places[0], run_folder) else places[0]
        say("to watch the curves (then http://localhost:6006/#custom_scalars), and to write more:")
        say(f"tensorboard --logdir {shlex.quote(str(place))}", to_copy=True)
    else:
        say("to write more:")
    ours = [each for each in trainer.checkpoint_callbacks if isinstance(each, RunCheckpoint)]
    saver: Any = ours[0] if ours else trainer.checkpoint_callback
    last = saver and (_best(saver, trainer) or saver.last_model_path or saver.best_model_path)
    if last and os.path.exists(last):
        path = shlex.quote(os.path.relpath(last))
        if is_sharded(Path(last)):  # which a model without its ranks does not read
            whole = shlex.quote(f"{run_folder.name}.ckpt")
            say(f"{called_as()} consolidate --ckpt_path {path} --output {whole}", to_copy=True)
            path = whole
        kind = type(trainer.lightning_module)
        own = f" --model {kind.__module__}.{kind.__qualname__} {ALLOW_IMPORT} {kind.__module__.split('.')[0]}"
        own = "" if kind is GPTLightningModule else own
        prompt = next(filter(None, samples.prompts or []), "The ")
        say(f"{called_as()} generate --ckpt_path {path}{own} --prompt {shlex.quote(prompt)}", to_copy=True)


def _best(saver: Any, trainer: Trainer) -> str | None:
    """Returns the best checkpoint, and says so, where the loss was lower at it than it is at the end."""
    path, best, end = saver.best_model_path, saver.best_model_score, trainer.callback_metrics.get("val/loss")
    if saver.monitor != "val/loss" or best is None or end is None or not os.path.exists(path):
        return None
    if float(end) - float(best) < NOTICEABLE:
        return None
    say(f"val/loss was lowest, {float(best):.3f}, at {Path(path).name}; it is {float(end):.3f} now")
    return str(path)


def show_held_out(verb: str, results: Sequence[Mapping[str, float]]) -> None:
    """Prints what was measured; each row says so where it was not measured on all of the split."""
    for metrics in results:
        # As Lightning's own table, in which a number could not say that it is of a part.
        table = Table(Column(f"{verb} metric".capitalize(), style="cyan"), Column("value", style="magenta"))
        shares = {name.partition("/")[0]: value for name, value in metrics.items() if name.endswith("/share")}
        for name, value in sorted(metrics.items()):
            share = shares.get(name.partition("/")[0])
            if not name.endswith("/share"):
                table.add_row(name if share is None else f"{name} ({part_of_text(share)})", str(value))
        Console().print(table)


def leave_report(run_folder: Path) -> None:
    """Writes the run's page into its folder, where there are events for one; no fault in it ends the run."""
    if not any(run_folder.rglob(EVENTS)):
        return
    try:
        write_report([run_folder], run_folder / REPORT_NAME)
    except Exception as error:  # the run itself has ended well
        say(f"warning: the report could not be written ({shorten(str(error) or repr(error))})")
    else:
        say(f"report: {run_folder / REPORT_NAME}")
