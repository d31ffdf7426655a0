"""Cares for runs of several processes, before they start and when they are done."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gpt_lightning.callbacks.finite_guard import NonFiniteError
from gpt_lightning.callbacks.orderly_stop import Stopped
from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.cli.errors import say, this_rank
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule

# Of each launcher, the variables of how many processes it has started, and of which one this is.
LAUNCHERS = {
    "WORLD_SIZE": "RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "JSM_NAMESPACE_SIZE": "JSM_NAMESPACE_RANK",
}
OF_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK")


def is_tensor_parallel(settings: Any) -> bool:
    """Tells whether the options of a verb choose TensorParallelDDPStrategy."""
    class_path = getattr(settings.trainer.strategy, "class_path", "")
    return class_path.rpartition(".")[2] == TensorParallelDDPStrategy.__name__


def follow_launcher(settings: dict[str, Any]) -> None:
    """Gives a Trainer the devices and nodes of torchrun or srun, where the options leave them out.

    On a CPU Lightning would take one device, and train as many models, each alone, as there are processes.
    """
    variables = os.environ
    if "TORCHELASTIC_RUN_ID" in variables:
        if missing := [name for name in OF_TORCHRUN if not variables.get(name, "").isdecimal()]:
            problem = f"TORCHELASTIC_RUN_ID is set, as torchrun does, and {', '.join(missing)} to no number"
            raise UserError(f"{problem}; start it by torchrun, or unset TORCHELASTIC_RUN_ID")
        processes, nodes = int(variables["WORLD_SIZE"]), int(variables.get("GROUP_WORLD_SIZE", 1))
    elif "SLURM_STEP_NUM_TASKS" in variables and SLURMEnvironment.job_name() not in ("bash", "interactive"):
        processes, nodes = int(variables["SLURM_STEP_NUM_TASKS"]), int(variables.get("SLURM_NNODES", 1))
    else:
        return
    if processes > 1 and settings["devices"] == "auto":
        settings["devices"] = max(1, processes // nodes)
    if nodes > 1 and settings["num_nodes"] == 1:
        settings["num_nodes"] = nodes


def check_options_under_launcher(devices: Any, num_nodes: int) -> None:
    """Refuses, before a Trainer is made of them, options that leave processes alone."""
    settings = {"devices": devices, "num_nodes": num_nodes}
    follow_launcher(settings)
    if str(settings["devices"]).isdecimal():  # a number, as a text too; else the Trainer finds out how many
        check_launcher(int(settings["devices"]), settings["num_nodes"])


def check_launcher(devices: int, nodes: int) -> None:
    """Refuses processes that a launcher has started and that a Trainer does not make one run of."""
    for size, rank in LAUNCHERS.items():
        processes = os.environ.get(size, "") if rank in os.environ else ""
        if processes.isdecimal() and int(processes) > devices * nodes:
            raise UserError(
                f"{size}={processes}: a launcher has started {processes} processes, and each would run alone "
                f"with trainer.devices={devices}, trainer.num_nodes={nodes}; leave both out, make their "
                f"product {processes}, or start one process"
            )
    if this_rank() >= devices * nodes:  # which would leave all logs to another one
        raise UserError(
            f"this process is rank {this_rank()} (by RANK, LOCAL_RANK or SLURM_PROCID) of the "
            f"{devices * nodes} that trainer.devices={devices}, trainer.num_nodes={nodes} make; unset what "
            "another run has left over"
        )


def others_at_work() -> Literal["wait", "leave"] | None:
    """Tells what a launcher's other processes are to one that has no more to do, if it has started others.

    Those of torchrun or srun run at one time and end together. The tasks of an array each run when there is
    room, and one that waits for others may keep them from starting.
    """
    n_tasks = os.environ.get("SLURM_ARRAY_TASK_COUNT", "")
    if n_tasks.isdecimal() and int(n_tasks) > 1:
        return "leave"
    sizes = (os.environ.get(size, "") for size, rank in LAUNCHERS.items() if rank in os.environ)
    return "wait" if any(size.isdecimal() and int(size) > 1 for size in sizes) else None


def tell_of_no_rank(processes: int) -> None:
    """Says that this process is none of as many as are meant, where it is not told which it is."""
    size = os.environ.get("WORLD_SIZE", "")
    if "RANK" not in os.environ and size.isdecimal() and int(size) > processes:
        say(
            f"warning: WORLD_SIZE={size} is set and RANK is not, so this process runs without others; start "
            "all of them by torchrun, or unset it"
        )


def on_first_machine() -> bool:
    names = ("GROUP_RANK", "NODE_RANK", "SLURM_NODEID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def check_environment(trainer: Trainer) -> None:
    """Raises now what Lightning would find when it starts: that srun was told of other numbers."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        environment.validate_settings(trainer.num_devices, trainer.num_nodes)


def build_without_memory(module: type[GPTLightningModule], *args: Any, **kwargs: Any) -> GPTLightningModule:
    """Makes the module on the meta device, for the strategy to give each rank its part."""
    with torch.device("meta"):
        return module(*args, **kwargs)


@contextmanager
def leaving_together(rank_guard: RankGuard) -> Iterator[None]:
    """Ends the process groups while all ranks are there: when all is done, or ended by all of them."""
    try:
        yield
    except MisconfigurationException as error:  # Lightning's word for a user's mistake
        raise UserError(str(error)) from error
    except (Stopped, NonFiniteError) as error:  # raised on all ranks, and said by the first
        rank_guard.leave()
        if this_rank():
            sys.exit(error.exit_code)
        raise
    rank_guard.leave()
