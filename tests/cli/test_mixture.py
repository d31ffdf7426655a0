"""A mixture through the command line: a run that was killed goes on as if it had not been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.cli.main import main
from tests.conftest import write_corpus


def mixed(tiny_config: Callable[..., Path], tmp_path: Path, **sections: Any) -> Path:
    """Two texts, of which one is used up in the run, and weights that change."""
    write_corpus(tmp_path / "one.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    (tmp_path / "two.jsonl").write_text("\n".join(json.dumps({"text": each.upper()}) for each in texts[:3]))
    path = tiny_config(**sections)
    settings = yaml.safe_load(path.read_text())
    settings["data"]["train_files"] = None
    settings["data"]["mixture"] = [
        {"name": "one", "files": str(tmp_path / "one.jsonl"), "weight": 1},
        {"name": "two", "files": str(tmp_path / "two.jsonl"), "weight": {0: 1, 5: 3}},
    ]
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.slow
def test_a_resumed_mixture_equals_the_uninterrupted_one(
    tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = {"max_steps": 12, "default_root_dir": str(tmp_path)}
    saves = {"save_top_k": -1, "every_n_train_steps": 3}
    config = str(mixed(tiny_config, tmp_path, trainer=trainer, checkpoint=saves))
    main(["fit", "--config", config, "--run_name", "whole"])
    whole = tmp_path / "checkpoints" / "whole"
    expected = Checkpoint.open(whole / "last.ckpt").contents
    assert expected["TextDataModule"]["mixture"]["starts"] == [0, 20]
    for step in (3, 6):  # before and after the weights change
        resumed = ["--ckpt_path", str(whole / f"step{step:06}.ckpt"), "--run_name", f"from{step}"]
        main(["fit", "--config", config, *resumed])
        found = Checkpoint.open(tmp_path / "checkpoints" / f"from{step}" / "last.ckpt").contents
        assert found["TextDataModule"] == expected["TextDataModule"]
        for name, weight in expected["state_dict"].items():
            assert torch.equal(found["state_dict"][name], weight), name
