"""One record a step says what a record for every number says."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.training.run_logger import RunLogger


def curves(logger: TensorBoardLogger) -> dict[str, list[tuple[int, float]]]:
    metrics: list[dict[str, Any]] = [{"a": 1.5, "b/c": 2}, {"a": float("nan"), "d": torch.tensor(0.25)}]
    for step, values in enumerate(metrics, start=3):
        logger.log_metrics(values, step)
    logger.log_metrics({}, 9)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    return {tag: [(e.step, repr(e.value)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_are_lightnings(tmp_path: Path) -> None:
    expected = curves(TensorBoardLogger(tmp_path / "one"))
    assert curves(RunLogger(tmp_path / "two")) == expected and expected["a"] == [(3, "1.5"), (4, "nan")]
    assert curves(RunLogger(tmp_path / "three", prefix="p")).keys() == {"p-a", "p-b/c", "p-d"}
