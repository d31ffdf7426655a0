"""What the Trainer costs a step above a bare loop, and what all that this program adds to it costs.

    python tests/benchmarks/trainer_overhead.py                       every 10th step logged, as by default
    python tests/benchmarks/trainer_overhead.py --log-every 10 50

A model so small that the work around it shows; the same model, batches, optimizer and schedule everywhere:
- bare: a loop of forward, backward, optimizer, schedule;
- off: Lightning's Trainer with everything off and a module that only returns its loss;
- ours: the whole program by its command line: the guard against NaN, exact resume, TensorBoard, throughput,
  the progress bar as on a terminal, a checkpoint every 200 steps;
- lightning: a plain module that calls `self.log` each step, with TensorBoard, progress bar and checkpoints.

They take turns, each in a process of its own; CPU time of the whole process, with what its threads draw and
write, and wall time, medians; of the differences too, each within a round. The last line is the result as
JSON: milliseconds of CPU a step.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.cli import GPTLightningCLI
from gpt_lightning.cli_noise import quiet
from gpt_lightning.config import GPTConfig
from gpt_lightning.data.batches import TokenBatch
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model import GPTModel
from gpt_lightning.training.optim import OptimizerConfig, build_optimizer

WARM_UP, SAVE_EVERY, SEQ_LEN = 100, 200, 32
SHAPE = {"max_position_embeddings": SEQ_LEN, "n_layers": 2, "n_heads": 2, "d_model": 32}
Seconds = tuple[float, float]  # CPU, wall; of a step


def data_options(folder: Path) -> dict[str, Any]:
    corpus = folder / "corpus.txt"
    if not corpus.exists():
        corpus.write_text("".join(random.Random(0).choices("abcdefgh .\n", k=1_500_000)))
    cache = str(folder / "cache")
    sizes = {"seq_len": SEQ_LEN, "batch_size": 4, "val_fraction": 0.01}
    return {"train_files": [str(corpus)], "tokenizer": "bytes", "cache_dir": cache, **sizes}


def data(folder: Path) -> TextDataModule:
    return TextDataModule(**data_options(folder))


def optimizer_and_schedule(model: torch.nn.Module) -> tuple[Any, Any]:
    optimizer = build_optimizer(model, OptimizerConfig())  # type: ignore[arg-type]
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


class Stopwatch(pl.Callback):
    """Stands last; the saving of a checkpoint at the last step of a run is not in its time."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.marks: list[Seconds] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in (WARM_UP, WARM_UP + self.steps):
            self.marks.append((time.process_time(), time.perf_counter()))

    def per_step(self) -> Seconds:
        (cpu, wall), (cpu_end, wall_end) = self.marks
        return (cpu_end - cpu) / self.steps, (wall_end - wall) / self.steps


def bare(folder: Path, steps: int, log_every: int) -> Seconds:
    datamodule = data(folder)
    model = GPTModel(GPTConfig(datamodule.vocab_size, **SHAPE))
    optimizer, schedule = optimizer_and_schedule(model)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    datamodule.trainer = trainer
    marks = []
    for step, batch in enumerate(datamodule.train_dataloader()):
        if step in (WARM_UP, WARM_UP + steps):
            marks.append((time.process_time(), time.perf_counter()))
            if step > WARM_UP:
                break
        optimizer.zero_grad()
        loss = model(batch.input_ids, batch.targets).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        schedule.step()
    (cpu, wall), (cpu_end, wall_end) = marks
    return (cpu_end - cpu) / steps, (wall_end - wall) / steps


class Plain(pl.LightningModule):
    def __init__(self, vocab_size: int, *, logs: bool) -> None:
        super().__init__()
        self.model = GPTModel(GPTConfig(vocab_size, **SHAPE))
        self.logs = logs

    def training_step(self, batch: TokenBatch, batch_idx: int) -> torch.Tensor:
        loss = self.model(batch.input_ids, batch.targets).loss
        assert loss is not None
        if self.logs:
            self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def off(folder: Path, steps: int, log_every: int, *, logs: bool = False) -> Seconds:
    datamodule, stopwatch = data(folder), Stopwatch(steps)
    callbacks: list[pl.Callback] = [stopwatch]
    if logs:
        callbacks.append(pl.callbacks.ModelCheckpoint(every_n_train_steps=SAVE_EVERY))
    with tempfile.TemporaryDirectory() as root:
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=WARM_UP + steps + 1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            log_every_n_steps=log_every,
            logger=pl.loggers.TensorBoardLogger(root) if logs else False,
            enable_checkpointing=logs,
            enable_progress_bar=logs,
            enable_model_summary=False,
            default_root_dir=root,
            callbacks=callbacks,
        )
        trainer.fit(Plain(datamodule.vocab_size, logs=logs), datamodule)
    return stopwatch.per_step()


class TimedCLI(GPTLightningCLI):
    stopwatch: Stopwatch

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self.stopwatch)
        return trainer


def ours(folder: Path, steps: int, log_every: int) -> Seconds:
    TimedCLI.stopwatch = Stopwatch(steps)
    with tempfile.TemporaryDirectory() as root:
        config = {
            "data": data_options(folder),
            "model": {"config": SHAPE, "schedule": {"warmup_steps": 10}},
            "checkpoint": {"every_n_train_steps": SAVE_EVERY},
            "trainer": {
                "accelerator": "cpu",
                "max_steps": WARM_UP + steps + 1,
                "limit_val_batches": 0,
                "log_every_n_steps": log_every,
                "default_root_dir": root,
            },
        }
        path = Path(root, "tiny.yaml")
        path.write_text(json.dumps(config))  # which is YAML too
        quiet()
        with ExitStack() as ending:
            TimedCLI(["fit", "--config", str(path)], RankGuard(), ending)
    return TimedCLI.stopwatch.per_step()


CONTENDERS: dict[str, Callable[[Path, int, int], Seconds]] = {
    "bare": bare,
    "off": off,
    "ours": ours,
    "lightning": partial(off, logs=True),
}


def _begin(threads: int) -> None:
    """In a process of each contender: its terminal is a file."""
    os.environ.update(FORCE_COLOR="1", COLUMNS="120", TERM="xterm-256color")
    screen = os.open(os.devnull, os.O_WRONLY)
    os.dup2(screen, 1)
    os.dup2(screen, 2)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")


def _turn(name: str, folder: Path, steps: int, log_every: int) -> Seconds:
    return CONTENDERS[name](folder, steps, log_every)


def measure(log_every: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A line each contender; the case of the JSON line."""
    found: dict[str, list[Seconds]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        processes = {}
        for name in CONTENDERS:
            processes[name] = stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), _begin, (options.threads,))
            )
            processes[name].submit(_turn, name, folder, SAVE_EVERY, log_every).result()  # to warm up
        for _ in range(options.rounds):
            for name, process in processes.items():
                turn = process.submit(_turn, name, folder, options.steps, log_every)
                found[name].append(turn.result())
    cpu = {name: 1e3 * statistics.median(turn[0] for turn in turns) for name, turns in found.items()}
    wall = {name: 1e3 * statistics.median(turn[1] for turn in turns) for name, turns in found.items()}
    for name in CONTENDERS:
        above = _median_difference(found[name], found["off"])
        print(
            f"logging every {log_every:3} {name:10} {cpu[name]:6.3f} ms of CPU a step  "
            f"{wall[name]:6.3f} ms of wall time  {above:+6.3f} against a Trainer with everything off"
        )
    return {
        "ours_above_off_ms": _median_difference(found["ours"], found["off"]),
        "lightning_above_off_ms": _median_difference(found["lightning"], found["off"]),
        "off_above_bare_ms": _median_difference(found["off"], found["bare"]),
        "vs_lightning": round(cpu["lightning"] / cpu["ours"], 2),
    }


def _median_difference(some: list[Seconds], others: list[Seconds]) -> float:
    """Of CPU time, in milliseconds."""
    return round(1e3 * statistics.median(a[0] - b[0] for a, b in zip(some, others)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000, help=f"measured in a turn; of {SAVE_EVERY} each")
    parser.add_argument("--log-every", type=int, nargs="+", default=[10])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = {f"log every {n}": measure(n, options, Path(folder)) for n in options.log_every}
    print(json.dumps(cases))


if __name__ == "__main__":
    sys.exit(main())
