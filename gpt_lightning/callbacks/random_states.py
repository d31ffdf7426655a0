"""Random states of all ranks, as plain values that `weights_only` reads; one of them where all are alike.

They are unless a user's code has ranks draw differently: ranks are seeded alike, and what replicas draw of
their own is seeded from the stream that all have in common (parallel/dropout.py). Any number of ranks goes on
from the one. Where they differ, the file holds a row of bytes of each, of which a rank reads its own.
"""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpt_lightning.checkpoint.training_state import ROWS, STATES, problem_of_generators
from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.ranks import are_alike, rows_on_first

State = dict[str, Any]


def random_state(device: torch.device) -> State:
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "device": torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None,
    }


def set_random_state(state: State, device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])
    if device.type != "cpu" and state["device"] is not None:
        torch.get_device_module(device).set_rng_state(state["device"])


def of_all_ranks(device: torch.device) -> dict[str, Any]:
    """Returns what a checkpoint holds of them, complete on the first rank; all ranks call it."""
    state = random_state(device)
    row = _as_row(state)
    rows = None if are_alike(row.numpy().tobytes(), device) else rows_on_first(row, device)
    return {STATES: [state]} if rows is None else {STATES: [state], ROWS: rows}


def own_state(saved: dict[str, Any], rank: int, world_size: int) -> State | None:
    """Returns the rank's state of a checkpoint; None where it holds those of another number of ranks."""
    states, rows = saved[STATES], saved.get(ROWS)
    if (len(states) if rows is None else len(rows)) not in (1, world_size):
        return None
    if rows is not None:
        state = _of_row(rows[rank], states[0])
    else:  # earlier versions kept here of other ranks what differs from the first one's
        state = {**states[0], **states[rank if len(states) > 1 else 0]}
    if (problem := problem_of_generators(state)) is not None:
        raise UserError(f"ckpt_path: the checkpoint holds no random states of rank {rank} ({problem})")
    return state


def _arrays(state: State) -> Iterator[NDArray[Any]]:
    """Yields a state's numbers, of equal length for all ranks."""
    yield state["torch"].numpy()
    yield np.zeros(0, np.uint8) if state["device"] is None else state["device"].numpy()
    _, internal, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    yield np.array([*internal, *keys, position, has_gauss], np.uint32)
    yield np.array([np.nan if gauss is None else gauss, cached], np.float64)


def _as_row(state: State) -> Tensor:
    return torch.from_numpy(np.concatenate([array.view(np.uint8) for array in _arrays(state)]))


def _of_row(row: Tensor, like: State) -> State:
    """Reads a row of bytes that was made where the first rank's state was `like` this."""
    lengths = [array.nbytes for array in _arrays(like)]
    if row.numel() != sum(lengths):
        raise UserError(f"ckpt_path: the checkpoint holds random states of {row.numel()} bytes; name another")
    of_torch, of_device, words, floats = row.clone().split(lengths)
    *numbers, position, has_gauss = np.frombuffer(words.numpy().tobytes(), np.uint32).tolist()
    gauss, cached = np.frombuffer(floats.numpy().tobytes(), np.float64).tolist()
    version, internal, _ = like["python"]
    return {
        "torch": of_torch,
        "python": (version, tuple(numbers[: len(internal)]), None if np.isnan(gauss) else gauss),
        "numpy": (like["numpy"][0], numbers[len(internal) :], position, has_gauss, cached),
        "device": None if like["device"] is None else of_device,
    }
