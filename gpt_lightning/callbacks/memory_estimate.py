"""Says before the first step what a run will hold of its devices' memory, and whether that is too much."""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.kernels.device import GIB, available_host_memory
from gpt_lightning.planning.memory import memory_of
from gpt_lightning.planning.setup import PRECISIONS, Setup
from gpt_lightning.training.module import GPTLightningModule


def memory_lines(trainer: Trainer, module: GPTLightningModule) -> list[str]:
    """Returns the estimate, and a warning where a device has less; nothing of a run that no plan knows."""
    if (setup := setup_of_run(trainer, module)) is None:
        return []
    peak, there = memory_of(setup).peak, _memory_of_device(module.device, trainer.num_devices)
    line = f"memory of about {peak / GIB:,.2f} GiB"
    if there is None:
        return [line]
    lines = [f"{line} of {there / GIB:,.2f}" + (" for each process" if trainer.world_size > 1 else "")]
    if peak > there:
        remedy = "`gpt-lightning plan` with the same options says what would make it fit"
        lines.append(f"warning: the run is expected to need more memory than there is; {remedy}")
    return lines


def setup_of_run(trainer: Trainer, module: GPTLightningModule) -> Setup | None:
    """Describes a run as plans have it; None for strategies and data of other kinds."""
    data, strategy = trainer.datamodule, trainer.strategy
    is_known = isinstance(strategy, (DDPStrategy, SingleDeviceStrategy))
    if not is_known or not isinstance(data, TextDataModule) or str(trainer.precision) not in PRECISIONS:
        return None
    return Setup(
        module.model.config,
        data.seq_len,
        data.batch_size,
        accumulation=trainer.accumulate_grad_batches,
        precision=str(trainer.precision),
        optimizer=module.optimizer.name,
        activation_checkpointing=module.model.activation_checkpointing,
        devices=trainer.num_devices,
        nodes=trainer.num_nodes,
        tensor_parallel_size=getattr(strategy, "tensor_parallel_size", 1),
        sequence_parallel=getattr(strategy, "sequence_parallel", False),
        shard_replicas=getattr(strategy, "shard_replicas", "none"),
        reduce_dtype=getattr(strategy, "reduce_dtype", None),
        gather_dtype=getattr(strategy, "gather_dtype", None),
        document_mask=data.document_mask,
        on_cpu=module.device.type == "cpu",
    )


def _memory_of_device(device: torch.device, processes: int) -> int | None:
    """Returns the bytes that one of the processes can have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = available_host_memory() if device.type == "cpu" else None
    return None if memory is None else memory // processes
