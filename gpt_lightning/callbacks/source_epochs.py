"""Tells how often each text of a mixture is gone through, and ends a run before one is used twice."""

import logging
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.dealing import MixtureOrder
from gpt_lightning.exit_codes import UserError
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.trainer import is_inside_a_step, is_logging_step

_log = logging.getLogger("gpt_lightning")


class SourceEpochs(Callback):
    """Says what a mixture is made of, and once of each text that it begins again; logs data/epochs/<name>.

    With data.mixture_used_up=stop the run has no more steps than all texts last for, as if trainer.max_steps
    said so: the schedule of the learning rate ends there, too. A run that goes on with another batch size
    may be over earlier.
    """

    def __init__(self) -> None:
        self._order: MixtureOrder | None = None
        self._names: list[str] = []
        self._repeated: set[str] = set()  # texts of which it is said

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data, self._order = trainer.datamodule, None
        if stage != "fit" or not isinstance(data, TextDataModule) or data.mixture is None:
            return
        order, self._names = data.train_order(), data.mixture.names
        assert isinstance(order, MixtureOrder)
        if data.mixture_used_up == "stop":
            _end_with_the_text(trainer, order, self._names)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = trainer.datamodule
        if not isinstance(data, TextDataModule) or data.mixture is None:
            return
        order = data.train_order()  # from the checkpoint's position on, if there is one
        assert isinstance(order, MixtureOrder)
        self._order = order
        self._repeated = {name for name, epochs in self._epochs(order.start).items() if epochs > 1}
        total, at_end = trainer.estimated_stepping_batches, {}
        if total != float("inf"):
            batches = int(total - trainer.global_step) * trainer.accumulate_grad_batches
            at_end = self._epochs(order.span(batches)[0])
        for name, weight in data.mixture.described_weights().items():
            n_tokens = data.split_counts("train", name)[0]
            epochs = f", {at_end[name]:.3g} epochs of it by step {int(total):,}" if at_end else ""
            _say(f"mixture: {name} with weight {weight}, {n_tokens:,} tokens{epochs}")

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._order is None:
            return
        data: Any = trainer.datamodule
        epochs, step = self._epochs(data.reached_samples), trainer.global_step + 1
        for name in (name for name, count in epochs.items() if count > 1 and name not in self._repeated):
            self._repeated.add(name)
            _say(f"step {step:,}: all text of {name} is used, and its epoch 2 begins")
        if is_logging_step(trainer, step) and isinstance(pl_module, GPTLightningModule):
            values = {f"data/epochs/{name}": count for name, count in epochs.items()}
            pl_module.step_row.add(trainer, values)  # which the module writes after this hook

    @override
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        data: Any = trainer.datamodule
        if self._order is None or data.mixture_used_up != "stop" or is_inside_a_step(trainer):
            return
        rest, end = replace(self._order, start=data.consumed_samples), self._order.first_end
        if end is not None and rest.steps_until(end[0]) == 0:
            trainer.should_stop = True

    def _epochs(self, position: int) -> dict[str, float]:
        """Tells how often each text was gone through before a position."""
        assert self._order is not None
        return dict(zip(self._names, self._order.epochs(position), strict=True))


def _end_with_the_text(trainer: Trainer, order: MixtureOrder, names: list[str]) -> None:
    """Lowers the number of steps to what all texts last for."""
    if order.first_end is None:
        return
    position, index = order.first_end
    steps, name = order.steps_until(position), names[index]
    if steps == 0:
        problem = f"data.mixture_used_up=stop: {name} has less text than the first step takes of it"
        raise UserError(f"{problem}; lower data.batch_size or its weight, or give it more text")
    loop = trainer.fit_loop.epoch_loop
    if not 0 <= loop.max_steps <= steps:
        loop.max_steps = steps
        _say(f"the run ends at step {steps:,}, before {name} begins again (data.mixture_used_up=stop)")


@rank_zero_only
def _say(line: str) -> None:
    _log.info(line)
