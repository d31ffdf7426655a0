"""Ends a run of several ranks when one of them is lost, instead of letting the others wait for it."""

import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.constants import default_pg_timeout
from typing_extensions import override

from gpt_lightning.parallel.rank_watch import RankWatch
from gpt_lightning.training.trainer import started_ranks, starts_ranks_as_programs, timeout_of

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
        if trainer.world_size > 1 and starts_ranks_as_programs(trainer):
            self.watch = self._start(trainer)

    def _start(self, trainer: Trainer) -> RankWatch:
        place = trainer.global_rank, trainer.world_size, trainer.local_rank, trainer.node_rank
        timeout = timeout_of(trainer) or default_pg_timeout
        watch = RankWatch(*place, timeout, lambda: started_ranks(trainer), _parent(trainer))
        watch.before_exit = lambda: self._finish(trainer)
        watch.start()
        return watch

    def _finish(self, trainer: Trainer) -> None:
        bar = trainer.progress_bar_callback
        if bar is not None:  # give the terminal its cursor back
            bar.on_exception(trainer, trainer.lightning_module, RuntimeError("a rank is lost"))
        self.before_exit()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and not self._is_connected:
            self.watch = self.watch or self._start(trainer)
            self.watch.remedy = (lambda: _remedy(trainer)) if stage == "fit" else str
            self.watch.connect()
            self._is_connected = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.watch is not None:
            self.watch.explain(exception)

    def leave(self) -> None:
        """Ends the process groups and the watch, since all ranks are done or have agreed to stop."""
        if dist.is_initialized():
            dist.barrier()
            # gloo's threads abort a process now and then if they are left to the interpreter's exit.
            dist.destroy_process_group()
        # Last: the first rank waits for its children, and they for the groups' end.
        if self.watch is not None:
            self.watch.leave()


def _remedy(trainer: Trainer) -> str:
    """Says how to go on from a checkpoint, where there is one."""
    callbacks: Any = trainer.checkpoint_callbacks
    saved = [getattr(each, name, "") for each in callbacks for name in ("last_model_path", "best_model_path")]
    is_there = any(path and os.path.exists(path) for path in [*saved, trainer.ckpt_path])
    return "Resume with --ckpt_path last" if is_there else "No checkpoint is there yet: begin again"


def _parent(trainer: Trainer) -> int | None:
    """Returns the process id of the first rank on this machine, if Lightning had it start this one."""
    if trainer.local_rank == 0:
        os.environ[PARENT] = str(os.getpid())  # which its children inherit
    elif isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment):
        return int(os.environ[PARENT]) if PARENT in os.environ else None
    return None
