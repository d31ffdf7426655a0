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
    """Counts 4 L + 2 all-reduces of [n, D] a pass, or of reduce-scatters so many and 6 L + 2 gatherings.

    Each block that is computed again adds the two all-reduces of its forward pass.
    """
    size, layers = setup.tensor_parallel_size, setup.config.n_layers
    message = setup.pass_tokens * setup.config.d_model * setup.compute_bytes * (size - 1) / size
    halves = 10 * layers + 4 if setup.cuts_sequence else 8 * layers + 4
    if setup.activation_checkpointing:
        halves += 4 * layers
    return halves * message * setup.accumulation


def _among_replicas(setup: Setup) -> tuple[float, float]:
    """Counts one all-reduce of the gradients a step, or a scattering of them and the gathering of weights."""
    replicas, n_bytes = setup.replicas, count_parameters(setup.part).total * setup.weight_bytes
    one_way = n_bytes * (replicas - 1) / replicas
    if setup.sharding == "none":
        return 2 * one_way, 0.0
    times = {"optimizer": 1, "full": 2}[setup.sharding]
    return one_way, times * one_way * setup.accumulation
