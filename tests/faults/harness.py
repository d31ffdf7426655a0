"""Runs the program in processes forked after the imports, to be killed anywhere and started again."""

import hashlib
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.__main__ import main
from gpt_lightning.checkpoint.checkpoint import Checkpoint
from tests.distributed import torchrun_environments

STARTING, TRAINING, VALIDATING, ENDED = range(4)
PHASES = ("starting", "training", "validating", "ended")
START_SECONDS = 60


class Process:
    """One run of the program, of one or several ranks, whose phase can be seen from outside."""

    def __init__(
        self, words: Sequence[str], folder: Path, *, ranks: int = 1, log: str = "log", **environment: str
    ) -> None:
        self.log = folder / log
        self._phase = mmap.mmap(-1, 2)  # of the first rank; whether it is writing a checkpoint
        self._changes, telling = multiprocessing.Pipe(duplex=False)  # a byte for every change of these
        fork = multiprocessing.get_context("fork")
        own = torchrun_environments(ranks) if ranks > 1 else [{"TOKENIZERS_PARALLELISM": "false"}]
        common = (list(words), folder, self.log, self._phase, telling)
        self.ranks = [fork.Process(target=_run, args=(*common, {**env, **environment})) for env in own]
        for process in self.ranks:
            process.start()
        telling.close()

    @property
    def phase(self) -> int:
        return self._phase[0]

    @property
    def is_writing(self) -> bool:
        return bool(self._phase[1])

    @property
    def is_alive(self) -> bool:
        return any(process.is_alive() for process in self.ranks)

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
        """Whether it came true while the program was running."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0 and self.is_alive:
            if condition():
                return True
            self._wait_for_a_change(min(left, 0.02))  # a file may be waited for, which tells nothing
        return False

    def _wait_for_a_change(self, seconds: float) -> None:
        waited_for = [self._changes, *(process.sentinel for process in self.ranks if process.is_alive())]
        if self._changes in multiprocessing.connection.wait(waited_for, seconds):
            try:
                self._changes.recv_bytes()
            except EOFError:  # of a run that has ended
                self.ranks[0].join(seconds)

    def send(self, number: int, rank: int | None = None) -> None:
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def exit_codes(self, seconds: float = 60) -> list[int | None]:
        """When all have ended; whoever has not by then is killed."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.send(signal.SIGKILL)
        for process in self.ranks:
            process.join()
        return codes

    def run_for(self, seconds: float) -> None:
        """Lets it run on for so long, or to its end."""
        multiprocessing.connection.wait([process.sentinel for process in self.ranks], seconds)

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def run(words: Sequence[str], folder: Path, **options: Any) -> tuple[int | None, str]:
    """The first rank's exit code, and all that the ranks have said."""
    process = Process(words, folder, **options)
    codes = process.exit_codes(120)
    return codes[0], process.output()


def _run(
    words: list[str],
    folder: Path,
    log: Path,
    phase: mmap.mmap,
    telling: Connection,
    environment: dict[str, str],
) -> None:
    status: int | str | None = 1
    try:
        os.chdir(folder)
        os.environ.update(environment)
        # A job in the background of a shell's script is begun with SIGINT ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        rank_zero_only.rank = int(environment.get("RANK", "0"))  # read from the environment at the import
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
        if environment.get("RANK", "0") == "0":
            _show_phase(phase, telling)
        main(words)
        status = 0
    except SystemExit as exit:
        status = exit.code if exit.code is not None else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def _show_phase(phase: mmap.mmap, telling: Connection) -> None:
    """Have the callbacks that each run has show what is going on."""
    os.set_blocking(telling.fileno(), False)
    from gpt_lightning.callbacks.orderly_stop import OrderlyStop
    from gpt_lightning.checkpoint import io as checkpoint

    def show(index: int, number: int) -> None:
        phase[index] = number
        with suppress(BlockingIOError):  # nobody has looked for long
            telling.send_bytes(b"!")

    def showing(name: str, number: int) -> None:
        hook = getattr(OrderlyStop, name)

        def shown(self: Any, *args: Any, **kwargs: Any) -> Any:
            show(0, number)
            return hook(self, *args, **kwargs)

        setattr(OrderlyStop, name, shown)

    showing("on_train_start", TRAINING)
    showing("on_validation_start", VALIDATING)
    showing("on_validation_end", TRAINING)
    showing("on_train_end", ENDED)
    write = checkpoint.write

    def shown_write(*args: Any, **kwargs: Any) -> Any:
        show(1, 1)
        try:
            return write(*args, **kwargs)
        finally:
            show(1, 0)

    checkpoint.write = shown_write


def weights_hash(path: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(Checkpoint.open(path).contents["state_dict"].items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
