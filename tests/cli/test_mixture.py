"""A mixture through the command line: a run that was killed goes on as if it had not been."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.cli.main import main
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.report.run import read_run
from gpt_lightning.training.module import GPTLightningModule
from tests.conftest import write_corpus

pytestmark = pytest.mark.slow


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


def test_each_text_is_validated_as_if_it_were_alone(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    trainer = {"max_steps": 1, "val_check_interval": 1, "default_root_dir": str(tmp_path)}
    config = mixed(tiny_config, tmp_path, trainer=trainer)
    main(["fit", "--config", str(config)])
    path = tmp_path / "checkpoints" / "tiny" / "last.ckpt"
    last = Checkpoint.open(path).contents["last_validation"]
    run = read_run(path.parent, "tiny")
    settings = yaml.safe_load(config.read_text())["data"]
    total, n_all = 0.0, 0
    for source in settings.pop("mixture"):
        data = TextDataModule(**{**settings, "train_files": source["files"]})
        module = GPTLightningModule.load_from_checkpoint(path)
        data.use_tokenizer(module.tokenizer)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        (found,) = Trainer(accelerator="cpu", **quiet).validate(module, data, verbose=False)
        n_tokens = data.split_counts("val")[0]
        total, n_all = total + found["val/loss"] * n_tokens, n_all + n_tokens
        assert abs(last["sources"][source["name"]] - found["val/loss"]) < 1e-6
        assert abs(run.curves[f"val/bpb/{source['name']}"][-1].value - found["val/bpb"]) < 1e-6
    assert abs(last["loss"] - total / n_all) < 1e-6 and last["whole"]


def test_a_run_says_when_a_text_begins_again_and_may_end_before(
    tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = {"max_steps": 16, "val_check_interval": 16, "default_root_dir": str(tmp_path)}
    config = str(mixed(tiny_config, tmp_path, trainer=trainer))
    main(["fit", "--config", config, "--run_name", "repeating"])
    said = capfd.readouterr().err
    begun = re.findall(r"step (\d+): all text of two is used, and its epoch 2 begins", said)
    assert len(begun) == 1 and "mixture: two with weight {0: 1, 5: 3}" in said
    epochs = read_run(tmp_path / "checkpoints" / "repeating", "repeating").curves["data/epochs/two"]
    first = next(step for step, value, _ in epochs if value > 1)
    assert len(epochs) == 16 and first == int(begun[0])

    main(["fit", "--config", config, "--run_name", "ending", "--data.mixture_used_up", "stop"])
    said = capfd.readouterr().err
    assert f"the run ends at step {first - 1}, before two begins again (data.mixture_used_up=stop)" in said
    assert Checkpoint.open(tmp_path / "checkpoints" / "ending" / "last.ckpt").step == first - 1
    (tmp_path / "tiny.yaml").write_text(Path(config).read_text().replace("batch_size: 4", "batch_size: 4000"))
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--run_name", "none", "--data.mixture_used_up", "stop"])
    assert "two has less text than the first step takes of it; lower data.batch" in capfd.readouterr().err
