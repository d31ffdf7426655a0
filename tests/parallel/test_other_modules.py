"""What other modules than ours do: several names for a layer, frozen blocks, their own optimizers, hooks."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gpt_lightning.parallel.plan import resolve
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from tests.distributed import run_ranks, torchrun_environments
from tests.parallel.runs import Recorder, Run, build, run_everywhere, trainer_of

pytestmark = pytest.mark.slow


class Plain(pl.LightningModule):
    """Two layers; subclasses change one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.build()

    def build(self) -> None:
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))

    def tensor_parallel_plan(self) -> dict[str, Any]:
        return {"net.0": "column", "net.2": "row"}

    def output(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.output(batch) - batch[..., :3].sin()).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class SecondName(Plain):
    def build(self) -> None:
        super().build()
        self.up = self.net[0]

    def output(self, x: Tensor) -> Tensor:
        return self.net[2](torch.tanh(self.up(x)))


class BuiltLate(Plain):
    def build(self) -> None:
        self.net = nn.Sequential()

    def configure_model(self) -> None:
        if not self.net:
            Plain.build(self)


class Frozen(Plain):
    def build(self) -> None:
        super().build()
        self.net[0].requires_grad_(False)


class Manual(Plain):
    """Clips by hand, steps by hand, twice a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()


class Quasi(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Factored(Plain):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


def train(kind: Callable[[], Plain], tp: int, folder: Path, options: dict[str, Any]) -> list[float]:
    pl.seed_everything(0, verbose=False)
    module = kind()
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    clip = {} if kind is Manual else {"gradient_clip_val": 0.1}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=tp,
        strategy=TensorParallelDDPStrategy(tensor_parallel_size=tp, **options.get("strategy", {})),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **clip,
        **options.get("trainer", {}),
    )
    trainer.fit(module, DataLoader(rows, batch_size=8))
    return module.losses


@pytest.mark.parametrize("kind", [Plain, SecondName, BuiltLate, Frozen, Manual])
def test_it_learns_as_in_one_process(kind: Callable[[], Plain], tmp_path: Path) -> None:
    (one,) = run_ranks(train, 1, kind, 1, tmp_path, {})
    assert one[-1] < one[0]
    for losses in run_ranks(train, 2, kind, 2, tmp_path, {}):
        assert losses == pytest.approx(one, abs=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_double_precision_and_either_way_of_clipping(algorithm: str, tmp_path: Path) -> None:
    options = {"trainer": {"precision": "64-true", "gradient_clip_algorithm": algorithm}}
    (one,) = run_ranks(train, 1, Plain, 1, tmp_path, options)
    for losses in run_ranks(train, 2, Plain, 2, tmp_path, options):
        assert losses == pytest.approx(one, abs=1e-12)


def complaint(kind: Callable[[], Plain], folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        train(kind, 2, folder, options)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        (Quasi, {}, "LBFGS needs whole parameters"),
        (Factored, {}, "Adafactor needs whole parameters"),
        (Manual, {"strategy": {"sequence_parallel": True}}, "optimizes manually"),
        (Plain, {"strategy": {"sequence_parallel": True}}, "needs activations [batch, time, features]"),
    ],
)
def test_what_would_go_wrong_is_refused(
    kind: Callable[[], Plain], options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for message in run_ranks(complaint, 2, kind, tmp_path, options):
        assert words in message


class Adapted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_a_layer_that_does_more_than_its_class_is_not_replaced() -> None:
    module = nn.Sequential(Adapted(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    for name in "01":
        with pytest.raises(ValueError, match=f"{name} .* computes more"):
            resolve(module, {name: "column"}, 2)


def test_a_pattern_stays_within_a_level_and_names_a_layer_once() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))})
    assert resolve(module, {"a.*.0": "column"}, 2).keys() == {"a.1.0"}
    with pytest.raises(ValueError, match="another pattern names too"):
        resolve(module, {"a.0": "column", "*.0": "row"}, 2)


class WithBuffer(Plain):
    def build(self) -> None:
        super().build()
        self.net[0].register_buffer("scale", torch.full((3,), 2.0))


def build_empty(folder: Path) -> str:
    strategy = TensorParallelDDPStrategy(tensor_parallel_size=2)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, logger=False, default_root_dir=folder
    )
    with trainer.init_module(empty_init=True):
        module = WithBuffer()
    with pytest.raises(ValueError) as error:
        trainer.fit(module, DataLoader(torch.randn(8, 6)))
    return str(error.value)


def test_a_buffer_is_not_left_without_values(tmp_path: Path) -> None:
    assert all(
        "net.0 has a buffer on the meta device" in message for message in run_ranks(build_empty, 2, tmp_path)
    )


def fit_with_a_block_in_evaluation_mode(run: Run, corpus: Path) -> list[float]:
    module, datamodule = build(corpus, run)
    module.model.blocks[0].eval()
    recorder = Recorder(None)
    trainer_of(run, corpus.parent, recorder).fit(module, datamodule)
    return recorder.losses


def test_sequence_parallelism_does_not_depend_on_a_layers_mode(shared_corpus: Path) -> None:
    options = {"steps": 4, "seq_len": 16}
    (one,) = run_ranks(fit_with_a_block_in_evaluation_mode, 1, Run(**options), shared_corpus)
    run = Run(2, 1, strategy={"sequence_parallel": True}, **options)
    for losses in run_ranks(fit_with_a_block_in_evaluation_mode, 2, run, shared_corpus):
        assert losses == pytest.approx(one, abs=2e-6)


def test_a_file_takes_the_place_of_a_sharded_folder(shared_corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    sharded = {"save_sharded": True}
    run_everywhere(Run(2, 1, steps=2, strategy=sharded, save_to=str(path)), shared_corpus)
    assert path.is_dir()
    run_everywhere(Run(2, 1, steps=4, save_to=str(path), resume_from=str(path)), shared_corpus)
    assert path.is_file() and torch.load(path, weights_only=True)["global_step"] == 4
    run_everywhere(Run(2, 1, steps=6, strategy=sharded, save_to=str(path)), shared_corpus)
    assert path.is_dir() and not list(tmp_path.glob(".*"))


def fit_by_forks(folder: Path, devices: int) -> dict[str, Tensor]:
    """Has the Trainer start its ranks itself: the weights that the first process has in the end."""
    for name in torchrun_environments(1)[0]:
        os.environ.pop(name)
    module, generator = Plain(), torch.Generator().manual_seed(1)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=TensorParallelDDPStrategy(start_method="fork") if devices > 1 else "auto",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(torch.randn(32, 6, generator=generator), batch_size=8))
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def test_forked_ranks_leave_their_weights_to_the_first_process(tmp_path: Path) -> None:
    (one,), (two,) = (run_ranks(fit_by_forks, 1, tmp_path, devices) for devices in (1, 2))
    new = Plain()
    assert not torch.equal(one["net.0.weight"], new.get_parameter("net.0.weight"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)
