"""Begins a run with the weights of another model."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from typing_extensions import override

from gpt_lightning.checkpoint.contents import ORIGIN_KEY
from gpt_lightning.exit_codes import UserError
from gpt_lightning.training.module import GPTLightningModule


class InitialWeights(Callback):
    """Loads a model's weights before the run begins, and tells the module where they came from.

    `contents` are a checkpoint's. Once loaded, its weights are removed from it, to give back their memory.
    """

    def __init__(self, name: str, contents: dict[str, Any]) -> None:
        self._origin = contents.get(ORIGIN_KEY, Path(name).name)
        self._contents: dict[str, Any] | None = contents

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
        assert isinstance(pl_module, GPTLightningModule)
        pl_module.begun_from = self._origin
        trainer.strategy.load_model_state_dict(self._contents, strict=True)
        self._contents.pop("state_dict", None)  # a sharded checkpoint's is in files of its own
        self._contents = None
