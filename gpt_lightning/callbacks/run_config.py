"""The configuration of a run, saved beside its checkpoints."""

from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from typing_extensions import override

CONFIG_NAME = "config.yaml"


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder; Lightning's own writes to the logger's, once only."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    @override
    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        # The run that is described may be continued or evaluated anywhere, not only from where it came.
        config.ckpt_path = None
        self.parser.save(config, self.folder / CONFIG_NAME, skip_unset=False, overwrite=True, multifile=False)
