"""What a run deletes does not follow from a file, also where only the module is of this program."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule


def fit(corpus: Path, run: Path, max_steps: int, resumed: Path | None = None) -> ModelCheckpoint:
    """Trains with Lightning's own Trainer, callback and plugin, and a validation a step."""
    cache = str(corpus.with_name("cache"))
    data = TextDataModule(train_files=[str(corpus)], tokenizer="bytes", seq_len=8, cache_dir=cache)
    saver = ModelCheckpoint(run, "{step}", monitor="val/loss", save_last=True)
    trainer = pl.Trainer(
        **{"max_steps": max_steps, "callbacks": [saver], "accelerator": "cpu", "limit_val_batches": 1},
        **{"val_check_interval": 1, "check_val_every_n_epoch": None, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
    )
    trainer.fit(GPTLightningModule(GPTConfig(data.vocab_size, 8, 1, 1, 8)), data, ckpt_path=resumed)
    return saver


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../precious", "../precious.ckpt", "notes", "notes.ckpt", "up/precious"])
def test_only_checkpoints_right_in_the_folder_are_removed(name: str, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(corpus, run, 1)
    checkpoint: dict[str, Any] = torch.load(run / "last.ckpt", weights_only=True)
    (run / "up").symlink_to(tmp_path)
    (run / name).mkdir()
    (run / name / "thesis.txt").write_text("years")
    (state,) = checkpoint["callbacks"].values()
    state["best_k_models"] = {f"{run}/{name}": torch.tensor(1e9)}
    state |= {"kth_best_model_path": f"{run}/{name}", "kth_value": torch.tensor(1e9)}
    torch.save(checkpoint, tmp_path / "evil.ckpt")
    saver = fit(corpus, run, 3, tmp_path / "evil.ckpt")
    assert (run / name / "thesis.txt").read_text() == "years"
    assert saver.best_k_models.keys() == {saver.best_model_path}
    assert Path(saver.best_model_path).parent == run
