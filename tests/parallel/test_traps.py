"""What Lightning does by world and must do by data-parallel rank (or the reverse), with its fix taken out.

None of these faults raises an error by itself. So every test also runs the fault and sees it.
"""

import ctypes
import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, Dataset

from gpt_lightning.parallel.gradients import TensorParallelGradScaler, norm
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from tests.distributed import run_ranks
from tests.parallel.runs import (
    Recorder,
    RecordingModule,
    Run,
    build,
    fit,
    run_everywhere,
    trainer_of,
    validate,
)

pytestmark = pytest.mark.slow
OneProcess = Callable[..., dict[str, Any]]
UNCHECKED = {"replica_check_every_n_steps": 0}
EVEN = {"data": {"tokenizer": "bpe:300"}}  # else the shapes of the parts would give some of it away


class ClipsByItsOwnNorm(TensorParallelDDPStrategy):
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self.precision_plugin.whole_norm = lambda parameters: norm(p.grad for p in parameters)


class BroadcastsBeforeEvaluation(TensorParallelDDPStrategy):
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        _sync_module_states(self.model)


class SamplesByGlobalRank(TensorParallelDDPStrategy):
    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}


class AveragesOverTheWorld(TensorParallelDDPStrategy):
    def configure_ddp(self) -> None:
        del self._ddp_kwargs["process_group"]
        super().configure_ddp()


class ReducesOverTheWorld(TensorParallelDDPStrategy):
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return DDPStrategy.reduce(self, tensor, group, reduce_op)

    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        self._reduce_metrics_over(None)
        self.mesh.dp_group = dist.group.WORLD


class DecidesByDataParallelRank(TensorParallelDDPStrategy):
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return DDPStrategy.reduce_boolean_decision(self, decision, all)


class SeedsWorkersByGlobalRank(TensorParallelDDPStrategy):
    def process_dataloader(self, dataloader: object) -> object:
        return dataloader


def test_clipping_by_the_norm_of_the_whole_model(shared_corpus: Path, one_process: OneProcess) -> None:
    one = one_process()
    wrong = run_everywhere(Run(2, 1, strategy=UNCHECKED, strategy_class=ClipsByItsOwnNorm), shared_corpus)
    assert max(abs(a - b) for a, b in zip(wrong[0]["losses"], one["losses"])) > 1e-4
    assert not same_bits(wrong[0]["replicated"], wrong[1]["replicated"])
    right = run_everywhere(Run(2, 1), shared_corpus)
    assert right[0]["losses"] == pytest.approx(one["losses"], abs=2e-6, rel=0)
    assert same_bits(right[0]["replicated"], right[1]["replicated"])


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_no_broadcast_of_parts_before_an_evaluation(shared_corpus: Path) -> None:
    (one,) = run_ranks(validate, 1, Run(**EVEN), shared_corpus)
    wrong = run_ranks(
        validate, 2, Run(2, 1, strategy_class=BroadcastsBeforeEvaluation, **EVEN), shared_corpus
    )
    right = run_ranks(validate, 2, Run(2, 1, **EVEN), shared_corpus)
    assert abs(wrong[0]["val/loss"] - one["val/loss"]) > 1e-3
    assert right[0]["val/loss"] == pytest.approx(one["val/loss"], abs=1e-6)


def test_tensor_parallel_peers_read_the_same_samples(shared_corpus: Path, one_process: OneProcess) -> None:
    one = one_process(steps=3)
    wrong = run_everywhere(Run(2, 1, steps=3, strategy_class=SamplesByGlobalRank), shared_corpus)
    right = run_everywhere(Run(2, 1, steps=3), shared_corpus)
    assert abs(wrong[0]["losses"][0] - one["losses"][0]) > 1e-3
    assert right[0]["losses"][0] == pytest.approx(one["losses"][0], abs=2e-6)


def test_gradients_are_averaged_over_data_parallel_ranks(
    shared_corpus: Path, one_process: OneProcess
) -> None:
    one = one_process(**EVEN)
    naive = Run(2, 2, strategy=UNCHECKED, strategy_class=AveragesOverTheWorld, **EVEN)
    wrong = run_everywhere(naive, shared_corpus)
    right = run_everywhere(Run(2, 2, **EVEN), shared_corpus)
    assert max(abs(a - b) for a, b in zip(wrong[0]["losses"], one["losses"])) > 1e-3
    assert right[0]["losses"] == pytest.approx(one["losses"], abs=2e-6, rel=0)


def sums(run: Run, corpus: Path) -> float:
    module, datamodule = build(corpus, run)
    trainer = trainer_of(replace(run, trainer={"limit_val_batches": 1}), corpus.parent, Recorder(None))
    trainer.validate(module, datamodule, verbose=False)
    return float(trainer.strategy.reduce(torch.ones(()), reduce_op="sum"))


def test_sums_count_tensor_parallel_peers_once(shared_corpus: Path) -> None:
    naive = Run(2, 2, strategy_class=ReducesOverTheWorld)
    assert run_ranks(sums, 4, naive, shared_corpus) == [4.0] * 4
    assert run_ranks(sums, 4, Run(2, 2), shared_corpus) == [2.0] * 4
    wrong = run_ranks(validate, 4, naive, shared_corpus)[0]
    right = run_ranks(validate, 4, Run(2, 2), shared_corpus)[0]
    assert wrong["tokens"] == 2 * wrong["in the split"]
    assert right["tokens"] == right["in the split"]


class Overflowing(RecordingModule):
    """One part of the model, on one rank, gets an infinite gradient in the fourth step."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 3 and self.trainer.global_rank == 1:
            self.model.blocks[0].mlp.up_proj.weight.grad[0, 0] = torch.inf


class ScalesAlone(TensorParallelDDPStrategy):
    def setup(self, trainer: pl.Trainer) -> None:
        super().setup(trainer)
        scaler = self.precision_plugin.scaler
        self.precision_plugin.scaler = torch.amp.GradScaler("cpu", init_scale=scaler.get_scale())


def overflow(run: Run, corpus: Path) -> dict[str, Any]:
    module, datamodule = build(corpus, run)
    module.__class__ = Overflowing
    recorder = Recorder(None)
    trainer = trainer_of(run, corpus.parent, recorder)
    trainer.fit(module, datamodule)
    naive = not isinstance(trainer.precision_plugin.scaler, TensorParallelGradScaler)
    return {"scales": recorder.scales, "losses": recorder.losses, "naive": naive, **replicated(module)}


def replicated(module: pl.LightningModule) -> dict[str, Any]:
    return {"replicated": {n: p.detach() for n, p in module.named_parameters() if ".ln_" in n}}


def half_precision() -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]


def test_an_overflow_on_one_rank_skips_the_step_on_all(shared_corpus: Path) -> None:
    run = Run(2, 1, steps=6, accumulate=1, plugins=half_precision, strategy=UNCHECKED)
    right = run_ranks(overflow, 2, run, shared_corpus)
    assert not right[0]["naive"]
    assert right[0]["scales"] == right[1]["scales"] == [256.0, 256.0, 256.0, 128.0, 128.0, 128.0]
    assert same_bits(right[0]["replicated"], right[1]["replicated"])
    wrong = run_ranks(overflow, 2, replace(run, strategy_class=ScalesAlone), shared_corpus)
    assert wrong[0]["naive"]
    assert wrong[0]["scales"] != wrong[1]["scales"]


class RandomRows(Dataset[Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(2)  # from the worker's own generator


class Remembering(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 1))
        self.seen: list[Tensor] = []

    def tensor_parallel_plan(self) -> dict[str, str]:
        return {"layers.0": "column", "layers.1": "row"}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.layers(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def worker_draws(run: Run, folder: Path) -> list[float]:
    os.environ.pop("PL_SEED_WORKERS", None)
    pl.seed_everything(3, workers=True, verbose=False)
    module = Remembering()
    loader = DataLoader(RandomRows(), batch_size=2, num_workers=1)
    trainer_of(replace(run, steps=2, accumulate=1), folder, Recorder(None)).fit(module, loader)
    return torch.cat(module.seen).flatten().tolist()


def test_worker_seeds_follow_the_data_parallel_rank(tmp_path: Path) -> None:
    a, b, c, d = run_ranks(worker_draws, 4, Run(2, 2), tmp_path)
    assert a == b and c == d and a != c
    a, b, c, d = run_ranks(worker_draws, 4, Run(2, 2, strategy_class=SeedsWorkersByGlobalRank), tmp_path)
    assert a != b, "Lightning no longer seeds workers by global rank: the override can go"


class HooksOverTheWorld(TensorParallelDDPStrategy):
    def configure_ddp(self) -> None:
        DDPStrategy.configure_ddp(self)
        self.model.register_comm_hook(None, self.ddp_comm_hook)


def by_state(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return allreduce_hook(state.process_group, bucket)


def test_communication_hooks_reduce_over_data_parallel_ranks(
    shared_corpus: Path, one_process: OneProcess
) -> None:
    one = one_process(steps=6, **EVEN)["losses"]
    plain = {"ddp_comm_hook": allreduce_hook, **UNCHECKED}
    with_state = {"ddp_comm_hook": by_state, "ddp_comm_state": SimpleNamespace(process_group=None)}
    for strategy in (plain, with_state):
        right = run_everywhere(Run(2, 2, steps=6, strategy=strategy, **EVEN), shared_corpus)
        assert right[0]["losses"] == pytest.approx(one, abs=2e-6, rel=0)
    naive = Run(2, 2, steps=6, strategy=plain, strategy_class=HooksOverTheWorld, **EVEN)
    wrong = run_everywhere(naive, shared_corpus)
    assert max(abs(a - b) for a, b in zip(wrong[0]["losses"], one)) > 1e-4


def test_all_parameters_of_lightnings_strategy_are_there_by_name() -> None:
    parameters = inspect.signature(TensorParallelDDPStrategy).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # The Trainer gives the first two; the third lets replicas differ, which the check of replicas ends.
    left_out = {"self", "accelerator", "precision_plugin", "model_averaging_period", "kwargs"}
    assert inspect.signature(DDPStrategy.__init__).parameters.keys() - left_out <= parameters.keys()


def decisions(run: Run, folder: Path) -> tuple[bool, bool, bool]:
    trainer = trainer_of(run, folder, Recorder(None))
    strategy = trainer.strategy
    strategy.setup_environment()
    one_says_no = trainer.global_rank != 2
    decide = strategy.reduce_boolean_decision
    return decide(True), decide(one_says_no), decide(not one_says_no, all=False)


def test_decisions_are_taken_by_the_world(tmp_path: Path) -> None:
    assert run_ranks(decisions, 4, Run(2, 2), tmp_path) == [(True, False, True)] * 4
    wrong = run_ranks(decisions, 4, Run(2, 2, strategy_class=DecidesByDataParallelRank), tmp_path)
    assert wrong != [(True, False, True)] * 4


def best_checkpoint(run: Run, corpus: Path) -> str:
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    checkpoint = pl.callbacks.ModelCheckpoint(corpus.parent / "best", "{step}", "val/loss")
    trainer.callbacks.append(checkpoint)
    trainer.fit(module, datamodule)
    return Path(checkpoint.best_model_path).name


def test_the_best_checkpoint_is_replaced(shared_corpus: Path) -> None:
    trainer = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    run = Run(2, 2, steps=6, accumulate=1, trainer=trainer)
    assert run_ranks(best_checkpoint, 4, run, shared_corpus) == ["step=6.ckpt"] * 4
    wrong = replace(run, strategy_class=DecidesByDataParallelRank)
    assert run_ranks(best_checkpoint, 4, wrong, shared_corpus) == ["step=2.ckpt"] * 4


class HeapState(ctypes.Structure):
    """glibc's mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefg"] + [("used", ctypes.c_size_t)] + [
        (name, ctypes.c_size_t) for name in "ij"
    ]


def grown_by_messages(run: Run, corpus: Path) -> int:
    """In a rank: the bytes of the heap that a thousand messages leave in use."""
    fit(run, corpus)
    heap = ctypes.CDLL(None).mallinfo2
    heap.restype = HeapState
    message, before = torch.ones(8), heap().used
    for _ in range(1000):
        dist.all_reduce(message)
    return int(heap().used - before)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc")
def test_messages_leave_no_records_on_the_heap(shared_corpus: Path) -> None:
    run = Run(2, 1, steps=2, accumulate=1)
    for grown in run_ranks(grown_by_messages, 2, run, shared_corpus):
        assert grown < 200_000
