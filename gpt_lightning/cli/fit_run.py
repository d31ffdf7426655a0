"""Makes of a fit's options what no other verb has: the run's folder, and the callbacks that know it."""

from contextlib import ExitStack
from glob import escape
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.callbacks.evaluation import Evaluation
from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.initial_weights import InitialWeights
from gpt_lightning.callbacks.overview import Overview
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.run_config import RunConfig
from gpt_lightning.callbacks.run_facts import RunFacts
from gpt_lightning.callbacks.source_epochs import SourceEpochs
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.checkpoint.contents import ORIGIN_KEY
from gpt_lightning.checkpoint.runs import check_place, open_named_folder, open_run_folder
from gpt_lightning.cli.checks import (
    check_task_files,
    tell_of_no_export,
    warn_of_no_validation,
    warn_of_untrained_positions,
)
from gpt_lightning.cli.closing import leave_report, tell_how_to_go_on, tell_of_other_logger
from gpt_lightning.cli.errors import say, this_rank
from gpt_lightning.cli.hyperparameters import compared_options
from gpt_lightning.cli.origin import Origin
from gpt_lightning.cli.ranks import on_first_machine
from gpt_lightning.cli.recipes import QUICKSTART, recipe, with_recipe_names


class FitRun:
    """Is one run of `fit`, from its options to what is said at its end.

    `restored` is what the Trainer will restore, empty where the run begins; `words` are the command line.
    """

    def __init__(self, settings: Any, origin: Origin, restored: dict[str, Any], words: list[str]) -> None:
        self._settings, self._origin, self._restored, self._words = settings, origin, restored, words
        last, done = settings.trainer.max_steps, restored.get("global_step", 0)
        if 0 < last < done:
            say(f"warning: the run is at step {done:,}, beyond trainer.max_steps={last}; none is left")
        elif 0 < last == done:
            say(f"the run is at trainer.max_steps={last} already, and no step is left; raise it to go on")
        if origin.init_from is None and ORIGIN_KEY not in restored:
            warn_of_untrained_positions(settings)
            tell_of_no_export(settings)
        if not settings.trainer.fast_dev_run:
            warn_of_no_validation(settings.trainer)
        check_task_files(settings.evaluate.tasks, words)
        self.evaluation = Evaluation(**settings.evaluate)
        self._guard, self._samples = FiniteGuard(**settings.non_finite), TextSamples(**settings.samples)
        self._saver = RunCheckpoint(**settings.checkpoint)

    def open_folder(self, root: Path, ending: ExitStack) -> None:
        """Finds the run's own folder; the first rank alone writes into it, and keeps other processes out."""
        settings = self._settings
        self._folder = root / settings.run_name
        if not settings.trainer.fast_dev_run and this_rank() == 0:
            path = Path(settings.ckpt_path) if self._restored else None
            run = open_run_folder(self._folder, path, begins_again=self._origin.begins_again)
            ending.callback(run.close)
            if (own := settings.checkpoint.dirpath) is not None:
                ending.callback(open_named_folder(Path(own), path, f"checkpoint.dirpath={own}").close)
            if run.folder != self._folder and not self._restored:
                say(f"{self._folder} holds another run; to go on with that one, add --ckpt_path last")
            self._folder = run.folder
        elif not settings.trainer.fast_dev_run and on_first_machine():
            check_place(self._folder)
        settings.run_name = self._folder.name

    def callbacks(self, trainer: dict[str, Any], parser: ArgumentParser, n_parameters: int) -> list[Callback]:
        """Makes the run's callbacks, and its logger in the Trainer's options where they name none."""
        if trainer["logger"] in (None, True):
            # Curves of a killed run go on after its last checkpoint: what comes again is shown once.
            again_from = 1 + self._restored.get("global_step", 0)
            trainer["logger"] = TensorBoardLogger(
                self._folder, name="logs", version="", default_hp_metric=False, purge_step=again_from
            )
        elif trainer["logger"] is not False:
            tell_of_other_logger(trainer["logger"], self._folder)
        parser.default_config_files = [escape(str(recipe(QUICKSTART)))]  # not what lies beneath this run
        compared = compared_options(self._settings, parser.get_defaults(), n_parameters)
        overview = Overview(compared if trainer["enable_autolog_hparams"] else {})
        callbacks = [self._guard, ExactResume(), Throughput(), overview, self._samples, self.evaluation]
        if self._settings.data.mixture is not None:
            callbacks.insert(0, SourceEpochs())
        if self._origin.checkpoint is not None and self._origin.init_from is not None:
            callbacks.insert(0, InitialWeights(self._origin.init_from, self._origin.checkpoint.contents))
        if trainer["enable_checkpointing"] is not False:
            self._saver.dirpath = self._saver.dirpath or str(self._folder)
            callbacks.append(self._saver)
        if not trainer["fast_dev_run"]:
            callbacks.append(RunConfig(parser, self._settings, self._folder))
            callbacks.append(RunFacts(with_recipe_names(self._words), parser, self._settings))
        return callbacks

    def tell_of_end(self, trainer: Trainer) -> None:
        leave_report(self._folder)
        tell_how_to_go_on(trainer, self._folder, self._samples)
