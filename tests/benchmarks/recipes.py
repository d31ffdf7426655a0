"""What a recipe is worth: validation loss of four, at equal tokens and in equal time.

    python tests/benchmarks/recipes.py                   ten minutes on two cores
    python tests/benchmarks/recipes.py --steps 2800      as long as the quickstart once was: an hour

They train on the quickstart's text, 8 sequences of 128 tokens a step, with a network of about 660,000
parameters (2 layers of 128): GPT-2's block, or rotary positions, RMS norms, SwiGLU and norms of queries and
keys; with AdamW and a cosine to zero, or with Muon, whose rate stays up until its last half (WSD) where the
table says so. First each trains so many steps, the recipes in turns; then the others train for as long as
GPT-2 with AdamW took, with their schedules fit to it. Time is that of training steps alone. Losses are over
the whole held-out text, means over the seeds, which draw weights and order anew. The last line is the result
as JSON.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from gpt_lightning.cli.errors import quiet
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

MODERN = {"positions": "rope", "norm": "rms", "activation": "swiglu", "qk_norm": True, "bias": False}
RATE = 3e-3  # the best of 1.5e-3, 3e-3, 6e-3 and 1.2e-2 for each, or as good
ADAMW, MUON = OptimizerConfig(RATE), OptimizerConfig(RATE, name="muon")
COSINE = ScheduleConfig(min_lr_ratio=0.0)
WSD = ScheduleConfig(min_lr_ratio=0.0, shape="wsd", decay_fraction=0.5)


@dataclass(frozen=True)
class Recipe:
    network: dict[str, Any]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


BASE = "GPT-2 + AdamW"
RECIPES = {
    BASE: Recipe({}, ADAMW, COSINE),
    "GPT-2 + Muon": Recipe({}, MUON, COSINE),
    "modern + AdamW": Recipe(MODERN, ADAMW, COSINE),
    "modern + Muon + WSD": Recipe(MODERN, MUON, WSD),
}


class StepClock(Callback):
    """Adds up the seconds of training steps, without validation."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.begin


@dataclass(frozen=True)
class Result:
    steps: int
    val_loss: float
    seconds: float


def train(recipe: Recipe, steps: int, seed: int) -> Result:
    seed_everything(seed, verbose=False)
    data = TextDataModule(train_files=["python:docs"], tokenizer="bpe:2048", seq_len=128, batch_size=8)
    config = GPTConfig(data.vocab_size, 128, n_layers=2, n_heads=4, d_model=128, **recipe.network)
    clock = StepClock()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[clock],
    )
    trainer.fit(GPTLightningModule(config, recipe.optimizer, recipe.schedule), data)
    return Result(steps, float(trainer.callback_metrics["val/loss"]), clock.seconds)


def compare(steps: int, seeds: list[int]) -> tuple[dict[str, list[Result]], dict[str, list[Result]]]:
    """Returns each recipe's results, one a seed: of equal tokens, and of equal time."""
    tokens: dict[str, list[Result]] = {name: [] for name in RECIPES}
    equal_time: dict[str, list[Result]] = {name: [] for name in RECIPES}
    for seed in seeds:
        for name, recipe in RECIPES.items():
            tokens[name].append(train(recipe, steps, seed))
            show(name, tokens[name][-1], "equal tokens")
        for name, recipe in RECIPES.items():
            result = tokens[name][-1]
            fitting = round(steps * tokens[BASE][-1].seconds / result.seconds)
            equal_time[name].append(result if name == BASE else train(recipe, fitting, seed))
            show(name, equal_time[name][-1], "equal time")
    return tokens, equal_time


def show(name: str, result: Result, what: str) -> None:
    line = f"{name:20} {result.steps:6,} steps  {result.seconds:6.1f} s  val loss {result.val_loss:.3f}"
    print(f"{line}  ({what})", file=sys.stderr, flush=True)


def means(results: list[Result]) -> dict[str, float]:
    return {
        "val_loss": round(statistics.mean(result.val_loss for result in results), 4),
        "wall_s": round(statistics.mean(result.seconds for result in results), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tokens, equal_time = compare(options.steps, options.seeds)
    print(f"| recipe | {options.steps:,} steps: val loss | s | in the time of the first: val loss | steps |")
    print("|---|---|---|---|---|")
    summary: dict[str, Any] = {}
    for name in RECIPES:
        at_tokens, in_time = means(tokens[name]), means(equal_time[name])
        steps = round(statistics.mean(result.steps for result in equal_time[name]))
        first = f"{at_tokens['val_loss']:.3f} | {at_tokens['wall_s']:.0f}"
        print(f"| {name} | {first} | {in_time['val_loss']:.3f} | {steps:,} |")
        summary[name] = {**at_tokens, "equal_time": in_time}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
