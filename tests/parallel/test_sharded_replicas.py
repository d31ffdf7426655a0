"""Replicas that share out parameters, gradients and moments: the numbers and files of one process."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.checkpoint.checkpoint import Checkpoint, consolidate
from gpt_lightning.parallel.sharded_replicas import gathered_apart, local, rounded_layers
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.planning.activations import kept_activations
from gpt_lightning.planning.setup import Setup
from gpt_lightning.planning.traffic import traffic_of
from tests.distributed import run_ranks
from tests.parallel.pretended import Messages
from tests.parallel.runs import Recorder, RecordingModule, Run, build, fit, run_everywhere, trainer_of
from tests.parallel.test_equality import assert_equal_runs
from tests.parallel.test_other_modules import (
    BuiltLate,
    Frozen,
    Manual,
    Plain,
    Quasi,
    SecondName,
)
from tests.parallel.test_replicas import drift
from tests.parallel.test_traps import half_precision
from tests.shapes import SHARED

pytestmark = pytest.mark.slow
OneProcess = Callable[..., dict[str, Any]]
FULL, OPTIMIZER = {"shard_replicas": "full"}, {"shard_replicas": "optimizer"}
NODES = {"devices": 2, "num_nodes": 2}


def assert_equal(ranks: list[dict[str, Any]], one: dict[str, Any], **options: float) -> None:
    for rank in ranks:
        rank["replicated"] = {}  # what is not cut is shared: its rows differ
    assert_equal_runs(ranks, one, **options)


@pytest.mark.parametrize(
    "tp, dp, strategy, shape",
    [(1, 2, FULL, {}), (2, 2, FULL, {}), (1, 2, OPTIMIZER, {}), (2, 2, OPTIMIZER, SHARED)],
)
def test_training_with_clipping_and_accumulation(
    tp: int,
    dp: int,
    strategy: dict[str, Any],
    shape: dict[str, Any],
    shared_corpus: Path,
    one_process: OneProcess,
) -> None:
    ranks = run_everywhere(Run(tp, dp, strategy=strategy, config=shape), shared_corpus)
    qk_norm = {"drift": 100.0, "norms": 2.0} if shape else {}  # as without sharing
    assert_equal(ranks, one_process(config=shape), **qk_norm)


VARIANTS: dict[str, dict[str, Any]] = {
    "untied, without biases, activation checkpointing": {
        "config": {"tie_embeddings": False, "bias": False},
        "module": {"activation_checkpointing": True},
    },
    "blocks compiled": {"module": {"compile_backend": "aot_eager"}, "config": {"n_layers": 1}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, shared_corpus: Path, one_process: OneProcess) -> None:
    options = {"steps": 8, **VARIANTS[name]}
    ranks = run_everywhere(Run(1, 2, strategy=FULL, **options), shared_corpus)
    assert_equal(ranks, one_process(**options))


def test_nodes_hold_copies_of_which_one_is_saved(
    shared_corpus: Path, tmp_path: Path, one_process: OneProcess
) -> None:
    run = Run(1, 4, strategy={**FULL, "save_sharded": True}, trainer=NODES, save_to=str(tmp_path / "folder"))
    ranks = run_ranks(fit, 4, run, shared_corpus, nodes=2)
    rows = [rank["replicated"] for rank in ranks]
    consolidate(tmp_path / "folder", tmp_path / "whole")
    saved = Checkpoint.open(tmp_path / "whole").contents["state_dict"]
    assert all(torch.equal(saved[n], torch.cat([part, rows[1][n]])) for n, part in rows[0].items())
    for one, other, is_copy in ((0, 2, True), (1, 3, True), (0, 1, False)):
        assert all(torch.equal(own, rows[other][name]) for name, own in rows[one].items()) == is_copy
    assert_equal(ranks, one_process())


def test_lower_precision_differs_by_its_rounding(shared_corpus: Path, one_process: OneProcess) -> None:
    """Tolerances are those without sharing; gathered are float32 parameters, and float32 is reduced."""
    for extra, tolerance in (
        ({"trainer": {"precision": "bf16-mixed"}}, 2.2e-3),
        ({"plugins": half_precision, "accumulate": 1}, 4.1e-4),
    ):
        one, run = one_process(steps=6, **extra), Run(2, 2, strategy=FULL, steps=6, **extra)
        for rank, *rounded in run_ranks(fit_both_ways, 4, run, shared_corpus):
            assert rank["losses"] == pytest.approx(one["losses"], abs=tolerance, rel=0)
            assert rank["scales"] == one["scales"]
            assert len(rounded) == ("plugins" not in extra)
            for other in rounded:
                assert_same(other, rank)


def fit_both_ways(run: Run, corpus: Path) -> list[dict[str, Any]]:
    """In a rank: gathers weights as they are and then, where that is not refused, as autocast rounds them."""
    rounded = replace(run, strategy={**run.strategy, "gather_dtype": "bf16"})
    return [fit(each, corpus) for each in ([run] if run.plugins else [run, rounded])]


def assert_same(rank: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit."""
    assert rank["losses"] == other["losses"] and rank["norms"] == other["norms"]
    for kind in ("replicated", "parts"):
        assert all(torch.equal(tensor, other[kind][name]) for name, tensor in rank[kind].items())


class Watching(pl.Callback):
    """Counts a step's bytes that are gathered, and those that are kept for a backward pass."""

    def __init__(self) -> None:
        self.messages, self.gathered, self.kept = Messages(), 0, 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.found: list[torch.UntypedStorage] = []
        self.messages.taken()
        self.messages.__enter__()
        self.hooks = saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.hooks.__enter__()

    def keep(self, tensor: Tensor) -> Tensor:
        self.found.append(tensor.untyped_storage())
        return tensor

    def on_before_backward(self, *_: Any) -> None:
        self.hooks.__exit__()
        self.kept = sum({storage._cdata: storage.nbytes() for storage in self.found}.values())

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.messages.__exit__(None, None, None)
        sent = self.messages.taken().items()
        self.gathered += sum(n * count for (name, _, n), count in sent if name == "allgather")


def watch(run: Run, again: Run, corpus: Path, folder: Path) -> dict[str, Any]:
    """In a rank: what two runs leave behind, by what is gathered; of the first, what it sends and keeps."""
    found: dict[str, Any] = {}
    for dtype in (None, "bf16"):
        watching, path = Watching(), str(folder / f"{dtype}.ckpt")
        strategy = {**run.strategy, "gather_dtype": dtype}
        first = fit(replace(run, strategy=strategy, callbacks=lambda: [watching]), corpus)
        second = fit(replace(again, strategy=strategy, stop_after=2, save_to=path), corpus)
        counts = {"gathered": watching.gathered, "kept": watching.kept}
        found[str(dtype)] = {**counts, "first": first, "second": second}
    found["all"] = fit(again, corpus)
    found["rest"] = fit(replace(again, strategy=strategy, resume_from=path), corpus)
    return found


def test_rounded_weights_spare_bytes_and_change_none(shared_corpus: Path, tmp_path: Path) -> None:
    """Bit for bit; what is sent, and what is kept no more, is what a plan says."""
    data = {"tokenizer": "bpe:302"}  # rows that two ranks can share evenly
    options: dict[str, Any] = {"trainer": {"precision": "bf16-mixed"}, "strategy": FULL, "steps": 4}
    run = Run(1, 2, config={"positions": "rope", "d_head": 10}, data=data, **options)
    noisy = {**SHARED, "dropout": 0.3}
    again = Run(1, 2, config=noisy, module={"activation_checkpointing": True}, **options)
    again = replace(again, callbacks=lambda: [ExactResume()])
    config = build(shared_corpus, run)[0].model.config
    plan = Setup(config, 15, 4, accumulation=2, devices=2, precision="bf16-mixed", on_cpu=True, **FULL)
    rounded = replace(plan, gather_dtype="bf16")
    for rank in run_ranks(watch, 2, run, again, shared_corpus, tmp_path):
        whole, narrow = rank["None"], rank["bf16"]
        assert_same(whole["first"], narrow["first"])
        assert_same(whole["second"], narrow["second"])
        assert narrow["second"]["losses"] + rank["rest"]["losses"] == rank["all"]["losses"]
        assert_same({**rank["rest"], "losses": [], "norms": []}, {**rank["all"], "losses": [], "norms": []})
        for found, setup in ((whole, plan), (narrow, rounded)):
            assert found["gathered"] / 2 == run.steps * traffic_of(setup).weights
        kept = [config.n_layers * kept_activations(setup).narrow_weights for setup in (plan, rounded)]
        assert whole["kept"] - narrow["kept"] == kept[0] > kept[1] == 0
    files = [Checkpoint.open(tmp_path / f"{dtype}.ckpt").contents for dtype in (None, "bf16")]
    one, other = map(tensors_in, files)
    assert len(one) > 40 and one.keys() == other.keys()
    assert all(torch.equal(tensor, one[key]) for key, tensor in other.items())
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}


def tensors_in(contents: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and moments by name."""
    (optimizer,) = contents["optimizer_states"]
    states = {f"{n} {key}": v for n, state in optimizer["state"].items() for key, v in state.items()}
    return {**contents["state_dict"], **states}


def test_bf16_gradients_differ_by_their_rounding_alone(shared_corpus: Path, one_process: OneProcess) -> None:
    """DDP's hook rounds them as shared replicas do, after all micro-batches of a step."""
    one = one_process(steps=10)["losses"]
    runs = [Run(1, 2, strategy={"reduce_dtype": "bf16", **kind}, steps=10) for kind in ({}, FULL, OPTIMIZER)]
    ddp, *shared = [run_everywhere(run, shared_corpus)[0]["losses"] for run in runs]
    assert ddp[0] == pytest.approx(one[0], abs=2e-6)
    assert 4e-6 < max(abs(a - b) for a, b in zip(ddp, one)) < 1e-4
    for losses in shared:
        assert losses == pytest.approx(ddp, abs=2e-6, rel=0)


class Summing(Plain):
    """Has one weight, whose gradient in a micro-batch is the batch; `gradient` is that of the step."""

    def build(self) -> None:
        self.net = nn.Linear(1, 1, bias=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.trainer.accumulate_grad_batches * self.net(batch).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradient = sum(float(local(p.grad).sum()) for p in self.parameters())


def sum_of_micro_batches(folder: Path, strategy: dict[str, Any], nodes: int) -> float:
    """In a rank: its part of the gradient, whose summands are finer than a step of bfloat16."""
    module, world_size, n = Summing(), int(os.environ["WORLD_SIZE"]), 8
    is_second_half = int(os.environ["RANK"]) >= world_size // 2
    rows = torch.tensor([1 + is_second_half / 128] + [1 / 512] * (n - 1))[:, None]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world_size // nodes,
        num_nodes=nodes,
        strategy=TensorParallelDDPStrategy(reduce_dtype="bf16", **strategy),
        max_steps=1,
        accumulate_grad_batches=n,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(rows, batch_size=1))
    return module.gradient


@pytest.mark.parametrize(
    "world_size, nodes, strategy", [(2, 1, {}), (2, 1, FULL), (2, 1, OPTIMIZER), (4, 2, FULL)]
)
def test_gradients_that_bf16_reduces_add_up_in_float32(
    world_size: int, nodes: int, strategy: dict[str, Any], tmp_path: Path
) -> None:
    """1 + 7/512 and 1 + 11/512 are rounded to 1 + 8/512 and 1 + 12/512, and their mean to 1 + 8/512."""
    found = run_ranks(sum_of_micro_batches, world_size, tmp_path, strategy, nodes, nodes=nodes)
    has_row = world_size // nodes if strategy else 1  # of how many ranks one has the only row
    assert found == [1 + 8 / 512 if rank % has_row == 0 else 0.0 for rank in range(world_size)]


# ---- checkpoints

Part = tuple[int, int, dict[str, Any]]
STEPS = 15
FILES: list[Part] = [(1, 1, {}), (2, 2, FULL), (4, 1, {}), (1, 2, {}), (1, 1, {})]
FOLDERS: list[Part] = [(1, 2, FULL), (2, 2, FULL), (4, 1, {}), (1, 4, OPTIMIZER), (1, 2, {})]


@pytest.mark.parametrize("save_sharded", [False, True], ids=["one file", "folder"])
def test_a_run_goes_on_at_other_topologies(
    save_sharded: bool, shared_corpus: Path, tmp_path: Path, one_process: OneProcess
) -> None:
    losses, path = [], None
    options: dict[str, Any] = {"accumulate": 1, "steps": STEPS}
    for number, (tp, dp, strategy) in enumerate(FOLDERS if save_sharded else FILES):
        strategy = {"save_sharded": save_sharded, **strategy} if tp * dp > 1 else {}
        own = {"stop_after": 3 * number + 3, "resume_from": path, "save_to": str(tmp_path / f"{number}.ckpt")}
        losses += run_everywhere(Run(tp, dp, strategy=strategy, **own, **options), shared_corpus)[0]["losses"]
        path = own["save_to"]
    assert losses == pytest.approx(one_process(**options)["losses"], abs=2e-6, rel=0)


def test_a_resumed_run_is_the_one_that_was_not_interrupted(shared_corpus: Path, tmp_path: Path) -> None:
    """Bit for bit, moments, dropout and all."""
    options: dict[str, Any] = {"steps": 8, "strategy": FULL, "accumulate": 1, "config": {"dropout": 0.3}}
    options["callbacks"] = lambda: [ExactResume()]
    ranks = run_everywhere(Run(1, 2, **options), shared_corpus)
    path = str(tmp_path / "run.ckpt")
    first = run_everywhere(Run(1, 2, stop_after=4, save_to=path, **options), shared_corpus)
    rest = run_everywhere(Run(1, 2, resume_from=path, **options), shared_corpus)
    assert first[0]["losses"] + rest[0]["losses"] == ranks[0]["losses"]
    for name, own in ranks[1]["replicated"].items():
        assert torch.equal(rest[1]["replicated"][name], own), name


def test_the_file_is_that_of_one_process(shared_corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 4, "config": {**SHARED, "positions": "learned", "bias": True}}
    for name, run in (
        ("one", Run(**options)),
        ("full", Run(2, 2, strategy=FULL, **options)),
        ("folder", Run(2, 2, strategy={**FULL, "save_sharded": True}, **options)),
    ):
        run_everywhere(replace(run, save_to=str(tmp_path / name)), shared_corpus)
    consolidate(tmp_path / "folder", tmp_path / "whole")
    one = Checkpoint.open(tmp_path / "one").contents
    for name in ("full", "whole"):
        other = Checkpoint.open(tmp_path / name).contents
        assert one.keys() == other.keys() and one["state_dict"].keys() == other["state_dict"].keys()
        for key, tensor in one["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][key], tensor, rtol=1e-4, atol=1e-5, msg=key)
        (own,), (theirs,) = one["optimizer_states"], other["optimizer_states"]
        assert own["param_groups"] == theirs["param_groups"]
        for index, entry in own["state"].items():
            for key, value in entry.items():
                torch.testing.assert_close(theirs["state"][index][key], value, rtol=1e-3, atol=1e-6)


class SavedAfterFourSteps(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i == 7:
            trainer.save_checkpoint(self.path)


def averages(path: Path) -> list[pl.Callback]:
    return [pl.callbacks.EMAWeightAveraging(decay=0.8), SavedAfterFourSteps(path)]


def test_averages_are_those_of_one_process(shared_corpus: Path, tmp_path: Path) -> None:
    """They are evaluated and saved, and what was trained beside them; from the file a run goes on."""
    evaluation = {"limit_val_batches": 2, "val_check_interval": 5, "check_val_every_n_epoch": None}
    files: dict[str, dict[str, Any]] = {}
    one: dict[str, Any] = {}
    for name, tp, dp, strategy in (
        ("one", 1, 1, {}),
        ("cut", 2, 1, {}),
        ("by steps", 1, 2, OPTIMIZER),
        ("shared", 2, 2, FULL),
    ):
        path = tmp_path / f"{name}.ckpt"
        options = {"steps": 8, "strategy": strategy, "trainer": evaluation}
        run = Run(tp, dp, callbacks=partial(averages, path), **options)
        ranks = run_everywhere(run, shared_corpus)
        files[name] = Checkpoint.open(path).contents
        one = one or ranks[0]
        assert ranks[0]["losses"] == pytest.approx(one["losses"], abs=2e-6, rel=0)
        assert ranks[0]["evaluated"] == pytest.approx(one["evaluated"], abs=2e-6, rel=0)
    assert len(one["evaluated"]) == 3 and len(one["losses"]) == 8
    of_one = files["one"]
    averaged, trained = of_one["state_dict"], of_one["current_model_state"]
    assert float((averaged["model.ln_f.weight"] - trained["model.ln_f.weight"]).abs().max()) > 1e-4
    for file in files.values():
        assert file.keys() == of_one.keys() and file["callbacks"].keys() == of_one["callbacks"].keys()
        for key in ("state_dict", "current_model_state", "averaging_state"):
            assert file[key].keys() == of_one[key].keys()
            for name, tensor in file[key].items():
                torch.testing.assert_close(tensor, of_one[key][name], rtol=0, atol=1e-6)
    rest = run_everywhere(replace(run, resume_from=str(path)), shared_corpus)
    assert ranks[0]["losses"][4:] == rest[0]["losses"]
    for rank, resumed in zip(ranks, rest):  # the averages, which take the weights' place at the end
        for part in ("replicated", "parts"):
            assert all(torch.equal(resumed[part][name], own) for name, own in rank[part].items())
    (at_one,) = run_everywhere(Run(resume_from=str(path), **{**options, "strategy": {}}), shared_corpus)
    assert at_one["losses"] == pytest.approx(one["losses"][4:], abs=2e-6, rel=0)


# ---- what looks at parameters and gradients

class Overflowing(RecordingModule):
    """The rows of one rank get an infinite gradient in the fourth step."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 3 and self.trainer.global_rank == 1:
            local(self.model.blocks[0].mlp.up_proj.weight.grad)[0, 0] = torch.inf


def overflow(run: Run, corpus: Path) -> list[float]:
    module, datamodule = build(corpus, run)
    module.__class__ = Overflowing
    recorder = Recorder(None)
    trainer_of(run, corpus.parent, recorder).fit(module, datamodule)
    return recorder.scales


def test_an_overflow_on_one_rank_skips_the_step_on_all(shared_corpus: Path) -> None:
    strategy = {**FULL, "replica_check_every_n_steps": 0}
    run = Run(2, 2, steps=6, accumulate=1, plugins=half_precision, strategy=strategy)
    for scales in run_ranks(overflow, 4, run, shared_corpus):
        assert scales == [256.0, 256.0, 256.0, 128.0, 128.0, 128.0]


class LeavingOut(RecordingModule):
    """Leaves out the second step as the guard does on a GPU; notes which steps have changed no parameter."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.unchanged: list[bool] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.before = [local(parameter).clone() for parameter in self.parameters()]
        setattr(optimizer, "found_inf", torch.tensor(float(self.trainer.global_step == 1)))

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        pairs = zip(self.before, map(local, self.parameters()))
        self.unchanged.append(all(torch.equal(before, now) for before, now in pairs))


class LeftOutByTheHost(LeavingOut):
    """Has NaN in one rank's rows of the second step's gradient, which the guard sees."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 1 and self.trainer.global_rank == 1:
            local(self.model.blocks[0].mlp.up_proj.weight.grad)[0, 0] = torch.nan

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.before = [local(parameter).clone() for parameter in self.parameters()]


def leave_out(kind: type[LeavingOut], run: Run, corpus: Path) -> list[bool]:
    module, datamodule = build(corpus, run)
    module.__class__ = kind
    trainer_of(run, corpus.parent, Recorder(None)).fit(module, datamodule)
    return module.unchanged


@pytest.mark.parametrize(
    "kind, name", [(LeavingOut, "adamw"), (LeavingOut, "muon"), (LeftOutByTheHost, "adamw")]
)
def test_a_step_that_is_left_out_changes_nothing(
    kind: type[LeavingOut], name: str, shared_corpus: Path
) -> None:
    run = Run(1, 2, steps=3, accumulate=1, strategy=FULL, optimizer={"name": name})
    run = replace(run, callbacks=(lambda: [FiniteGuard(1)]) if kind is LeftOutByTheHost else None)
    assert run_ranks(leave_out, 2, kind, run, shared_corpus) == [[False, True, False]] * 2


class DriftingRows(RecordingModule):
    """After the third step one number on rank 3 is another: `drifting` says in which parameter."""

    drifting = ""

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.trainer.global_step == 3 and self.trainer.global_rank == 3:
            with torch.no_grad():
                local(self.get_parameter(self.drifting)).view(-1)[0] += 1


@pytest.mark.parametrize(
    "tp, nodes, name, is_found",
    [
        (2, 1, "model.ln_f.weight", True),  # rank 2 has the same rows
        (2, 1, "model.blocks.0.mlp.up_proj.weight", False),  # nobody has
        (1, 2, "model.blocks.0.mlp.up_proj.weight", True),  # the other node's copy has
    ],
)
def test_replicas_are_compared_where_they_hold_the_same(
    tp: int, nodes: int, name: str, is_found: bool, shared_corpus: Path
) -> None:
    strategy = {**FULL, "replica_check_every_n_steps": 2}
    sizes = {"devices": 4 // nodes, "num_nodes": nodes}
    run = Run(tp, 4 // tp, steps=6, accumulate=1, strategy=strategy, trainer=sizes)
    for step, message in run_ranks(drift, 4, run, shared_corpus, name, DriftingRows, nodes=nodes):
        assert step == (3 if is_found else 6)
        assert ("is not the same on all ranks" in message) == is_found


def evaluate_after_fit(run: Run, corpus: Path, path: str) -> dict[str, Any]:
    """In a rank: what validation and a generated text are during, after and from a file of a fit."""
    module, datamodule = build(corpus, run)
    trainer = trainer_of(run, corpus.parent, Recorder(None))
    trainer.fit(module, datamodule)
    during = float(trainer.callback_metrics["val/loss"])
    text = module.generate("The ", max_new_tokens=3 + trainer.global_rank, do_sample=False)
    gathered = any(not isinstance(p, DTensor) for p in module.parameters())
    trainer.save_checkpoint(path)
    (after,) = trainer.validate(module, datamodule, verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            local(parameter).zero_()
    (restored,) = trainer.validate(module, datamodule, ckpt_path=path, weights_only=True, verbose=False)
    refusal = ""
    if run.tp * run.dp > 1:
        with pytest.raises(ValueError) as error:
            trainer.predict(module, datamodule)
        refusal = str(error.value)
    losses = [during, after["val/loss"], restored["val/loss"]]
    return {"losses": losses, "text": text, "gathered": gathered, "refusal": refusal}


def test_validation_and_text_between_and_after_steps(shared_corpus: Path, tmp_path: Path) -> None:
    validations = {"limit_val_batches": 1.0, "val_check_interval": 3, "num_sanity_val_steps": 2}
    options: dict[str, Any] = {"steps": 4, "trainer": validations}
    path = str(tmp_path / "run.ckpt")
    (one,) = run_ranks(evaluate_after_fit, 1, Run(**options), shared_corpus, path)
    for kind in (FULL, OPTIMIZER):
        ranks = run_ranks(evaluate_after_fit, 2, Run(1, 2, strategy=kind, **options), shared_corpus, path)
        for rank in ranks:
            assert rank["losses"] == pytest.approx(one["losses"], abs=2e-6)
            assert rank["text"].startswith(one["text"]) and not rank["gathered"]
            assert "predict needs whole layers" in rank["refusal"]


def evaluate_both_ways(run: Run, corpus: Path, path: str) -> list[dict[str, Any]]:
    rounded = replace(run, strategy={**run.strategy, "gather_dtype": "bf16"})
    return [evaluate_after_fit(each, corpus, path) for each in (run, rounded)]


def test_rounded_weights_are_evaluated_and_write_text(shared_corpus: Path, tmp_path: Path) -> None:
    validations = {"limit_val_batches": 1.0, "val_check_interval": 3, "precision": "bf16-mixed"}
    run = Run(1, 2, strategy=FULL, steps=4, trainer=validations)
    for whole, rounded in run_ranks(evaluate_both_ways, 2, run, shared_corpus, str(tmp_path / "run.ckpt")):
        assert rounded == whole


# ---- memory


class Counting(RecordingModule):
    """Counts, where gradients are and layers compute, what this rank has of each."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.counts: dict[str, int] = {"within a block": 0, "at rest": 0}
        for block in self.model.blocks:
            block.mlp.register_forward_pre_hook(lambda *_: self.count_gathered("within a block"))

    def count_gathered(self, when: str) -> None:
        whole = sum(p.numel() for p in self.parameters() if not isinstance(p, DTensor))
        self.counts[when] = max(self.counts[when], whole)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.counts["gradients"] = sum(local(p.grad).numel() for p in self.parameters())
        self.counts["parameters"] = sum(local(p).numel() for p in self.parameters())

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.count_gathered("at rest")
        moments = [v for entry in self.optimizers().state.values() for v in entry.values() if v.dim()]
        self.counts["moments"] = sum(local(moment).numel() for moment in moments)


def count(run: Run, corpus: Path) -> dict[str, int]:
    module, datamodule = build(corpus, run)
    module.__class__ = Counting
    trainer_of(run, corpus.parent, Recorder(None)).fit(module, datamodule)
    return module.counts


@pytest.mark.parametrize("tp, dp", [(1, 2), (1, 4), (2, 2)])
def test_a_rank_holds_its_share_of_parameters_gradients_and_moments(
    tp: int, dp: int, shared_corpus: Path
) -> None:
    options: dict[str, Any] = {"steps": 2, "accumulate": 1, "config": {"n_layers": 6}}
    (one,) = run_ranks(count, 1, Run(**options), shared_corpus)
    dense = one["parameters"]
    model = build(shared_corpus, Run(**options))[0].model
    block = sum(p.numel() for p in model.blocks[0].parameters())
    root = dense - 6 * block
    assert one["moments"] == 2 * dense and one["gradients"] == dense
    full = run_ranks(count, tp * dp, Run(tp, dp, strategy=FULL, **options), shared_corpus)
    rows = 4 * 36 * len([*model.parameters()])  # of a tensor that does not divide, and what peers replicate
    for rank in full:
        held = rank["parameters"] + rank["gradients"] + rank["moments"]
        assert held <= 4 * (dense / (tp * dp) + rows)
        assert held + rank["within a block"] <= 4 * dense / (tp * dp) + 4 * rows + (root + block) / tp + rows
        assert rank["at rest"] == 0
    if tp == 1:  # each element on one rank
        assert sum(rank["parameters"] for rank in full) == dense
        optimizer = run_ranks(count, dp, Run(tp, dp, strategy=OPTIMIZER, **options), shared_corpus)
        assert all(rank["within a block"] > root + block for rank in optimizer)


# ---- other modules


class Listed(Plain):
    """Has layers in a list, two of which share a tensor, and a parameter of its own."""

    def build(self) -> None:
        torch.manual_seed(4)
        self.net = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 7), nn.Linear(6, 6), nn.Linear(7, 3)])
        self.net[2].weight = self.net[0].weight
        self.scale = nn.Parameter(torch.ones(1))

    def output(self, x: Tensor) -> Tensor:
        first, second, third, last = self.net
        return self.scale * last(torch.tanh(second(third(torch.tanh(first(x))))))


class InPlace(Plain):
    """Changes in place what a linear layer returns; one is never called, and another's weight is computed."""

    def build(self) -> None:
        torch.manual_seed(4)
        weight_norm = nn.utils.parametrizations.weight_norm
        first = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.ReLU(inplace=True))
        second = nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)
        self.net = nn.Sequential(first, second, weight_norm(nn.Linear(12, 12)), nn.Linear(12, 3))

    def output(self, x: Tensor) -> Tensor:
        return self.net(x.unflatten(0, (2, -1))).flatten(0, 1)


def train(
    kind: Callable[[], Plain], folder: Path, strategy: dict[str, Any], precision: Any = "32-true"
) -> list[float]:
    """In a rank: the losses, of the same rows on all of them."""
    module = kind()
    rows = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=TensorParallelDDPStrategy(**strategy),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        gradient_clip_val=0.1,
        precision=precision,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(rows, batch_size=8))
    return module.losses


def train_by_each(kinds: list[Callable[[], Plain]], folder: Path) -> list[list[list[float]]]:
    """In a rank: the losses of each, gathered as it is, and rounded."""
    ways = (FULL, {**FULL, "gather_dtype": "bf16"}, {**OPTIMIZER, "gather_dtype": "bf16"})
    return [[train(kind, folder, way, "bf16-mixed") for way in ways] for kind in kinds]


@pytest.mark.parametrize("kind", [Plain, SecondName, BuiltLate, Frozen, Listed])
def test_any_module_without_a_plan(kind: Callable[[], Plain], tmp_path: Path) -> None:
    (one,) = run_ranks(train, 1, kind, tmp_path, {})
    assert one[-1] < one[0]
    for losses in run_ranks(train, 2, kind, tmp_path, FULL):
        assert losses == pytest.approx(one, abs=1e-6)


def test_any_module_may_gather_what_autocast_rounds(tmp_path: Path) -> None:
    """Bit for bit, whatever a module does with its layers."""
    for found in run_ranks(train_by_each, 2, [Plain, SecondName, Frozen, Listed, InPlace], tmp_path):
        for whole, *rounded in found:
            assert rounded == [whole, whole] and whole[-1] < whole[0]


def test_linear_layers_that_are_more_are_not_rounded() -> None:
    module = InPlace()
    first, second, normed, last = module.net
    assert rounded_layers(first) == [first[0], first[2]]
    assert rounded_layers(second) == [second.linear1, second.linear2]
    assert rounded_layers(normed) == [] and rounded_layers(last) == [last]
    second.linear2.bias = second.norm2.bias
    assert rounded_layers(second) == [second.linear1]


def test_layers_that_share_a_tensor_stay_together() -> None:
    module = Listed()
    assert gathered_apart(module) == [module.net[1], module.net[3]]
    nested = nn.Sequential(nn.ModuleList([nn.ReLU(), layer := nn.Linear(2, 2)]))
    assert gathered_apart(nested) == [layer]


class UsedByRank(Plain):
    """Each rank uses another layer, of the same size."""

    def build(self) -> None:
        super().build()
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def output(self, x: Tensor) -> Tensor:
        return self.net(x) + self.experts[self.trainer.global_rank](x)


def test_layers_that_only_some_ranks_use_end_the_run(tmp_path: Path) -> None:
    for message in run_ranks(refusal, 2, UsedByRank, tmp_path, FULL, RuntimeError):
        assert "after 1 optimizer steps, experts.0.weight has a gradient on some ranks" in message


class Scalar(Plain):
    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.ones(()))


class AveragedByEpoch(Plain):
    def configure_callbacks(self) -> pl.Callback:
        return pl.callbacks.StochasticWeightAveraging(0.1)


def refusal(
    kind: Callable[[], Plain],
    folder: Path,
    strategy: dict[str, Any],
    error_type: type[Exception] = ValueError,
) -> str:
    with pytest.raises(error_type) as error:
        train(kind, folder, strategy)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, strategy, words",
    [
        (Quasi, FULL, "LBFGS needs whole parameters, and data-parallel ranks hold parts"),
        (Manual, FULL, "shard_replicas cannot tell where a step ends of Manual"),
        (Scalar, FULL, "scale is a single number"),
        (AveragedByEpoch, {}, "StochasticWeightAveraging averages whole weights"),
        (Plain, {"shard_replicas": "some"}, "shard_replicas=some is unknown"),
        (Plain, {"reduce_dtype": "fp8"}, "reduce_dtype=fp8 is unknown"),
        (Plain, {**FULL, "gather_dtype": "fp8"}, "gather_dtype=fp8 is unknown"),
        (Plain, {"gather_dtype": "bf16"}, "replicas share, and shard_replicas=none; choose full"),
        (Plain, {**FULL, "gather_dtype": "bf16"}, "trainer.precision=32-true; choose bf16-mixed"),
        (Plain, {**FULL, "static_graph": True}, "static_graph=True is for DDP"),
        (Plain, {"reduce_dtype": "bf16", "ddp_comm_hook": print}, "both say how gradients are reduced"),
        (Plain, {**FULL, "start_method": "fork"}, "start_method=fork gives the first process"),
    ],
)
def test_what_would_go_wrong_is_refused(
    kind: Callable[[], Plain], strategy: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for message in run_ranks(refusal, 2, kind, tmp_path, strategy):
        assert words in message
