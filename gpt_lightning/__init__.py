"""Trains a GPT from your own text in PyTorch Lightning, and samples from it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.callbacks.exact_resume import ExactResume
    from gpt_lightning.callbacks.finite_guard import FiniteGuard
    from gpt_lightning.callbacks.initial_weights import InitialWeights
    from gpt_lightning.callbacks.orderly_stop import OrderlyStop
    from gpt_lightning.callbacks.progress import StepProgressBar
    from gpt_lightning.callbacks.run_checkpoint import RunCheckpoint
    from gpt_lightning.callbacks.text_samples import TextSamples
    from gpt_lightning.callbacks.throughput import Throughput
    from gpt_lightning.checkpoint.checkpoint import load_model
    from gpt_lightning.checkpoint.io import DurableCheckpointIO
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.data.loader import TokenBatch
    from gpt_lightning.data.tokenizer import TextTokenizer, load_tokenizer
    from gpt_lightning.exit_codes import UserError
    from gpt_lightning.generation.sampling import GenerationConfig
    from gpt_lightning.model.config import GPTConfig
    from gpt_lightning.model.gpt import GPTModel
    from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
    from gpt_lightning.training.module import GPTLightningModule
    from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig
    from gpt_lightning.training.trainer import GPTTrainer

__version__ = "0.1.0"
__all__ = [
    "DurableCheckpointIO",
    "ExactResume",
    "FiniteGuard",
    "GPTConfig",
    "GPTLightningModule",
    "GPTModel",
    "GPTTrainer",
    "GenerationConfig",
    "InitialWeights",
    "OptimizerConfig",
    "OrderlyStop",
    "RunCheckpoint",
    "ScheduleConfig",
    "StepProgressBar",
    "TensorParallelDDPStrategy",
    "TextDataModule",
    "TextSamples",
    "TextTokenizer",
    "Throughput",
    "TokenBatch",
    "UserError",
    "load_model",
    "load_tokenizer",
]

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


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing one room does not import them all."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})  # a notebook completes them
