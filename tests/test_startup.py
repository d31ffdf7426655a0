"""What a verb does not need is neither imported nor made; after the imports, garbage is looked for again."""

import gc
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.cli.app import GPTLightningCLI
from gpt_lightning.cli.main import without_collector
from tests.cli.test_generate import write_checkpoint

PROGRAM = """
import sys
{first}
before = set(sys.modules)
from gpt_lightning.__main__ import main
try:
    main({words})
except SystemExit as exit:
    assert not exit.code, exit.code
print("imported:", *(set(sys.modules) - before), file=sys.stderr)
"""
# Unless Lightning brings it along.
NEVER_TO_GENERATE = ("torch.distributed.checkpoint", "torch.utils.tensorboard", "tensorboard", "transformers")


def imported(words: list[str], folder: Path, *, first: str = "") -> set[str]:
    """The modules of a new process that runs the program; those of `first`, run before, do not count."""
    code = PROGRAM.format(first=first, words=words)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].removeprefix("imported: ").split())


def among(modules: set[str], names: tuple[str, ...]) -> list[str]:
    """Those modules that are one of `names` or within one."""
    return [module for module in modules if f"{module}.".startswith(tuple(f"{name}." for name in names))]


def test_what_the_program_can_do_is_told_without_any_package(tmp_path: Path) -> None:
    modules = imported(["--help"], tmp_path)
    tops = {module.partition(".")[0] for module in modules}
    assert tops - sys.stdlib_module_names == {"gpt_lightning"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [["generate", "--prompt", "The", "--generation.max_new_tokens", "1"], ["evaluate", "--tasks", "a.jsonl"]],
    ids=["generate", "evaluate"],
)
def test_what_runs_a_model_alone_imports_neither_lightning_nor_the_compiler(
    words: list[str], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    (tmp_path / "a.jsonl").write_text('{"question": "The", "choices": ["cat", "dog"], "answer": 0}')
    modules = imported(words, tmp_path)
    assert "gpt_lightning.generation.engine" in modules
    heavy = ("lightning", "torchmetrics", "scipy", "rich", "torch._dynamo", "torch._inductor", "sympy")
    assert not among(modules, (*NEVER_TO_GENERATE, *heavy))


@pytest.mark.slow
def test_predict_imports_little_beside_lightning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "checkpoints" / "run" / "last.ckpt")
    words = ["predict", "--data.prompts", "The", "--generation.max_new_tokens", "1"]
    modules = imported(words, tmp_path, first="import lightning.pytorch.cli")
    assert "gpt_lightning.generation.engine" in modules
    assert not among(modules, (*NEVER_TO_GENERATE, "torch._dynamo", "torch._inductor", "sympy"))


def test_a_verb_is_the_only_one_whose_parser_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    init_parser = GPTLightningCLI.init_parser

    def counting(cli: GPTLightningCLI, **options: object) -> object:
        made.append(options["prog"])
        return init_parser(cli, **options)

    monkeypatch.setattr(GPTLightningCLI, "init_parser", counting)
    for verb in ("fit", "predict", "prepare"):
        made.clear()
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert made == [f"gpt-lightning {verb}"] and f" {verb} [--config FILE]" in capsys.readouterr().out


class Cycle:
    """Garbage that only the collector finds."""

    n_collected = 0

    def __init__(self) -> None:
        self.self = self

    def __del__(self) -> None:
        Cycle.n_collected += 1


def test_the_collector_works_again_after_the_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_to_import.py").write_text("kept = [[] for _ in range(5000)]")
    (tmp_path / "torn.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    gc.collect()
    try:
        with without_collector():
            assert not gc.isenabled()
            import_module("slow_to_import")
        n_frozen = gc.get_freeze_count()
        assert gc.isenabled() and n_frozen > 5000
        with pytest.raises(ZeroDivisionError), without_collector():
            import_module("torn")
        with without_collector():
            import_module("slow_to_import")
        assert gc.isenabled() and gc.get_freeze_count() <= n_frozen
        Cycle()
        gc.collect()
        assert Cycle.n_collected == 1
    finally:
        gc.unfreeze()
        del sys.modules["slow_to_import"]
