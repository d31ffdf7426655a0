"""Begins a run with the weights of another model."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from typing_extensions import override

from gpt_lightning.checkpoint.contents import ORIGIN_KEY
from gpt_lightning.exit_codes import UserError


class InitialWeights(Callback):
    """Loads a model's weights before the run begins; all checkpoints of the run name where they came from.

    `contents` are a checkpoint's. Once loaded, its weights are removed from it, to give back their memory.
    """

    def __init__(self, name: str | None = None, contents: dict[str, Any] | None = None) -> None:
        self._contents = contents
        self._origin = name and Path(name).name
        if contents is not None:
            self._origin = contents.get(ORIGIN_KEY, self._origin)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The strategy may cut the model for it; that is why it cannot be done when the model is built.
        if self._contents is None:
            return
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise UserError(  # they would load nothing here, without a word
                f"trainer.strategy={type(trainer.strategy).__name__} cannot begin with init_from="
                f"{self._origin}; use ddp or gpt_lightning.TensorParallelDDPStrategy"
            )
        trainer.strategy.load_model_state_dict(self._contents, strict=True)
        self._contents.pop("state_dict", None)  # a sharded checkpoint's is in files of its own
        self._contents = None

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._origin is not None:
            checkpoint[ORIGIN_KEY] = self._origin

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._origin = checkpoint.get(ORIGIN_KEY)
