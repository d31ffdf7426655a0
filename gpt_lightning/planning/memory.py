"""Estimates what a device has to hold in a step: bytes by kind, and the most at a time.

Weights, moments and, where something accumulates in them, gradients are always there. Beside them a step is
at its fullest when the loss is made, when it is traversed, in the first block that is, when the last gradient
is made, or in the optimizer. Shapes: V vocabulary, D d_model.
"""

from dataclasses import dataclass

from gpt_lightning.kernels.cross_entropy import SOFTMAX_ELEMENTS, chunk_rows
from gpt_lightning.planning.activations import kept_activations, residual_bytes, total_bytes
from gpt_lightning.planning.parameters import Parameters, count_parameters
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.traffic import gathered_bytes

_MULTIPLE = 64  # to which the loss pads a vocabulary in half precision
_AT_ONCE = 2**24  # numbers that Muon orthogonalises together
# What a process holds beside its tensors: on a CPU the libraries, and what the allocator keeps of the freed
# (docs/planning.md); on a GPU the context and the libraries' buffers.
PROGRAM_ON_CPU, PROGRAM_ON_GPU = 430 * 2**20, 768 * 2**20
_GAPS_ON_CPU = 1 / 8  # of what tensors take


@dataclass(frozen=True)
class Memory:
    """Holds bytes of one device; `peak` is the most at a time, where not all is there at once."""

    weights: int
    gradients: int
    moments: int
    gathered: int  # of shared weights, for the layers that compute
    activations: int
    narrow_weights: int  # as autocast rounds them; layers keep them for the backward pass
    logits: int  # and all else that the loss makes
    program: int
    peak: int

    def as_dict(self) -> dict[str, int]:
        return dict(vars(self))


def memory_of(setup: Setup) -> Memory:
    """Estimates a step after the first, which makes the moments."""
    counts = count_parameters(setup.part)
    whole = counts.total * setup.weight_bytes
    weights, moments = _share(setup, whole), _share(setup, moment_bytes(setup, counts))
    gradients = whole if setup.accumulation > 1 else _share(setup, whole)  # the sums are whole
    gathered = _gathered(setup, counts)
    kept = kept_activations(setup)
    activations = total_bytes(kept, setup)
    loss = _Loss(setup)
    resident = weights + moments
    stays = gradients if _gradients_stay(setup) else 0
    table = counts.tokens * setup.weight_bytes
    again = kept.block if setup.activation_checkpointing else 0
    # Of a tied table the head's gradient waits for the lookup's; a bucket is filled from one of its own.
    waiting = table * ((1 if setup.config.tie_embeddings else 0) + (1 if stays else 0))
    moments_of_a_step = (
        stays + gathered + activations + loss.forward,
        stays + gathered + activations + loss.backward,
        stays + gathered + activations + again + _working(setup) + loss.gradient_of_weight,
        gradients + _gathered_in_block(setup, counts) + waiting + again + _working(setup),
        gradients + _optimizer_bytes(setup, counts),
    )
    tensors = resident + max(moments_of_a_step)
    program = PROGRAM_ON_CPU + int(_GAPS_ON_CPU * tensors) if setup.on_cpu else PROGRAM_ON_GPU
    narrow = 0 if setup.activation_checkpointing else setup.config.n_layers * kept.narrow_weights
    kinds = (weights, gradients, moments, gathered, activations - narrow, narrow, loss.forward, program)
    return Memory(*kinds, peak=program + tensors)


def _share(setup: Setup, n_bytes: int) -> int:
    """Returns this device's share of what replicas share out."""
    return -(-n_bytes // setup.shards)


def moment_bytes(setup: Setup, counts: Parameters) -> int:
    """AdamW has two moments, Muon one of the matrices."""
    two = counts.total - (counts.matrices if setup.optimizer == "muon" else 0)
    return (2 * two + counts.total - two) * setup.weight_bytes


def _gradients_stay(setup: Setup) -> bool:
    """Tells whether gradients are there when a pass begins: sums of earlier ones, or DDP's buckets."""
    return setup.accumulation > 1 or (setup.replicas > 1 and setup.sharding == "none")


def _gathered(setup: Setup, counts: Parameters) -> int:
    """Counts the whole weights, at the end of a forward pass, that replicas gather of their parts."""
    if setup.sharding == "none":
        return 0
    if setup.sharding == "optimizer":
        return _outside_bytes(setup, counts) + gathered_bytes(setup, counts)
    return _gathered_in_block(setup, counts)


def _gathered_in_block(setup: Setup, counts: Parameters) -> int:
    """Counts what is whole within a block: two of them, one on its way, and what is outside of blocks."""
    if setup.sharding == "none":
        return 0
    outside, blocks = _outside_bytes(setup, counts), gathered_bytes(setup, counts)
    if setup.sharding == "optimizer":
        return outside + blocks
    # And the gradients of a block, whole until they are summed.
    return outside + (2 * blocks + counts.blocks * setup.weight_bytes) // setup.config.n_layers


def _outside_bytes(setup: Setup, counts: Parameters) -> int:
    return (counts.total - counts.blocks) * setup.weight_bytes


class _Loss:
    """Counts what `linear_cross_entropy` makes, chunk by chunk."""

    def __init__(self, setup: Setup) -> None:
        V, D, e = setup.part.vocab_size, setup.config.d_model, setup.compute_bytes
        n, device = setup.pass_tokens, "cpu" if setup.on_cpu else "cuda"
        rows = min(n, chunk_rows(n, V * e, device))
        padded = -(-V // _MULTIPLE) * _MULTIPLE if e == 2 else V
        self.gradient_of_weight = V * D * max(4, setup.weight_bytes)
        of_hidden = n * D * residual_bytes(setup)
        logits = rows * padded * e
        softmax = min(rows * V, SOFTMAX_ELEMENTS if setup.on_cpu else rows * V) * 4 if e == 2 else 0
        narrow = padded * D * e if e != setup.weight_bytes or padded != V else 0
        product = padded * D * e
        laid_out = logits if setup.on_cpu and e == 2 else 0
        self.forward = self.gradient_of_weight + of_hidden + logits + narrow
        self.forward += max(softmax, product + laid_out)
        self.backward = 2 * (self.gradient_of_weight + of_hidden)


def _working(setup: Setup) -> int:
    """Counts what the backward pass of a block makes for a moment: gradients of its widest activations."""
    return setup.pass_tokens * setup.compute_bytes * (2 * setup.part.mlp_width + 2 * setup.config.d_model)


def _optimizer_bytes(setup: Setup, counts: Parameters) -> int:
    """Counts Muon's updates of all matrices, in bfloat16, before and after; fused AdamW makes nothing."""
    if setup.optimizer != "muon":
        return 0
    return _share(setup, 4 * counts.matrices) + 4 * 2 * min(_AT_ONCE, counts.matrices)
