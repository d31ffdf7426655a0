"""Gives loggers what runs are compared by, and TensorBoard a page of the curves that matter."""

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from gpt_lightning.training.notes import REPETITION
from gpt_lightning.training.trainer import loggers_may_fail

Value = str | int | float
# The table begins with what differs, and shows five columns until it is asked for others.
FIRST_COLUMNS = ("learning_rate", "n_layers", "d_model", "batch_size", "seq_len")
RESULTS = ("val/loss", "val/bpb", "throughput/tokens_per_second")
# The page "Custom Scalars"; a curve is found by a pattern.
_CURVES: dict[str, dict[str, tuple[str, ...]]] = {
    "loss": {"loss": ("train/loss$", "val/loss$"), "bits per byte": ("val/bpb$",)},
    "generation": {"share of repeated 4-grams in the samples": (f"{REPETITION}$",)},
    "throughput": {
        "tokens per second": ("throughput/tokens_per_second$",),
        "share of the peak arithmetic": ("throughput/mfu$",),
        "where the time goes": ("throughput/.*_share$",),
    },
    "optimization": {"learning rates": ("lr-.*",), "gradient norm": ("train/grad_norm$",)},
}
PAGE = {
    category: {title: ["Multiline", list(patterns)] for title, patterns in charts.items()}
    for category, charts in _CURVES.items()
}


class Overview(Callback):
    """Logs the hyper-parameters of a run when it starts; its results are the last values of its curves.

    So a run that is still going on, or was killed, has its row too, and one that goes on has no second one.
    """

    def __init__(self, row: Mapping[str, Value]) -> None:
        self._row = dict(row)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Else Lightning would log all that the module remembers, constants too.
            pl_module.save_hyperparameters({}, logger=False)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        with loggers_may_fail(trainer):
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    _show_page(logger)
                    _add_row(logger, self._row)
                elif self._row:
                    logger.log_hyperparams(self._row)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._row:
            with loggers_may_fail(trainer):
                for logger in trainer.loggers:
                    if isinstance(logger, TensorBoardLogger):
                        _end_row(logger)


def _show_page(logger: TensorBoardLogger) -> None:
    logger.experiment.add_custom_scalars(PAGE)


def _add_row(logger: TensorBoardLogger, row: Mapping[str, Value]) -> None:
    """Writes a row of the table "HParams", which finds the results among the run's curves by their names.

    Lightning's own way would draw the results as points of those curves.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams  # slow to import

    if row:
        columns, begun, _ = hparams(dict(row), dict.fromkeys(RESULTS, 0.0))
        plugin_data = columns.value[0].metadata.plugin_data
        table = HParamsPluginData.FromString(plugin_data.content)
        for column in table.experiment.hparam_infos:
            column.differs = column.name in FIRST_COLUMNS
        plugin_data.content = table.SerializeToString()
        logger.experiment.file_writer.add_summary(columns)
        logger.experiment.file_writer.add_summary(begun)
        logger.hparams.update(row)  # of which it makes hparams.yaml


def _end_row(logger: TensorBoardLogger) -> None:
    from torch.utils.tensorboard.summary import hparams

    logger.experiment.file_writer.add_summary(hparams({}, {})[-1])
