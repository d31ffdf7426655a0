"""Averages weights that ranks have parts of, as Lightning's WeightAveraging and its like do whole ones."""

import copy
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from gpt_lightning.checkpoint.files import AVERAGING_KEY, TRAINED_KEY, WEIGHTS
from gpt_lightning.exit_codes import UserError


class Access(NamedTuple):
    """Says how to do with a model in parts what is simple with a whole one."""

    share_out: Callable[[nn.Module], None]  # leaves in a copy of the model what the model itself has
    put_away: Callable[[], None]  # leaves the model with its rows alone
    whole_state: Callable[[nn.Module], dict[str, Any]]  # what a checkpoint has of a copy of the model
    load: Callable[[Mapping[str, Any]], None]  # gives the model its parts of the weights that were trained


class AveragingParts(WeightAveraging):
    """Averages what this rank has of the weights, of which checkpoints have the whole, as of one process."""

    access: Access
    is_restored = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the copy to `begin`: the strategy has yet to cut the model."""

    def begin(self, module: LightningModule) -> None:
        """Averages from a model on, which is cut and not yet shared out at its first fit."""
        if not self.is_restored:
            self._take(module)
        self.is_restored = False

    def share_out(self, device: torch.device) -> None:
        """Keeps of the averages what the model has of its weights, where they belong."""
        assert self._average_model is not None
        self.access.share_out(self._average_model.module)
        self._average_model.to(device if self._device is None else self._device)

    def _take(self, module: LightningModule) -> None:
        if self._average_model is None:
            options = {"use_buffers": self._use_buffers, **self._kwargs}
            self._average_model = AveragedModel(module, **options)
            return
        with torch.no_grad():
            own = self._average_model.module
            pairs = zip(chain(own.parameters(), own.buffers()), chain(module.parameters(), module.buffers()))
            for average, current in pairs:
                average.copy_(current)
        self._average_model.n_averaged.zero_()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._average_model is not None:
            checkpoint[WEIGHTS] = self.access.whole_state(self._average_model.module)

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the averages from the model, into which the strategy has loaded this rank's part of them."""
        if trainer.state.fn != TrainerFn.FITTING:
            return super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._take(pl_module)
        self.is_restored = True
        if TRAINED_KEY not in checkpoint:
            rank_zero_warn("the checkpoint's run averaged no weights: averages begin with those that it has")
            return
        assert self._average_model is not None
        self._average_model.n_averaged.copy_(checkpoint[AVERAGING_KEY]["n_averaged"])
        self.access.load(checkpoint)

    @override
    def _swap_models(self, pl_module: LightningModule) -> None:
        self.access.put_away()
        super()._swap_models(pl_module)


def check_callbacks(callbacks: Iterable[Callback], *, save_sharded: bool) -> None:
    """Refuses callbacks that average what no rank has, or where no checkpoint keeps it."""
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            problem = "averages whole weights, and trainer.strategy=TensorParallelDDPStrategy cuts them"
            remedy = "use EMAWeightAveraging, or another strategy"
        elif isinstance(callback, WeightAveraging) and save_sharded:
            problem = "keeps averages in one file, and trainer.strategy.save_sharded=true writes a folder"
            remedy = "leave out the one or the other"
        else:
            continue
        raise UserError(f"trainer.callbacks: {type(callback).__name__} {problem}; {remedy}")


def average_parts(callbacks: list[Callback], access: Access) -> None:
    """Puts in the place of each callback that averages weights one like it that averages parts of them."""
    for index, callback in enumerate(callbacks):
        if isinstance(callback, WeightAveraging) and not isinstance(callback, AveragingParts):
            # Named like the callback's own class: a checkpoint holds its state under that name.
            adapted: Any = copy.copy(callback)
            kind = type(callback)
            adapted.__class__ = type(kind.__qualname__, (AveragingParts, kind), {})
            adapted.access = access
            callbacks[index] = adapted


def averaging(callbacks: Iterable[Callback]) -> list[AveragingParts]:
    return [callback for callback in callbacks if isinstance(callback, AveragingParts)]
