"""What is said where a rank is lost is true of the checkpoints that are there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpt_lightning.callbacks.rank_guard import _remedy
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint


def test_a_run_is_resumed_only_where_there_is_a_checkpoint(tmp_path: Path) -> None:
    saver = RunCheckpoint(str(tmp_path))
    trainer: Any = SimpleNamespace(checkpoint_callbacks=[saver], ckpt_path=None)
    assert _remedy(trainer) == "No checkpoint is there yet: begin again"
    saver.last_model_path = str(tmp_path / "last.ckpt")  # which is being written
    assert _remedy(trainer) == "No checkpoint is there yet: begin again"
    Path(saver.last_model_path).touch()
    assert _remedy(trainer) == "Resume with --ckpt_path last"
    trainer.checkpoint_callbacks, trainer.ckpt_path = [], saver.last_model_path
    assert _remedy(trainer) == "Resume with --ckpt_path last"
