"""Holds the last lines of a run to commands that work."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpt_lightning.checkpoint.files import REST
from gpt_lightning.cli.closing import tell_how_to_go_on
from gpt_lightning.training.module import GPTLightningModule


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sharded_checkpoint_is_made_a_file_before_it_writes(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    last = Path("runs/mine/last.ckpt")
    if sharded:
        last.mkdir(parents=True)
        (last / REST).touch()
    else:
        last.parent.mkdir(parents=True)
        last.touch()
    best = {"best_model_path": "", "best_model_score": None, "monitor": None}
    saver = SimpleNamespace(last_model_path=str(last), **best)
    module = GPTLightningModule.__new__(GPTLightningModule)
    ended: dict[str, Any] = {"loggers": [], "checkpoint_callbacks": [], "callback_metrics": {}}
    trainer: Any = SimpleNamespace(**ended, checkpoint_callback=saver, lightning_module=module)
    samples: Any = SimpleNamespace(latest=[], prompts=["Once upon"], step=3)
    tell_how_to_go_on(trainer, last.parent, samples)
    words = [line.partition(" gpt_lightning ")[2] for line in capsys.readouterr().err.splitlines()]
    wanted = ["generate --ckpt_path runs/mine/last.ckpt --prompt 'Once upon'"]
    if sharded:
        wanted = ["consolidate --ckpt_path runs/mine/last.ckpt --output mine.ckpt"]
        wanted += ["generate --ckpt_path mine.ckpt --prompt 'Once upon'"]
    assert [line for line in words if line] == wanted
