"""A rank that is killed or stopped ends the whole run in time: one line says which, no process stays."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt_lightning.exit_codes import LOST_RANK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc"),
]
Config = Callable[..., Path]
END_SECONDS = 10  # long before any timeout, also on cores that other tests keep busy
TIMEOUT_SECONDS = 30  # the ranks also have to find each other in this time
DDP = ["ddp"]
TENSOR_PARALLEL = ["gpt_lightning.TensorParallelDDPStrategy", "--trainer.strategy.tensor_parallel_size", "2"]


class Program:
    """The program under its own launcher or torchrun, in a folder that its processes have in their words."""

    def __init__(self, folder: Path, words: list[str], torchrun: int = 0) -> None:
        self.folder = folder
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(torchrun)]
        command = [sys.executable, *(launcher if torchrun else []), "-m", "gpt_lightning", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = (folder / "log").open("w")
        self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)
        self.first_is_child = bool(torchrun)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def output(self) -> str:
        return (self.folder / "log").read_text()

    def wait_until(self, done: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, f"{self.processes()}\n{self.output()}"
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """All of this run that live, whoever started them."""
        self.process.poll()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._lives_here(pid)]

    def _lives_here(self, pid: int) -> bool:
        # A process that has ended and is not waited for has no words left.
        return str(self.folder) in _read(pid, "cmdline")

    def send(self, rank: int, number: int) -> None:
        os.kill(self._find(rank), number)

    def _find(self, rank: int) -> int:
        if rank == 0 and not self.first_is_child:
            return self.process.pid
        for pid in self.processes():
            is_child = f"\nPPid:\t{self.process.pid}\n" in _read(pid, "status")
            if is_child and f"LOCAL_RANK={rank}" in _read(pid, "environ").split("\0"):
                return pid
        raise AssertionError(f"no rank {rank}\n{self.output()}")


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def start(tiny_config: Config, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    """Starts an endless run and returns when it trains."""
    programs = []

    def start(strategy: list[str], devices: int, *words: str, torchrun: bool = False) -> Program:
        config = ["--config", str(tiny_config(trainer={"max_steps": 1000000, "val_check_interval": 100000}))]
        options = ["--trainer.devices", str(devices), "--trainer.strategy", *strategy]
        words = ("fit", *config, *options, *words)
        programs.append(Program(tmp_path, list(words), devices if torchrun else 0))
        program = programs[-1]
        program.wait_until(lambda: "model of " in program.output() or program.has_ended, 120)
        assert not program.has_ended, program.output()
        return program

    yield start
    for program in programs:
        for pid in program.processes():
            os.kill(pid, signal.SIGKILL)
        program.process.wait()


def assert_told(program: Program, expected: str) -> None:
    told = [line for line in program.output().splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and re.search(expected, told[0]), program.output()
    assert told[0].endswith("No checkpoint is there yet: begin again")


@pytest.mark.parametrize(
    "strategy, devices, rank",
    [(DDP, 2, "first"), (TENSOR_PARALLEL, 2, "last"), (TENSOR_PARALLEL, 4, "first")],
)
def test_a_killed_rank(
    strategy: list[str], devices: int, rank: str, start: Callable[..., Program]
) -> None:
    killed = 0 if rank == "first" else devices - 1
    program = start(strategy, devices)
    program.send(killed, signal.SIGKILL)
    program.wait_until(lambda: not program.processes(), END_SECONDS)
    assert program.process.wait(1) == (LOST_RANK if killed else -signal.SIGKILL)
    assert_told(program, f"rank {killed} of {devices} was (killed|ended by signal 9 .SIGKILL.)")
    assert "Traceback" not in program.output()


@pytest.mark.parametrize(
    "strategy, devices, rank", [(["DDPStrategy"], 2, "last"), (TENSOR_PARALLEL, 4, "first")]
)
def test_a_stopped_rank(
    strategy: list[str], devices: int, rank: str, start: Callable[..., Program]
) -> None:
    stopped = 0 if rank == "first" else devices - 1
    program = start(strategy, devices, "--trainer.strategy.timeout", f"0:00:{TIMEOUT_SECONDS}")
    program.send(stopped, signal.SIGSTOP)
    program.wait_until(lambda: not program.processes(), TIMEOUT_SECONDS)
    assert program.process.wait(1) == (LOST_RANK if stopped else -signal.SIGKILL)
    limits = TIMEOUT_SECONDS - 5, TIMEOUT_SECONDS
    silence = "has not answered for %d s .trainer.strategy.timeout is %d s" % limits
    assert_told(program, f"rank {stopped} of {devices} {silence}")


@pytest.mark.parametrize("killed", [0, 1])
def test_data_workers_end_with_their_rank(killed: int, start: Callable[..., Program]) -> None:
    program = start(DDP, 2, "--data.num_workers", "2")
    program.send(killed, signal.SIGKILL)
    program.wait_until(lambda: program.has_ended, END_SECONDS)
    # torch's workers look for their parent every 5 s.
    program.wait_until(lambda: not program.processes(), 2 * END_SECONDS)
    assert_told(program, f"rank {killed} of 2 was")


@pytest.mark.parametrize("killed", [0, 1])
def test_torchrun_too_hears_which_rank_was_killed(killed: int, start: Callable[..., Program]) -> None:
    program = start(DDP, 2, torchrun=True)
    program.send(killed, signal.SIGKILL)
    program.wait_until(lambda: not program.processes(), 2 * END_SECONDS)
    assert program.process.wait(1) != 0
    assert_told(program, f"rank {killed} of 2 was killed")
