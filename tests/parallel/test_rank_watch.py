"""Ranks that are killed, stopped or fail, told from those that are slow, suspended together, or leave."""

import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt_lightning.exit_codes import LOST_RANK
from gpt_lightning.parallel import rank_signs, rank_watch
from gpt_lightning.parallel import ranks as exchanges
from gpt_lightning.parallel.rank_signs import TICK_SECONDS, MachineFile, MachineLinks
from gpt_lightning.parallel.rank_watch import Lost, RankWatch

DEADLINE_SECONDS = 30
TIMEOUT = timedelta(seconds=4)
Body = Callable[[int, RankWatch], None]


class Ranks:
    """Forked ranks with a process group and a watch each; what they write goes to one file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[Any] = []

    def start(
        self,
        world_size: int,
        body: Body,
        timeout: timedelta = TIMEOUT,
        n_nodes: int = 1,
        machines: list[int] | None = None,
    ) -> None:
        """Machine after machine is filled, unless `machines` says where each rank lies."""
        fork = multiprocessing.get_context("fork")
        for rank in range(world_size):
            machine = rank // (world_size // n_nodes) if machines is None else machines[rank]
            args = (self.folder, rank, world_size, machine, body, timeout)
            self.processes.append(fork.Process(target=_rank, args=args))
            self.processes[-1].start()
        self.wait_until(lambda: len(list(self.folder.glob("*.working"))) == world_size)

    def wait_until(self, done: Callable[[], bool], deadline_seconds: float = DEADLINE_SECONDS) -> float:
        start = time.monotonic()
        while not done():
            assert time.monotonic() - start < deadline_seconds, self.lines()
            self.processes[0].join(0.02)
        return time.monotonic() - start

    def wait_for_ticks(self, count: int) -> None:
        end = time.monotonic() + count * TICK_SECONDS
        self.wait_until(lambda: time.monotonic() > end)

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


def _rank(
    folder: Path, rank: int, world_size: int, machine: int, body: Body, timeout: timedelta
) -> None:
    torch.set_num_threads(1)
    sys.stderr = (folder / "stderr").open("a", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    tempfile.tempdir = str(folder)
    os.environ.update(MASTER_ADDR="127.0.0.1", FOLDER=str(folder))
    store = dist.FileStore(str(folder / "store"), world_size)  # asks no name server, whatever the timeout
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    watch = RankWatch(rank, world_size, 0, machine, timeout)
    watch.remedy = lambda: "Resume with --ckpt_path last"
    watch.start()
    watch.connect()
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


def n_machines_that_speak(world_size: int, n_nodes: int, lost: int) -> int:
    """Rank 0 alone does; where it is lost, all machines that have another rank do."""
    if lost != 0:
        return 1
    return n_nodes if world_size > n_nodes else n_nodes - 1


@pytest.mark.parametrize("body", [work, wait_outside_of_collectives])
@pytest.mark.parametrize(
    "world_size, n_nodes, killed",
    [(2, 1, 1), (4, 1, 0), (4, 2, 1), (4, 2, 2), (4, 2, 3), (4, 2, 0), (2, 2, 0), (2, 2, 1)],
)
def test_a_killed_rank_ends_the_others(
    ranks: Ranks, world_size: int, n_nodes: int, killed: int, body: Body
) -> None:
    ranks.start(world_size, body, n_nodes=n_nodes)
    ranks.send(killed, signal.SIGKILL)
    others = [rank for rank in range(world_size) if rank != killed]
    assert ranks.codes(*others, within_seconds=3) == [LOST_RANK] * len(others)
    line = (
        f"error: rank {killed} of {world_size} was killed, or its machine failed; the other ranks end too. "
        "Resume with --ckpt_path last"
    )
    assert ranks.told() == [line] * n_machines_that_speak(world_size, n_nodes, killed)
    assert "Traceback" not in "".join(ranks.lines())


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_ranks_that_a_scheduler_deals_to_machines_in_turn_are_watched(ranks: Ranks, killed: int) -> None:
    ranks.start(4, wait_outside_of_collectives, machines=[0, 1, 0, 1])
    ranks.send(killed, signal.SIGKILL)
    others = [rank for rank in range(4) if rank != killed]
    assert ranks.codes(*others, within_seconds=3) == [LOST_RANK] * 3
    assert [line.startswith(f"error: rank {killed} of 4 was killed") for line in ranks.told()] == [True]


@pytest.mark.slow
@pytest.mark.parametrize("body", [work, wait_outside_of_collectives])
@pytest.mark.parametrize(
    "world_size, n_nodes, stopped", [(2, 1, 1), (2, 1, 0), (4, 2, 0), (4, 2, 2), (2, 2, 0)]
)
def test_a_stopped_rank_ends_the_others_in_time(
    ranks: Ranks, world_size: int, n_nodes: int, stopped: int, body: Body
) -> None:
    ranks.start(world_size, body, n_nodes=n_nodes)
    ranks.send(stopped, signal.SIGSTOP)
    others = [rank for rank in range(world_size) if rank != stopped]
    codes = ranks.codes(*others, within_seconds=TIMEOUT.total_seconds() + 0.5)
    assert codes == [LOST_RANK] * len(others)
    told = ranks.told()
    assert len(told) == n_machines_that_speak(world_size, n_nodes, stopped)
    for line in told:
        assert line.startswith(f"error: rank {stopped} of {world_size} has not answered for 3 s")
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


@pytest.mark.parametrize("world_size, n_nodes", [(3, 1), (4, 2), (3, 3)])
def test_leaving_in_order_judges_nobody(ranks: Ranks, world_size: int, n_nodes: int) -> None:
    ranks.start(world_size, leave_with_a_code, n_nodes=n_nodes)
    (ranks.folder / "done").touch()
    assert ranks.codes(*range(world_size), within_seconds=3) == [143] * world_size
    assert not ranks.lines()


def test_the_last_word_of_who_leaves_is_not_overwritten(tmp_path: Path) -> None:
    """By the thread, which may be about to write what the rank has said before."""
    watch, file = RankWatch(1, 2, 1, 0, TIMEOUT), MachineFile(tmp_path / "machine", 1, [0, 1])
    write, is_writing, may_write = file.write, threading.Event(), threading.Event()

    def write_late(word: str) -> None:
        if threading.current_thread() is watch._thread:
            is_writing.set()
            may_write.wait(TICK_SECONDS)
        write(word)
        if word == "left":
            may_write.set()

    setattr(file, "write", write_late)
    watch._file = file
    watch.start()
    assert is_writing.wait(DEADLINE_SECONDS)
    watch.leave()
    assert [sign.word for sign in MachineFile(tmp_path / "machine", 0, [0, 1]).signs()] == ["left"]


def watch_a_child(rank: int, watch: RankWatch) -> None:
    """In place of the harness's watch: rank 0 of 2 as Lightning's launcher has it, with a child process."""
    watch.leave()
    folder = Path(os.environ["FOLDER"])
    command = "import os; open('child', 'w').write(str(os.getpid())); import time; time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", command], cwd=folder)
    RankWatch(0, 2, 0, 0, TIMEOUT, children=lambda: {1: child}).start()
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


def count_links(rank: int, watch: RankWatch) -> None:
    assert watch._links is not None
    assert [sign.rank for sign in watch._links.signs()] == {0: [3], 3: [0]}.get(rank, [])
    (Path(os.environ["FOLDER"]) / f"{rank}.working").touch()
    dist.barrier()
    watch.leave()


def test_the_first_rank_of_each_node_has_a_link_with_rank_0(ranks: Ranks) -> None:
    ranks.start(6, count_links, n_nodes=2)
    assert ranks.codes(*range(6)) == [0] * 6, ranks.lines()


def pretend_nodes(port: int, n_nodes: int, telling: Any) -> None:
    """Is the first rank of all nodes but the first."""
    all_links = [MachineLinks("secret") for _ in range(1, n_nodes)]
    for node, links in enumerate(all_links, start=1):
        links.call(8 * node, "127.0.0.1", port)
        links.write("")
    telling.send("called")
    while True:
        start = time.monotonic()
        for links in all_links:
            links.write("")
            assert not links.signs()[0].is_gone
        time.sleep(max(0, start + TICK_SECONDS - time.monotonic()))


def measure_a_tick(rank: int, _: RankWatch) -> None:
    """As rank 0 of 128 nodes of 8 ranks."""
    folder, fork = Path(os.environ["FOLDER"]), multiprocessing.get_context("fork")
    others: list[Any] = []

    def start_process(target: Callable[..., None], *args: Any) -> None:
        answer, telling = fork.Pipe(duplex=False)
        others.append(fork.Process(target=target, args=(*args, telling), daemon=True))
        others[-1].start()
        assert answer.poll(DEADLINE_SECONDS)

    watch = RankWatch(0, 1024, 0, 0, TIMEOUT)
    watch._file = MachineFile(folder / "machine", 0, [*range(8)])
    for other in range(1, 8):
        start_process(join_and_wait, folder / "machine", other)
    watch._links = MachineLinks("secret")
    start_process(pretend_nodes, watch._links.listen(), 128)
    watch._links.join(127)
    seconds = []
    for _ in range(8):
        start = time.process_time()
        watch._say("")
        assert watch._find_lost() is None
        seconds.append(time.process_time() - start)
        others[0].join(TICK_SECONDS)
    tick_ms = 1000 * sorted(seconds)[4]
    signs = watch._links.signs()
    for process in others:
        process.kill()
    assert [sign.rank for sign in signs] == [*range(8, 1024, 8)] and min(sign.beats for sign in signs) > 1
    (folder / "tick_ms").write_text(f"{tick_ms:.2f}")
    (folder / f"{rank}.working").touch()


def test_a_tick_of_rank_0_of_1024(ranks: Ranks, capsys: pytest.CaptureFixture[str]) -> None:
    ranks.start(1, measure_a_tick)
    tick_ms = (ranks.folder / "tick_ms").read_text()
    with capsys.disabled():
        print(f"\na tick of rank 0 of 1,024 ranks: {tick_ms} ms of CPU")
    assert float(tick_ms) < 5


def join_and_wait(path: Path, rank: int, telling: Any) -> None:
    file = MachineFile(path, rank, [*range(8)])
    telling.send("joined")
    signal.pause()
    file.write("")


def exhaust_descriptors() -> None:
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def work_without_descriptors(rank: int, watch: RankWatch) -> None:
    watch_again(watch)
    if rank == 0:
        exhaust_descriptors()
    reduce_for_a_while()


def join_without_descriptors(rank: int, watch: RankWatch) -> None:
    """Rank 0 has no descriptors for its file and its listener."""
    exhaust_after_exchange(str, rank, watch)


def accept_without_descriptors(rank: int, watch: RankWatch) -> None:
    """The other ranks call rank 0 when it has no descriptors any more."""
    exhaust_after_exchange(type(None), rank, watch)


def exhaust_after_exchange(kind: type, rank: int, watch: RankWatch) -> None:
    def exhausting(exchange: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def exchanged_and_exhausted(value: Any) -> Any:
            result = exchange(value)
            if rank == 0 and isinstance(value, kind):
                exhaust_descriptors()
            return result

        return exchanged_and_exhausted

    together = exhausting(lambda _: exchanges.together())
    setattr(rank_watch, "from_first", exhausting(exchanges.from_first))
    setattr(rank_watch, "together", lambda: together(None))
    watch_again(watch)
    reduce_for_a_while()


def watch_again(watch: RankWatch) -> None:
    """In place of the harness's watch, with a timeout that is shorter than the collective operations'."""
    watch.leave()
    (Path(os.environ["FOLDER"]) / f"{watch._rank}.working").touch()
    second = RankWatch(watch._rank, 2, 0, watch._machine_number, timedelta(seconds=2))
    second.start()
    second.connect()


def reduce_for_a_while() -> None:
    start = time.monotonic()
    one = torch.ones(1)
    while one.item():  # longer than the timeout
        dist.all_reduce(one.fill_(float(time.monotonic() < start + 3)), op=dist.ReduceOp.MIN)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [work_without_descriptors, join_without_descriptors, accept_without_descriptors]
)
@pytest.mark.parametrize("n_nodes", [1, 2])
def test_a_healthy_run_goes_on_when_rank_0_is_out_of_file_descriptors(
    ranks: Ranks, n_nodes: int, body: Body, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_signs, "CONNECT_SECONDS", 1.0)
    ranks.start(2, body, timedelta(seconds=20), n_nodes=n_nodes)
    assert ranks.codes(0, 1) == [0, 0], ranks.lines()
    assert not ranks.told()
    assert not list(ranks.folder.glob("gpt_lightning-*"))


def test_a_stranger_is_not_taken_for_a_rank() -> None:
    first, second = MachineLinks("secret"), MachineLinks("secret")
    port = first.listen()
    lines = [b"a guess 8\nlost 1 was killed\n", b"x" * 1_000, b"", b"secret"]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in lines]
    for stranger, line in zip(strangers, lines, strict=True):
        stranger.sendall(line)
    second.call(8, "127.0.0.1", port)
    joining = threading.Thread(target=second.join, args=[1])
    joining.start()
    first.join(1)
    joining.join()
    first.write("a word for ranks")
    assert [sign.rank for sign in first.signs()] == [8]
    for stranger in strangers:
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (word := second.signs()[0].word) and time.monotonic() < deadline:
        time.sleep(TICK_SECONDS / 25)
    assert word == "a word for ranks"


def test_who_was_not_heard_in_time_is_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_signs, "CONNECT_SECONDS", 0.2)
    first, second = MachineLinks("secret"), MachineLinks("secret")
    second.call(8, "127.0.0.1", first.listen())
    with pytest.raises(TimeoutError, match="0 of 1 machines have answered"):
        second.join(1)
    with pytest.raises(TimeoutError, match="1 of 2 machines have answered"):
        first.join(2)
    assert not second.signs()
    assert [sign.word for sign in first.signs()] == ["left"]


def test_a_lost_rank_is_told_of_though_no_remedy_comes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_watch, "PATIENCE_SECONDS", 0.01)
    watch, answered = RankWatch(0, 2, 0, 0, TIMEOUT), threading.Event()
    watch.remedy = lambda: f"too late: {answered.wait(DEADLINE_SECONDS)}"  # as of a disk that hangs
    watch._report(Lost(1, "was killed"))
    answered.set()
    watch.remedy = lambda: "Resume"
    watch._report(Lost(1, "was killed"))
    line = "error: rank 1 of 2 was killed; the other ranks end too"
    assert capsys.readouterr().err == f"{line}\n{line}. Resume\n"


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
