"""Refuses options of TensorParallelDDPStrategy that cannot work, or that contradict each other."""

from collections.abc import Mapping
from typing import Any

from gpt_lightning.exit_codes import UserError
from gpt_lightning.parallel.sharded_replicas import KINDS, NONE

OF_DDP = ("find_unused_parameters", "static_graph", "bucket_cap_mb", "ddp_comm_hook")
DTYPES = (None, "bf16")


def check_options(options: Mapping[str, Any]) -> None:
    """Looks at each option by itself, and at those that do not go together."""
    shard_replicas, reduce_dtype = options["shard_replicas"], options["reduce_dtype"]
    if shard_replicas not in KINDS:
        raise _error(options, "shard_replicas", f"is unknown; choose one of {', '.join(KINDS)}")
    if reduce_dtype not in DTYPES:
        raise _error(options, "reduce_dtype", "is unknown; choose bf16, or leave it out")
    if options["replica_check_every_n_steps"] < 0:
        raise _error(options, "replica_check_every_n_steps", "is below 0; raise it")
    if reduce_dtype is not None and options["ddp_comm_hook"] is not None:
        another = "and ddp_comm_hook both say how gradients are reduced; leave out the one or the other"
        raise _error(options, "reduce_dtype", another)
    for name in OF_DDP if shard_replicas != NONE else ():
        if options[name]:
            place = f"is for DDP, in whose place shard_replicas={shard_replicas} puts FSDP"
            raise _error(options, name, f"{place}; leave out the one or the other")
    if options["start_method"] != "popen" and (shard_replicas != NONE or options["tensor_parallel_size"] > 1):
        part = "gives the first process the model of rank 0, which has a part of it"
        raise _error(options, "start_method", f"{part}; use popen, or torchrun")


def _error(options: Mapping[str, Any], name: str, rule_and_remedy: str) -> UserError:
    return UserError(f"trainer.strategy.{name}={options[name]} {rule_and_remedy}")
