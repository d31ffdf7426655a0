"""Saves the configuration of a run beside its checkpoints."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from gpt_lightning.checkpoint.atomic import written_file

CONFIG_NAME = "config.yaml"


class RunConfig(Callback):
    """Writes config.yaml into the run's folder."""

    def __init__(self, parser: ArgumentParser, config: Namespace, folder: Path) -> None:
        self._parser, self._config, self.folder = parser, config, folder

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            config = self._config.clone()
            # The run that is described may be continued or evaluated anywhere, not only from where it came.
            config.ckpt_path = None
            text = self._parser.dump(config, skip_unset=False)
            with written_file(self.folder / CONFIG_NAME) as file:
                file.write(text.encode())  # in UTF-8, whatever the locale
