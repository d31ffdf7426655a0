"""A fit equals a plain loop written here: loss, gradients, accumulation, held-out perplexity."""

import copy
import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device

from gpt_lightning.callbacks.finite_guard import FiniteGuard
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate_factor,
)

pytestmark = pytest.mark.slow
SEQ_LEN = 15


class Recorder(pl.Callback):
    """Targets of every micro-batch and what was logged at every optimizer step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batches.append(batch)
        if len(self.batches) % trainer.accumulate_grad_batches == 0:
            metrics = trainer.callback_metrics
            self.logged.append(
                {name: float(metrics[name]) for name in ("train/loss", "train/grad_norm", "lr-AdamW")}
            )


def build(corpus: Path, cache: Path, **data: Any) -> tuple[GPTLightningModule, TextDataModule]:
    settings = {"tokenizer": "bpe:300", "seq_len": SEQ_LEN, "batch_size": 4, "val_fraction": 0.2} | data
    datamodule = TextDataModule(train_files=[str(corpus)], cache_dir=str(cache), **settings)
    torch.manual_seed(1)
    config = GPTConfig(datamodule.vocab_size, SEQ_LEN, n_layers=2, n_heads=3, d_model=18)
    schedule = ScheduleConfig(warmup_steps=3, min_lr_ratio=0.1)
    return GPTLightningModule(config, OptimizerConfig(learning_rate=0.01), schedule), datamodule


def trainer(folder: Path, **settings: Any) -> pl.Trainer:
    options = {
        "max_steps": 8,
        "log_every_n_steps": 1,
        "gradient_clip_val": 0.5,
        "num_sanity_val_steps": 0,
        "logger": False,
    } | settings
    return pl.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize("accumulate, document_mask", [(1, False), (3, False), (2, True)])
def test_fit_equals_a_plain_loop(corpus: Path, tmp_path: Path, accumulate: int, document_mask: bool) -> None:
    module, datamodule = build(corpus, tmp_path / "cache", document_mask=document_mask)
    start = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    recorder = Recorder()
    max_steps = 3 * 2000 // datamodule.seq_len // 4 // accumulate // 4
    fit = trainer(tmp_path, max_steps=max_steps, accumulate_grad_batches=accumulate, callbacks=[recorder])
    fit.fit(module, datamodule)
    # At least one epoch must have ended inside the run: its last windows are partly padding.
    assert fit.current_epoch >= 1

    model = build(corpus, tmp_path / "cache")[0].model
    model.load_state_dict(start)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), foreach=False)
    for step in range(max_steps):
        batches = recorder.batches[step * accumulate : (step + 1) * accumulate]
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * learning_rate_factor(step, ScheduleConfig(3, 0.1), max_steps)
        logits = [model(b.input_ids, document_ids=b.document_ids).logits.flatten(0, 1) for b in batches]
        targets = torch.cat([b.targets.flatten() for b in batches])
        loss = F.cross_entropy(torch.cat(logits), targets)  # the mean over all tokens that are not -100
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert recorder.logged[step]["train/loss"] == pytest.approx(float(loss), abs=2e-5)
        assert recorder.logged[step]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        assert recorder.logged[step]["lr-AdamW"] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
    for name, tensor in module.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_a_fit_with_muon_equals_a_plain_loop_and_logs_both_rates(corpus: Path, tmp_path: Path) -> None:
    settings = OptimizerConfig(0.01, name="muon", matrix_learning_rate=0.04)
    schedule = ScheduleConfig(3, 0.1)

    def module() -> GPTLightningModule:
        return GPTLightningModule(build(corpus, tmp_path / "cache")[0].model.config, settings, schedule)

    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.logged: list[list[float]] = []
            self.batches: list[Any] = []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, _: int) -> None:
            metrics = trainer.callback_metrics
            self.batches.append(batch)
            self.logged.append([float(metrics[name]) for name in ("lr-AdamW", "lr-Muon")])

    torch.manual_seed(1)
    fitted, rates = module(), Rates()
    model, start = copy.deepcopy(fitted.model), copy.deepcopy(fitted.model.state_dict())
    fit = trainer(tmp_path, max_steps=6, callbacks=[rates], limit_val_batches=0)
    fit.fit(fitted, build(corpus, tmp_path / "cache")[1])
    optimizer = build_optimizer(model, settings)
    for step, batch in enumerate(rates.batches):
        factor = learning_rate_factor(step, schedule, 6)
        assert rates.logged[step] == pytest.approx([0.01 * factor, 0.04 * factor])
        for group, peak in zip(optimizer.param_groups, (0.01, 0.01, 0.04)):
            group["lr"] = peak * factor
        optimizer.zero_grad()
        model(batch.input_ids, batch.targets, document_ids=batch.document_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    # Muon's bfloat16 makes much of the last bits of a gradient.
    for name, tensor in fitted.model.state_dict().items():
        expected, change = model.state_dict()[name], model.state_dict()[name] - start[name]
        assert (tensor - expected).norm() < 0.1 * change.norm(), name


class Gradients(pl.Callback):
    """Whether there are any when a forward pass begins, by micro-batch, and in the end of a batch."""

    def __init__(self) -> None:
        self.before: list[bool] = []
        self.after: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.before.append(any(p.grad is not None for p in pl_module.parameters()))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.after.append(any(p.grad is not None for p in pl_module.parameters()))


def test_no_forward_pass_holds_the_gradients_of_a_step_that_was_taken(corpus: Path, tmp_path: Path) -> None:
    """Within a step they are kept, and callbacks see them at its end."""
    module, datamodule = build(corpus, tmp_path / "cache")
    gradients = Gradients()
    trainer(
        tmp_path, max_steps=2, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[gradients]
    ).fit(module, datamodule)
    assert gradients.before == [False, True, True] * 2
    assert gradients.after == [True] * 6


class Clipped(pl.Callback):
    """The gradients of a step, made one long together, before and after they are clipped."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.parameters()]
        factor = 1.0 / float(torch.nn.utils.get_total_norm(gradients))
        self.before = [gradient.mul_(factor).clone() for gradient in gradients]
        self.versions = [gradient._version for gradient in gradients]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.after = [p.grad for p in pl_module.parameters()]


@pytest.mark.parametrize("limit", [0.5, 2.0])
def test_gradients_are_clipped_as_by_pytorch(corpus: Path, tmp_path: Path, limit: float) -> None:
    module, datamodule = build(corpus, tmp_path / "cache")
    seen = Clipped()
    trainer(tmp_path, max_steps=1, gradient_clip_val=limit, callbacks=[seen]).fit(module, datamodule)
    expected = [torch.nn.Parameter(gradient) for gradient in seen.before]
    for parameter, gradient in zip(expected, seen.before):
        parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_(expected, limit)
    torch.testing.assert_close(seen.after, [parameter.grad for parameter in expected])


class Fails(pl.Callback):
    """After the others have seen the step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise OSError("disk full")


class Own(GPTLightningModule):
    """A user's, whose hook does not call the one that it replaces."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("with_throughput", [True, False])
def test_loggers_get_one_row_a_logging_step(corpus: Path, tmp_path: Path, with_throughput: bool) -> None:
    """Also of a step that ends the run; a second run of the module begins with nothing of the first."""
    module, datamodule = build(corpus, tmp_path / "cache")
    module.__class__ = Own
    callbacks = [Throughput()] if with_throughput else []
    options: dict[str, Any] = {"log_every_n_steps": 2, "limit_val_batches": 0}
    for number, last in enumerate((6, 3), start=1):
        logger = pl.loggers.CSVLogger(tmp_path, name="", version=str(number))
        fit = trainer(tmp_path, logger=logger, callbacks=[*callbacks, Fails(last)], **options)
        with pytest.raises(OSError, match="disk full"):
            fit.fit(module, datamodule)
        rows = list(csv.DictReader((tmp_path / str(number) / "metrics.csv").open()))
        assert [int(row["step"]) for row in rows] == list(range(2, last + 1, 2))
        assert all(bool(row["train/loss"]) for row in rows)
        assert all(bool(row.get("throughput/mfu")) == with_throughput for row in rows)


def test_an_interrupted_step_leaves_nothing_for_the_next_run(corpus: Path, tmp_path: Path) -> None:
    module, datamodule = build(corpus, tmp_path / "cache")

    class Interrupts(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise OSError("in the middle of a step")

    with pytest.raises(OSError, match="in the middle"):
        trainer(tmp_path, accumulate_grad_batches=2, callbacks=[Interrupts()]).fit(module, datamodule)
    recorder = Recorder()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    trainer(tmp_path, max_steps=1, callbacks=[recorder]).fit(module, datamodule)
    for parameter, value in zip(module.parameters(), before):
        parameter.data.copy_(value)
    loss = module.model(recorder.batches[0].input_ids, recorder.batches[0].targets).loss
    assert recorder.logged[0]["train/loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_step_that_scores_nothing_has_no_gradient(tmp_path: Path) -> None:
    """Of six batches for five windows the last is empty, and in epochs of three it is a step of its own."""
    (tmp_path / "text.txt").write_text("abcdefghijklm" * 3)  # 40 tokens with the eos
    datamodule = TextDataModule(
        train_files=str(tmp_path / "text.txt"),
        tokenizer="bytes",
        seq_len=8,
        batch_size=1,
        val_fraction=0,
        cache_dir=str(tmp_path / "cache"),
    )
    module = GPTLightningModule(GPTConfig(datamodule.vocab_size, 8, n_layers=1, n_heads=1, d_model=4))
    limits = {"max_epochs": 4, "max_steps": -1, "limit_train_batches": 3, "accumulate_grad_batches": 2}
    fit = trainer(tmp_path, callbacks=[FiniteGuard()], **limits)
    fit.fit(module, datamodule)
    assert fit.global_step == 8  # two of an epoch, the second of which scores nothing
    assert all(parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_interrupted_evaluation_leaves_nothing_for_the_next(
    corpus: Path, tmp_path: Path, verb: str
) -> None:
    other = tmp_path / corpus.with_stem("other").name
    other.write_bytes(corpus.read_bytes() * 2)  # the same text as in training would be refused
    module, datamodule = build(corpus, tmp_path / "cache", test_files=[str(other)])

    class Interrupts(pl.Callback):
        def on_validation_batch_end(self, *_: Any) -> None:
            raise OSError("in the middle of an evaluation")

        on_test_batch_end = on_validation_batch_end

    (whole,) = getattr(trainer(tmp_path), verb)(module, datamodule, verbose=False)
    with pytest.raises(OSError, match="in the middle"):
        getattr(trainer(tmp_path, callbacks=[Interrupts()]), verb)(module, datamodule, verbose=False)
    (again,) = getattr(trainer(tmp_path), verb)(module, datamodule, verbose=False)
    assert again == whole


def test_batches_that_do_not_say_what_their_step_scores_weigh_alike(tmp_path: Path) -> None:
    """With a loader of one's own: the gradient is that of the mean of their means, as Lightning has it."""
    ids = torch.arange(16).view(2, 8)
    batches = [TokenBatch(ids, torch.where(torch.arange(8) < n, ids, -100), None) for n in (5, 2)]
    module = GPTLightningModule(GPTConfig(16, 8, n_layers=1, n_heads=2, d_model=8))
    before = copy.deepcopy(module.model)
    recorder = Recorder()
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    options = {"max_steps": 1, "limit_val_batches": 0, "accumulate_grad_batches": 2}
    trainer(tmp_path, callbacks=[recorder], **options).fit(module, loader)
    losses = [before(batch.input_ids, batch.targets, reduction="sum").loss for batch in batches]
    assert module.step.tokens == 14
    assert recorder.logged[0]["train/loss"] == pytest.approx(float(sum(losses)) / 14, abs=1e-5)
    ((losses[0] / 10 + losses[1] / 4) / 2).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in before.parameters() if p.grad is not None])
    assert recorder.logged[0]["train/grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_a_batch_moves_to_a_device() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = TokenBatch(ids, ids, None, step_tokens=6)
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, TokenBatch) and moved.document_ids is None and moved.step_tokens == 6
    assert moved.input_ids.device.type == moved.targets.device.type == "meta"


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_is_that_of_a_plain_loop_at_any_batch_size(
    corpus: Path, tmp_path: Path, batch_size: int
) -> None:
    module, datamodule = build(corpus, tmp_path / "cache", batch_size=batch_size)
    metrics = trainer(tmp_path).validate(module, datamodule, verbose=False)[0]

    tokens = torch.from_numpy(held_out_tokens(datamodule).astype("int64"))
    inputs = torch.cat([tokens[-1:], tokens[:-1]])  # a document starts after an eos; the split ends with one
    nll = 0.0
    module.model.eval()
    for start in range(0, len(tokens), SEQ_LEN):
        logits = module.model(inputs[None, start : start + SEQ_LEN]).logits[0].double()
        nll += float(F.cross_entropy(logits, tokens[start : start + SEQ_LEN], reduction="sum"))
    assert metrics["val/loss"] == pytest.approx(nll / len(tokens), abs=1e-6)
    assert metrics["val/ppl"] == pytest.approx(math.exp(nll / len(tokens)), rel=1e-6)
    n_tokens, n_bytes = datamodule.split_counts("val")
    assert n_tokens == len(tokens)
    text = datamodule.text_tokenizer.decode(
        [t for t in tokens.tolist() if t != datamodule.text_tokenizer.eos_token_id]
    )
    assert n_bytes == len(text.encode())
    assert metrics["val/bpb"] == pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6)


class OneBatch(pl.LightningDataModule):
    """Loaders of somebody's own, of four batches."""

    def val_dataloader(self) -> Any:
        ids = torch.arange(4 * 2 * SEQ_LEN).view(4, 2, SEQ_LEN) % 300
        return torch.utils.data.DataLoader([TokenBatch(row, row, None) for row in ids], batch_size=None)

    test_dataloader = val_dataloader


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("limit", [1, 0.5, 3, 1.0, 1000])
@pytest.mark.parametrize("own_loader", [False, True])
def test_what_is_taken_of_a_part_of_the_held_out_text_says_so(
    own_loader: bool, limit: float, split: str, corpus: Path, tmp_path: Path
) -> None:
    module, text = build(corpus, tmp_path / "cache", batch_size=5)
    data = OneBatch() if own_loader else text
    n_batches = 4 if own_loader else len(text.val_dataloader())
    run = trainer(tmp_path, **{f"limit_{split}_batches": limit})
    (metrics,) = (run.validate if split == "val" else run.test)(module, data, verbose=False)
    n_done = int(limit * n_batches) if isinstance(limit, float) else min(limit, n_batches)
    if n_done == n_batches:
        assert f"{split}/share" not in metrics
    else:
        n_tokens = 4 * 2 * SEQ_LEN if own_loader else text.split_counts("val")[0]
        rows = 2 if own_loader else 5
        assert metrics[f"{split}/share"] == pytest.approx(n_done * rows * SEQ_LEN / n_tokens)


def held_out_tokens(datamodule: TextDataModule) -> Any:
    """The held-out split as it lies in the cache file."""
    import numpy as np

    (path,) = Path(datamodule.cache_dir).glob("tokens-*/val.tokens.bin")
    return np.fromfile(path, dtype=np.uint16)


def test_a_fresh_model_is_as_good_as_a_guess(corpus: Path, tmp_path: Path) -> None:
    module, datamodule = build(corpus, tmp_path / "cache")
    loss = trainer(tmp_path).validate(module, datamodule, verbose=False)[0]["val/loss"]
    assert abs(loss - math.log(datamodule.vocab_size)) < 0.1


class OwnOptimizer(GPTLightningModule):
    """A subclass with two groups of its own, of AdamW's or of another optimizer's."""

    kind: Any = torch.optim.AdamW

    def configure_optimizers(self) -> Any:
        first, *others = self.parameters()
        groups = [{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.25, "weight_decay": 0.75}]
        optimizer = self.kind(groups, lr=0.1)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_resumed_run_leaves_a_subclass_its_own_optimizer(kind: Any, corpus: Path, tmp_path: Path) -> None:
    config = build(corpus, tmp_path / "cache")[0].model.config
    path, saved = tmp_path / "m.ckpt", []
    for steps in (2, 3):
        module, datamodule = OwnOptimizer(config), build(corpus, tmp_path / "cache")[1]
        module.kind = kind
        fit = trainer(tmp_path, max_steps=steps, limit_val_batches=0)
        fit.fit(module, datamodule, ckpt_path=path if saved else None, weights_only=True)
        fit.save_checkpoint(path)
        saved.append(torch.load(path, weights_only=True))
    (one,), (other,) = (state["optimizer_states"] for state in saved)
    assert [group["lr"] for group in one["param_groups"]] == [0.5, 0.25]
    assert one["param_groups"] == other["param_groups"]
    assert saved[0]["lr_schedulers"][0]["base_lrs"] == saved[1]["lr_schedulers"][0]["base_lrs"] == [0.5, 0.25]


def test_the_module_reloads_from_plain_scalars(corpus: Path, tmp_path: Path) -> None:
    module, datamodule = build(corpus, tmp_path / "cache")
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(module, datamodule)
    fit.save_checkpoint(tmp_path / "m.ckpt")
    again = GPTLightningModule.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert again.model.config == module.model.config
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_an_unknown_compiler_is_refused() -> None:
    with pytest.raises(ValueError, match="model.compile_backend='nonsense' is unknown; choose inductor"):
        GPTLightningModule(GPTConfig(16, 8, n_layers=1, n_heads=1, d_model=8), compile_backend="nonsense")


def test_saved_settings_are_plain(corpus: Path, tmp_path: Path, tiny_config: Callable[..., Path]) -> None:
    module, _ = build(corpus, tmp_path / "cache")

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list):
            return all(plain(item) for item in value)
        return value is None or type(value) in (bool, int, float, str)

    assert plain(dict(module.hparams))
