"""A run whose ranks hold different numbers where they should hold the same is stopped."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.distributed import run_ranks
from tests.parallel.runs import Recorder, RecordingModule, Run, build, trainer_of

pytestmark = pytest.mark.slow
CHECKED = {"replica_check_every_n_steps": 2}


class Drifting(RecordingModule):
    """After the third step one number on rank 1 is another: `drifting` says in which parameter."""

    drifting = ""

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.global_step == 3 and self.trainer.global_rank == 1:
            parameter = self.get_parameter(self.drifting)
            with torch.no_grad():
                parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(9.0))


def drift(
    run: Run, corpus: Path, name: str, kind: type[RecordingModule] = Drifting
) -> tuple[int, str]:
    """In a rank: the step at which such a run has ended, in which `name` drifts, and by what error."""
    module, datamodule = build(corpus, run)
    module.__class__, module.drifting = kind, name
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    try:
        trainer.fit(module, datamodule)
    except RuntimeError as error:
        return trainer.global_step, str(error)
    return trainer.global_step, ""


@pytest.mark.parametrize(
    "tp, dp, name",
    [
        (2, 1, "model.ln_f.weight"),
        (2, 2, "model.blocks.0.attn.out_proj.bias"),
        (1, 2, "model.token_embedding.weight"),
        (2, 2, "model.token_embedding.weight"),
    ],
)
def test_one_bit_stops_all_ranks(tp: int, dp: int, name: str, shared_corpus: Path) -> None:
    run = Run(tp, dp, steps=8, accumulate=1, strategy=CHECKED)
    for step, message in run_ranks(drift, tp * dp, run, shared_corpus, name):
        # The step that stops is not counted; by then the difference has reached other parameters too.
        assert step == 3 and message.startswith("after 4 optimizer steps, model.")
        assert "is not the same on all ranks" in message


def test_parts_may_differ_between_tensor_parallel_peers_and_the_check_may_be_off(shared_corpus: Path) -> None:
    run = Run(2, 1, steps=8, accumulate=1, strategy=CHECKED)
    assert run_ranks(drift, 2, run, shared_corpus, "model.token_embedding.weight") == [(8, "")] * 2
    off = replace(run, strategy={"replica_check_every_n_steps": 0})
    assert run_ranks(drift, 2, off, shared_corpus, "model.ln_f.weight") == [(8, "")] * 2


def differently_seeded(run: Run, corpus: Path) -> str:
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    pl.seed_everything(100 + trainer.global_rank, verbose=False)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(module, datamodule)
    return str(error.value)


@pytest.mark.parametrize("tp, dp", [(2, 1), (1, 2)])
def test_ranks_that_start_from_different_weights_do_not_start(tp: int, dp: int, shared_corpus: Path) -> None:
    for message in run_ranks(differently_seeded, 2, Run(tp, dp), shared_corpus):
        assert message.startswith("at the start, ") and "seed_everything" in message


class SteppingAside(RecordingModule):
    """Rank 1 changes the gradient of a replicated parameter, as no rank may alone."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        if self.trainer.global_rank == 1:
            self.model.ln_f.weight.grad.neg_()


def step_aside(run: Run, corpus: Path) -> str:
    module, datamodule = build(corpus, run)
    module.__class__ = SteppingAside
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    with pytest.raises(RuntimeError) as error:
        trainer.fit(module, datamodule)
    return str(error.value)


def test_what_drifts_at_every_step_is_seen_after_the_first(shared_corpus: Path) -> None:
    for message in run_ranks(step_aside, 2, Run(2, 1, steps=8), shared_corpus):
        assert message.startswith("after 1 optimizer steps, model.ln_f.weight is not the same")


def unseeded(run: Run, corpus: Path) -> list[float]:
    module, datamodule = build(corpus, run)
    del os.environ["PL_GLOBAL_SEED"]
    torch.manual_seed(int(os.environ["RANK"]))  # as unlike as the entropy of the operating system
    recorder = Recorder(None)
    trainer_of(run, corpus.parent, recorder).fit(module, datamodule)
    return recorder.losses


def test_peers_draw_alike_also_where_nobody_seeded_them(shared_corpus: Path) -> None:
    run = Run(2, 1, steps=4, config={"dropout": 0.1}, strategy={"replica_check_every_n_steps": 1})
    one, other = run_ranks(unseeded, 2, run, shared_corpus)
    assert len(one) == 4 and one == other
