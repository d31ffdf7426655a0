"""Lightning's private names: each is there, and all of the package's uses of them lie in one file."""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops import _FitLoop, _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

import gpt_lightning
from gpt_lightning.training.trainer import GPTTrainer, SaveCallback, Stopwatch

PACKAGE = Path(gpt_lightning.__file__).parent
HOME = "training/trainer.py"
# What a room needs beside: a type, and what its classes have of their parents and do not define.
BESIDE = {
    "checkpoint": {"_PATH"},
    # The latter three of WeightAveraging, which gives no other way to average what ranks have parts of.
    "parallel": {"_layer_sync", "_timeout", "_ddp_kwargs", "_device", "_use_buffers", "_kwargs"},
    "callbacks": {"_save_topk_checkpoint", "_monitor_candidates"},
    "training": {"_trainer"},
    "cli": {"_actions", "_action_groups"},  # of argparse
}
# What a subclass outside of HOME overrides or calls, for which Lightning has no public name.
INHERITED = {
    "callbacks/run_checkpoint.py": {
        "_monitor_candidates",
        "_save_topk_checkpoint",
        "_save_checkpoint",
        "_remove_checkpoint",
    },
    "parallel/averages.py": {"_swap_models"},
}


@pytest.mark.parametrize(
    "owner, name",
    [
        (_TrainingEpochLoop, "_on_before_fetch"),
        (_TrainingEpochLoop, "_broadcast_sigterm_tensor"),
        (_TrainingEpochLoop, "_should_accumulate"),
        (_TrainingEpochLoop, "_num_ready_batches_reached"),
        (_TrainingEpochLoop, "_should_check_val_fx"),
        (_FitLoop, "_can_stop_early"),
        (_SignalConnector, "register_signal_handlers"),
        (_LoggerConnector, "update_train_step_metrics"),
        (pl.Trainer, "_results"),
        (pl.Trainer(logger=False, enable_checkpointing=False), "_signal_connector"),
        (pl.Trainer(logger=False, enable_checkpointing=False), "_logger_connector"),
        (pl.Trainer(logger=False, enable_checkpointing=False).fit_loop, "_data_fetcher"),
        (DDPStrategy(), "_timeout"),
        (DDPStrategy(), "_layer_sync"),
        (DDPStrategy(), "_ddp_kwargs"),
        (pl.callbacks.ModelCheckpoint, "_save_topk_checkpoint"),
        (pl.callbacks.ModelCheckpoint, "_monitor_candidates"),
        (pl.callbacks.WeightAveraging(), "_device"),
        (pl.callbacks.WeightAveraging(), "_use_buffers"),
        (pl.callbacks.WeightAveraging(), "_kwargs"),
        (pl.LightningModule(), "_trainer"),
        (_ChildProcessObserver(0, []), "_child_processes"),
    ],
)
def test_lightning_still_has_the_name(owner: Any, name: str) -> None:
    assert hasattr(owner, name)
    assert name in (PACKAGE / HOME).read_text(encoding="utf-8") or name in set().union(*BESIDE.values())


def private_uses(path: Path) -> set[str]:
    """Private names that are imported from Lightning, or read from what is not the file's own."""
    found = set()
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    own = {node.name for node in nodes if isinstance(node, kinds)}
    own |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    own |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            inherited = ast.unparse(node.value) == "self" and node.attr not in own
            if inherited or _is_lightnings(node.value):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if _is_lightnings(node.args[0]) and ast.unparse(node.args[1]).startswith("'_"):
                found.add(ast.unparse(node.args[1]))
    return {name for name in found if not name.endswith("__")}


def _is_lightnings(owner: ast.expr) -> bool:
    """`trainer`, `self.trainer`, and all that hangs on them."""
    return "trainer" in ast.unparse(owner).split(".")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_other_file_uses_private_names_of_lightning(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if name != HOME:
        assert private_uses(path) <= BESIDE.get(name.partition("/")[0], set())


def inherited_names(kind: type) -> set[str]:
    """Private names of Lightning's that a class overrides, or reads from itself."""
    bases = [base for base in kind.__mro__ if base.__module__.startswith("lightning.")]
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls", "super()"):
            names.add(node.attr)
    private = {name for name in names if name.startswith("_") and not name.endswith("__")}
    return {name for name in private if any(name in vars(base) for base in bases)}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_what_subclasses_take_from_lightning_is_known_and_there(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    if name in (HOME, "__main__.py"):
        return
    module = importlib.import_module("gpt_lightning." + name.removesuffix(".py").replace("/", "."))
    kinds = [kind for kind in vars(module).values() if inspect.isclass(kind)]
    found = [inherited_names(kind) for kind in kinds if kind.__module__ == module.__name__]
    assert set().union(*found) == INHERITED.get(name, set())


def test_the_loops_state_has_the_layout_that_a_resume_mends() -> None:
    state = pl.Trainer(logger=False, enable_checkpointing=False).fit_loop.state_dict()
    assert {"ready", "started", "processed", "completed"} == state["epoch_progress"]["total"].keys()
    for loop in ("epoch_loop", "epoch_loop.val_loop"):
        progress = state[f"{loop}.batch_progress"]
        assert progress.keys() == {"total", "current", "is_last_batch"}
        assert {"ready", "started", "processed", "completed"} == progress["total"].keys()
    assert "_batches_that_stepped" in state["epoch_loop.state_dict"]


def test_the_file_that_may_is_found_out() -> None:
    assert {"_results", "_TrainingEpochLoop", "_can_stop_early"} < private_uses(PACKAGE / HOME)


class Turns(Stopwatch):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def turn_to(self, part: str) -> str:
        self.parts.append(part)
        return super().turn_to(part)


class Making(SaveCallback):
    """Turns the clock of the Trainer as its batches come and its checkpoint is made."""

    def __init__(self, clock: Stopwatch) -> None:
        self.clock = clock

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.turn_to("step")

    def on_save_start(self, trainer: pl.Trainer) -> None:
        self.clock.turn_to("told")

    def state_dict(self) -> dict[str, Any]:
        assert self.clock.turn_to("making") == "told"
        self.clock.turn_to("checkpoint")
        return {}


def test_fetches_and_saves_are_timed(tmp_path: Path) -> None:
    clock = Turns()
    clock.seconds |= {"told": 0.0, "making": 0.0}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "limit_val_batches": 0, "default_root_dir": tmp_path}
    trainer = GPTTrainer(accelerator="cpu", max_steps=2, callbacks=[Making(clock)], **quiet)
    trainer.clock = clock
    trainer.fit(BoringModel())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    batch, save = ["data", "step"], ["checkpoint", "told", "making", "checkpoint", "step"]
    assert clock.parts == [*batch, *batch, *save]
