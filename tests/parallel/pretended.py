"""One rank of a world whose others are pretended: torch's fake backend sends nothing, and never waits."""

import multiprocessing
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import environment_of

RANKS_A_NODE = 8
DEADLINE_SECONDS = 120


def in_a_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function in a process of its own, forked from this one, and returns what it returns."""
    fork = multiprocessing.get_context("fork")
    answer, telling = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(telling, function, args))
    process.start()
    try:
        assert answer.poll(DEADLINE_SECONDS), "still working"
        error, result = answer.recv()
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def _answer(telling: Any, function: Callable[..., Any], args: Any) -> None:
    torch.set_num_threads(1)
    try:
        telling.send((None, function(*args)))
    except BaseException:
        telling.send((traceback.format_exc(), None))
    finally:
        sys.stdout.flush()
        os._exit(0)


def as_rank(rank: int, world_size: int, function: Callable[..., Any], *args: Any) -> Any:
    """Calls the function in a process that takes itself for the rank, and returns what it returns."""
    return in_a_process(_as_rank, rank, world_size, function, args)


def _as_rank(rank: int, world_size: int, function: Callable[..., Any], args: Any) -> Any:
    os.environ.update(environment_of(rank, world_size, world_size // RANKS_A_NODE))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # where nobody listens
    rank_zero_only.rank = rank
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    setattr(dist, "broadcast_object_list", lambda *args, **kwargs: None)  # all ranks have the same
    return function(*args)


Sent = Counter[tuple[str, int, int]]  # how often an operation, over so many ranks, of so many bytes


class Messages(TorchDispatchMode):
    """Counts what the rank sends, also from within DDP's reducer."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Sent = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, rest = str(func).partition(".")
        if space == "c10d":
            group = next(ProcessGroup.unbox(each) for each in args if _is_group(each))
            operation = rest.partition(".")[0].strip("_").removesuffix("_base").replace("_", "-")
            # Of parts and the whole, as in an all-gather, the whole.
            self.sent[operation, group.size(), max(map(_bytes, args))] += 1
        return func(*args, **(kwargs or {}))

    def taken(self) -> Sent:
        """Returns what was sent since it was asked for last."""
        sent, self.sent = self.sent, Counter()
        return sent


def _bytes(value: Any) -> int:
    tensors = [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def arrived(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Reduces DDP's bucket as DDP does, whose own waiting the fake backend does not know."""
    dist.all_reduce(bucket.buffer(), group=state)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Measures by how many bytes this process grows at most."""
    grown: list[int] = []
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = _status("VmRSS")
    yield grown
    grown.append(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))
