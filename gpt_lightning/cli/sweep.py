"""Runs `sweep`: reads its words, tries those of the first trial, and shows at the end which was the best."""

import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from itertools import islice, product
from pathlib import Path
from typing import Any

from typing_extensions import override

from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.checkpoint.atomic import release, take_lock
from gpt_lightning.checkpoint.runs import LAST, LOCK, checkpoints_folder, run_folder
from gpt_lightning.cli.app import GPTLightningCLI
from gpt_lightning.cli.checks import ends_before_validation
from gpt_lightning.cli.config_file import complete_words
from gpt_lightning.cli.errors import say
from gpt_lightning.cli.main import VERBS
from gpt_lightning.cli.parser import PARSER_ONLY, PlainParser
from gpt_lightning.cli.program import called_as
from gpt_lightning.cli.trainer_parser import files_in_utf8, limited_imports
from gpt_lightning.exit_codes import UserError
from gpt_lightning.report.page import write_report
from gpt_lightning.sweep.process import Signals, SweepStopped
from gpt_lightning.sweep.search import (
    FINISHED,
    UNMEASURED,
    Outcome,
    Sweep,
    check_installed,
    open_sweep,
    search,
    told_apart,
)
from gpt_lightning.sweep.space import RULE, Varied, read_varied
from gpt_lightning.sweep.table import save_plot, table

OWN = ("--vary", "--trials", "--run_name", "--give_up")
HELP = ("-h", "--help", "--help-all")
# By which trials are told apart, followed or kept out of each other's way.
NOT_VARIED = {"run_name", "ckpt_path", "trainer.default_root_dir", "checkpoint.dirpath", "trainer.logger"}
_COMBINATIONS = 16  # of which one is to be a run


class _FitWords(GPTLightningCLI):
    """Settles and checks the options of a fit, of which nothing is made."""

    @override
    def _begin_run(self, settings: Any, root: Path) -> None:
        """Refuses a trial that would measure nothing by which to judge it."""
        every, last = settings.trainer.val_check_interval, settings.trainer.max_steps
        if ends_before_validation(settings.trainer):
            problem = f"trainer.val_check_interval={every} is above trainer.max_steps={last}"
            raise UserError(f"{problem}, and trials need a val/loss; lower the one or raise the other")

    @override
    def instantiate_classes(self) -> None: ...


def run_sweep(words: list[str]) -> None:
    own, fit_words = _separated(words)
    options = _parser().parse_args(own)
    varied = read_varied(options.vary or [])
    if options.trials < 1:
        raise UserError(f"trials={options.trials} is below 1; raise it")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep starts its trials itself; call it once, without torchrun")
    check_installed()
    with limited_imports(fit_words) as rest, files_in_utf8(), _without_news():
        settings = _checked(rest, varied)
    root = checkpoints_folder(settings.trainer.default_root_dir)
    name = options.run_name or f"{settings.run_name}-sweep"
    has_steps = settings.trainer.max_steps > 0
    if options.give_up and not has_steps:
        say("the trials end by epochs or time, a third of which is not known: none is given up")
    sweep = Sweep(
        folder=run_folder(root, name),
        varied=varied,
        words=tuple(fit_words),
        program=(sys.executable, "-m", "gpt_lightning", "fit"),
        n_trials=options.trials,
        warmup_steps=settings.trainer.max_steps // 3 if has_steps else 0,
        gives_up=options.give_up and has_steps,
    )
    open_sweep(sweep)
    if (lock := take_lock(sweep.folder / LOCK)) is None:
        raise UserError(f"run_name={name}: another process runs this sweep; wait for it, or give another")
    try:
        with Signals() as signals:
            found = search(sweep, signals, say)
    except SweepStopped:
        say(f"to go on:\n{called_as()} sweep {shlex.join(words)}")
        raise
    finally:
        release(lock)
    _show(sweep, told_apart(found))


@contextmanager
def _without_news() -> Iterator[None]:
    """Leaves out what Lightning tells of a run, which here is none."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _parser() -> PlainParser:
    about = f"{VERBS['sweep']}\n\n{RULE}\nEvery other option is one of fit, and each trial has it."
    parser = PlainParser(prog="gpt-lightning sweep", description=about)
    parser.arguments = "--vary NAME=VALUES [--vary ...] [--trials N] [--option value ...]"
    help = "An option of fit, and what to try of it: learning_rate's 1e-3..1e-2, or 2,4. May be repeated."
    parser.add_argument("--vary", type=str, action="append", help=help)
    help = "How many to run; fewer if there are not so many combinations of choices."
    parser.add_argument("--trials", type=int, default=12, help=help)
    help = "Folder of the sweep under checkpoints/, and beginning of its trials' names."
    parser.add_argument("--run_name", type=str | None, help=help)
    help = "Stop a trial whose val/loss is above the median of others at the same step, after a third of it."
    parser.add_argument("--give_up", type=bool, default=True, help=help)
    return parser


def _separated(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates what is said to the sweep from what is said to each fit."""
    own: list[str] = []
    rest: list[str] = []
    remaining = iter(words)
    for word in remaining:
        name, equals, _ = word.partition("=")
        if word == PARSER_ONLY:
            own.append(word)
        elif name in HELP:
            own.append("--help")
        elif name in OWN:
            own += [word] if equals else [word, *islice(remaining, 1)]
        else:
            rest.append(word)
    return own, rest


def _checked(words: list[str], varied: Sequence[Varied]) -> Any:
    """Returns the settings of a first trial; raises, or ends the program, where there can be none."""
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    for each in varied:
        if each.name in NOT_VARIED:
            raise UserError(f"--vary {each.name} is for the sweep to choose; leave it out")
        if each.name in given - {"config"}:
            raise UserError(f"{each.name} is varied, and given too; leave out the one or the other")
    with _naming_varied(varied):
        return _first_settings(words, varied)


@contextmanager
def _naming_varied(varied: Sequence[Varied]) -> Iterator[None]:
    """Has what is wrong with an option that is varied said of --vary, and not of a trial's words."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            yield
    finally:
        lines = said.getvalue()
        for each in varied:
            lines = re.sub(rf"(?<!\S)--{re.escape(each.name)}=\S*", f"--vary {each.name}", lines)
        print(lines, end="", file=sys.stderr)


def _first_settings(words: list[str], varied: Sequence[Varied]) -> Any:
    """Returns the settings of the first combination that can be trained."""
    firsts = product(*(each.examples for each in varied))
    refusal: UserError | None = None
    for values in islice(firsts, _COMBINATIONS):  # not each combination need be one that can be trained
        try:
            fit = _parsed(words, [f"--{each.name}={value}" for each, value in zip(varied, values)])
            break
        except UserError as error:
            refusal = refusal or error
    else:
        assert refusal is not None
        raise refusal
    for each in varied:
        for value in each.examples if each.name != "config" else ():
            fit.parser.parse_args(complete_words(["fit", *words, f"--{each.name}={value}"])[0][1:])
    _check_settings(fit.config)
    return fit.config


def _parsed(words: list[str], values: list[str]) -> _FitWords:
    with ExitStack() as ending:
        return _FitWords(*complete_words(["fit", *words, *values]), RankGuard(), ending)


def _check_settings(settings: Any) -> None:
    refused = {
        "ckpt_path": (settings.ckpt_path, "each trial begins anew"),
        "checkpoint.dirpath": (settings.checkpoint.dirpath, "all trials would write there"),
        "trainer.fast_dev_run": (settings.trainer.fast_dev_run, "such runs keep no curves"),
        "trainer.logger": (settings.trainer.logger not in (None, True), "trials are judged by their curves"),
        "trainer.limit_val_batches": (settings.trainer.limit_val_batches == 0, "trials need a val/loss"),
    }
    for name, (is_given, reason) in refused.items():
        if is_given:
            raise UserError(f"{name}={settings[name]}: {reason}; leave it out of a sweep")


def _show(sweep: Sweep, found: list[Outcome]) -> None:
    """Prints the table and the best command, and writes plot and report into the sweep's folder."""
    print(table(found, sweep.varied), flush=True)
    try:
        if measured := [each for each in found if each.loss is not None]:
            _plot(sweep, measured)
            _compare([sweep.run_folder(each.number) for each in measured], sweep.folder / "report.html")
    finally:
        _tell_best(sweep, found)


def _plot(sweep: Sweep, found: list[Outcome]) -> None:
    paths = [sweep.folder / "losses.html", sweep.folder / "losses.png"]
    try:
        save_plot(found, sweep.varied, paths)
    except UserError as error:
        say(f"no plot: {error}")
    else:
        say(f"plot: {paths[0]} (and {paths[1].name})")


def _compare(folders: list[Path], output: Path) -> None:
    """Writes the report that compares runs."""
    try:
        write_report(folders, output)
    except UserError as error:
        say(f"no report: {error}")
    else:
        say(f"report: {output}")


def _tell_best(sweep: Sweep, found: list[Outcome]) -> None:
    finished = [each for each in found if each.state == FINISHED]
    if not finished:
        if any(each.state == UNMEASURED for each in found):
            problem = "no trial has a val/loss, though some came to their end"
            raise UserError(f"{problem}; have them validate earlier, by a lower trainer.val_check_interval")
        raise UserError(f"no trial came to its end; see {sweep.folder}/trial*.log")
    best = finished[0]
    last = shlex.quote(os.path.relpath(sweep.run_folder(best.number) / LAST))
    command = [*sweep.words_of(best.values), "--run_name", f"{sweep.folder.name}-best"]
    say("to watch the curves, to write with the best model, and to train it again:")
    say(f"tensorboard --logdir {shlex.quote(os.path.relpath(sweep.folder.parent))}")
    say(f"{called_as()} generate --ckpt_path {last}")
    say(f"{called_as()} fit {shlex.join(command)}")
