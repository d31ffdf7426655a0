"""Saves the configuration of a run beside its checkpoints."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

CONFIG_NAME = "config.yaml"


class RunConfig(Callback):
    """Writes config.yaml into the run's folder."""

    def __init__(self, parser: ArgumentParser, config: Namespace, folder: Path) -> None:
        self._parser, self._config, self._folder = parser, config, folder

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            config = self._config.clone()
            # The run that is described may be continued or evaluated anywhere, not only from where it came.
            config.ckpt_path = None
            path = self._folder / CONFIG_NAME
            self._parser.save(config, path, skip_unset=False, overwrite=True, multifile=False)
