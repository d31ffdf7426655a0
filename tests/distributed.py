"""Run a function on several ranks: forked after the imports, which take longer than most tests."""

import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only

TIMEOUT_SECONDS = 120


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, nodes: int = 1) -> list[Any]:
    """`function(*args)` on `world_size` processes, in the environment that torchrun gives; results by rank.

    The first rank that fails fails the test with its traceback, and no process outlives the call.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=_rank, args=(environment, Path(folder), function, args))
            for environment in torchrun_environments(world_size, nodes)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _wait(ranks: list[Any], folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        failed = [rank for rank, process in enumerate(ranks) if process.exitcode not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        multiprocessing.connection.wait(alive, deadline - time.monotonic())
    for rank, process in enumerate(ranks):
        if process.exitcode != 0:
            error = folder / f"{rank}.error"
            text = error.read_text() if error.exists() else f"still waiting, or ended by {process.exitcode}"
            if error.exists() or not any(folder.glob("*.error")):
                raise AssertionError(f"rank {rank} of {len(ranks)}: {text}")


def torchrun_environments(world_size: int, nodes: int = 1) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    return [{**common, **environment_of(rank, world_size, nodes)} for rank in range(world_size)]


def environment_of(rank: int, world_size: int, nodes: int) -> dict[str, str]:
    """What torchrun tells one rank of itself."""
    local = world_size // nodes
    own = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local}
    own |= {"GROUP_RANK": rank // local, "GROUP_WORLD_SIZE": nodes}
    # A pool of threads that tokenizers has made here does not survive the fork.
    other = {"TORCHELASTIC_RUN_ID": "test", "TOKENIZERS_PARALLELISM": "false"}
    return {**other, **{name: str(value) for name, value in own.items()}}


def _rank(
    environment: dict[str, str], folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(environment)
    rank = environment["RANK"]
    torch.set_num_threads(1)
    rank_zero_only.rank = int(rank)  # read from the environment at the import
    status = 1
    try:
        result = function(*args)
        torch.save(result, folder / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early takes the store away from the others
            dist.destroy_process_group()
        status = 0
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not back into pytest


_reserved: deque[socket.socket] = deque(maxlen=32)


def reserve_port() -> int:
    """A port for the first rank's store, which no other process is given meanwhile.

    The socket here is bound and does not listen: Linux then lets a second one, that may share, listen there.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _reserved.append(holder)
    return int(holder.getsockname()[1])
