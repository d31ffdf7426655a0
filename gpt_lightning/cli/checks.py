"""Refuses what the options alone show to be wrong."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from gpt_lightning.cli.errors import say
from gpt_lightning.cli.model_class import model_options
from gpt_lightning.exit_codes import UserError
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.huggingface.families import family_of
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

VOCABULARY = "model.config.vocab_size"
LARGEST_SEED = 2**32 - 1  # NumPy's
PATHS = (
    "trainer.default_root_dir checkpoint.dirpath data.cache_dir data.tokenizer data.prompts_file ckpt_path "
    "init_from output evaluate.tasks"
).split()


def check_paths(settings: Any) -> None:
    """Refuses a name of nothing, as of a shell's variable that is not set, and the character that ends one.

    Only a file of options can hold that.
    """
    for option in PATHS:
        if settings.get(option) == "":
            raise UserError(f"{option}='' names nothing; give a name, or leave it out")
        if "\0" in str(settings.get(option)):
            raise UserError(f"{option}={settings.get(option)!r} holds a null character; leave it out")


def check_task_files(tasks: list[str] | str, words: list[str]) -> None:
    """Refuses a description of a task that a file of options names: it can hold code, and none may run so."""
    listed = tasks.split(",") if isinstance(tasks, str) else tasks
    for name in listed:
        if name.strip().endswith((".yaml", ".yml")) and not any(name in word for word in words):
            problem = "can hold code, and so only the command line may name it"
            raise UserError(f"evaluate.tasks={name} {problem}; add --evaluate.tasks {name}")


def check_monitors(callbacks: Iterable[Callback]) -> None:
    """Refuses to wait for the bits per byte of a text of which some is lost: nobody logs them."""
    for callback in callbacks:
        if getattr(callback, "monitor", None) == "val/bpb":
            name, problem = type(callback).__name__, "which is not shown as the tokenizer loses text"
            raise UserError(f"{name} monitors val/bpb, {problem}; monitor val/loss")


def check_averaging(callbacks: Iterable[Callback], max_steps: int) -> None:
    """Refuses averages that no step ever goes into: the first weights would be judged and saved as such."""
    for callback in callbacks:
        if isinstance(callback, EMAWeightAveraging) and callback.update_starting_at_epoch is None:
            every, begin = callback.update_every_n_steps, callback.update_starting_at_step
            if every < 1:
                raise UserError(f"EMAWeightAveraging.update_every_n_steps={every} averages nothing; use 1")
            if begin is not None and 0 < max_steps <= begin:
                problem = f"EMAWeightAveraging.update_starting_at_step={begin} is not below"
                raise UserError(f"{problem} trainer.max_steps={max_steps}, so it averages nothing; lower it")


@contextmanager
def refused_arguments() -> Iterator[None]:
    """Says in one line what a class that the options name has against the arguments that they give it."""
    try:
        yield
    except ValueError as error:
        named = re.search(r"class_path='([\w.]+)'", str(error))
        if named is None or error.__cause__ is None or not str(error).startswith("Does not validate"):
            raise
        refusal = f"{named[1]} does not take its arguments: {error.__cause__}"
        raise UserError(f"{refusal}; change them, or leave the class out") from error


def check_options(verb: str, settings: Any) -> None:
    """Raises what can be raised before a tokenizer is trained or a file written."""
    config = model_options(settings, "config")
    positions = GPTConfig(**{**config, "vocab_size": 1}).max_position_embeddings
    OptimizerConfig(**model_options(settings, "optimizer"))
    ScheduleConfig(**model_options(settings, "schedule"))
    GenerationConfig(**settings.generation)
    for option, rule in _refused(verb, settings, positions if config else None):
        raise UserError(f"{option}={settings[option]}{rule}")


def check_processes(settings: Any) -> None:
    """Raises where this machine is not for so many processes."""
    for option, rule in _refused_devices(settings.trainer):
        raise UserError(f"{option}={settings[option]}{rule}")


def given_vocabulary(given: Any) -> int | None:
    """Returns the vocabulary size that the options say, which the text's tokenizer decides, too."""
    size: int | None = given.get(VOCABULARY) or given.get(VOCABULARY.replace("model", "model.init_args", 1))
    return size


def check_vocabulary(given: Any, size: int, source: str) -> None:
    """Refuses a vocabulary size that is not that of the source of the ids."""
    if (own := given_vocabulary(given)) not in (None, size):
        problem = f"{VOCABULARY}={own} contradicts {source}, which has {size} ids"
        raise UserError(f"{problem}; leave the option out, or change the other")


def _refused(verb: str, settings: Any, positions: int | None) -> Iterator[tuple[str, str]]:
    """Yields options that cannot be as they are, and what is said of each after its value."""
    yield from _refused_of_trainer(verb, settings.trainer)
    seed = settings.seed_everything
    if type(seed) is int and not 0 <= seed <= LARGEST_SEED:
        yield "seed_everything", f" is not in [0, {LARGEST_SEED}]; choose e.g. 42"
    if verb != "predict" and positions is not None and settings.data.seq_len > positions:
        remedy = "lower it" if settings.get("init_from") else "lower the one or raise the other"
        yield "data.seq_len", f" is over model.config.max_position_embeddings={positions}; {remedy}"
    of_others = {"quantize": None, "num_samples": 1, "logprobs": False, "top_logprobs": 0}
    for name, default in of_others.items():
        if verb == "fit" and settings.generation[name] != default:
            yield f"generation.{name}", " is for predict and generate; leave it out of fit"


def _refused_of_trainer(verb: str, trainer: Any) -> Iterator[tuple[str, str]]:
    """Yields what Lightning would take without a word, divide by, or answer with a page of its own."""
    if isinstance(trainer.strategy, str) and "." in trainer.strategy:
        given = f"--trainer.strategy.class_path {trainer.strategy}, or in a file"
        yield "trainer.strategy", f" is a class; write {given} strategy: {{class_path: {trainer.strategy}}}"
    for name, least in (("log_every_n_steps", 1), ("accumulate_grad_batches", 1), ("gradient_clip_val", 0)):
        if trainer[name] is not None and trainer[name] < least:
            yield f"trainer.{name}", f" is below {least}; raise it, or leave it out"
    if trainer.val_check_interval == 0:
        yield "trainer.val_check_interval", " is below 1; choose a number of steps, or leave it out"
    by_the_clock = not isinstance(trainer.val_check_interval, (int, float, type(None)))
    if by_the_clock and trainer.accumulate_grad_batches > 1:
        yield (
            "trainer.val_check_interval",
            " could validate and save inside an optimizer step of trainer.accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}; give a number of steps",
        )
    if trainer.limit_predict_batches not in (None, 1.0):
        rule = ": all prompts are one batch of predict; leave the option out, and give fewer prompts"
        yield "trainer.limit_predict_batches", rule
    limit = {"validate": "limit_val_batches", "test": "limit_test_batches"}.get(verb)
    if limit is not None and trainer[limit] == 0:  # as in the configuration of a run without validations
        yield f"trainer.{limit}", f" leaves nothing to {verb} on; give 1.0 for all of the text"


def _refused_devices(trainer: Any) -> Iterator[tuple[str, str]]:
    """Yields a number of processes that no CPU is for: as many as a mistyped one says would be started."""
    on_gpu = trainer.accelerator == "auto" and torch.accelerator.is_available()
    is_number = str(trainer.devices).removeprefix("-").isdecimal()
    if trainer.accelerator not in ("cpu", "auto") or on_gpu or not is_number:
        return
    cores = os.cpu_count() or 1
    most = max(8, 2 * cores)
    if int(trainer.devices) < 1:
        yield "trainer.devices", " is below 1; raise it, or leave it out"
    if int(trainer.devices) > most:
        yield "trainer.devices", f" is over {most}, all that {cores} cores are good for; lower it"


def tell_of_no_export(settings: Any) -> None:
    """Says, before it is trained, that a shape is of no model of Hugging Face's."""
    try:
        family_of(GPTConfig(**{**model_options(settings, "config"), "vocab_size": 1}))
    except UserError as error:
        say(f"this shape exports to nothing (export-hf): {error}")


def ends_before_validation(trainer: Any) -> bool:
    """Tells whether the last step comes before the first validation is due."""
    interval = trainer.val_check_interval
    return type(interval) is int and 0 < trainer.max_steps < interval


def warn_of_no_validation(trainer: Any) -> None:
    """Says that a run ends before its first validation is due, and so shows and keeps no val/loss."""
    interval, steps = trainer.val_check_interval, trainer.max_steps
    if ends_before_validation(trainer) and trainer.limit_val_batches != 0:
        problem = f"trainer.val_check_interval={interval} is over trainer.max_steps={steps}"
        say(f"warning: {problem}: the run ends without a validation; lower it")


def warn_of_untrained_positions(settings: Any) -> None:
    """Says that text beyond the training windows would be generated from positions never trained."""
    seq_len = settings.data.seq_len
    positions = model_options(settings, "config").get("max_position_embeddings", seq_len)
    if 0 < seq_len < positions:
        say(
            f"warning: data.seq_len={seq_len} trains only the first {seq_len} of "
            f"model.config.max_position_embeddings={positions} positions; make them equal, unless the rest "
            "comes trained from a checkpoint"
        )
