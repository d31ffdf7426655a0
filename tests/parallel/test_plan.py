"""A plan is checked before any process waits for another, and serves modules that are not ours."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import Linear
from gpt_lightning.parallel.plan import ParallelStyle, resolve, styles_of
from gpt_lightning.parallel.shard import sharded_parameters
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from tests.distributed import run_ranks
from tests.shapes import MIXED, MODERN


class TwoLayers(pl.LightningModule):
    """Somebody else's module: all that it brings for tensor parallelism is a plan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
        self.losses: list[float] = []

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"net.0": "column", "net.2": "row"}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.net(batch) - batch[:, :3].sin()).square().mean()
        self.log("loss", loss, sync_dist=True)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach())))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def train_two_layers(tp: int, dp: int, folder: Path) -> dict[str, Any]:
    pl.seed_everything(0, verbose=False)
    module = TwoLayers()
    rows = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=tp * dp,
        strategy=TensorParallelDDPStrategy(tensor_parallel_size=tp),
        max_epochs=2,
        gradient_clip_val=0.1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(rows, batch_size=8 // dp))
    trainer.save_checkpoint(folder / f"{tp}x{dp}.ckpt")
    return {"losses": module.losses, "cut": len(sharded_parameters(module))}


@pytest.mark.slow
@pytest.mark.parametrize("tp, dp", [(2, 1), (2, 2)])
def test_it_trains_a_module_that_is_not_ours(tp: int, dp: int, tmp_path: Path) -> None:
    (one,) = run_ranks(train_two_layers, 1, 1, 1, tmp_path)
    ranks = run_ranks(train_two_layers, tp * dp, tp, dp, tmp_path)
    assert one["cut"] == 0 and ranks[0]["cut"] == 3
    assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert one["losses"][-1] < one["losses"][0]
    dense, gathered = (
        torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("1x1", f"{tp}x{dp}")
    )
    assert dense.keys() == gathered.keys()
    for name, tensor in dense.items():
        torch.testing.assert_close(gathered[name], tensor, rtol=1e-4, atol=1e-5)


def gpt(**sizes: Any) -> GPTLightningModule:
    options = {
        "vocab_size": 64,
        "max_position_embeddings": 8,
        "n_layers": 1,
        "n_heads": 4,
        "d_model": 16,
    } | sizes
    return GPTLightningModule(GPTConfig(**options))


@pytest.mark.parametrize(
    "sizes, tp, words",
    [
        (
            {"n_heads": 25, "d_model": 100},
            2,
            ["model.config.n_heads=25", "tensor_parallel_size=2", "divides 25"],
        ),
        (
            {"n_kv_heads": 2},
            4,
            ["model.config.n_kv_heads=2", "tensor_parallel_size=4", "divides 2"],
        ),
        ({"d_ff": 30}, 4, ["model.config.d_ff=30", "tensor_parallel_size=4"]),
        ({"vocab_size": 5}, 4, ["model.config.vocab_size=5", "too small"]),
    ],
)
def test_sizes_that_cannot_be_cut(sizes: dict[str, Any], tp: int, words: list[str]) -> None:
    module = gpt(**sizes)
    with pytest.raises(ValueError) as error:
        styles_of(module, tp)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "plan, words",
    [
        ({"net.7": "column"}, ["'net.7' names no submodule of TwoLayers"]),
        ({"net.1": "column"}, ["net.1 is a Tanh", "'column'", "Linear"]),
        ({"net.0": "vocab_embedding"}, ["net.0 is a Linear", "Embedding"]),
        ({"net.0": "columns"}, ["unknown style 'columns'", "column, row"]),
        ({"net.2": "vocab_head"}, ["net.2 has bias"]),
        ({"net.0": ParallelStyle("column", 5, "model.groups")}, ["model.groups=5 is not divisible"]),
        ({"net.2": ParallelStyle("row", 5)}, ["the inputs of net.2=5 is not divisible"]),
    ],
)
def test_plans_that_make_no_sense(plan: Any, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        resolve(TwoLayers(), plan, 2)
    assert all(word in str(error.value) for word in words), error.value


class Adapted(Linear):
    """A child of ours that computes more than its parent."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum()


def test_what_a_child_of_our_layers_adds_is_not_dropped() -> None:
    module = TwoLayers()
    module.net[0] = Linear(6, 10, bias=True)
    resolve(module, {"net.0": "column"}, 2)
    module.net[0] = Adapted(6, 10, bias=True)
    with pytest.raises(ValueError, match="net.0 .Adapted. computes more than its parent class"):
        resolve(module, {"net.0": "column"}, 2)


def test_a_module_without_a_plan_is_told_so() -> None:
    with pytest.raises(ValueError, match="LightningModule has no tensor_parallel_plan"):
        styles_of(pl.LightningModule(), 2)


@pytest.mark.parametrize("shape", [{}, {**MODERN, "n_kv_heads": 2}, {**MIXED, "dropout": 0.1}])
def test_the_plan_of_a_gpt_covers_every_parameter(shape: dict[str, Any]) -> None:
    for tie_embeddings in (True, False):
        module = gpt(tie_embeddings=tie_embeddings, **shape)
        cuts = resolve(module, module.tensor_parallel_plan(), 2)
        planned = {id(p) for name in cuts for p in module.get_submodule(name).parameters()}
        assert planned == {id(p) for p in module.parameters()}


def trainer(**options: Any) -> pl.Trainer:
    strategy = TensorParallelDDPStrategy(**options.pop("strategy"))
    return pl.Trainer(accelerator="cpu", strategy=strategy, logger=False, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"strategy": {"tensor_parallel_size": 2}, "devices": 3},
            ["trainer.devices=3", "tensor_parallel_size=2"],
        ),
        (
            {"strategy": {"tensor_parallel_size": 4}, "devices": 2, "num_nodes": 2},
            ["trainer.devices=2 a node"],
        ),
        ({"strategy": {"tensor_parallel_size": 0}, "devices": 2}, ["tensor_parallel_size=0 is below 1"]),
        ({"strategy": {"replica_check_every_n_steps": -1}, "devices": 2}, ["replica_check_every_n_steps=-1"]),
        ({"strategy": {"tensor_parallel_size": 2}, "devices": 2, "sync_batchnorm": True}, ["sync_batchnorm"]),
    ],
)
def test_topologies_that_cannot_be(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        trainer(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_a_bad_plan_is_refused_before_processes_meet() -> None:
    """`connect` comes before the process groups; here there are no other processes to meet."""
    module = gpt(n_heads=1)
    with pytest.raises(ValueError, match="n_heads=1"):
        TensorParallelDDPStrategy(tensor_parallel_size=2).connect(module)
    assert not torch.distributed.is_initialized()
