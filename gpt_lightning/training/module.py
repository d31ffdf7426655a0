"""Tells Lightning what a step of training, validation or prediction does with a batch."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import Self, override

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    ORIGIN_KEY,
    VALIDATION_KEY,
    VERSION,
    VERSION_KEY,
    check_same_architecture,
)
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch, rank_and_ranks
from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.data.windows import IGNORED_TARGET
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.kernels.device import keep_freed_memory
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.parallel.plan import ParallelStyle
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.compilation import check_backend, compile_blocks
from gpt_lightning.training.metrics import OptimizerStep, StepRow, TokenLoss
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    keep_settings,
)
from gpt_lightning.training.prediction import CompletionCallback, predicted_rows
from gpt_lightning.training.sharding import tensor_parallel_plan
from gpt_lightning.training.trainer import has_logged, is_logging_step


class GPTLightningModule(LightningModule):
    """Trains, validates and samples a GPTModel.

    Args:
        config: The architecture.
        optimizer: AdamW's settings.
        schedule: The learning rate over time.
        activation_checkpointing: Recompute each block in the backward pass, not keep its activations.
        compile_backend: Train through torch.compile, block by block, with this backend; `none` turns it off.
            Left out, it is inductor on a GPU with Triton, in runs of 2000 micro-batches and more.
    """

    def __init__(
        self,
        config: GPTConfig = GPTConfig(),
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        activation_checkpointing: bool = False,
        compile_backend: str | None = None,
    ) -> None:
        super().__init__()
        # `load_from_checkpoint` gives the plain dictionaries that the checkpoint holds.
        config = GPTConfig(**config) if isinstance(config, dict) else config
        self.optimizer = OptimizerConfig(**optimizer) if isinstance(optimizer, dict) else optimizer
        self.schedule = ScheduleConfig(**schedule) if isinstance(schedule, dict) else schedule
        self.save_hyperparameters(
            {
                "config": asdict(config),
                "optimizer": {**asdict(self.optimizer), "betas": list(self.optimizer.betas)},
                "schedule": asdict(self.schedule),
                "activation_checkpointing": activation_checkpointing,
                "compile_backend": compile_backend,
            }
        )
        self.model = GPTModel(config, activation_checkpointing)
        self.n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        check_backend(compile_backend)
        self.compile_backend = compile_backend
        self.generation = GenerationConfig()
        self.held_out_loss = TokenLoss()
        self.step_row = StepRow()
        self.trained_tokens = 0  # scored by all ranks in this process's optimizer steps
        self._replicas = 1
        self.step = OptimizerStep()  # which is under way
        self.begun_from: str | None = None  # the model whose weights the run began with
        self._last_validation: dict[str, Any] | None = None  # step, loss, and whether of all the text

    # Training

    @override
    def on_fit_start(self) -> None:
        # An interrupted run may have left some of a step, and a callback that writes its row.
        self.step, self.step_row = OptimizerStep(), StepRow()
        if self.device.type == "cpu":
            keep_freed_memory()

    @override
    def on_train_start(self) -> None:
        self._replicas = rank_and_ranks(self.trainer)[1]
        compile_blocks(self.model.blocks, self.trainer, self.compile_backend)

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Returns the batch's part of the mean over all tokens that the optimizer step scores."""
        nll = self._nll(batch)
        # Lightning divides the loss by the number of micro-batches, DDP the gradients by that of replicas.
        parts = self._replicas * self.trainer.accumulate_grad_batches
        if batch.step_tokens is not None:
            self.step.tokens, share = batch.step_tokens, batch.step_tokens / parts
        else:  # of a loader of somebody's own: ranks and micro-batches weigh alike, as Lightning has it
            share = max(1, int(_scored_tokens(batch)))
            self.step.tokens += self._replicas * share
        self.step.nlls.append(nll.detach())
        if batch.sample_ids is not None:
            self.step.sample_ids.append(batch.sample_ids)
        return (nll / share).float()

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step, self.step = self.step, OptimizerStep()
        self.trained_tokens += step.tokens
        if is_logging_step(self.trainer, self.trainer.global_step + 1):
            nll = sum(step.nlls, torch.zeros((), device=self.device))
            if self._replicas > 1:
                nll = self.trainer.strategy.reduce(nll, reduce_op="sum")
            self._log_step(nll / step.tokens, optimizer)

    def _log_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        values = {
            "train/loss": loss,
            "train/ppl": loss.exp(),
            "train/grad_norm": self._gradient_norm(),
            "lr-AdamW": optimizer.param_groups[0]["lr"],
            "epoch": self._epoch(),
        }
        self.step_row.add(self.trainer, values, progress_bar=("train/loss",))
        if not self.step_row.is_shared:
            self.step_row.write(self.trainer, self.trainer.global_step + 1)

    def _gradient_norm(self) -> Tensor:
        if isinstance(self.trainer.strategy, TensorParallelDDPStrategy):
            return self.trainer.strategy.gradient_norm(self.parameters())
        return norm(p.grad for p in self.parameters() if p.grad is not None)

    @override
    def on_train_batch_end(self, outputs: Any, batch: TokenBatch, batch_idx: int) -> None:
        if not self.step.nlls:  # a step was taken
            # Lightning keeps the gradients through the next forward pass, and so raises its peak of memory.
            self.trainer.optimizers[0].zero_grad()
        # What others log with `self.log` would be put one step early.
        if is_logging_step(self.trainer, self.trainer.global_step) and has_logged(self.trainer):
            self.log("step", float(self.trainer.global_step))

    def _epoch(self) -> float:
        """Counts the epochs trained, with the fraction of this one; Lightning would log whole ones."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch + done / self.trainer.num_training_batches

    def _nll(self, batch: TokenBatch) -> Tensor:
        """Sums the negative log-likelihood of the batch's targets."""
        output = self.model(batch.input_ids, batch.targets, reduction="sum", document_ids=batch.document_ids)
        return output.loss

    # Validation and test

    @override
    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.held_out_loss.update(self._nll(batch), _scored_tokens(batch))

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_held_out("val")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))  # else Lightning puts them one step early
            self.log("epoch", self._epoch())

    @override
    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def _log_held_out(self, split: str) -> None:
        """Logs loss per token, perplexity, and bits per byte by the split's own number of bytes per token."""
        held_out, self.held_out_loss = self.held_out_loss, TokenLoss()
        loss = held_out.compute(self.trainer.strategy)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            limit = self.trainer.limit_val_batches
            whole = isinstance(limit, float) and limit == 1.0  # 1 is one batch
            self._last_validation = {"step": self.trainer.global_step, "loss": float(loss), "whole": whole}
        self.log(f"{split}/loss", loss, prog_bar=True)
        self.log(f"{split}/ppl", loss.exp())
        if isinstance(self.trainer.datamodule, TextDataModule):  # others do not know their bytes
            n_tokens, n_bytes = self.trainer.datamodule.split_counts(split)
            self.log(f"{split}/bpb", loss / math.log(2) * n_tokens / n_bytes)

    # Prediction

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Returns a dictionary a completion, in prompt order; tells CompletionCallbacks when one ends."""
        datamodule = self.trainer.datamodule
        if datamodule is None:
            raise UserError("predict needs a tokenizer; give datamodule=TextDataModule(...), not a loader")
        tokenizer: TextTokenizer = datamodule.text_tokenizer
        listeners = [each for each in self.trainer.callbacks if isinstance(each, CompletionCallback)]
        n_rows = max(1, min(datamodule.batch_size, len(batch.token_ids) * self.generation.num_samples))
        model = packed(self.model, quantize=self.generation.quantize, n_rows=n_rows)
        # Lengths change with every token, and each would be compiled anew.
        with torch.compiler.set_stance("force_eager"):
            engine = self._engine(model, self.generation, tokenizer, n_rows)
            return predicted_rows(engine, batch, self.generation, tokenizer, listeners)

    def complete(self, tokenizer: TextTokenizer, prompts: list[list[int]]) -> list[str]:
        """Returns one continuation of each tokenized prompt, by the `generation` settings."""
        settings = replace(self.generation, num_samples=1)
        texts = [TextStream(tokenizer, settings.stop) for _ in prompts]
        requests = [Request(prompt, n, ends_with=texts[n].add) for n, prompt in enumerate(prompts)]
        with torch.compiler.set_stance("force_eager"):
            self._engine(self.model, settings, tokenizer, len(prompts)).complete(requests)
        return [text.end() for text in texts]

    def _engine(
        self, model: GPTModel, settings: GenerationConfig, tokenizer: TextTokenizer, n_rows: int
    ) -> Engine:
        eos = tokenizer.eos_token_id
        return Engine(model, settings, eos_token_id=eos, batch_size=n_rows, broadcast=self._broadcast)

    def _broadcast(self, tokens: Tensor) -> Tensor:
        """Takes the first tensor-parallel peer's tokens: with different ones the peers would deadlock."""
        if self._trainer is not None and isinstance(self.trainer.strategy, TensorParallelDDPStrategy):
            return self.trainer.strategy.mesh.from_first_peer(tokens)
        return tokens

    # Tensor parallelism

    def tensor_parallel_plan(self) -> dict[str, ParallelStyle]:
        return tensor_parallel_plan(self.model.config)

    # Optimizer and checkpoint

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self.model, self.optimizer)
        scheduler = build_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @classmethod
    @override
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads as Lightning does, but plain data alone: no code of the file, or that it names, runs."""
        if hparams_file is not None or weights_only is False:
            raise UserError("load_from_checkpoint reads plain data; leave out hparams_file and weights_only")
        Checkpoint.open(Path(checkpoint_path), may_be_sharded=False)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, strict=strict, weights_only=True, **kwargs
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps this run's optimizer settings: PyTorch would restore those of the run that saved."""
        check_same_architecture(self.model.config, checkpoint)
        self.begun_from = checkpoint.get(ORIGIN_KEY)
        self._last_validation = checkpoint.get(VALIDATION_KEY)
        keep_settings(self.optimizer, checkpoint)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {VERSION_KEY: VERSION, CONFIG_KEY: asdict(self.model.config)}
        for key, value in ((ORIGIN_KEY, self.begun_from), (VALIDATION_KEY, self._last_validation)):
            if value is not None:
                checkpoint[key] = value


def _scored_tokens(batch: TokenBatch) -> Tensor:
    return (batch.targets != IGNORED_TARGET).sum()
