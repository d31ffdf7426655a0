"""What is no mistake, but may not be meant, is told in a line before the run begins."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.cli.checks import warn_of_no_validation


@pytest.mark.parametrize(
    ("max_steps", "interval", "limit", "told"),
    [
        (50, 100, 1.0, True),
        (100, 100, 1.0, False),
        (50, 100, 0, False),  # none is wanted
        (-1, 100, 1.0, False),
        (50, 0.5, 1.0, False),
        (50, None, 1.0, False),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(
    max_steps: int, interval: Any, limit: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"max_steps": max_steps, "val_check_interval": interval, "limit_val_batches": limit}
    warn_of_no_validation(SimpleNamespace(**given))
    said = capsys.readouterr().err
    assert said.count("\n") == told and (f"trainer.max_steps={max_steps}" in said) is told


@pytest.mark.parametrize("verb", ["fit", "prepare"])
def test_a_vocabulary_in_a_file_that_is_not_the_texts_is_refused(
    verb: str, tiny_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"vocab_size": 512, "max_position_embeddings": 16, "n_layers": 1, "n_heads": 2, "d_model": 16}
    model, data = {"config": config}, {"tokenizer": "bytes", "train_files": str(tmp_path / "*.txt")}
    (tmp_path / "text.txt").write_text("some words\n" * 500)
    data |= {"seq_len": 16, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    path = tiny_config(model=model, data=data)
    with pytest.raises(SystemExit) as exit:
        main([verb, "--config", str(path)])
    assert exit.value.code == 2
    said = "model.config.vocab_size=512 contradicts data.tokenizer=bytes, which has 257 ids"
    assert said in capsys.readouterr().err and not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "fit --trainer.strategy gpt_lightning.TensorParallelDDPStrategy",
            "is a class; write --trainer.strategy.class_path gpt_lightning.TensorParallelDDPStrategy",
        ),
        (
            "fit --trainer.strategy ddp --trainer.strategy.shard_replicas full",
            "trainer.strategy.shard_replicas=full is an option of a class; give --trainer.strategy",
        ),
        ("plan --device h100 --trainer.devices -1", "with --device give how many a node has"),
    ],
)
def test_a_strategy_that_is_half_said_is_refused_in_a_line(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(words.split())
    error = capsys.readouterr().err
    assert exit.value.code == 2 and said in error and "Traceback" not in error
    assert not [*tmp_path.iterdir()]
