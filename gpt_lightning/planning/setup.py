"""Holds what a plan is of: a model, its batches, and how devices share them."""

from dataclasses import dataclass, replace

from gpt_lightning.exit_codes import UserError
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.mesh import check_devices
from gpt_lightning.parallel.sharded_replicas import KINDS as SHARDINGS
from gpt_lightning.parallel.sharded_replicas import shard_size

# Bytes of a number: of the weights, of their gradients and moments, and of what layers compute.
PRECISIONS = {
    **{"64-true": (8, 8), "32-true": (4, 4), "bf16-true": (2, 2), "16-true": (2, 2)},
    **{"bf16-mixed": (4, 2), "16-mixed": (4, 2)},
}


@dataclass(frozen=True)
class Setup:
    """Is what memory, time and messages follow from; `batch_size` is per data-parallel rank and micro-batch.

    `on_cpu` tells whether a CPU's kernels compute, which keep other tensors than those of a GPU.
    """

    config: GPTConfig
    seq_len: int
    batch_size: int
    accumulation: int = 1
    precision: str = "32-true"
    optimizer: str = "adamw"
    activation_checkpointing: bool = False
    devices: int = 1  # of a node
    nodes: int = 1
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    shard_replicas: str = "none"
    reduce_dtype: str | None = None
    gather_dtype: str | None = None
    document_mask: bool = False
    on_cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "batch_size", "accumulation", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{OPTIONS[name]}={getattr(self, name)} is below 1; raise it")
        if self.shard_replicas not in SHARDINGS:
            choices = ", ".join(SHARDINGS)
            raise UserError(f"shard_replicas={self.shard_replicas!r} is unknown; choose one of {choices}")
        check_devices(self.devices, self.tensor_parallel_size)
        if self.tensor_parallel_size > 1:
            _check_cut(self)

    @property
    def world_size(self) -> int:
        return self.devices * self.nodes

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor_parallel_size

    @property
    def cuts_sequence(self) -> bool:
        return self.sequence_parallel and self.tensor_parallel_size > 1

    @property
    def sharding(self) -> str:
        """Is what one replica alone leaves of `shard_replicas`: there is no other to share with."""
        return self.shard_replicas if self.replicas > 1 else "none"

    @property
    def gathers_rounded(self) -> bool:
        """Tells whether replicas gather linear layers as autocast rounds them, which then makes no copies."""
        return self.gather_dtype is not None and self.sharding != "none" and self.precision == "bf16-mixed"

    @property
    def shards(self) -> int:
        """Counts the replicas that share one copy: those of a node, or all where a node has only one."""
        return shard_size(self.sharding, self.replicas, self.nodes)

    @property
    def pass_tokens(self) -> int:
        """Counts the tokens of a replica's micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def step_tokens(self) -> int:
        """Counts the tokens of an optimizer step."""
        return self.pass_tokens * self.accumulation * self.replicas

    @property
    def weight_bytes(self) -> int:
        return self._item_sizes[0]

    @property
    def compute_bytes(self) -> int:
        return self._item_sizes[1]

    @property
    def is_mixed(self) -> bool:
        return self.weight_bytes != self.compute_bytes

    @property
    def _item_sizes(self) -> tuple[int, int]:
        return PRECISIONS[self.precision]

    @property
    def part(self) -> GPTConfig:
        """Is the architecture of the part that one of the tensor-parallel peers computes, the largest."""
        size, config = self.tensor_parallel_size, self.config
        return replace(
            config,
            vocab_size=-(-config.vocab_size // size),
            n_heads=config.n_heads // size,
            n_kv_heads=config.kv_heads // size,
            d_head=config.head_dim,
            d_ff=config.mlp_width // size,
        )


OPTIONS = {
    "devices": "trainer.devices",
    "nodes": "trainer.num_nodes",
    "batch_size": "data.batch_size",
    "accumulation": "trainer.accumulate_grad_batches",
    "seq_len": "data.seq_len",
}


def _check_cut(setup: Setup) -> None:
    """Refuses sizes that tensor-parallel peers cannot share evenly."""
    config, size = setup.config, setup.tensor_parallel_size
    heads = "n_heads" if config.n_kv_heads is None else "n_kv_heads"
    option = f"trainer.strategy.tensor_parallel_size={size}"
    counts = {f"model.config.{heads}": config.kv_heads, "model.config.d_ff": config.mlp_width}
    if setup.sequence_parallel:
        counts["data.seq_len"] = setup.seq_len
    for name, count in counts.items():
        if count % size:
            raise UserError(
                f"{name}={count} is not divisible by {option}; choose a multiple of {size}, or a "
                f"tensor_parallel_size that divides {count}"
            )
    if config.vocab_size < size:
        problem = f"model.config.vocab_size={config.vocab_size} is too small to be cut over {option}"
        raise UserError(f"{problem}; choose a smaller tensor_parallel_size")
