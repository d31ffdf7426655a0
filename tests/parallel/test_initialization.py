"""A model built for several ranks starts as that of one process, and never lies whole in one's memory."""

import ctypes
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.mesh import ParallelMesh
from gpt_lightning.parallel.plan import parallelize, resolve
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from tests.distributed import run_ranks
from tests.shapes import SHARED

pytestmark = pytest.mark.slow
MIB = 2**20


def module(**sizes: Any) -> GPTLightningModule:
    options = {"vocab_size": 301, "max_position_embeddings": 8, "n_layers": 2, "n_heads": 4, "d_model": 20}
    return GPTLightningModule(GPTConfig(**{**options, **sizes}))


def initial(tp: int, folder: Path, meta: bool, sizes: dict[str, Any]) -> dict[str, Any]:
    """In a rank: the whole state dict before any step, as `save_checkpoint` gives it."""
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=dist_size(),
        strategy=TensorParallelDDPStrategy(tensor_parallel_size=tp) if dist_size() > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    pl.seed_everything(11, verbose=False)
    if meta:
        with trainer.init_module(empty_init=True):
            built = module(**sizes)
        assert all(parameter.is_meta for parameter in built.parameters())
        built.setup = lambda stage: torch.rand(3)  # somebody draws before the weights are drawn
    else:
        built = module(**sizes)
    built.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    built.on_validation_epoch_end = lambda: None  # type: ignore[method-assign]
    trainer.validate(built, torch.utils.data.DataLoader([0] * 4), verbose=False)
    return trainer.strategy.lightning_module_state_dict()


def dist_size() -> int:
    import os

    return int(os.environ["WORLD_SIZE"])


@pytest.mark.parametrize("sizes", [{}, {**SHARED, "tie_embeddings": False}], ids=["gpt2", "modern, untied"])
@pytest.mark.parametrize("meta", [False, True])
def test_the_weights_are_those_of_one_process(meta: bool, sizes: dict[str, Any], tmp_path: Path) -> None:
    (one,) = run_ranks(initial, 1, 1, tmp_path, False, sizes)
    for tp, size in ((2, 2), (2, 4), (4, 4)):
        first = run_ranks(initial, size, tp, tmp_path, meta, sizes)[0]
        assert first.keys() == one.keys()
        for name, tensor in one.items():
            assert torch.equal(first[name], tensor), name


def resident_bytes(which: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024


def growth(meta: bool) -> tuple[int, int, int]:
    """Bytes: the peak of building one rank's model, this rank's part of it, the largest tensor."""
    dist.init_process_group("gloo")
    mesh = ParallelMesh("cpu", 4, 4)
    # Most tensors are large enough for malloc to give back their pages, and the last is the largest.
    sizes = {"vocab_size": 8_000, "n_layers": 3, "d_model": 1792, "tie_embeddings": False}
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before the fork would be used first, unseen
    Path("/proc/self/clear_refs").write_text("5")  # start the peak anew
    before = resident_bytes("VmRSS")
    with torch.device("meta" if meta else "cpu"):
        built = module(**sizes)
    parallelize(built, resolve(built, built.tensor_parallel_plan(), 4), mesh)
    part = sum(parameter.numel() * 4 for parameter in built.parameters())
    return resident_bytes("VmHWM") - before, part, 4 * 8_000 * 1792


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own counters")
def test_building_takes_a_part_and_the_largest_tensor() -> None:
    for peak, part, largest in run_ranks(growth, 4, True):
        assert part + largest < peak + 8 * MIB, "the measurement misses what must be there"
        assert peak < 1.2 * (part + largest) + 16 * MIB
    for peak, part, largest in run_ranks(growth, 4, False):
        assert peak > 3 * part, "building the whole model is not seen: the test above proves nothing"
