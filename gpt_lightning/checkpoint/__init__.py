"""Bytes, contents and places of checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt_lightning.checkpoint.checkpoint import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    """Imports `load_model` at its first use: the small files of the room need no PyTorch."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpt_lightning.checkpoint.checkpoint import load_model

    return load_model
