"""Says of a model how well it knows text that was held out: of all of it, and of each text of a mixture."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from torch import Tensor

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.training.metrics import TokenLoss


class HeldOutLoss:
    """Sums the loss of one pass over a split; no batch of a mixture has text of two sources."""

    def __init__(self) -> None:
        self.of_all = TokenLoss()
        self._of_sources: dict[str, TokenLoss] = {}

    @property
    def is_empty(self) -> bool:
        return self.of_all.is_empty

    def update(self, nll: Tensor, tokens: Tensor, source: str | None) -> None:
        """Adds a batch's summed nll and the number of tokens it was summed over."""
        self.of_all.update(nll, tokens)
        if source is not None:
            self._of_sources.setdefault(source, TokenLoss()).update(nll, tokens)

    def values(self, trainer: Trainer, split: str) -> dict[str, Tensor | float]:
        """Returns what is logged, such as val/loss and val/loss/novels; all ranks call it together."""
        values = _values(trainer, split, self.of_all)
        for source, loss in self._of_sources.items():
            of_source = _values(trainer, split, loss, source)
            values |= {f"{name}/{source}": value for name, value in of_source.items()}
        return values


def remembered(values: Mapping[str, Tensor | float], step: int) -> dict[str, Any]:
    """Picks of a validation what a checkpoint keeps: its step, its losses, and whether it was of all text."""
    whole, prefix = "val/share" not in values, "val/loss/"
    sources = {
        name.removeprefix(prefix): float(value) for name, value in values.items() if name.startswith(prefix)
    }
    of_sources = {"sources": sources} if sources else {}
    return {"step": step, "loss": float(values["val/loss"]), "whole": whole, **of_sources}


def _values(
    trainer: Trainer, split: str, held_out: TokenLoss, source: str | None = None
) -> dict[str, Tensor | float]:
    """Returns loss, perplexity, and bits per byte by the text's own number of bytes per token.

    Of what was not all of the text, the share stands beside.
    """
    loss = held_out.compute(trainer.strategy)
    values: dict[str, Tensor | float] = {f"{split}/loss": loss, f"{split}/ppl": loss.exp()}
    if (share := _scored_share(trainer, split, int(held_out.tokens), source)) < 1:
        values[f"{split}/share"] = share
    data = trainer.datamodule
    if isinstance(data, TextDataModule) and data.keeps_text(split, source):  # others do not know their bytes
        n_tokens, n_bytes = data.split_counts(split, source)
        values[f"{split}/bpb"] = loss / math.log(2) * n_tokens / n_bytes
    return values


def _scored_share(trainer: Trainer, split: str, n_tokens: int, source: str | None) -> float:
    """Tells which part of a held-out text was scored: `n_tokens`, as trainer.limit_val_batches has it."""
    if isinstance(trainer.datamodule, TextDataModule):
        return n_tokens / trainer.datamodule.split_counts(split, source)[0]
    is_test = split == "test"  # of loaders of somebody's own only the batches are known
    loaders = trainer.test_dataloaders if is_test else trainer.val_dataloaders
    done = sum(trainer.num_test_batches if is_test else trainer.num_val_batches)
    every = sum(sized_len(loader) or done for loader in (loaders if isinstance(loaders, list) else [loaders]))
    return min(1.0, done / every) if every else 1.0
