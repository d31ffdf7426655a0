"""Ends a run of several ranks when one of them is lost, instead of letting the others wait for it."""

import os
import subprocess
import threading
from collections.abc import Callable

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from gpt_lightning.parallel.rank_signs import Place
from gpt_lightning.parallel.rank_watch import RankWatch

PARENT = "GPT_LIGHTNING_PARENT"


class RankGuard(Callback):
    """Keeps a RankWatch from `begin`, or else from `setup`, until the program leaves.

    `begin` before the Trainer works also watches ranks that are still starting.
    """

    def __init__(self) -> None:
        self.watch: RankWatch | None = None
        self.before_exit: Callable[[], None] = lambda: None  # gets a few seconds where another rank is lost
        self._is_connected = False

    def begin(self, trainer: Trainer) -> None:
        launcher = trainer.strategy.launcher
        if trainer.world_size > 1 and isinstance(launcher, _SubprocessScriptLauncher):
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self.watch is not None:
            return
        place = Place(
            trainer.global_rank,
            trainer.world_size,
            trainer.local_rank,
            trainer.node_rank,
            trainer.num_nodes,
            children=lambda: _children(trainer),
            parent=_parent(trainer),
        )
        timeout = getattr(trainer.strategy, "_timeout", None) or default_pg_timeout
        self.watch = RankWatch(place, timeout, before_exit=lambda: self._finish(trainer))
        self.watch.start()

    def _finish(self, trainer: Trainer) -> None:
        bar = trainer.progress_bar_callback
        if bar is not None:  # give the terminal its cursor back
            bar.on_exception(trainer, trainer.lightning_module, RuntimeError("a rank is lost"))
        self.before_exit()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and not self._is_connected:
            self._begin(trainer)
            assert self.watch is not None
            self.watch.remedy = "Resume with --ckpt_path last" if stage == "fit" else ""
            self.watch.connect(trainer.strategy.broadcast)
            self._is_connected = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.explain(exception)

    def explain(self, error: BaseException) -> None:
        """End the process with one line if the error comes of a lost rank."""
        if self.watch is not None:
            self.watch.explain(error)

    def leave(self) -> None:
        """When all ranks are done, or have agreed to stop."""
        if self.watch is not None:
            self.watch.leave()


def _parent(trainer: Trainer) -> int | None:
    """The process id of the first rank on this machine, if Lightning had it start this one."""
    if trainer.local_rank == 0:
        os.environ[PARENT] = str(os.getpid())  # which its children inherit
    elif isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment):
        return int(os.environ[PARENT]) if PARENT in os.environ else None
    return None


def _children(trainer: Trainer) -> dict[int, "subprocess.Popen[bytes]"]:
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return {}
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            # It would kill all ranks when one has a non-zero exit code, as those have that agreed to stop.
            thread._child_processes = []
    return {trainer.global_rank + 1 + number: child for number, child in enumerate(launcher.procs)}
