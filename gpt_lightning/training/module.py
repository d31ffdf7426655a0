"""The LightningModule: what a step of training, validation and prediction does with a batch."""

import math
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_
from typing_extensions import Self, override

from gpt_lightning.checkpoint.contents import (
    CONFIG_KEY,
    VALIDATION_KEY,
    check_own,
    check_same_architecture,
    read_checked,
)
from gpt_lightning.data.loader import TokenBatch, rank_and_ranks
from gpt_lightning.data.prompts import PromptBatch
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.data.windows import IGNORED_TARGET
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.engine import Engine, Request
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.generation.text_stream import TextStream
from gpt_lightning.kernels.device import keep_freed_memory, runs_ahead
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.sharding import tensor_parallel_plan
from gpt_lightning.parallel.gradients import norm
from gpt_lightning.parallel.plan import Cut
from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
from gpt_lightning.training.compilation import check_backend, compile_blocks
from gpt_lightning.training.metrics import TokenLoss
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    learning_rate_factor,
)
from gpt_lightning.training.prediction import CompletionCallback, predicted_rows
from gpt_lightning.training.step_metrics import StepRow, StepSums, is_logging_step

# Of which `_gradient_norm` is that of the whole gradient.
_KNOWN_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, TensorParallelDDPStrategy)


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
        # `load_from_checkpoint` hands back the plain dictionaries that the checkpoint holds.
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
        self._sums = StepSums()
        self._last_validation: dict[str, Any] | None = None  # step, loss, and whether of all the text
        self.trained_tokens: Tensor | int = 0  # scored by all ranks in this process's optimizer steps

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes every hook of a step, and nn.Module asks each time whether that is a parameter.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    # Training

    @override
    def on_fit_start(self) -> None:
        self._sums = StepSums()  # an interrupted run may have left some
        if self.device.type == "cpu":
            keep_freed_memory()

    @override
    def on_train_start(self) -> None:
        compile_blocks(self.model.blocks, self.trainer, self.compile_backend)

    @override
    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        nll, tokens = self._nll(batch)
        self._sums.add(nll.detach(), tokens, batch.targets.numel())
        # Divided by the places, a constant; `on_before_optimizer_step` turns that into the tokens scored.
        return (nll / self._sums.places).float()

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the gradient that of the mean over all tokens scored in this step, and log."""
        nll, tokens = self._sums.take()
        ranks = rank_and_ranks(self.trainer)[1]
        if ranks > 1:
            nll = self.trainer.strategy.reduce(nll, reduce_op="sum")
            tokens = self.trainer.strategy.reduce(tokens, reduce_op="sum")
        self.trained_tokens = self.trained_tokens + tokens  # on the device
        self._rescale_gradients(self._sums.places * ranks * self.trainer.accumulate_grad_batches, tokens)
        if is_logging_step(self.trainer, self.trainer.global_step + 1):
            self._log_step(nll / tokens, optimizer)

    def _rescale_gradients(self, places: int, tokens: Tensor) -> None:
        """From the mean over places (what the backward passes made) to the mean over scored tokens.

        The two differ where micro-batches hold padding: the end of an epoch. Lightning's division by
        accumulate_grad_batches is undone with it where limit_train_batches ends an epoch inside a step.
        """
        # Reading the number on an accelerator would make the host wait; multiplying by one is cheaper.
        if not runs_ahead(tokens.device) and int(tokens) == places:
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if gradients:  # else the step is left out
            torch._foreach_mul_(gradients, (places / tokens).float())

    def _log_step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        values = {
            "train/loss": loss,
            "train/ppl": loss.exp(),
            "train/grad_norm": self._gradient_norm(optimizer),
            "lr-AdamW": optimizer.param_groups[0]["lr"],
            "epoch": self._epoch(),
        }
        self.step_row.add(self.trainer, self.trainer.global_step + 1, values, progress_bar=("train/loss",))
        if not self.step_row.is_shared:
            self.step_row.write(self.trainer)

    @override
    def on_train_batch_end(self, outputs: Any, batch: TokenBatch, batch_idx: int) -> None:
        if not self._sums:  # a step was taken
            # Lightning drops them after the next forward pass, whose peak of memory would hold them too.
            for parameter in _parameters(self.trainer.optimizers[0]):
                parameter.grad = None
        # What others log with `self.log` would be put one step early.
        if is_logging_step(self.trainer, self.trainer.global_step) and self.trainer._results:
            self.log("step", float(self.trainer.global_step))

    @override
    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        # Most often `on_train_batch_end` has dropped them; to ask takes a fifth of the time of not asking.
        if any(parameter.grad is not None for parameter in _parameters(optimizer)):
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        plugin = self.trainer.precision_plugin
        is_plain = (
            gradient_clip_algorithm in (None, "norm")
            and type(self.trainer.strategy) in _KNOWN_STRATEGIES
            and type(plugin).clip_grad_by_norm is Precision.clip_grad_by_norm
        )
        if runs_ahead(self.device) or not is_plain or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        # PyTorch multiplies a gradient that is short enough by one: on a CPU 1 % of a step at 124M weights.
        length = self._gradient_norm(optimizer)
        if not length + 1e-6 <= gradient_clip_val:
            clip_grads_with_norm_(_parameters(optimizer), gradient_clip_val, length)

    def _gradient_norm(self, optimizer: torch.optim.Optimizer) -> Tensor:
        if isinstance(self.trainer.strategy, TensorParallelDDPStrategy):
            return self.trainer.strategy.gradient_norm(_parameters(optimizer))
        return norm(p.grad for p in _parameters(optimizer) if p.grad is not None)

    def _epoch(self) -> float:
        """As a fraction of the corpus, where Lightning would log whole ones."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch + done / self.trainer.num_training_batches

    def _nll(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Summed negative log-likelihood of the batch and the number of tokens it is summed over."""
        loss = self.model(
            batch.input_ids, batch.targets, reduction="sum", document_ids=batch.document_ids
        ).loss
        return loss, (batch.targets != IGNORED_TARGET).sum()

    # Validation and test

    @override
    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.held_out_loss.update(*self._nll(batch))

    @override
    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self.held_out_loss.update(*self._nll(batch))

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_held_out("val")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))  # where Lightning would put them one step early
            self.log("epoch", self._epoch())

    @override
    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def _log_held_out(self, split: str) -> None:
        """Loss per token, perplexity, and bits per byte by the split's own number of bytes per token."""
        loss = self.held_out_loss.compute()
        self.held_out_loss.reset()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            whole = self.trainer.limit_val_batches == 1.0
            self._last_validation = {"step": self.trainer.global_step, "loss": float(loss), "whole": whole}
        n_tokens, n_bytes = self.trainer.datamodule.split_counts(split)
        self.log(f"{split}/loss", loss, prog_bar=True)
        self.log(f"{split}/ppl", loss.exp())
        self.log(f"{split}/bpb", loss / math.log(2) * n_tokens / n_bytes)

    # Prediction

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A dictionary a completion, in prompt order; a CompletionCallback is told of each when it ends."""
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
        """One continuation of each tokenized prompt by the `generation` settings."""
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
        """The first tensor-parallel peer's choice: one other token, and the peers would wait for ever."""
        if self._trainer is not None and isinstance(self.trainer.strategy, TensorParallelDDPStrategy):
            return self.trainer.strategy.mesh.from_first_peer(tokens)
        return tokens

    # Tensor parallelism

    def tensor_parallel_plan(self) -> dict[str, Cut]:
        plan = tensor_parallel_plan(self.model.config)
        return {f"model.{name}": Cut(*sharding) for name, sharding in plan.items()}

    # Optimizer and checkpoint

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        horizon = self.trainer.estimated_stepping_batches
        if self.schedule.warmup_steps >= horizon:
            rank_zero_warn(
                f"model.schedule.warmup_steps={self.schedule.warmup_steps} is not below the {horizon} steps "
                "of this run: the learning rate never reaches its peak"
            )
        optimizer = build_optimizer(self.model, self.optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, self.schedule, horizon)
        )
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
        """Lightning's own, of plain data alone: nothing in the file runs, and nothing that it names."""
        if hparams_file is not None or weights_only is False:
            raise UserError("load_from_checkpoint reads plain data; leave out hparams_file and weights_only")
        check_own(checkpoint_path, read_checked(checkpoint_path))
        return super().load_from_checkpoint(
            checkpoint_path, map_location, strict=strict, weights_only=True, **kwargs
        )

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep this run's optimizer settings: PyTorch would restore those of the run that saved."""
        check_same_architecture(self.model.config, checkpoint)
        self._last_validation = checkpoint.get(VALIDATION_KEY)
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                group["lr"] *= self.optimizer.learning_rate / group["initial_lr"]
                group["initial_lr"] = self.optimizer.learning_rate
                group["betas"] = self.optimizer.betas
                group["weight_decay"] = self.optimizer.weight_decay if group["weight_decay"] else 0.0
        for state in checkpoint.get("lr_schedulers", []):
            state["base_lrs"] = [self.optimizer.learning_rate for _ in state["base_lrs"]]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG_KEY] = asdict(self.model.config)
        if self._last_validation is not None:
            checkpoint[VALIDATION_KEY] = self._last_validation


def _parameters(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
