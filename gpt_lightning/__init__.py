"""Trains a GPT from your own text in PyTorch Lightning, and samples from it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.callbacks.exact_resume import ExactResume as ExactResume
    from gpt_lightning.callbacks.finite_guard import FiniteGuard as FiniteGuard
    from gpt_lightning.callbacks.initial_weights import InitialWeights as InitialWeights
    from gpt_lightning.callbacks.orderly_stop import OrderlyStop as OrderlyStop
    from gpt_lightning.callbacks.progress import StepProgressBar as StepProgressBar
    from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint as RunCheckpoint
    from gpt_lightning.callbacks.text_samples import TextSamples as TextSamples
    from gpt_lightning.callbacks.throughput import Throughput as Throughput
    from gpt_lightning.checkpoint.checkpoint import load_model as load_model
    from gpt_lightning.checkpoint.io import DurableCheckpointIO as DurableCheckpointIO
    from gpt_lightning.data.datamodule import TextDataModule as TextDataModule
    from gpt_lightning.data.loader import TokenBatch as TokenBatch
    from gpt_lightning.data.tokenizer import TextTokenizer as TextTokenizer
    from gpt_lightning.data.tokenizer import load_tokenizer as load_tokenizer
    from gpt_lightning.exit_codes import UserError as UserError
    from gpt_lightning.generation.sampling import GenerationConfig as GenerationConfig
    from gpt_lightning.model.config import GPTConfig as GPTConfig
    from gpt_lightning.model.gpt import GPTModel as GPTModel
    from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy as TensorParallelDDPStrategy
    from gpt_lightning.training.module import GPTLightningModule as GPTLightningModule
    from gpt_lightning.training.optim import OptimizerConfig as OptimizerConfig
    from gpt_lightning.training.optim import ScheduleConfig as ScheduleConfig
    from gpt_lightning.training.trainer import GPTTrainer as GPTTrainer

__version__ = "0.1.0"

_HOMES = {
    "DurableCheckpointIO": "checkpoint.io",
    "ExactResume": "callbacks.exact_resume",
    "FiniteGuard": "callbacks.finite_guard",
    "GPTConfig": "model.config",
    "GPTLightningModule": "training.module",
    "GPTModel": "model.gpt",
    "GPTTrainer": "training.trainer",
    "GenerationConfig": "generation.sampling",
    "InitialWeights": "callbacks.initial_weights",
    "OptimizerConfig": "training.optim",
    "OrderlyStop": "callbacks.orderly_stop",
    "RunCheckpoint": "callbacks.run_checkpoint",
    "ScheduleConfig": "training.optim",
    "StepProgressBar": "callbacks.progress",
    "TensorParallelDDPStrategy": "parallel.strategy",
    "TextDataModule": "data.datamodule",
    "TextSamples": "callbacks.text_samples",
    "TextTokenizer": "data.tokenizer",
    "Throughput": "callbacks.throughput",
    "TokenBatch": "data.loader",
    "UserError": "exit_codes",
    "load_model": "checkpoint.checkpoint",
    "load_tokenizer": "data.tokenizer",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing one room does not import them all."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})  # a notebook completes them
