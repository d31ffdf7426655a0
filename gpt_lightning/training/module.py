"""Tells Lightning what a step of training, validation or prediction does with a batch."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import Self, override

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.contents import ORIGIN_KEY, VALIDATION_KEY, check_same_architecture
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch, rank_and_ranks, token_batch
from gpt_lightning.data.prompts import PromptBatch, encode_prompts
from gpt_lightning.data.tokenizer import TextTokenizer
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.device import keep_freed_memory
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel, GPTOutput
from gpt_lightning.parallel.dropout import own_numbers
from gpt_lightning.parallel.plan import ParallelStyle
from gpt_lightning.training.compilation import check_backend, compile_blocks
from gpt_lightning.training.held_out import HeldOutLoss, remembered
from gpt_lightning.training.metrics import (
    OptimizerStep,
    StepRow,
    epochs_trained,
    gradient_norm,
)
from gpt_lightning.training.optim import (
    OptimizerConfig,
    ScheduleConfig,
    build_optimizer,
    build_schedule,
    learning_rates,
    raise_peak,
    with_peak,
)
from gpt_lightning.training.own_checkpoints import (
    forget_other_folders,
    leave_averages_behind,
    tell_of_other_callbacks,
)
from gpt_lightning.training.prediction import (
    agree_on_kernel,
    changed_settings,
    continued,
    make_engine,
    predict,
    whole_model,
)
from gpt_lightning.training.saving import (
    arguments_of_child_classes,
    check_arguments,
    describe,
    plain_settings,
    refuse_other_layers,
    warn_of_inexact_resume,
)
from gpt_lightning.training.sharding import tensor_parallel_plan
from gpt_lightning.training.trainer import has_logged, is_inside_a_step, is_logging_step

KINDS = {"config": GPTConfig, "optimizer": OptimizerConfig, "schedule": ScheduleConfig}


class GPTLightningModule(LightningModule):
    """Trains, validates and samples a GPTModel.

    Args:
        config: The architecture.
        optimizer: AdamW's settings, and Muon's.
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
        ours = {"config": config, "optimizer": self.optimizer, "schedule": self.schedule}
        ours |= {"activation_checkpointing": activation_checkpointing, "compile_backend": compile_backend}
        theirs = arguments_of_child_classes(self, inspect.currentframe())
        self.save_hyperparameters(plain_settings(theirs | ours, type(self).__name__))
        self.model = GPTModel(config, activation_checkpointing)
        self.n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        check_backend(compile_backend)
        self.compile_backend = compile_backend
        self.generation = GenerationConfig()
        self.held_out_loss = HeldOutLoss()
        self.step_row = StepRow()
        self.step = OptimizerStep()  # which is under way
        self.tokenizer: TextTokenizer | None = None  # of a checkpoint that was loaded, or as you set it
        self.begun_from: str | None = None  # the model whose weights the run began with
        self._kernel: str | None = None  # by which layers multiply while predicting, if agreed on
        self._last_validation: dict[str, Any] | None = None  # step, loss, and whether of all the text

    @override
    def save_hyperparameters(self, *args: Any, frame: FrameType | None = None, **options: Any) -> None:
        """Keeps them plain: dictionaries of dataclasses, and nothing that no checkpoint may hold."""
        caller = inspect.currentframe().f_back  # type: ignore[union-attr]
        super().save_hyperparameters(*args, frame=frame or caller, **options)
        self.hparams.update(plain_settings(self.hparams, type(self).__name__))

    @property
    def learning_rate(self) -> float:
        """Is the peak, which Lightning's Tuner.lr_find finds and sets here."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimizer = with_peak(self.optimizer, value)
        self.hparams["optimizer"] = plain_settings({"optimizer": self.optimizer}, "")["optimizer"]
        if self._trainer is not None:  # Lightning's LearningRateFinder sets it when the schedule is built
            raise_peak(self.trainer, value)

    @override
    def forward(self, input_ids: Tensor, targets: Tensor | None = None, **options: Any) -> GPTOutput:
        """Returns the logits or, with `targets`, the loss, as GPTModel does."""
        output: GPTOutput = self.model(input_ids, targets, **options)
        return output

    @override
    def setup(self, stage: str) -> None:
        """Refuses text that the model cannot take: a GPU would only say that some index is out of range."""
        config, data = self.model.config, self.trainer.datamodule
        if stage == "predict" or not isinstance(data, TextDataModule):
            return
        if data.seq_len > config.max_position_embeddings:
            rule = f"is over max_position_embeddings={config.max_position_embeddings} of the model's config"
            raise UserError(f"data.seq_len={data.seq_len} {rule}; lower the one or raise the other")
        if data.vocab_size > config.vocab_size:
            problem = f"vocab_size={config.vocab_size} of the model's config is under the {data.vocab_size}"
            raise UserError(f"{problem} ids of data.tokenizer={data.tokenizer}; give data.vocab_size")

    # Training

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Has each replica drop elements of its own in its training step, which DDP takes through here."""
        if self.training and self._trainer is not None:
            replica, replicas = rank_and_ranks(self.trainer)
            if replicas > 1:
                with own_numbers(replica):
                    return super().__call__(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    @override
    def on_fit_start(self) -> None:
        if self.automatic_optimization and not any(p.requires_grad for p in self.parameters()):
            remedy = "set requires_grad=True for some of its parameters"
            raise UserError(f"{type(self).__name__} has nothing to train, all of it is frozen; {remedy}")
        # An interrupted run may have left some of a step, and a callback that writes its row.
        self.step, self.step_row = OptimizerStep(), StepRow()
        if self.device.type == "cpu":
            keep_freed_memory()

    @override
    def on_train_start(self) -> None:
        compile_blocks(self.model.blocks, self.trainer, self.compile_backend)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the batch's part of the mean over all tokens that the optimizer step scores."""
        batch = token_batch(batch)
        if self.step.after != self.trainer.global_step:
            self.step = OptimizerStep(after=self.trainer.global_step)
        nll = self._nll(batch)
        replicas = rank_and_ranks(self.trainer)[1]
        # Lightning divides the loss by the number of micro-batches, DDP the gradients by that of replicas.
        parts = replicas * self.trainer.accumulate_grad_batches
        if batch.step_tokens is not None:
            # An epoch's last batches may be of padding alone, and limit_train_batches a step of nothing else.
            self.step.tokens, share = batch.step_tokens, max(1, batch.step_tokens) / parts
        else:  # of a loader of somebody's own: ranks and micro-batches weigh alike, as Lightning has it
            share = max(1, int(batch.scored()))
            self.step.tokens += replicas * share
        self.step.nlls.append(nll.detach())
        return (nll / share).float()

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if is_logging_step(self.trainer, self.trainer.global_step + 1):
            values = {
                **self.step.loss(self.trainer, self.device),
                "train/grad_norm": gradient_norm(self.trainer, self),
                **learning_rates(optimizer),
                "epoch": epochs_trained(self.trainer),
            }
            self.step_row.add(self.trainer, values, progress_bar={"train/loss"} & values.keys())
            if not self.step_row.is_shared:
                self.step_row.write(self.trainer, self.trainer.global_step + 1)

    @override
    def on_train_batch_end(self, outputs: Any, batch: TokenBatch, batch_idx: int) -> None:
        if self.automatic_optimization and not is_inside_a_step(self.trainer):
            # Lightning keeps the gradients through the next forward pass, and so raises its peak of memory.
            self.trainer.optimizers[0].zero_grad()
        # What others log with `self.log` would be put one step early.
        if is_logging_step(self.trainer, self.trainer.global_step) and has_logged(self.trainer):
            self.log("step", float(self.trainer.global_step))

    def _nll(self, batch: TokenBatch) -> Tensor:
        """Sums the negative log-likelihood of the batch's targets."""
        output = self.model(batch.input_ids, batch.targets, reduction="sum", document_ids=batch.document_ids)
        return output.loss

    # Validation and test

    @override
    def on_validation_epoch_start(self) -> None:
        self.held_out_loss = HeldOutLoss()  # an interrupted evaluation may have left sums

    on_test_epoch_start = on_validation_epoch_start

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        batch = token_batch(batch)
        self.held_out_loss.update(self._nll(batch), batch.scored(), batch.source)

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_held_out("val")
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))  # else Lightning puts them one step early
            self.log("epoch", epochs_trained(self.trainer))

    @override
    def on_test_epoch_end(self) -> None:
        self._log_held_out("test")

    def _log_held_out(self, split: str) -> None:
        """Logs the loss per token, and what follows from it."""
        held_out, self.held_out_loss = self.held_out_loss, HeldOutLoss()
        if held_out.is_empty:  # the step is a child class's, which logs its own loss
            return
        values = held_out.values(self.trainer, split)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._last_validation = remembered(values, self.trainer.global_step)
        self.log(f"{split}/loss", values.pop(f"{split}/loss"), prog_bar=True)
        self.log_dict(values)

    # Prediction

    @override
    def on_predict_start(self) -> None:
        self._kernel = agree_on_kernel(self.trainer, self.model, self.generation)

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Returns a dictionary a completion, in prompt order; tells CompletionCallbacks when one ends."""
        return predict(self.trainer, self.model, batch, self.generation, self._kernel)

    def generate(self, prompt: str, **settings: Any) -> str:
        """Returns the prompt and its continuation; `settings` are those of a GenerationConfig to change."""
        if self.own_tokenizer is None:
            remedy = "fit it with a TextDataModule, use load_from_checkpoint, or set module.tokenizer"
            raise UserError(f"the module has no tokenizer; {remedy}")
        token_ids = encode_prompts([prompt], self.own_tokenizer)
        changed = changed_settings(self.generation, settings)
        return prompt + self.complete(self.own_tokenizer, token_ids, changed)[0]

    @property
    def own_tokenizer(self) -> TextTokenizer | None:
        """Is the one that was set or loaded, or else that of the text that the module is fitted with."""
        datamodule = self._trainer.datamodule if self._trainer is not None else None
        if self.tokenizer is None and isinstance(datamodule, TextDataModule):
            return datamodule.text_tokenizer
        return self.tokenizer

    def complete(
        self, tokenizer: TextTokenizer, prompts: list[list[int]], settings: GenerationConfig | None = None
    ) -> list[str]:
        """Returns one continuation of each tokenized prompt, by the `generation` settings or by others."""
        settings = replace(settings or self.generation, num_samples=1)
        with whole_model(self._trainer):
            engine = make_engine(self._trainer, self.model, settings, tokenizer, len(prompts))
            return continued(engine, tokenizer, prompts, settings)

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
        checkpoint = Checkpoint.open(Path(checkpoint_path), may_be_sharded=False)
        check_arguments(checkpoint.path, checkpoint.contents, KINDS)
        module = super().load_from_checkpoint(
            checkpoint_path, map_location, strict=strict, weights_only=True, **kwargs
        )
        module.tokenizer = checkpoint.tokenizer if checkpoint.has_tokenizer else None
        return module

    @override
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        if strict:
            refuse_other_layers(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_architecture(self.model.config, checkpoint)
        self.begun_from = checkpoint.get(ORIGIN_KEY)
        self._last_validation = checkpoint.get(VALIDATION_KEY)
        if self._trainer is not None:
            warn_of_inexact_resume(self.trainer)
            forget_other_folders(self.trainer, checkpoint)
            leave_averages_behind(self.trainer, checkpoint)
            tell_of_other_callbacks(self.trainer, checkpoint)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, value in ((ORIGIN_KEY, self.begun_from), (VALIDATION_KEY, self._last_validation)):
            if value is not None:
                checkpoint[key] = value
        child = type(self) if type(self) is not GPTLightningModule else None
        describe(checkpoint, self.model.config, child, self.own_tokenizer)
