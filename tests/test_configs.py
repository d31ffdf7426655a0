"""Every shipped configuration runs, shrunk; none contradicts itself."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from tests.distributed import run_ranks
from tests.huggingface.gpt2_folders import write_gpt2

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
SHRUNK = {
    "data.tokenizer": "bytes",
    "data.seq_len": "16",
    "data.batch_size": "2",
    "data.num_workers": "0",
    "data.val_fraction": "0.2",
    "model.config.max_position_embeddings": "16",
    "model.config.n_layers": "2",
    "model.config.n_heads": "2",
    "model.config.d_model": "16",
    "generation.max_new_tokens": "8",
    "trainer.accelerator": "cpu",
    "trainer.accumulate_grad_batches": "2",
    "trainer.max_steps": "4",
    "trainer.val_check_interval": "2",
}
OF_THE_WEIGHTS = {"data.tokenizer", *(name for name in SHRUNK if name.startswith("model.config."))}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_shrunk(path: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    devices = min(4, settings["trainer"].get("devices", 1))
    options = {**SHRUNK, "trainer.devices": str(devices)}
    options |= {"data.train_files": f'["{corpus}"]', "data.cache_dir": str(tmp_path / "cache")}
    if settings["trainer"].get("num_nodes", 1) > 1:  # one node of two has to do
        devices = 2
        cut = {"trainer.devices": "2", "trainer.num_nodes": "1", "trainer.strategy.tensor_parallel_size": "2"}
        options |= {**cut, "model.config.d_ff": "32", "trainer.strategy.save_sharded": "false"}
    if "n_kv_heads" in settings["model"].get("config", {}):
        options["model.config.n_kv_heads"] = "1"
    if "init_from" in settings:  # whose architecture and tokenizer it takes
        write_gpt2(tmp_path / "gpt2")
        options = {name: value for name, value in options.items() if name not in OF_THE_WEIGHTS}
        options["init_from"] = str(tmp_path / "gpt2")
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    command = ["fit", "--config", str(path), *words]
    main(command) if devices == 1 else run_ranks(main, devices, command)
    # Reads plain data alone, and checks that it is what was written.
    Checkpoint.open(tmp_path / "checkpoints" / path.stem / "last.ckpt").contents


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_is_consistent(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    trainer, schedule = settings["trainer"], settings["model"].get("schedule", {})
    assert schedule.get("warmup_steps", 100) < trainer["max_steps"]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0, "the run would end without a validation"
    config = GPTConfig(**settings["model"]["config"])
    assert settings["data"]["seq_len"] <= config.max_position_embeddings


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_header_says_what_it_is_for(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert header[0].startswith("# Purpose: ")
    assert any(line.startswith("# Command: python -m gpt_lightning fit") for line in header)
    assert any(line.startswith("# Expect:  ") for line in header)


def test_gpt2_small_is_the_known_recipe() -> None:
    settings = yaml.safe_load((CONFIGS[0].parent / "gpt2_small.yaml").read_text(encoding="utf-8"))
    data, trainer = settings["data"], settings["trainer"]
    assert data["batch_size"] * data["seq_len"] * trainer["accumulate_grad_batches"] == 491_520


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_heads_can_be_cut(path: Path) -> None:
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    strategy = settings["trainer"].get("strategy", {"init_args": {}})
    size = strategy["init_args"].get("tensor_parallel_size", 1)
    assert GPTConfig(**settings["model"]["config"]).kv_heads % size == 0
    assert settings["trainer"].get("devices", 1) % size == 0


def test_llama_7b_fits_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """And has the parameters that Meta counts: 6,738,415,616."""
    main(["plan", "--config", "llama_7b_2x8", "--device", "h100", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 6_738_415_616 and plan["fits"]
    assert (plan["setup"]["devices"], plan["setup"]["nodes"]) == (8, 2)
    assert plan["tokens_a_step"] == 4 * 2**20


def test_gpt2_xl_has_its_parameter_count() -> None:
    """1.56 billion, whatever the number of heads: counted by Hugging Face's model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = yaml.safe_load((CONFIGS[0].parent / "gpt2_xl_tp2.yaml").read_text(encoding="utf-8"))
    with torch.device("meta"):
        ours = GPTModel(GPTConfig(**settings["model"]["config"]))
        theirs = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_layer=48, n_head=25))
    count = sum(parameter.numel() for parameter in ours.parameters())
    assert count == theirs.num_parameters() == 1_557_611_200
