"""Saves what else a resumed run needs, beside weights, optimizer and data, to be the one that never ended."""

import logging
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, Timer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from gpt_lightning.callbacks.random_states import of_all_ranks, own_state, set_random_state
from gpt_lightning.checkpoint.files import OPTIMIZERS
from gpt_lightning.checkpoint.optimizer_state import problem_of_optimizer, problem_of_options
from gpt_lightning.checkpoint.training_state import STATES
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import rank_and_ranks
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.ranks import are_alike, gathered
from gpt_lightning.training.trainer import ResumeCallback, validation_is_due

RESUME_KEY = "resume"

_log = logging.getLogger("gpt_lightning")


class ExactResume(ResumeCallback):
    """Saves and restores the random states of all ranks, and where Lightning's loops were."""

    def __init__(self) -> None:
        self._validating = False
        self._random_state: dict[str, Any] | None = None
        self._monitored: dict[str, float] = {}
        self._owes_last_validation = self._owes_plateau = False
        self._samples_per_step = 0
        self._loaded: dict[str, Any] | None = None  # until the optimizers are there to compare with
        self._hooks: list[RemovableHandle] = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = True

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validating = False
        self._end_at_the_last_step(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            _check_numbers(trainer, loaded)
            check = partial(_check_state, trainer)
            own = [optimizer for optimizer in trainer.optimizers if _is_plain(optimizer)]
            self._hooks = [optimizer.register_load_state_dict_pre_hook(check) for optimizer in own]
        if self._owes_last_validation:
            # Else Lightning sees that all steps are done, and ends without the last one's validation.
            trainer.fit_loop.epoch_loop.max_steps += 1

    def _end_at_the_last_step(self, trainer: Trainer) -> None:
        if self._owes_last_validation:
            self._owes_last_validation = False
            trainer.fit_loop.epoch_loop.max_steps -= 1

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what a resumed run needs, for which Lightning has all ranks call this."""
        fit_loop = checkpoint["loops"]["fit_loop"]
        checkpoint[RESUME_KEY] = {
            **of_all_ranks(pl_module.device),
            "validation_is_due": validation_is_due(trainer),
            "validation_is_done": not self._validating and not _inside_a_batch(fit_loop),
            "epoch_is_finished": _epoch_is_finished(fit_loop, trainer.num_training_batches),
            "samples_per_step": self._samples_per_step,
            "monitored": _monitored(trainer),
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._loaded = checkpoint
        _refuse_begun_averages(trainer, checkpoint)
        saved = checkpoint.get(RESUME_KEY)
        if saved is None:
            _log.warning("the checkpoint was saved without ExactResume: random states begin anew")
            return
        if not isinstance(trainer.datamodule, TextDataModule):
            _log.warning(
                "without a TextDataModule no loader goes on where it was: an epoch that was interrupted is "
                "read from its beginning again"
            )
        self._random_state = _own_random_state(trainer, saved)
        self._samples_per_step = saved["samples_per_step"]
        self._monitored = saved.get("monitored", {})
        if saved["epoch_is_finished"] and isinstance(trainer.datamodule, TextDataModule):
            trainer.datamodule.close_epoch_first()
        # The limit trainer.max_time is one of this process: a job that goes on has all of it again.
        checkpoint["callbacks"].pop(Timer.__qualname__, None)
        due, done = saved["validation_is_due"], saved["validation_is_done"]
        fit_loop, step = checkpoint["loops"]["fit_loop"], checkpoint["global_step"]
        self._owes_plateau = _batches_that_stepped(fit_loop) < step
        _set_loops(fit_loop, step, due=due, done=done)
        self._owes_last_validation = due and not done and step == trainer.max_steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        _check_that_all_go_on_alike(trainer)
        former, self._samples_per_step = self._samples_per_step, _samples_per_step(trainer)
        for name, value in self._monitored.items():
            trainer.callback_metrics[name] = torch.tensor(value, dtype=torch.float64)
        if not validation_is_due(trainer):  # by the schedule of this run
            self._end_at_the_last_step(trainer)
            if self._owes_plateau:  # else Lightning asks such schedules where it ends that step's validation
                trainer.fit_loop.epoch_loop.update_lr_schedulers("step", update_plateau_schedulers=True)
        self._owes_plateau = False
        # Not earlier: what sets up a run may draw, and the run that was never killed has done that before.
        if self._random_state is not None:
            set_random_state(self._random_state, pl_module.device)
            self._random_state = None
            if former not in (0, self._samples_per_step) and trainer.is_global_zero:
                _log.info(
                    f"an optimizer step takes {self._samples_per_step:,} samples now, and took {former:,} "
                    f"before: the order goes on at sample {trainer.datamodule.consumed_samples:,}, none is "
                    "left out or repeated"
                )


def _own_random_state(trainer: Trainer, saved: dict[str, Any]) -> dict[str, Any]:
    state = own_state(saved, trainer.global_rank, trainer.world_size)
    if state is None and trainer.is_global_zero:
        _log.warning(
            "the checkpoint holds the random states of another number of ranks than there are now "
            f"({trainer.world_size}): all go on with the first one's"
        )
    return saved[STATES][0] if state is None else state


def _check_that_all_go_on_alike(trainer: Trainer) -> None:
    if are_alike(str(trainer.global_step).encode(), trainer.strategy.root_device):
        return
    steps = gathered(trainer.global_step)
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise UserError(
                f"ckpt_path: rank 0 begins at step {steps[0]} and rank {rank} at step {step}; let all ranks "
                "see the same files (trainer.default_root_dir)"
            )


def _samples_per_step(trainer: Trainer) -> int:
    """Counts the windows that an optimizer step takes, over all ranks and micro-batches."""
    if not isinstance(trainer.datamodule, TextDataModule):
        return 0
    return trainer.datamodule.batch_size * rank_and_ranks(trainer)[1] * trainer.accumulate_grad_batches


def _monitored(trainer: Trainer) -> dict[str, float]:
    """Returns the metrics that schedules wait for, which may ask for them before the next validation."""
    names = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name in names}


# ---- what a child class may have built otherwise than the run that saved


def _check_numbers(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuses what Lightning would restore a part of: other numbers of optimizers, lacking schedules."""
    saved, own = len(checkpoint.get(OPTIMIZERS, [])), len(trainer.optimizers)
    if saved != own:
        raise _refusal(trainer, f"holds the states of {saved} optimizers, and this run has {own}")
    schedules = checkpoint.get("lr_schedulers", [])
    if len(schedules) < len(trainer.lr_scheduler_configs):
        raise _refusal(trainer, f"holds {len(schedules)} of this run's schedules of the learning rate")
    for config, state in zip(trainer.lr_scheduler_configs, schedules):
        for name in config.scheduler.state_dict():
            if not name.startswith("_") and name not in state:
                raise _refusal(trainer, f"lacks {name} of the learning rate's schedule")


def _refuse_begun_averages(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Refuses what Lightning takes up again one epoch too late, with another learning rate until then."""
    for callback in trainer.callbacks:
        state = checkpoint["callbacks"].get(callback.state_key, {})
        if isinstance(callback, StochasticWeightAveraging) and state.get("scheduler_state") is not None:
            problem = "was saved when StochasticWeightAveraging had begun, which goes on otherwise from there"
            remedy = "name an earlier one, or begin a run with EMAWeightAveraging"
            raise UserError(f"ckpt_path={trainer.ckpt_path} {problem}; {remedy}")


def _is_plain(optimizer: Optimizer) -> bool:
    """Tells whether its parameters are ordinary ones, not parts that a strategy of others has made."""
    return all(type(p) is nn.Parameter for group in optimizer.param_groups for p in group["params"])


def _check_state(trainer: Trainer, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuses, before the optimizer takes it, a state that is not for this rank's parameters."""
    own = optimizer.param_groups
    # PyTorch fills in what is left out.
    whole = [{**options, **saved} for options, saved in zip(own, state["param_groups"])]
    groups = whole if len(whole) == len(state["param_groups"]) else state["param_groups"]
    parameters = [group["params"] for group in own]
    problem = problem_of_optimizer({**state, "param_groups": groups}, parameters)
    if problem is None:
        problem = problem_of_options(state, own)
    if problem is not None:
        raise _refusal(trainer, problem)


def _refusal(trainer: Trainer, problem: str) -> UserError:
    remedy = "go on with it as it was trained, or name another"
    return UserError(f"ckpt_path={trainer.ckpt_path} {problem}; {remedy}")


# ---- Lightning's loops


def _inside_a_batch(fit_loop: dict[str, Any]) -> bool:
    """Tells whether the checkpoint is made in `on_train_batch_end`."""
    total = fit_loop["epoch_loop.batch_progress"]["total"]
    return bool(total["processed"] > total["completed"])


def _epoch_is_finished(fit_loop: dict[str, Any], batches: float) -> bool:
    """Tells whether an epoch's batches are all trained, and what Lightning does at its end is not done."""
    epochs, trained = fit_loop["epoch_progress"]["current"], fit_loop["epoch_loop.batch_progress"]["current"]
    return bool(epochs["processed"] < epochs["started"] and trained["processed"] >= batches)


def _batches_that_stepped(fit_loop: dict[str, Any]) -> int:
    return int(fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"])


def _set_loops(fit_loop: dict[str, Any], global_step: int, *, due: bool, done: bool) -> None:
    """Has Lightning go on at the end of the batch that was trained last.

    After a checkpoint saved in `on_train_batch_end` it would leave out the validation and, at an epoch's end,
    the epoch's end with it; after one saved during a validation it would validate on a part of the text.
    """
    batches, epochs = fit_loop["epoch_loop.batch_progress"], fit_loop["epoch_progress"]["total"]
    if _inside_a_batch(fit_loop):
        for count in ("total", "current"):
            batches[count]["completed"] = batches[count]["processed"]
    # A validation that was begun and of which no batch is done is what makes Lightning run it all.
    begun = 1 if due and not done else 0
    validation = fit_loop["epoch_loop.val_loop.batch_progress"]
    for count, ready in (("total", begun), ("current", 0)):
        validation[count].update(ready=ready, started=ready, processed=0, completed=0)
    validation["is_last_batch"] = False
    if epochs["processed"] < epochs["started"]:
        # Lightning counts the step after its validation, in the code that it comes to again if one is due.
        fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = global_step - (1 if due else 0)
