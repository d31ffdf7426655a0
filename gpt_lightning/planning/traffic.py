"""Counts the bytes that a device sends in an optimizer step, by ring algorithms.

An all-reduce of x bytes over r ranks sends 2 (r - 1) / r x, a gathering or a scattering half of that.
Shapes: L layers of width D, n tokens a pass.
"""

from typing import NamedTuple

from gpt_lightning.planning.parameters import Parameters, count_parameters
from gpt_lightning.planning.setup import Setup


class Traffic(NamedTuple):
    """Holds bytes that a device sends in a step.

    To tensor-parallel peers; to replicas, of gradients and of weights; of gradients that replicas have shared
    out within their nodes, to other nodes.
    """

    peers: float
    gradients: float
    weights: float
    nodes: float


def traffic_of(setup: Setup) -> Traffic:
    return Traffic(_among_peers(setup), *_among_replicas(setup))


def gathered_bytes(setup: Setup, counts: Parameters) -> int:
    """Counts the blocks' parameters in the dtypes in which replicas gather them."""
    rounded = counts.rounded if setup.gathers_rounded else 0
    return rounded * setup.compute_bytes + (counts.blocks - rounded) * setup.weight_bytes


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


def _among_replicas(setup: Setup) -> tuple[float, float, float]:
    """Counts an all-reduce of the gradients a step, or what fully_shard does in its place.

    That scatters them once a step, and sums the own part over the nodes; it gathers the weights once a step
    (optimizer), or those of the blocks twice a pass and the others once (full).
    """
    counts, replicas, shards = count_parameters(setup.part), setup.replicas, setup.shards
    of_gradients = counts.total * (2 if setup.reduce_dtype == "bf16" else setup.weight_bytes)
    if setup.sharding == "none":
        return 2 * of_gradients * (replicas - 1) / replicas, 0.0, 0.0
    copies, share = replicas // shards, (shards - 1) / shards
    of_blocks = gathered_bytes(setup, counts)
    gathered = of_blocks + (counts.total - counts.blocks) * setup.weight_bytes
    if setup.sharding == "full":
        gathered = setup.accumulation * (gathered + of_blocks)
    between = 2 * of_gradients / shards * (copies - 1) / copies
    return of_gradients * share, gathered * share, between
