"""Checkpoints and configurations from strangers never run code, by any route."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule

Config = Callable[..., Path]
VERBS = ("fit", "validate", "test", "predict")
EVIL = """
from pathlib import Path
Path(__file__).with_name("canary").touch()
from lightning.pytorch import Callback
class Watcher(Callback):
    def __init__(self, **options): pass
def make() -> Callback:
    return Watcher()
"""


class Payload:
    """A pickle that makes a folder when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture(autouse=True)
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where code that must not run leaves its trace; `evilmod` can be imported, and does when it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    return tmp_path / "canary"


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The first line of a command that must end with code 2, which has one for each mistake."""
    with pytest.raises(SystemExit) as exit:
        main(words)
    message = capsys.readouterr().err
    assert exit.value.code == 2 and "Traceback" not in message, message
    line, *_ = [line for line in message.splitlines() if line.startswith("error: ")]
    return line


# ---- checkpoints


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The contents of a checkpoint that a run wrote."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("the cat sees a dog and the dog sees the cat. " * 40)
    trainer = small_trainer(folder, max_steps=1)
    trainer.fit(small_module(), datamodule=small_data(folder))
    trainer.save_checkpoint(folder / "x.ckpt")
    return Checkpoint.open(folder / "x.ckpt").contents


def small_trainer(folder: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    plugins = [DurableCheckpointIO()]
    settings: dict[str, Any] = {"accelerator": "cpu", "enable_checkpointing": False, **quiet, **options}
    return Trainer(default_root_dir=folder, plugins=plugins, **settings)


def small_module(**changes: Any) -> GPTLightningModule:
    sizes = {"vocab_size": 257, "max_position_embeddings": 16, "n_layers": 1, "n_heads": 2, "d_model": 8}
    return GPTLightningModule(GPTConfig(**{**sizes, **changes}))


def small_data(folder: Path) -> TextDataModule:
    files = {"train_files": str(folder / "text.txt"), "cache_dir": str(folder / "cache")}
    return TextDataModule(**files, tokenizer="bytes", seq_len=16, batch_size=2, prompts="the")


def evil_contents(honest: dict[str, Any], canary: Path) -> dict[str, dict[str, Any]]:
    hparams = honest["hyper_parameters"]
    building = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "evilmod.Watcher"}
    named = {
        "nested": {"act": {"class_path": "evilmod.Watcher", "init_args": {}}},
        "listed": {"callbacks": [{"class_path": "evilmod.Watcher"}]},
        "class": {"_class_path": "evilmod.Watcher"},
        "instantiator": {"_instantiator": "evilmod.make"},
        "lightning": building,
        "system": {"_instantiator": "os.system"},
        "typed": {"dtype": torch.float32},
    }
    evil = {name: {**honest, "hyper_parameters": {**hparams, **extra}} for name, extra in named.items()}
    evil["data"] = {**honest, "datamodule_hyper_parameters": named["nested"]}
    evil["former"] = {**honest, "module_arguments": named["nested"]}
    evil["payload"] = {**honest, "gpt_config": Payload(canary)}
    evil["payload in the loops"] = {**honest, "loops": Payload(canary)}
    return evil


KINDS = sorted(evil_contents({"hyper_parameters": {}}, Path()))


@pytest.fixture(params=KINDS)
def evil(request: pytest.FixtureRequest, honest: dict[str, Any], canary: Path, tmp_path: Path) -> Path:
    torch.save(evil_contents(honest, canary)[request.param], tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


@pytest.fixture
def unsafe_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own protection is off where nobody says otherwise."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


@pytest.mark.usefixtures("unsafe_default")
def test_the_payload_would_run(canary: Path, tmp_path: Path) -> None:
    torch.save(Payload(canary), tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt")
    assert canary.exists()


@pytest.mark.usefixtures("unsafe_default")
@pytest.mark.parametrize("verb", VERBS)
def test_the_program_refuses_evil_checkpoints(
    verb: str, evil: Path, canary: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails([verb, "--config", str(tiny_config()), "--ckpt_path", str(evil)], capsys)
    assert "evil.ckpt" in message
    assert not canary.exists() and not Path("checkpoints").exists() and not Path("cache").exists()


@pytest.mark.usefixtures("unsafe_default")
def test_python_refuses_evil_checkpoints(evil: Path, canary: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sees a dog. " * 40)
    routes: dict[str, Callable[[], object]] = {
        "load_model": lambda: load_model(evil),
        "load_from_checkpoint": lambda: GPTLightningModule.load_from_checkpoint(evil),
        "with keywords": lambda: GPTLightningModule.load_from_checkpoint(str(evil), strict=False),
        "unsafe": lambda: GPTLightningModule.load_from_checkpoint(evil, weights_only=False),
        "hparams_file": lambda: GPTLightningModule.load_from_checkpoint(evil, hparams_file="x.yaml"),
        "datamodule": lambda: TextDataModule.load_from_checkpoint(evil),
    }
    for verb in VERBS:
        for trust in (None, False):

            def run(verb: str = verb, trust: bool | None = trust) -> None:
                trainer = small_trainer(tmp_path, max_steps=2)
                options = {"datamodule": small_data(tmp_path), "ckpt_path": str(evil), "weights_only": trust}
                getattr(trainer, verb)(small_module(), **options)

            routes[f"{verb} {trust}"] = run
    for name, route in routes.items():
        with pytest.raises(ValueError) as error:
            route()
        assert not canary.exists() and "\n" not in str(error.value), name


@pytest.mark.parametrize(
    "name, value",
    [
        ("config", None),
        ("optimizer", [1]),
        ("optimizer", {"learning_rate": "high"}),
        ("optimizer", {"betas": "ab"}),
        ("optimizer", {"odd": 3}),
        ("optimizer", {"learning_rate": -1.0}),
        ("schedule", "cosine"),
        ("schedule", {"warmup_steps": None}),
    ],
)
def test_options_that_make_no_module_are_one_line(
    name: str, value: Any, honest: dict[str, Any], tmp_path: Path
) -> None:
    evil = {**honest, "hyper_parameters": {**honest["hyper_parameters"], name: value}}
    torch.save(evil, tmp_path / "evil.ckpt")
    with pytest.raises(UserError) as error:
        GPTLightningModule.load_from_checkpoint(tmp_path / "evil.ckpt")
    assert name in str(error.value) and "\n" not in str(error.value)


def test_honest_checkpoints_load_by_the_same_routes(honest: dict[str, Any], tmp_path: Path) -> None:
    torch.save(honest, tmp_path / "x.ckpt")
    model, _ = load_model(tmp_path / "x.ckpt")
    module = GPTLightningModule.load_from_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(module.model.ln_f.weight, model.ln_f.weight)
    other = GPTLightningModule.load_from_checkpoint(str(tmp_path / "x.ckpt"), compile_backend=None)
    assert other.optimizer == module.optimizer


def test_another_architecture_is_told_in_one_line(honest: dict[str, Any], tmp_path: Path) -> None:
    torch.save(honest, tmp_path / "x.ckpt")
    (tmp_path / "text.txt").write_text("the cat sees a dog. " * 40)
    trainer = small_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"n_layers=2 \(there 1\), d_ff=16 \(there 32\);"):
        module = small_module(n_layers=2, d_ff=16)
        trainer.validate(module, small_data(tmp_path), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("verb", VERBS)
def test_unsafe_loading_is_refused_by_name(
    verb: str, tiny_config: Config, honest: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(honest, tmp_path / "x.ckpt")
    words = [verb, "--config", str(tiny_config()), "--ckpt_path", "x.ckpt", "--weights_only", "false"]
    assert "weights_only=False" in fails(words, capsys)


# ---- class paths in configurations and options


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.callbacks", "evilmod.Watcher"],
        ["--trainer.callbacks", "evilmod.make"],
        ["--trainer.callbacks", "[{class_path: evilmod.Watcher}]"],
        ["--trainer.callbacks", "{class_path: LambdaCallback, init_args: {on_fit_start: evilmod.make}}"],
        ["--trainer.callbacks.help=evilmod.Watcher"],
        ["--trainer.logger", "{class_path: evilmod.Watcher}"],
        ["--trainer.strategy", "{class_path: DDPStrategy, init_args: {ddp_comm_hook: evilmod.make}}"],
        ["--model.config", "{class_path: evilmod.Watcher}"],
        ["--trainer.callbacks", "[{class_path: torch.hub.os.system}]"],
        ["--trainer.callbacks", "[{class_path: subprocess.run}]"],
    ],
)
def test_a_class_path_of_a_stranger_is_not_imported(
    words: list[str], canary: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(["fit", "--config", str(tiny_config()), *words], capsys)
    assert "is not imported" in message and "add --allow_import " in message
    assert not canary.exists() and "evilmod" not in sys.modules and not Path("checkpoints").exists()


def test_a_file_cannot_allow_itself(
    canary: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("strategy", "logger", "profiler", "plugins", "accelerator"):
        config = tiny_config(trainer={name: {"class_path": "evilmod.Watcher"}})
        fails(["fit", "--config", str(config)], capsys)
    config = tiny_config(trainer={"callbacks": [{"class_path": "evilmod.Watcher"}]})
    assert "evilmod.Watcher is not imported" in fails(["fit", "--config", str(config)], capsys)
    config.write_text(config.read_text() + "allow_import: evilmod\n")
    fails(["fit", "--config", str(config)], capsys)
    assert not canary.exists()


def test_what_is_no_class_of_the_kind_is_not_called(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = []
    monkeypatch.setattr(torch.hub, "load", lambda *args, **options: called.append(args))
    for value in ("torch.hub.load", "{class_path: torch.hub.load, init_args: {repo_or_dir: a/b, model: c}}"):
        fails(["fit", "--config", str(tiny_config()), "--trainer.callbacks", value], capsys)
    assert not called


@pytest.mark.parametrize(
    "path",
    [
        "torch.hub.load",
        "torch.distributed.launcher.elastic_launch",
        "torch.distributed.launcher.api.elastic_launch",
        "torch.distributed.run.run",
        "torch.multiprocessing.spawn",
        "torch.utils.cpp_extension.load",
        "torch.serialization.load",
        "lightning.pytorch.cli.LightningCLI",
        "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher",
        "lightning.fabric.strategies.launchers.multiprocessing._MultiProcessingLauncher",
        "lightning_fabric.utilities.cloud_io._load",
    ],
)
@pytest.mark.parametrize("place", ["callback", "function", "class of a function"])
def test_what_starts_programs_or_loads_code_is_not_imported(
    path: str, place: str, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    function = path if place == "function" else {"class_path": path, "init_args": {"entrypoint": "x"}}
    given = {"class_path": "LambdaCallback", "init_args": {"on_fit_start": function}}
    callback = {"class_path": path} if place == "callback" else given
    config = tiny_config(trainer={"callbacks": [callback]})
    message = fails(["fit", "--config", str(config)], capsys)
    assert f"class_path={path} is not imported: no option needs" in message


def test_what_options_need_of_the_trusted_packages_is_imported(
    tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook"
    trainer: dict[str, object] = {
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}],
        "strategy": {"class_path": "DDPStrategy", "init_args": {"ddp_comm_hook": hook}},
        "plugins": [{"class_path": "lightning.pytorch.plugins.io.AsyncCheckpointIO"}],
        "profiler": {"class_path": "lightning.pytorch.profilers.SimpleProfiler"},
    }
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(tiny_config(trainer=trainer)), "--print_config"])
    assert exit.value.code == 0 and hook in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("option", [["--allow_import", "evilmod"], ["--allow_import=evilmod"]])
def test_the_command_line_can_allow_a_package(
    option: list[str], canary: Path, tiny_config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(tiny_config()), "--trainer.callbacks", "evilmod.Watcher"]
    main(["fit", *words, *option])
    assert canary.exists() and Path("checkpoints/tiny/last.ckpt").is_file()
    fails(["fit", *words], capsys)  # not from now on


@pytest.mark.parametrize("value", ["", "a b", "--config", "jsonargparse", "*"])
def test_what_can_be_allowed_is_a_package(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--allow_import={value} " in fails(["fit", "--allow_import", value], capsys)


def test_the_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for help in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main(["fit", help])
        assert "--allow_import PACKAGE" in capsys.readouterr().out
