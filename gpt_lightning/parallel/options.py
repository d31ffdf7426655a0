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
    check_gathering(options["gather_dtype"], shard_replicas, options["precision"])
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


def check_gathering(gather_dtype: str | None, shard_replicas: str, precision: str) -> None:
    """Refuses to round what nobody gathers, or what layers would compute with unrounded."""
    option = {"gather_dtype": gather_dtype}
    if gather_dtype not in DTYPES:
        raise _error(option, "gather_dtype", "is unknown; choose bf16, or leave it out")
    if gather_dtype is not None and shard_replicas == NONE:
        needs = "is for weights that replicas share, and shard_replicas=none"
        raise _error(option, "gather_dtype", f"{needs}; choose full or optimizer, or leave it out")
    if gather_dtype is not None and precision != "bf16-mixed":
        needs = f"is for layers that compute in bfloat16, and trainer.precision={precision}"
        raise _error(option, "gather_dtype", f"{needs}; choose bf16-mixed, or leave it out")


def _error(options: Mapping[str, Any], name: str, rule_and_remedy: str) -> UserError:
    return UserError(f"trainer.strategy.{name}={options[name]} {rule_and_remedy}")
