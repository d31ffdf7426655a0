"""Goes from trial to trial of a sweep: optuna proposes the values, and gives up what its curve condemns."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_lightning.checkpoint.atomic import written_file
from gpt_lightning.exit_codes import MISTAKE, NON_FINITE, UserError
from gpt_lightning.sweep.process import Curve, Signals
from gpt_lightning.sweep.space import Choice, Varied, short_names, spread_evenly

if TYPE_CHECKING:
    import optuna

WORDS, TRIALS = "sweep.json", "trials.db"
FINISHED, GIVEN_UP, DIVERGED, REFUSED, FAILED = "finished", "given up", "diverged", "refused", "failed"
REPEATED, UNMEASURED = "repeated", "ended without a val/loss"


@dataclass(frozen=True)
class Sweep:
    """Says what is varied, in which folder the sweep keeps what it knows, and how a trial is begun."""

    folder: Path
    varied: tuple[Varied, ...]
    words: tuple[str, ...]  # of a fit, that all trials have
    program: tuple[str, ...]  # which is a fit, without any words
    n_trials: int
    warmup_steps: int = 0  # of a trial, before it may be given up
    gives_up: bool = True

    def run_folder(self, number: int) -> Path:
        return self.folder.with_name(f"{self.folder.name}-trial{number + 1:02d}")

    def words_of(self, values: dict[str, str]) -> list[str]:
        """Returns the words of a fit with these values."""
        return [*self.words, *(f"--{name}={value}" for name, value in values.items())]

    @property
    def n_spread(self) -> int:
        """Counts the trials before those whose values follow from what has come of others."""
        return 4 + 2 * len(self.varied)

    @property
    def grid(self) -> list[dict[str, str]]:
        """Lists all combinations, where there are so few choices that all can be tried."""
        choices = [each for each in self.varied if isinstance(each, Choice)]
        if len(choices) < len(self.varied) or math.prod(len(each.values) for each in choices) > self.n_trials:
            return []
        names = [each.name for each in choices]
        return [dict(zip(names, values)) for values in product(*(each.values for each in choices))]


@dataclass(frozen=True)
class Outcome:
    """Tells what has come of a trial: its lowest validation loss, and the step of that."""

    number: int
    values: dict[str, str]
    state: str
    loss: float | None = None
    step: int | None = None
    note: str = ""

    @property
    def rank(self) -> tuple[bool, bool, float]:
        """Sorts the finished ones first, by their losses."""
        loss = math.inf if self.loss is None else self.loss
        return self.state != FINISHED, self.loss is None, loss


def open_sweep(sweep: Sweep) -> None:
    """Makes the folder of a sweep, or finds that it was begun by the same words."""
    varied = [asdict(each) for each in sweep.varied]
    said = json.loads(json.dumps({"vary": varied, "fit": sweep.words}))
    path = sweep.folder / WORDS
    if path.is_file():
        with suppress(ValueError):
            if json.loads(path.read_text(encoding="utf-8")) == said:
                return
        problem = f"run_name={sweep.folder.name}: {sweep.folder} holds a sweep that was begun by other words"
        raise UserError(f"{problem}; give another --run_name, or remove it and its trials")
    if trials := [*sweep.folder.parent.glob(f"{sweep.folder.name}-trial*")]:
        problem = f"run_name={sweep.folder.name}: {trials[0]} is a trial of another sweep"
        raise UserError(f"{problem}; give another --run_name, or remove it")
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with written_file(path) as file:
        file.write(json.dumps(said, indent=1).encode())


def search(sweep: Sweep, signals: Signals, tell: Callable[[str], None]) -> list[Outcome]:
    """Runs the trials that are left, and returns what has come of all."""
    storage = _storage(sweep.folder)
    study = _study(sweep, storage)
    n_trials = len(sweep.grid) or sweep.n_trials
    while True:
        signals.check()
        trial = _next_trial(study, storage, sweep, n_trials)
        if trial is None:
            return outcomes(study)
        values = {each.name: each.suggest(trial) for each in sweep.varied}
        trial.set_user_attr("values", values)
        _run(study, trial, sweep, n_trials, signals, tell)


def outcomes(study: "optuna.Study") -> list[Outcome]:
    """Returns the trials that have ended, the best first."""
    ended = [_outcome(trial) for trial in study.trials if trial.state.is_finished()]
    return sorted(ended, key=lambda each: each.rank)


def check_installed() -> None:
    try:
        import optuna
    except ImportError as error:
        raise UserError("sweep needs optuna; pip install 'gpt_lightning[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _storage(folder: Path) -> "optuna.storages.RDBStorage":
    import optuna
    from sqlalchemy import URL

    place = URL.create("sqlite", database=str(folder / TRIALS))
    return optuna.storages.RDBStorage(place.render_as_string())


def _study(sweep: Sweep, storage: "optuna.storages.RDBStorage") -> "optuna.Study":
    import optuna

    # Against others at the same step, when three have come to their end.
    judge = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=sweep.warmup_steps)
    never = optuna.pruners.NopPruner()
    return optuna.create_study(
        storage=storage,
        study_name="sweep",
        pruner=judge if sweep.gives_up else never,
        load_if_exists=True,
    )


def _next_trial(
    study: "optuna.Study", storage: "optuna.storages.RDBStorage", sweep: Sweep, n_trials: int
) -> "optuna.Trial | None":
    """Returns the trial that was under way when the sweep was stopped, or a new one; None after the last."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial, TrialState

    under_way = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    number = under_way[0].number if under_way else len(study.get_trials(deepcopy=False)) - len(waiting)
    # Of each trial's own seed, so that a sweep that goes on does not draw again what it began with.
    study.sampler = TPESampler(seed=number, n_startup_trials=sweep.n_spread)
    if under_way:
        study_id = storage.get_study_id_from_name(study.study_name)
        return Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))
    if number >= n_trials:
        return None
    if not waiting and (sweep.grid or number < sweep.n_spread):
        study.enqueue_trial(sweep.grid[number] if sweep.grid else spread_evenly(sweep.varied, number))
    return study.ask()


def _run(
    study: "optuna.Study",
    trial: "optuna.Trial",
    sweep: Sweep,
    n_trials: int,
    signals: Signals,
    tell: Callable[[str], None],
) -> None:
    """Runs one trial to its end, or to where it is given up, and tells the study."""
    number, values = trial.number, trial.user_attrs["values"]
    name = f"trial {number + 1} of {n_trials}"
    names = short_names(sweep.varied)
    tell(f"{name}: {'  '.join(f'{names[option]} {value}' for option, value in values.items())}")
    if (twin := _twin(study, number, values)) is not None:
        tell(f"{name}: the same as trial {twin.number + 1}")
        # One that did not come to its end has a value too, the last of its curve.
        came_to_its_end = twin.user_attrs.get("state") == FINISHED
        _end(study, trial, REPEATED, twin.values[0] if came_to_its_end else None)
        return
    folder, log = sweep.run_folder(number), sweep.folder / f"trial{number + 1:02d}.log"
    signals.wait_until_free(folder, tell)
    curve, reported = Curve(folder), {*study.trials[number].intermediate_values}

    def look() -> bool:
        for step, loss in curve.read().items():
            if step not in reported and math.isfinite(loss):
                reported.add(step)
                trial.report(loss, step)
                tell(f"  step {step:,}: val/loss {loss:.4g}")
        return trial.should_prune()

    own = ["--run_name", folder.name, "--ckpt_path", "last"]
    code, was_ended = signals.run([*sweep.program, *sweep.words_of(values), *own], log, look)
    state, note = _judged(code, was_ended, log)
    losses = study.trials[number].intermediate_values
    if state == FINISHED and not losses:
        state = UNMEASURED
    trial.set_user_attr("note", note)
    _end(study, trial, state, min(losses.values(), default=None))
    best = f"val/loss {min(losses.values()):.4f}" if losses else ""
    tell("  ".join(part for part in (f"{name}: {state}", best, note) if part))


def _judged(code: int, was_ended: bool, log: Path) -> tuple[str, str]:
    if was_ended:
        return GIVEN_UP, ""
    if code == 0:
        return FINISHED, ""
    state = {MISTAKE: REFUSED, NON_FINITE: DIVERGED}.get(code, FAILED)
    said = _last_line(log)
    return state, said if state != FAILED else f"exit code {code}: {said}"


def _last_line(log: Path) -> str:
    """Returns what a program said last, or the last that it called an error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


def _twin(study: "optuna.Study", number: int, values: dict[str, str]) -> "optuna.trial.FrozenTrial | None":
    """Finds an earlier trial of the same values, which would come to the same end."""
    for other in study.get_trials(deepcopy=False)[:number]:
        if other.user_attrs.get("values") == values:
            return other
    return None


def _end(study: "optuna.Study", trial: "optuna.Trial", state: str, loss: float | None) -> None:
    """Tells the study; it keeps away from what diverged or was refused as from what was given up."""
    from optuna.trial import TrialState

    trial.set_user_attr("state", state)
    if state in (FINISHED, REPEATED) and loss is not None:
        study.tell(trial, loss)
    else:
        study.tell(trial, state=TrialState.FAIL if state in (FAILED, UNMEASURED) else TrialState.PRUNED)


def _outcome(trial: "optuna.trial.FrozenTrial") -> Outcome:
    attributes: dict[str, Any] = trial.user_attrs
    curve = trial.intermediate_values
    step = min(curve, key=lambda step: curve[step], default=None)
    loss = None if step is None else curve[step]
    values, state = attributes.get("values", {}), attributes.get("state", FAILED)
    return Outcome(trial.number, values, state, loss, step, attributes.get("note", ""))


def told_apart(found: Sequence[Outcome]) -> list[Outcome]:
    """Leaves out trials that were the same as others."""
    return [each for each in found if each.state != REPEATED]
