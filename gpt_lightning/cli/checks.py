"""Refuses what the options alone show to be wrong."""

import os
from typing import Any

import torch

from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

LARGEST_SEED = 2**32 - 1  # NumPy's


def check_options(verb: str, settings: Any) -> None:
    """Raises what can be raised before a tokenizer is trained or a file written."""
    config = GPTConfig(**{**settings.model.config, "vocab_size": 1})
    OptimizerConfig(**settings.model.optimizer)
    ScheduleConfig(**settings.model.schedule)
    GenerationConfig(**settings.generation)
    _check_trainer(settings.trainer)
    seed, seq_len = settings.seed_everything, settings.data.seq_len
    if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"seed_everything={seed} is not in [0, {LARGEST_SEED}]; choose e.g. 42")
    if verb != "predict" and seq_len > config.max_position_embeddings:
        remedy = "lower it" if settings.get("init_from") else "lower the one or raise the other"
        limit = f"model.config.max_position_embeddings={config.max_position_embeddings}"
        raise UserError(f"data.seq_len={seq_len} is over {limit}; {remedy}")
    for name, default in (("quantize", None), ("num_samples", 1), ("logprobs", False)):
        given = settings.generation[name]
        if verb == "fit" and given != default:
            raise UserError(f"generation.{name}={given} is for predict and generate; leave it out of fit")


def _check_trainer(trainer: Any) -> None:
    """Raises what Lightning would take without a word, or divide by."""
    for name, least in (("log_every_n_steps", 1), ("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        if trainer[name] is not None and trainer[name] < least:
            raise UserError(f"trainer.{name}={trainer[name]} is below {least}; raise it, or leave it out")
    interval, batches = trainer.val_check_interval, trainer.accumulate_grad_batches
    if interval == 0:
        raise UserError("trainer.val_check_interval=0 is below 1; choose a number of steps, or leave it out")
    if interval is not None and not isinstance(interval, (int, float)) and batches > 1:  # by the clock
        raise UserError(
            f"trainer.val_check_interval={interval} could validate and save inside an optimizer step of "
            f"trainer.accumulate_grad_batches={batches}; give a number of steps"
        )
    if trainer.limit_predict_batches not in (None, 1.0):
        raise UserError(
            f"trainer.limit_predict_batches={trainer.limit_predict_batches}: all prompts are one batch of "
            "predict; leave the option out, and give fewer prompts"
        )
    # Each device of the CPU is a process, and as many as a mistyped number says would be started.
    on_cpu = trainer.accelerator == "cpu"
    on_cpu = on_cpu or trainer.accelerator == "auto" and not torch.accelerator.is_available()
    devices, cores = str(trainer.devices), os.cpu_count() or 1
    if on_cpu and devices.removeprefix("-").isdecimal():
        if int(devices) < 1:
            raise UserError(f"trainer.devices={devices} is below 1; raise it, or leave it out")
        if int(devices) > (most := max(8, 2 * cores)):
            limit = f"{most}, all that {cores} cores are good for"
            raise UserError(f"trainer.devices={devices} is over {limit}; lower it")
