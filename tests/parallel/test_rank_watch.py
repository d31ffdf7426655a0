"""Ranks that are killed, stopped or fail, told from those that are slow, suspended together, or leave."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt_lightning.exit_codes import LOST_RANK
from gpt_lightning.parallel.rank_watch import Place, RankWatch

DEADLINE_SECONDS = 30
TIMEOUT = timedelta(seconds=4)
Body = Callable[[int, RankWatch], None]


class Ranks:
    """Forked ranks with a process group and a watch each; what they write goes to one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []

    def start(self, world_size: int, body: Body, timeout: timedelta = TIMEOUT) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        for rank in range(world_size):
            args = (self.folder, rank, world_size, port, body, timeout)
            self.processes.append(fork.Process(target=_rank, args=args))
            self.processes[-1].start()
        self.wait_until(lambda: len(list(self.folder.glob("*.working"))) == world_size)

    def wait_until(self, done: Callable[[], bool], deadline_seconds: float = DEADLINE_SECONDS) -> float:
        start = time.monotonic()
        while not done():
            assert time.monotonic() - start < deadline_seconds, self.lines()
            self.processes[0].join(0.02)
        return time.monotonic() - start

    def send(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def codes(self, *ranks: int, within_seconds: float = DEADLINE_SECONDS) -> list[int | None]:
        """The exit codes of these ranks, once they have ended."""
        processes = [self.processes[rank] for rank in ranks]
        self.wait_until(lambda: not any(process.is_alive() for process in processes), within_seconds)
        return [process.exitcode for process in processes]

    def lines(self) -> list[str]:
        return (self.folder / "stderr").read_text().splitlines()

    def told(self) -> list[str]:
        return [line for line in self.lines() if line.startswith("error: ")]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.join()


def _rank(folder: Path, rank: int, world_size: int, port: int, body: Body, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    sys.stderr = (folder / "stderr").open("a", buffering=1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), FOLDER=str(folder))
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timeout)
    watch = RankWatch(Place(rank, world_size, rank), timeout, "Resume with --ckpt_path last")
    watch.start()
    watch.connect(_broadcast)
    status = 1
    try:
        body(rank, watch)
        status = 0
    except SystemExit as exit:
        status = int(str(exit.code))
    except Exception as error:
        watch.explain(error)
        traceback.print_exc()
    finally:
        os._exit(status)


def _broadcast(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]


def work(rank: int, watch: RankWatch) -> None:
    """All-reduces until somebody writes the file `done`."""
    folder, one = Path(os.environ["FOLDER"]), torch.ones(1)
    while True:
        dist.all_reduce(one.fill_(float((folder / "done").exists())))
        (folder / f"{rank}.working").touch()
        if one.item() == dist.get_world_size():
            break
    dist.barrier()
    watch.leave()


def wait_outside_of_collectives(rank: int, watch: RankWatch) -> None:
    """As with NCCL, where nobody hears of a peer that has gone."""
    (Path(os.environ["FOLDER"]) / f"{rank}.working").touch()
    while True:
        signal.pause()  # returns after any handled signal, such as that of a child's end


@pytest.mark.parametrize("body", [work, wait_outside_of_collectives])
@pytest.mark.parametrize("world_size, killed", [(2, 1), (2, 0), (4, 3), (4, 0)])
def test_a_killed_rank_ends_the_others(ranks: Ranks, world_size: int, killed: int, body: Body) -> None:
    ranks.start(world_size, body)
    ranks.send(killed, signal.SIGKILL)
    others = [rank for rank in range(world_size) if rank != killed]
    assert ranks.codes(*others, within_seconds=3) == [LOST_RANK] * len(others)
    (line,) = ranks.told()
    assert line == (
        f"error: rank {killed} of {world_size} was killed, or its machine failed; the other ranks end too. "
        "Resume with --ckpt_path last"
    )
    assert "Traceback" not in "".join(ranks.lines())


@pytest.mark.slow
@pytest.mark.parametrize("body", [work, wait_outside_of_collectives])
@pytest.mark.parametrize("world_size, stopped", [(2, 1), (2, 0), (4, 2)])
def test_a_stopped_rank_ends_the_others_in_time(
    ranks: Ranks, world_size: int, stopped: int, body: Body
) -> None:
    ranks.start(world_size, body)
    ranks.send(stopped, signal.SIGSTOP)
    others = [rank for rank in range(world_size) if rank != stopped]
    codes = ranks.codes(*others, within_seconds=TIMEOUT.total_seconds() + 0.5)
    assert codes == [LOST_RANK] * len(others)
    (line,) = ranks.told()
    assert line.startswith(f"error: rank {stopped} of {world_size} has not answered for")
    assert "(trainer.strategy.timeout is 4 s)" in line


def fail_on_rank_1(rank: int, watch: RankWatch) -> None:
    (Path(os.environ["FOLDER"]) / f"{rank}.working").touch()
    if rank == 1:
        raise KeyError("a fault of its own")
    work(rank, watch)


def test_a_rank_that_fails_shows_why_and_the_others_say_which(ranks: Ranks) -> None:
    ranks.start(3, fail_on_rank_1)
    assert ranks.codes(0, 1, 2, within_seconds=5) == [LOST_RANK, 1, LOST_RANK]
    assert "KeyError: 'a fault of its own'" in ranks.lines()
    (line,) = ranks.told()
    assert line.startswith("error: rank 1 of 3 ended with an error (KeyError)")


def fail_alike(rank: int, watch: RankWatch) -> None:
    (Path(os.environ["FOLDER"]) / f"{rank}.working").touch()
    dist.barrier()
    raise RuntimeError(f"rank {rank} cannot go on")


@pytest.mark.slow
def test_ranks_that_fail_alike_all_show_why(ranks: Ranks) -> None:
    ranks.start(3, fail_alike)
    assert ranks.codes(0, 1, 2) == [1, 1, 1]
    assert not ranks.told()
    for rank in range(3):
        assert f"RuntimeError: rank {rank} cannot go on" in ranks.lines()


@pytest.mark.slow
def test_a_run_that_was_suspended_as_a_whole_goes_on(ranks: Ranks) -> None:
    ranks.start(3, wait_outside_of_collectives, timedelta(seconds=2))
    for rank in range(3):
        ranks.send(rank, signal.SIGSTOP)
    start = time.monotonic()
    ranks.wait_until(lambda: time.monotonic() - start > 3)
    for rank in (2, 0, 1):
        ranks.send(rank, signal.SIGCONT)
    ranks.wait_until(lambda: time.monotonic() - start > 6)
    assert all(process.is_alive() for process in ranks.processes), ranks.lines()


def leave_with_a_code(rank: int, watch: RankWatch) -> None:
    work(rank, watch)
    assert [thread.name for thread in threading.enumerate() if "rank-watch" in thread.name] == []
    sys.exit(143)


def test_leaving_in_order_judges_nobody(ranks: Ranks) -> None:
    ranks.start(3, leave_with_a_code)
    (ranks.folder / "done").touch()
    assert ranks.codes(0, 1, 2, within_seconds=3) == [143, 143, 143]
    assert not ranks.lines()


def watch_a_child(rank: int, watch: RankWatch) -> None:
    """In place of the harness's watch: rank 0 of 2 as Lightning's launcher has it, with a child process."""
    watch.leave()
    folder = Path(os.environ["FOLDER"])
    command = "import os; open('child', 'w').write(str(os.getpid())); import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", command], cwd=folder)
    RankWatch(Place(0, 2, 0, children=lambda: {1: child}), TIMEOUT).start()
    wait_outside_of_collectives(rank, watch)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_that_ends_before_it_is_connected_is_lost(ranks: Ranks, number: int) -> None:
    ranks.start(1, watch_a_child)
    child = ranks.folder / "child"
    ranks.wait_until(lambda: child.exists() and child.read_text() != "")
    os.kill(int(child.read_text()), number)
    assert ranks.codes(0, within_seconds=3) == [LOST_RANK]
    name = signal.Signals(number).name
    assert ranks.told() == [
        f"error: rank 1 of 2 was ended by signal {int(number)} ({name}); the other ranks end too"
    ]


def slow_rank(rank: int, watch: RankWatch) -> None:
    (Path(os.environ["FOLDER"]) / f"{rank}.working").touch()
    if rank == 1:
        time.sleep(3)
    dist.barrier()
    watch.leave()


@pytest.mark.slow
def test_a_slow_rank_is_not_lost(ranks: Ranks) -> None:
    ranks.start(2, slow_rank, timedelta(seconds=4))
    assert ranks.codes(0, 1) == [0, 0], ranks.lines()
