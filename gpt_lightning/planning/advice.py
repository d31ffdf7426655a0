"""Finds which options make a run fit its devices, and which arrangement of given devices is the fastest."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any

from gpt_lightning.exit_codes import UserError
from gpt_lightning.planning.devices import Device
from gpt_lightning.planning.memory import memory_of
from gpt_lightning.planning.setup import OPTIONS, SHARDINGS, Setup
from gpt_lightning.planning.speed import speed_of

USABLE = 0.95  # of a device's memory: allocators leave gaps
_MOST_ROWS = 64
_GAIN = 1.05  # of the least time, within which times are taken for equal
STRATEGY = "gpt_lightning.TensorParallelDDPStrategy"
WORDS = {
    "tensor_parallel_size": "trainer.strategy.tensor_parallel_size",
    "sequence_parallel": "trainer.strategy.sequence_parallel",
    "shard_replicas": "trainer.strategy.shard_replicas",
    "gather_dtype": "trainer.strategy.gather_dtype",
    **OPTIONS,
    "activation_checkpointing": "model.activation_checkpointing",
}


@dataclass(frozen=True)
class Change:
    """Is a setup that differs from another, by the estimated peak of memory and seconds of a step."""

    setup: Setup
    peak: int
    step_seconds: float

    def options(self, former: Setup) -> list[str]:
        """Says by which options it differs."""
        changed = {name: getattr(self.setup, name) for name in WORDS}
        options = [
            f"--{WORDS[name]} {'null' if value is None else str(value).lower()}"
            for name, value in changed.items()
            if value != getattr(former, name)
        ]
        is_plain = former.tensor_parallel_size == 1 and former.shard_replicas == "none"
        needs_ours = any(option.startswith("--trainer.strategy.") for option in options)
        return [f"--trainer.strategy {STRATEGY}", *options] if is_plain and needs_ours else options


def fits(setup: Setup, device: Device) -> bool:
    return memory_of(setup).peak <= USABLE * device.memory


def remedies(setup: Setup, device: Device) -> list[Change]:
    """Lists what makes the run fit, each change alone: the steps have the same tokens, the fastest first."""
    changes = _judged(_single_changes(setup), device)
    fitting = [change for change in changes if change.peak <= USABLE * device.memory]
    return sorted(fitting, key=lambda change: change.step_seconds)


def proposal(setup: Setup, device: Device) -> Change | None:
    """Returns the fastest arrangement on these devices that fits, or None where none does.

    What is given stays where little is gained, and so does what is simpler.
    """
    arrangements = _judged(chain([setup], _arrangements(setup)), device)
    fitting = [change for change in arrangements if change.peak <= USABLE * device.memory]
    least = min((change.step_seconds for change in fitting), default=0.0)
    return next((change for change in fitting if change.step_seconds <= _GAIN * least), None)


def _judged(setups: Iterable[Setup], device: Device) -> list[Change]:
    return [Change(each, memory_of(each).peak, speed_of(each, device).step) for each in setups]


def _single_changes(setup: Setup) -> Iterator[Setup]:
    if not setup.activation_checkpointing:
        yield replace(setup, activation_checkpointing=True)
    if setup.replicas > 1:
        for way in SHARDINGS:
            if way != setup.shard_replicas:
                gather_dtype = None if way == "none" else setup.gather_dtype
                yield replace(setup, shard_replicas=way, gather_dtype=gather_dtype)
    if setup.gather_dtype is None and "bf16" in _gather_dtypes(setup, setup.sharding):
        yield replace(setup, gather_dtype="bf16")
    if setup.tensor_parallel_size > 1 and not setup.sequence_parallel:
        yield from _possible(setup, sequence_parallel=True)
    for size in (2, 4, 8):
        if size > setup.tensor_parallel_size:
            yield from _arranged(setup, tensor_parallel_size=size)
    rows = setup.batch_size
    while rows % 2 == 0:
        rows //= 2
        yield from _arranged(setup, batch_size=rows)


def _arrangements(setup: Setup) -> Iterator[Setup]:
    """Yields the simplest first: no tensor parallelism, nothing shared, nothing computed again."""
    for size in (1, 2, 4, 8):
        for sharding in SHARDINGS:
            ways = product(_gather_dtypes(setup, sharding), (False, True), range(_MOST_ROWS, 0, -1))
            for gather_dtype, again, rows in ways:
                yield from _arranged(
                    setup,
                    tensor_parallel_size=size,
                    sequence_parallel=size > 1 and setup.seq_len % size == 0,
                    shard_replicas=sharding,
                    gather_dtype=gather_dtype,
                    activation_checkpointing=again,
                    batch_size=rows,
                )


def _gather_dtypes(setup: Setup, sharding: str) -> list[str | None]:
    """Lists those that go with the precision, where replicas share weights so."""
    return [None, "bf16"] if sharding != "none" and setup.precision == "bf16-mixed" else [None]


def _arranged(setup: Setup, **changes: Any) -> Iterator[Setup]:
    """Yields the changed setup with as many accumulated passes as keep a step's tokens, if that can be."""
    for changed in _possible(setup, **changes):
        rows = changed.replicas * changed.batch_size
        sequences = setup.replicas * setup.batch_size * setup.accumulation
        if sequences % rows == 0 and changed.sharding == changed.shard_replicas:
            yield replace(changed, accumulation=sequences // rows)


def _possible(setup: Setup, **changes: Any) -> Iterator[Setup]:
    try:
        yield replace(setup, **changes)
    except UserError:  # heads, or devices, that cannot be cut so
        return
