"""Train a GPT from your own text in PyTorch Lightning, and sample from it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.data.datamodule import TextDataModule
    from gpt_lightning.model.config import GPTConfig
    from gpt_lightning.model.gpt import GPTModel
    from gpt_lightning.parallel.strategy import TensorParallelDDPStrategy
    from gpt_lightning.training.module import GPTLightningModule

__version__ = "0.1.0"
__all__ = ["GPTConfig", "GPTModel", "GPTLightningModule", "TextDataModule", "TensorParallelDDPStrategy"]

_HOMES = {
    "GPTConfig": "model.config",
    "GPTModel": "model.gpt",
    "GPTLightningModule": "training.module",
    "TextDataModule": "data.datamodule",
    "TensorParallelDDPStrategy": "parallel.strategy",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, so that importing one room does not import them all."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
