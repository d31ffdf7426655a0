"""Refuses what the options alone show to be wrong."""

import os
import sys
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

LARGEST_SEED = 2**32 - 1  # NumPy's


def check_before_opening(settings: Any) -> None:
    """Raises what even the seed and the checkpoint must not be tried with."""
    seed = settings.seed_everything
    if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed_everything={seed} is not in [0, {LARGEST_SEED}]; choose e.g. 42")
    if settings.get("weights_only") is False:
        raise UserError(
            "weights_only=False would let a checkpoint run code, and none of ours needs it; leave it out"
        )


def check_options(verb: str, settings: Any) -> None:
    """Raises what can be raised before a tokenizer is trained or a file written."""
    config = GPTConfig(**{**settings.model.config, "vocab_size": 1})
    OptimizerConfig(**settings.model.optimizer)
    ScheduleConfig(**settings.model.schedule)
    GenerationConfig(**settings.generation)
    _check_trainer(settings.trainer)
    if verb != "predict" and settings.data.seq_len > config.max_position_embeddings:
        raise UserError(
            f"data.seq_len={settings.data.seq_len} is over "
            f"model.config.max_position_embeddings={config.max_position_embeddings}; "
            f"{'lower it' if settings.get('init_from') else 'lower the one or raise the other'}"
        )
    if verb == "fit":
        _check_only_sampled(settings.generation)


def _check_only_sampled(generation: Any) -> None:
    """Raises what has no meaning for the samples that `fit` shows."""
    for name, default in (("quantize", None), ("num_samples", 1), ("logprobs", False)):
        if generation[name] != default:
            raise UserError(
                f"generation.{name}={generation[name]} is for predict and generate; leave it out of fit"
            )


def _check_trainer(trainer: Any) -> None:
    """Raises what Lightning would take without a word, or divide by."""
    for name, least in (("log_every_n_steps", 1), ("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        if trainer[name] is not None and trainer[name] < least:
            raise UserError(f"trainer.{name}={trainer[name]} is below {least}; raise it, or leave it out")
    if trainer.val_check_interval == 0:
        raise UserError("trainer.val_check_interval=0 is below 1; choose a number of steps, or leave it out")
    if trainer.limit_predict_batches not in (None, 1.0):
        raise UserError(
            f"trainer.limit_predict_batches={trainer.limit_predict_batches}: all prompts are one batch of "
            "predict; leave the option out, and give fewer prompts"
        )
    by_the_clock = trainer.val_check_interval is not None and not isinstance(
        trainer.val_check_interval, (int, float)
    )
    if by_the_clock and trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.val_check_interval={trainer.val_check_interval} could validate and save inside an "
            f"optimizer step of trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}; give a "
            "number of steps"
        )
    _check_devices(trainer)


def _check_devices(trainer: Any) -> None:
    """Raises a mistyped number: each device of the CPU is a process, and so many would be started."""
    if trainer.accelerator != "cpu" and (trainer.accelerator != "auto" or torch.accelerator.is_available()):
        return
    cores = os.cpu_count() or 1
    most = max(8, 2 * cores)
    devices = str(trainer.devices)
    if not devices.removeprefix("-").isdecimal():
        return
    if int(devices) < 1:
        raise UserError(f"trainer.devices={devices} is below 1; raise it, or leave it out")
    if int(devices) > most:
        raise UserError(
            f"trainer.devices={devices} is over {most}, all that {cores} cores are good for; lower it"
        )


def warn_of_untrained_positions(seq_len: int, positions: int) -> None:
    """Says that text beyond the training windows would be generated from positions never trained."""
    if 0 < seq_len < positions:
        say(
            f"warning: data.seq_len={seq_len} trains only the first {seq_len} of "
            f"model.config.max_position_embeddings={positions} positions; make them equal, unless the rest "
            "comes trained from a checkpoint"
        )


@rank_zero_only
def say(line: str) -> None:
    print(line, file=sys.stderr)
