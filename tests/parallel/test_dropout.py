"""Replicas drop other elements than each other, peers of one replica the same; one state stands for all."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from gpt_lightning.callbacks.exact_resume import RESUME_KEY, ExactResume
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.parallel.dropout import own_numbers
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from tests.distributed import run_ranks
from tests.parallel.runs import Run, build


def drawn(number: int) -> list[float]:
    torch.manual_seed(3)
    with own_numbers(number):
        own = torch.rand(2).tolist()
    return [*own, *torch.rand(2).tolist()]


def test_own_numbers_differ_and_leave_the_common_ones_alone() -> None:
    one, other = drawn(0), drawn(1)
    assert one == drawn(0) and one[:2] != other[:2] and one[2:] == other[2:]


def test_the_common_numbers_go_on_after_an_error() -> None:
    expected = drawn(0)[2:]
    torch.manual_seed(3)
    with pytest.raises(KeyError), own_numbers(0):
        raise KeyError
    assert torch.rand(2).tolist() == expected


class OwnStep(GPTLightningModule):
    """A subclass that computes its loss itself, and drops elements itself."""

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        self.dropped = nn.functional.dropout(torch.ones(64), training=True).tolist()
        return self.model(batch.input_ids, batch.targets).loss


class Draws(pl.Callback):
    """Writes down numbers drawn among whole tensors, in a layer that is cut, and between the steps."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[Any]] = {"whole": [], "cut": [], "between": [], "step": []}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        model.ln_f.register_forward_pre_hook(lambda *_: self.note("whole"))
        model.blocks[0].attn.qkv_proj.register_forward_pre_hook(lambda *_: self.note("cut"))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.numbers["step"].append(getattr(pl_module, "dropped", None))
        self.note("between")

    def note(self, where: str) -> None:
        self.numbers[where].append(torch.rand(2).tolist())


def fit(strategy: Any, devices: int, kind: type[GPTLightningModule], corpus: Path, **run: Any) -> Any:
    """Runs in a rank, for two steps of two micro-batches."""
    module, datamodule = build(corpus, Run(config={"dropout": 0.5}))
    own = kind(module.model.config)
    draws = Draws()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy(),
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        callbacks=[draws, ExactResume()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=corpus.parent,
    )
    trainer.fit(own, datamodule)
    saved = trainer._checkpoint_connector.dump_checkpoint()[RESUME_KEY]
    return draws.numbers, len(saved["random_states"])


def cut_in_two() -> TensorParallelDDPStrategy:
    return TensorParallelDDPStrategy(tensor_parallel_size=2)


def ddp() -> Any:
    return pl.strategies.DDPStrategy()


@pytest.mark.slow
def test_replicas_draw_their_own_numbers_and_their_peers_the_same(shared_corpus: Path) -> None:
    ranks, states = zip(*run_ranks(fit, 4, cut_in_two, 4, GPTLightningModule, shared_corpus))
    whole, cut = [rank["whole"] for rank in ranks], [rank["cut"] for rank in ranks]
    assert whole[0] == whole[1] and whole[2] == whole[3]
    assert not any(one == other for one, other in zip(whole[0], whole[2], strict=True))
    assert all(len({str(rank[step]) for rank in cut}) == 4 for step in range(4))
    assert all(rank["between"] == ranks[0]["between"] for rank in ranks)
    assert states == (1, 1, 1, 1), "the random states differ between the steps"


@pytest.mark.slow
def test_a_subclass_with_a_step_of_its_own_draws_so_too(shared_corpus: Path) -> None:
    (one, other), states = zip(*run_ranks(fit, 2, ddp, 2, OwnStep, shared_corpus))
    assert one["between"] == other["between"] and states == (1, 1)
    for where in ("whole", "step"):
        assert not any(a == b for a, b in zip(one[where], other[where], strict=True))
