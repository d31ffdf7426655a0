"""A child class on the command line: `--model my_package.MyModule --allow_import my_package`, or a file."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from tests.cli.conftest import Program
from tests.log import since_start

pytestmark = pytest.mark.slow
PACKAGE = '''
from typing import Any
import torch
from gpt_lightning import GPTConfig, GPTLightningModule

class LoRA(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

class MyModule(GPTLightningModule):
    """Mine.

    Args:
        rank: Of the adapters.
    """

    def __init__(self, rank: int = 4, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.attn.qkv_proj = LoRA(block.attn.qkv_proj, rank)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self(batch.input_ids, batch.targets).loss
        self.log("my/loss", loss)
        return loss

class SameLayers(GPTLightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch.input_ids, batch.targets).loss
'''
MINE = ("--model", "my_package.MyModule", "--allow_import", "my_package")


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_package.py").write_text(PACKAGE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_package", None)


def test_a_class_trains_resumes_and_is_judged_and_writes(
    program: Program, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    said = program("fit", "--config", str(tiny_config()), *MINE, "--model.rank", "3")
    run = tmp_path / "checkpoints" / "tiny"
    last = run / "last.ckpt"
    assert Checkpoint.open(last).contents["module_class"] == "my_package.MyModule"
    config = yaml.safe_load((run / "config.yaml").read_text())["model"]
    assert config["class_path"] == "my_package.MyModule" and config["init_args"]["rank"] == 3
    assert config["init_args"]["config"]["n_layers"] == 2
    assert "val/loss" in said.err
    assert f"last.ckpt {' '.join(MINE)} --prompt" in said.err  # the line to go on with

    allowed = ("--allow_import", "my_package")
    said = program("validate", "--ckpt_path", str(last), *allowed)
    assert "val/loss" in said.out and "warning" not in said.err
    program("fit", "--ckpt_path", str(last), *allowed, "--trainer.max_steps", "8")
    assert Checkpoint.open(last).step == 8
    # Without its configuration, and with: the file says how the class was built.
    texts = []
    prompt = ("--data.prompts", "the", "--output", "p.jsonl")
    for more in (MINE, (*allowed, "--config", str(run / "config.yaml"))):
        program("predict", "--ckpt_path", str(last), *more, *prompt)
        texts.append(json.loads((tmp_path / "p.jsonl").read_text())["completion"])
    said = program("generate", "--ckpt_path", str(last), *MINE, "--prompt", "the")
    assert said.out.startswith("the")
    length = ("--generation.max_new_tokens", "12")
    said = program("generate", "--ckpt_path", str(last), *MINE, "--prompt", "the", *length)
    program("predict", "--ckpt_path", str(last), *MINE, *prompt, *length)
    assert "the" + json.loads((tmp_path / "p.jsonl").read_text())["completion"] == said.out.rstrip("\n")
    assert texts[0].startswith(texts[1])  # the configuration has 12 tokens


@pytest.mark.parametrize("form", ["class_path", "plain"])
def test_a_file_may_name_the_class_or_leave_it_to_the_command_line(
    form: str, program: Program, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_config()
    settings = yaml.safe_load(path.read_text())
    words = ["--allow_import", "my_package"]
    if form == "class_path":
        arguments = {"rank": 2, **settings["model"]}
        settings["model"] = {"class_path": "my_package.MyModule", "init_args": arguments}
    else:
        words += ["--model", "my_package.MyModule", "--model.init_args.rank", "2"]
    path.write_text(yaml.safe_dump(settings))
    program("fit", "--config", str(path), *words, "--model.config.n_layers", "1", "--trainer.max_steps", "2")
    contents = Checkpoint.open(tmp_path / "checkpoints" / "tiny" / "last.ckpt").contents
    assert contents["hyper_parameters"]["rank"] == 2 and contents["gpt_config"]["n_layers"] == 1
    assert contents["state_dict"]["model.blocks.0.attn.qkv_proj.down.weight"].shape == (2, 16)


REFUSED = {
    "not allowed": (("--model", "my_package.MyModule"), "add --allow_import my_package"),
    "no such class": (("--model", "my_package.Nothing", "--allow_import", "my_package"), "Nothing"),
    "none of ours": (("--model", "my_package.LoRA", "--allow_import", "my_package"), "LoRA"),
    "no such option": ((*MINE, "--model.rnk", "3"), "rnk"),
    "no number": ((*MINE, "--model.rank", "x"), "rank"),
}


MISTAKES = [(mistake, "fit") for mistake in REFUSED] + [
    (mistake, "generate")  # which has none of a model's options
    for mistake, (words, _) in REFUSED.items()
    if not any(word.startswith("--model.") for word in words)
]


@pytest.mark.parametrize("mistake, verb", MISTAKES)
def test_mistakes_are_one_line(
    mistake: str,
    verb: str,
    tiny_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = REFUSED[mistake]
    (tmp_path / "a.ckpt").touch()
    where = ("--config", str(tiny_config())) if verb == "fit" else ("--ckpt_path", "a.ckpt", "--prompt", "a")
    with pytest.raises(SystemExit) as ended:
        main([verb, *where, *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and expected in error
    error = since_start(error)
    assert "Traceback" not in error and error.startswith("error: ") and len(error.splitlines()) <= 3
    assert not (tmp_path / "checkpoints").exists()


def test_other_verbs_are_told_the_class(
    program: Program, tiny_config: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program("fit", "--config", str(tiny_config()), *MINE)
    last = str(tmp_path / "checkpoints" / "tiny" / "last.ckpt")
    for words in (
        ("predict", "--ckpt_path", last),
        ("generate", "--ckpt_path", last, "--prompt", "a"),
        ("export-hf", last, "folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            program(*words)
        error = capfd.readouterr().err
        assert ended.value.code == 2 and "--model" in error and "my_package.MyModule" in error, error
        assert "Traceback" not in error
    assert not (tmp_path / "folder").exists()


def test_a_class_without_layers_of_its_own_is_named_and_used_as_a_gpt(
    program: Program, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("--model", "my_package.SameLayers", "--allow_import", "my_package")
    program("fit", "--config", str(tiny_config()), *words)
    last = str(tmp_path / "checkpoints" / "tiny" / "last.ckpt")
    assert "it is of 'my_package.SameLayers'" in program("predict", "--ckpt_path", last).err
    assert program("generate", "--ckpt_path", last, "--prompt", "the").out.startswith("the")


def test_a_run_of_a_class_begins_with_the_weights_of_a_gpt(
    program: Program, tiny_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = str(tiny_config())
    program("fit", "--config", config)
    first = str(tmp_path / "checkpoints" / "tiny" / "last.ckpt")
    words = ("--model", "my_package.SameLayers", "--allow_import", "my_package", "--run_name", "second")
    program("fit", "--config", config, *words, "--init_from", first)
    assert (tmp_path / "checkpoints" / "second" / "last.ckpt").is_file()
