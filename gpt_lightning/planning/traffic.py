"""Counts the bytes that a device sends in an optimizer step, by ring algorithms.

An all-reduce of x bytes over r ranks sends 2 (r - 1) / r x, a gathering or a scattering half of that.
Shapes: L layers of width D, n tokens a pass.
"""

from typing import NamedTuple

from gpt_lightning.planning.parameters import count_parameters
from gpt_lightning.planning.setup import Setup


class Traffic(NamedTuple):
    """Holds bytes that a device sends in a step: to tensor-parallel peers, and to replicas of both kinds."""

    peers: float
    gradients: float
    weights: float


def traffic_of(setup: Setup) -> Traffic:
    return Traffic(_among_peers(setup), *_among_replicas(setup))


def _among_peers(setup: Setup) -> float:
    """Counts messages of [n, D], in halves of all-reduces.

    A column-parallel layer has an all-reduce backward, a row-parallel one forward. Where the sequence is cut
    the first gathers, gathers again and scatters, the second scatters and gathers. The token table and the
    head have one each. A block that is computed again ends before the last message of its forward pass.
    """
    size, config = setup.tensor_parallel_size, setup.config
    columns, rows = 3 if config.activation == "swiglu" else 2, 2
    if setup.cuts_sequence:
        a_block, again = 3 * columns + 2 * rows, columns + rows - 1
    else:
        a_block, again = 2 * columns + 2 * rows, 2 * (rows - 1)
    halves = config.n_layers * (a_block + (again if setup.activation_checkpointing else 0)) + 2
    table = 2 * setup.weight_bytes  # whose vectors are not yet rounded
    numbers = setup.pass_tokens * config.d_model * (size - 1) / size
    return numbers * (halves * setup.compute_bytes + table) * setup.accumulation


def _among_replicas(setup: Setup) -> tuple[float, float]:
    """Counts one all-reduce of the gradients a step, or a scattering of them and the gathering of weights."""
    replicas, n_bytes = setup.replicas, count_parameters(setup.part).total * setup.weight_bytes
    one_way = n_bytes * (replicas - 1) / replicas
    if setup.sharding == "none":
        return 2 * one_way, 0.0
    times = {"optimizer": 1, "full": 2}[setup.sharding]
    return one_way, times * one_way * setup.accumulation
