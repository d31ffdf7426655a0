"""A GPTLightningModule of one's own, and one in a script: what it may override, and who opens its file."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

from gpt_lightning.callbacks.exact_resume import ExactResume
from gpt_lightning.callbacks.finite_guard import FiniteGuard, NonFiniteError
from gpt_lightning.callbacks.initial_weights import InitialWeights
from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
from gpt_lightning.callbacks.text_samples import TextSamples
from gpt_lightning.callbacks.throughput import Throughput
from gpt_lightning.checkpoint.checkpoint import Checkpoint, load_model
from gpt_lightning.checkpoint.contents import MODULE_KEY
from gpt_lightning.checkpoint.io import DurableCheckpointIO
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch, token_batch
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig, learning_rate_factor
from gpt_lightning.training.saving import check_arguments
from gpt_lightning.training.trainer import GPTTrainer
from tests.distributed import run_ranks

SIZES: dict[str, int] = {"n_layers": 1, "n_heads": 2, "d_model": 8}
SCHEDULE = ScheduleConfig(warmup_steps=0)


def config(vocab_size: int = 257, **options: Any) -> GPTConfig:
    return GPTConfig(vocab_size, 8, **{**SIZES, **options})


def text(corpus: Path, folder: Path) -> TextDataModule:
    options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 8, "batch_size": 2}
    return TextDataModule(train_files=[str(corpus)], cache_dir=str(folder / "cache"), **options)


def trainer(folder: Path, kind: type[pl.Trainer] = GPTTrainer, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, RunCheckpoint) for each in options.get("callbacks", [])),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return kind(**{**settings, **options})


def everything(folder: Path) -> list[pl.Callback]:
    saver = RunCheckpoint(str(folder / "run"), monitor=None)
    return [FiniteGuard(), ExactResume(), Throughput(), TextSamples(), saver]


class OwnStep(GPTLightningModule):
    """Computes its loss by itself, as Lightning's documentation does."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        logits = self(batch.input_ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        self.log("my/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(0.5))


@pytest.mark.parametrize("kind", [GPTTrainer, pl.Trainer])
def test_an_own_training_step_trains_with_every_callback(
    kind: type[pl.Trainer], corpus: Path, tmp_path: Path
) -> None:
    """What it does not compute is not logged: no loss of ours, no NaN in the place of its own."""
    module = OwnStep(config(), schedule=SCHEDULE)
    options = {"accumulate_grad_batches": 2, "val_check_interval": 4}
    fit = trainer(tmp_path, kind, callbacks=everything(tmp_path), **options)
    fit.fit(module, text(corpus, tmp_path))
    logged = fit.logged_metrics
    assert 5 < float(logged["my/loss"]) < 6 and float(logged["val/loss"]) == 0.5
    assert float(logged["train/grad_norm"]) > 0
    assert "train/loss" not in logged and "val/ppl" not in logged
    assert float(logged["throughput/tokens_per_second"]) > 0


def test_an_own_training_step_accumulates(tmp_path: Path) -> None:
    """The step is that of the mean of its micro-batches, as Lightning has it."""
    ids = torch.arange(64).view(4, 16) % 13
    batches = [TokenBatch(rows[:, :8], rows[:, 1:9]) for rows in (ids[:2], ids[2:])]
    torch.manual_seed(0)
    module = OwnStep(config(13), OptimizerConfig(learning_rate=0.1), SCHEDULE)
    expected = GPTLightningModule(config(13)).model
    expected.load_state_dict(module.model.state_dict())
    sum(expected(*batch[:2]).loss / 2 for batch in batches).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in expected.parameters() if p.grad is not None])
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0, accumulate_grad_batches=2)
    fit.fit(module, DataLoader(batches, batch_size=None))
    assert float(fit.logged_metrics["train/grad_norm"]) == pytest.approx(float(norm), rel=1e-5)


class NanStep(GPTLightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(batch.input_ids, batch.targets).loss * (float("nan") if batch_idx == 1 else 1.0)


class Plain(pl.LightningModule):
    """Somebody's, that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch.input_ids.float()).mean() * (float("inf") if batch_idx == 1 else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("kind", [GPTTrainer, pl.Trainer])
@pytest.mark.parametrize("make", [lambda: NanStep(config(), schedule=SCHEDULE), Plain])
def test_the_guard_sees_the_loss_of_any_module(
    make: Any, kind: type[pl.Trainer], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is not finite \(samples 2-3\)"):
        trainer(tmp_path, kind, callbacks=[FiniteGuard()]).fit(make(), text(corpus, tmp_path))


class NoSuper(GPTLightningModule):
    """Overrides hooks and calls none of ours."""

    def on_fit_start(self) -> None: ...

    def on_train_start(self) -> None: ...

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None: ...

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None: ...

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None: ...


def test_hooks_that_do_not_call_ours_change_neither_training_nor_tokens(corpus: Path, tmp_path: Path) -> None:
    weights = []
    for kind in (GPTLightningModule, NoSuper):
        torch.manual_seed(1)
        module = kind(config(), schedule=SCHEDULE)
        fit = trainer(tmp_path, callbacks=[Throughput()], max_steps=3, accumulate_grad_batches=2)
        fit.fit(module, text(corpus, tmp_path))
        assert len(module.step.nlls) <= 2
        assert float(fit.logged_metrics["throughput/tokens_per_second"]) > 0
        weights.append(module.state_dict())
    assert all(torch.equal(*pair) for pair in zip(*(each.values() for each in weights)))


class OwnStart(GPTLightningModule):
    def on_validation_epoch_start(self) -> None: ...


def test_a_validation_counts_nothing_of_the_one_before(tmp_path: Path) -> None:
    """Also where the hook that begins it is another one."""
    module = OwnStart(config(13), OptimizerConfig(learning_rate=0.1), SCHEDULE)
    loader = DataLoader(pairs(), batch_size=2)
    fit = trainer(tmp_path, max_steps=3, val_check_interval=1, limit_val_batches=1.0)
    fit.fit(module, loader, loader)
    nll = sum(float(module.model(*pair, reduction="sum").loss) for pair in DataLoader(pairs(), batch_size=8))
    assert float(fit.callback_metrics["val/loss"]) == pytest.approx(nll / 64, abs=1e-5)


IDS = torch.arange(18).view(2, 9)


def pairs() -> TensorDataset:
    ids = torch.arange(8 * 9).view(8, 9) % 13
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def dictionaries() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": inputs, "targets": targets} for inputs, targets in pairs()]


def batches() -> list[TokenBatch]:
    return [TokenBatch(inputs[None], targets[None]) for inputs, targets in pairs()]


@pytest.mark.parametrize("kind", [GPTTrainer, pl.Trainer])
@pytest.mark.parametrize("dataset, batch_size", [(pairs(), 2), (dictionaries(), 2), (batches(), None)])
def test_plain_loaders_train_and_validate(
    dataset: Any, batch_size: int | None, kind: type[pl.Trainer], tmp_path: Path
) -> None:
    loader = DataLoader(dataset, batch_size=batch_size)
    module = GPTLightningModule(config(13), OptimizerConfig(learning_rate=0.01), SCHEDULE)
    fit = trainer(tmp_path, kind, callbacks=everything(tmp_path), limit_val_batches=1.0, val_check_interval=1)
    fit.fit(module, loader, loader)
    nll = sum(float(module.model(*pair, reduction="sum").loss) for pair in DataLoader(pairs(), batch_size=8))
    assert float(fit.logged_metrics["val/loss"]) == pytest.approx(nll / 64, abs=1e-5)
    assert float(fit.logged_metrics["throughput/tokens_per_second"]) > 0
    assert trainer(tmp_path, kind).test(module, loader, verbose=False)[0]["test/ppl"] > 1


def test_a_batch_of_another_kind_is_refused_in_one_line(tmp_path: Path) -> None:
    loader = DataLoader([{"input_ids": torch.zeros(8), "labels": torch.zeros(8)}])
    with pytest.raises(UserError, match="a batch holds input_ids, labels; give input_ids and targets"):
        trainer(tmp_path).fit(GPTLightningModule(config()), loader)


@pytest.mark.parametrize(
    "batch, problem",
    [
        ((IDS, IDS[:, 1:]), r"input_ids \(2, 9\) of torch.int64 and targets \(2, 8\) of"),
        ((IDS[0], IDS[0]), r"input_ids \(9,\) of torch.int64"),
        ((IDS, IDS.float()), r"targets \(2, 9\) of torch.float32"),
        (TokenBatch(IDS.byte(), IDS), r"input_ids \(2, 9\) of torch.uint8"),
    ],
)
def test_a_batch_whose_targets_are_not_those_of_its_ids_is_refused(batch: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        token_batch(batch)


@pytest.mark.parametrize(
    "size, problem",
    [
        ({"max_position_embeddings": 7}, "data.seq_len=8 is over max_position_embeddings=7 of the model"),
        ({"vocab_size": 256}, "vocab_size=256 of the model's config is under the 257 ids of data.tok"),
    ],
)
def test_a_model_that_cannot_take_the_text_is_refused(
    size: dict[str, int], problem: str, corpus: Path, tmp_path: Path
) -> None:
    module = GPTLightningModule(replace(config(257), **size))
    with pytest.raises(UserError, match=problem):
        trainer(tmp_path).fit(module, text(corpus, tmp_path))


def test_a_model_of_which_all_is_frozen_is_refused(corpus: Path, tmp_path: Path) -> None:
    module = GPTLightningModule(config()).requires_grad_(False)
    with pytest.raises(UserError, match="has nothing to train, all of it is frozen; set requires_grad=True"):
        trainer(tmp_path).fit(module, text(corpus, tmp_path))


def test_the_module_is_called_as_its_model() -> None:
    module = GPTLightningModule(config())
    ids = torch.arange(6)[None]
    assert torch.equal(module(ids).logits, module.model(ids).logits)
    assert torch.equal(module(ids, ids).loss, module.model(ids, ids).loss)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_learning_rate_is_found_and_set(name: str, corpus: Path, tmp_path: Path) -> None:
    module = GPTLightningModule(config(), OptimizerConfig(name=name), SCHEDULE)
    fit = trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    finder = Tuner(fit).lr_find(module, datamodule=text(corpus, tmp_path), num_training=30, min_lr=1e-5)
    assert finder is not None and len(finder.results["lr"]) > 5
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    found = finder.suggestion()
    assert module.learning_rate == found == module.optimizer.learning_rate
    assert module.hparams["optimizer"]["learning_rate"] == found
    fit.fit(module, text(corpus, tmp_path))
    assert {group["initial_lr"] for group in fit.optimizers[0].param_groups} == {found}


def test_a_rate_that_is_set_is_that_of_all_groups() -> None:
    module = GPTLightningModule(config(), OptimizerConfig(name="muon", matrix_learning_rate=0.1))
    with pytest.warns(UserWarning, match="matrix_learning_rate=0.1 gives way to learning_rate=0.02"):
        module.learning_rate = 0.02
    assert module.optimizer == OptimizerConfig(0.02, name="muon")


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_a_learning_rate_that_is_found_by_the_run_itself_is_its_peak(corpus: Path, tmp_path: Path) -> None:
    """Lightning sets it when the schedule is there already, which would go back to its own one."""
    module, rates = GPTLightningModule(config(), schedule=SCHEDULE), Rates()
    finder = LearningRateFinder(num_training_steps=30, min_lr=1e-5)
    trainer(tmp_path, callbacks=[finder, rates], max_steps=8).fit(module, text(corpus, tmp_path))
    expected = [module.learning_rate * learning_rate_factor(step, SCHEDULE, 8) for step in range(8)]
    assert module.learning_rate != 6e-4 and rates.seen[-8:] == pytest.approx(expected)


def test_text_is_generated_after_a_fit_and_after_loading(corpus: Path, tmp_path: Path) -> None:
    module = GPTLightningModule(config(), schedule=SCHEDULE)
    with pytest.raises(UserError, match="the module has no tokenizer"):
        module.generate("the")
    fit = trainer(tmp_path)
    fit.fit(module, text(corpus, tmp_path))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    module.train()
    written = module.generate("the", max_new_tokens=5, temperature=0)
    assert written.startswith("the") and module.training
    again = GPTLightningModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.generate("the", max_new_tokens=5, temperature=0) == written
    with pytest.raises(UserError, match="generation.max_tokens is no setting"):
        module.generate("the", max_tokens=5)


class LoRA(torch.nn.Module):
    """Adds a product of two thin matrices to a linear layer."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.base.weight, self.base.bias) + self.up(self.down(x))


class WithLoRA(GPTLightningModule):
    def __init__(self, rank: int = 2, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.attn.qkv_proj = LoRA(block.attn.qkv_proj, rank)


class InPlace(torch.nn.Linear):
    """Keeps the names of the layer that it stands for."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.scale = torch.nn.Parameter(torch.full((base.out_features,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale


class WithInPlace(GPTLightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.attn.qkv_proj = InPlace(block.attn.qkv_proj)


class WithHead(GPTLightningModule):
    def __init__(self, config: GPTConfig = GPTConfig(), n_classes: int = 2, **options: Any) -> None:
        super().__init__(config, **options)
        self.save_hyperparameters()
        self.head = torch.nn.Linear(self.model.config.d_model, n_classes)


class WithHeadAndHooks(WithHead):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1


CHILDREN = [(WithLoRA, {"rank": 3}), (WithInPlace, {}), (WithHead, {"n_classes": 5}), (WithHeadAndHooks, {})]


@pytest.mark.parametrize("kind, options", CHILDREN)
def test_a_class_with_layers_of_its_own_is_trained_saved_loaded_and_resumed(
    kind: type[GPTLightningModule], options: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    module = kind(config=config(), schedule=SCHEDULE, **options)
    parts = {"callbacks": everything(tmp_path), "plugins": [DurableCheckpointIO()]}
    trainer(tmp_path, val_check_interval=1, **parts).fit(module, text(corpus, tmp_path))
    path = tmp_path / "run" / "last.ckpt"
    again = kind.load_from_checkpoint(path)
    assert {name: again.hparams[name] for name in options} == options
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert again.generate("the", max_new_tokens=4) == module.generate("the", max_new_tokens=4)
    parts = {"callbacks": everything(tmp_path), "plugins": [DurableCheckpointIO()]}
    resumed = trainer(tmp_path, max_steps=4, **parts)
    resumed.fit(kind(config=config(), schedule=SCHEDULE, **options), text(corpus, tmp_path), ckpt_path=path)
    assert resumed.global_step == 4
    trainer(tmp_path).validate(again, text(corpus, tmp_path), ckpt_path=path, verbose=False)


def saved(kind: type[GPTLightningModule], corpus: Path, folder: Path, **options: Any) -> Path:
    fit = trainer(folder, max_steps=1, limit_val_batches=0)
    fit.fit(kind(config=config(), schedule=SCHEDULE, **options), text(corpus, folder))
    fit.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.mark.parametrize("kind", [WithLoRA, WithInPlace])
def test_a_gpt_with_other_layers_is_no_gpt_to_others(
    kind: type[GPTLightningModule], corpus: Path, tmp_path: Path
) -> None:
    """Also where all that a GPT has is there: without the layers beside it, it would be another model."""
    path = saved(kind, corpus, tmp_path)
    with pytest.raises(UserError, match=rf"^ckpt_path=.* is of '.*{kind.__name__}'; use that .* unknown "):
        load_model(path)
    with pytest.raises(UserError, match="GPTLightningModule has other layers than these weights: .*; use"):
        GPTLightningModule.load_from_checkpoint(path)
    assert "\n" not in str(pytest.raises(UserError, load_model, path).value)


def test_what_lies_beside_the_gpt_is_left_out_with_a_word(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(WithHead, corpus, tmp_path)
    model, tokenizer = load_model(path)
    assert torch.equal(model.lm_head.weight, WithHead.load_from_checkpoint(path).model.lm_head.weight)
    assert "head.weight, head.bias" in caplog.text and "left out" in caplog.text


def test_hyper_parameters_that_no_checkpoint_may_hold_are_refused_when_they_are_saved() -> None:
    class Holds(GPTLightningModule):
        def __init__(self, loss: Any, explicit: bool) -> None:
            super().__init__(config(13))
            if explicit:
                self.save_hyperparameters()

    assert "loss" not in Holds(torch.nn.CrossEntropyLoss(), explicit=False).hparams
    refused = r"Holds: the hyper-parameter loss is a CrossEntropyLoss, .*ignore=\['loss'\]"
    with pytest.raises(UserError, match=refused):
        Holds(torch.nn.CrossEntropyLoss(), explicit=True)


@pytest.mark.parametrize("stored", [None, "lion", {"own": 1}])
def test_a_child_class_may_call_other_arguments_as_ours(stored: Any) -> None:
    contents = {"hyper_parameters": {"optimizer": stored}}
    check_arguments(Path("a"), {**contents, MODULE_KEY: "my_package.Mine"}, {"optimizer": OptimizerConfig})
    with pytest.raises(UserError, match="^ckpt_path=a holds hyper_parameters.optimizer=.*no OptimizerConfig"):
        check_arguments(Path("a"), contents, {"optimizer": OptimizerConfig})


def test_names_that_no_checkpoint_may_hold_are_refused(corpus: Path, tmp_path: Path) -> None:
    class Named(GPTLightningModule):
        def __init__(self, class_path: str = "a.B", options: Any = None) -> None:
            super().__init__(config())

    class Other(GPTLightningModule):
        def __init__(self, options: Any = None) -> None:
            super().__init__(config(), schedule=SCHEDULE)

    with pytest.raises(UserError, match=r"^Named: a checkpoint with hyper_parameters\['class_path'] "):
        Named()
    with pytest.raises(UserError, match=r"^Other: .* hyper_parameters.options\['init_args'] would"):
        Other({"init_args": 1})
    module = Other({"any": 1})
    module.hparams["later"] = {1, 2}
    fit = trainer(tmp_path, callbacks=everything(tmp_path), plugins=[DurableCheckpointIO()])
    with pytest.raises(UserError, match="^no checkpoint is saved, .* a set as hyper_parameters.later; keep"):
        fit.fit(module, text(corpus, tmp_path))
    assert not list(tmp_path.glob("run/*.ckpt"))


def test_a_class_without_an_optimizer_runs() -> None:
    class Idle(OwnStep):
        def configure_optimizers(self) -> Any:
            return None

    ids = torch.zeros(2, 8, dtype=torch.long)
    fit = trainer(Path(), max_steps=1)
    fit.fit(Idle(config(13)), DataLoader([TokenBatch(ids, ids)], batch_size=None))
    assert "my/loss" in fit.logged_metrics and not any(name.startswith("lr-") for name in fit.logged_metrics)


def test_a_tokenizer_of_ones_own_is_saved_with_plain_loaders(corpus: Path, tmp_path: Path) -> None:
    module = GPTLightningModule(config(257), schedule=SCHEDULE)
    module.tokenizer = text(corpus, tmp_path).text_tokenizer
    fit = trainer(tmp_path, callbacks=everything(tmp_path), val_check_interval=1)
    fit.fit(module, DataLoader(pairs(), batch_size=2), DataLoader(pairs(), batch_size=2))
    assert load_model(str(tmp_path / "run" / "last.ckpt"))[1].fingerprint == module.tokenizer.fingerprint
    again = GPTLightningModule.load_from_checkpoint(tmp_path / "run" / "last.ckpt")
    assert again.generate("a", max_new_tokens=3) == module.generate("a", max_new_tokens=3)


class OwnData(TextDataModule):
    pass


def test_a_child_class_of_the_datamodule_saves_a_tokenizer_too(corpus: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    datamodule = OwnData(train_files=[str(corpus)], tokenizer="bytes", seq_len=8, cache_dir=cache)
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(GPTLightningModule(config(), schedule=SCHEDULE), datamodule)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt")[1].fingerprint == datamodule.text_tokenizer.fingerprint


class Hooked(GPTLightningModule):
    """Changes what a layer gives by a hook."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.lm_head.register_forward_hook(lambda layer, inputs, output: output.flip(-1))


class Own(GPTLightningModule):
    """Changes what a block gives by another class."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for block in self.model.blocks:
            block.ln_1 = Doubled(block.ln_1)


class Doubled(torch.nn.Module):
    def __init__(self, base: torch.nn.LayerNorm) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * F.layer_norm(x, self.base.normalized_shape, self.base.weight)


@pytest.mark.parametrize("kind", [WithLoRA, WithInPlace, Hooked, Own])
def test_decoding_drops_nothing_of_other_layers(
    kind: type[GPTLightningModule], corpus: Path, tmp_path: Path
) -> None:
    """Weights are laid out anew for a CPU; `generate` computes with the model as it is."""
    torch.manual_seed(0)
    module = kind(config=config(d_model=16))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    datamodule = text(corpus, tmp_path)
    datamodule.prompts = ["the", "old garden"]
    module.generation = GenerationConfig(max_new_tokens=6, temperature=0)
    (rows,) = trainer(tmp_path).predict(module, datamodule)
    assert [row["prompt"] + row["completion"] for row in rows][:1] == [module.generate("the")]


def test_a_run_of_a_child_class_begins_with_the_weights_of_a_gpt(corpus: Path, tmp_path: Path) -> None:
    """Layers that keep the names take them; with other names nothing would be loaded, and that is said."""
    path = saved(GPTLightningModule, corpus, tmp_path)
    module = WithInPlace(config=config(), schedule=SCHEDULE)
    begin = InitialWeights("a.ckpt", Checkpoint.open(path).contents)
    trainer(tmp_path, callbacks=[begin], max_steps=0).fit(module, text(corpus, tmp_path))
    for name, tensor in load_model(path)[0].state_dict().items():
        assert torch.equal(module.model.state_dict()[name], tensor)
    begin = InitialWeights("a.ckpt", Checkpoint.open(path).contents)
    with pytest.raises(UserError, match=r"WithLoRA has no model.blocks.0.attn.qkv_proj.bias; let its layers"):
        trainer(tmp_path, callbacks=[begin]).fit(WithLoRA(config=config()), text(corpus, tmp_path))


class Dropping(GPTLightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch.input_ids, batch.targets).loss


class Waiting(Dropping):
    """Lowers its learning rate where a validation is no better, and asks between validations."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        parts = {"monitor": "val/loss", "interval": "step", "frequency": 3}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, **parts}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.tensor(0.5))


class Saves(pl.Callback):
    """Saves in a step, which is after its validation if it has one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved.ckpt")

    on_validation_end = on_train_batch_end


@pytest.mark.parametrize(
    "own, step, kind",
    [
        *((Dropping, 3, GPTTrainer), (Dropping, 3, pl.Trainer)),
        *((Waiting, 3, GPTTrainer), (Waiting, 6, pl.Trainer)),
    ],
)
def test_a_script_resumes_exactly_with_these_and_is_told_without(
    own: type[GPTLightningModule],
    step: int,
    kind: type[pl.Trainer],
    corpus: Path,
    tmp_path: Path,
    recwarn: pytest.WarningsRecorder,
) -> None:
    ended = []
    for callbacks, path in (
        ([*everything(tmp_path), Saves(step)], None),
        (everything(tmp_path), tmp_path / "saved.ckpt"),
        ([], tmp_path / "saved.ckpt"),
    )[: 3 if own is Dropping else 2]:  # Lightning alone has no metric to go on with
        torch.manual_seed(len(ended))
        module = own(config(dropout=0.2), schedule=SCHEDULE)
        if path is None:
            start = module.state_dict()
        module.load_state_dict(start)
        parts = {"callbacks": callbacks, "plugins": [DurableCheckpointIO()]}
        fit = trainer(tmp_path, kind, max_steps=8, val_check_interval=2, **parts)
        recwarn.clear()
        fit.fit(module, text(corpus, tmp_path), ckpt_path=path)
        told = [str(each.message) for each in recwarn if "ExactResume" in str(each.message)]
        assert len(told) == (len(callbacks) == 0)
        ended.append(torch.cat([tensor.flatten() for tensor in module.state_dict().values()]))
    assert torch.equal(ended[0], ended[1])
    assert not torch.equal(ended[0], ended[-1]) or own is Waiting


def test_what_cannot_go_on_exactly_is_said(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(Dropping, corpus, tmp_path)
    fit = trainer(tmp_path, callbacks=[ExactResume()])
    fit.fit(Dropping(config(), schedule=SCHEDULE), text(corpus, tmp_path), ckpt_path=path)
    assert "the checkpoint was saved without ExactResume" in caplog.text
    fit = trainer(tmp_path, callbacks=[ExactResume()], limit_val_batches=0)
    module = GPTLightningModule(config(13), schedule=SCHEDULE)
    fit.fit(module, DataLoader(pairs(), batch_size=2))
    fit.save_checkpoint(tmp_path / "plain.ckpt")
    fit = trainer(tmp_path, callbacks=[ExactResume()], max_steps=4, limit_val_batches=0)
    fit.fit(module, DataLoader(pairs(), batch_size=2), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    assert "without a TextDataModule no loader goes on where it was" in caplog.text


def fit_on_ranks(folder: str, tensor_parallel_size: int, batch_size: int) -> dict[str, Any]:
    torch.manual_seed(0)
    # Without biases: those of keys have no gradient but rounding, which Adam makes steps of.
    module = OwnStep(config(14, bias=False), OptimizerConfig(learning_rate=0.05), SCHEDULE)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    strategy = TensorParallelDDPStrategy(tensor_parallel_size) if tensor_parallel_size > 1 else "ddp"
    parts: dict[str, Any] = {"strategy": strategy, "devices": ranks} if ranks > 1 else {}
    parts["use_distributed_sampler"] = False
    callbacks = [FiniteGuard(), Throughput(), ExactResume(), RunCheckpoint(folder, monitor=None)]
    fit = trainer(Path(folder), callbacks=callbacks, max_steps=3, **parts)
    replicas = ranks // tensor_parallel_size
    rows = [*pairs()][int(os.environ.get("RANK", 0)) % replicas :: replicas]
    batches = [stacked(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    loader = DataLoader(batches, batch_size=None)
    fit.fit(module, loader, loader)
    found = {name: float(fit.logged_metrics[name]) for name in ("my/loss", "train/grad_norm")}
    fit.save_checkpoint(Path(folder) / "end.ckpt")
    return found


def stacked(rows: list[tuple[torch.Tensor, ...]]) -> TokenBatch:
    return TokenBatch(*(torch.stack(column) for column in zip(*rows)))


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel_size, batch_size", [(1, 1), (2, 2)])
def test_ranks_that_share_an_own_training_step_train_as_one(
    tensor_parallel_size: int, batch_size: int, tmp_path: Path
) -> None:
    expected = fit_on_ranks(str(tmp_path / "one"), 1, 2)
    for found in run_ranks(fit_on_ranks, 2, str(tmp_path / "two"), tensor_parallel_size, batch_size):
        assert found["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-4)
    one, two = (OwnStep.load_from_checkpoint(tmp_path / name / "end.ckpt") for name in ("one", "two"))
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two.state_dict()[name], atol=1e-5, rtol=1e-4)
