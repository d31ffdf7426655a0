"""What the Trainer costs a step above a bare loop, and what all that this program adds to it costs.

    python tests/benchmarks/trainer_overhead.py                       every 10th step logged, as by default
    python tests/benchmarks/trainer_overhead.py --log-every 10 50

A model so small that the work around it shows; the same model, batches, optimizer and schedule everywhere:
- bare: a loop of forward, backward, optimizer, schedule;
- off: Lightning's Trainer with everything off and a module that only returns its loss;
- ours: the whole program by its command line: the guard against NaN, exact resume, TensorBoard, throughput,
  the progress bar as on a terminal, a checkpoint every 200 steps;
- lightning: a plain module that calls `self.log` each step, with TensorBoard, progress bar and checkpoints.

They take turns every 50 steps, so that a machine whose speed changes, changes it for all; each round has new
processes, as where one happens to lie in memory shows too. CPU time of the whole process, with what its
threads draw and write, and wall time; medians over stretches of 200 steps, and of their differences. One
thread: a second one would wait for work most of the time, which counts as CPU time. That the model learns is
looked at first. The last line is the result as JSON: milliseconds of CPU a step.
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
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier, Semaphore
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from gpt_lightning.callbacks.rank_guard import RankGuard
from gpt_lightning.cli.app import GPTLightningCLI
from gpt_lightning.cli.errors import quiet
from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import TokenBatch
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig, build_optimizer

SAVE_EVERY, SEQ_LEN = 200, 32
WARM_UP = SAVE_EVERY + 25  # with what the first checkpoint imports; no later one is at the end of a turn
LEARNT = 3.0  # 11 letters by chance are ln 11 = 2.4, and 5.5 before training
PASS_EVERY, LONGEST = 50, 300  # steps; seconds to wait for others
TARGET_MS = 1.0
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
    """Stands last, and lets the others run every PASS_EVERY steps."""

    ready: Barrier  # these are set in the process of a contender
    own_turn: Semaphore
    next_turn: Semaphore

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.stretches: list[Seconds] = []
        self._done = -WARM_UP
        self._since = self._spent = (0.0, 0.0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.count(outputs["loss"])

    def count(self, loss: torch.Tensor) -> None:
        self._done += 1
        if self._done < 0 or self._done % PASS_EVERY or self._done > self.steps:
            return
        if self._done == 0:
            if float(loss) > LEARNT:
                sys.exit(f"a loss of {float(loss):.2f} after {WARM_UP} steps: this contender does not learn")
            self.ready.wait(LONGEST)
        else:
            self._spent = _add(self._spent, _now(), self._since)
            if self._done % SAVE_EVERY == 0:
                self.stretches.append((self._spent[0] / SAVE_EVERY, self._spent[1] / SAVE_EVERY))
                self._spent = (0.0, 0.0)
            self.next_turn.release()
        if self._done < self.steps and not self.own_turn.acquire(timeout=LONGEST):
            sys.exit("another contender has ended before its time")
        self._since = _now()


def _now() -> Seconds:
    return time.process_time(), time.perf_counter()


def _add(spent: Seconds, now: Seconds, since: Seconds) -> Seconds:
    return spent[0] + now[0] - since[0], spent[1] + now[1] - since[1]


def bare(folder: Path, steps: int, log_every: int) -> list[Seconds]:
    datamodule = data(folder)
    model = GPTModel(GPTConfig(datamodule.vocab_size, **SHAPE))
    optimizer, schedule = optimizer_and_schedule(model)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    datamodule.trainer = trainer
    stopwatch = Stopwatch(steps)
    for step, batch in enumerate(datamodule.train_dataloader(), start=1):
        optimizer.zero_grad()
        loss = model(batch.input_ids, batch.targets).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        schedule.step()
        stopwatch.count(loss.detach())
        if step == WARM_UP + steps:
            break
    return stopwatch.stretches


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


def off(folder: Path, steps: int, log_every: int, *, logs: bool = False) -> list[Seconds]:
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
    return stopwatch.stretches


class TimedCLI(GPTLightningCLI):
    stopwatch: Stopwatch

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.append(self.stopwatch)
        return trainer


def ours(folder: Path, steps: int, log_every: int) -> list[Seconds]:
    TimedCLI.stopwatch = Stopwatch(steps)
    shape = asdict(GPTConfig(**SHAPE))
    with tempfile.TemporaryDirectory() as root:
        config = {
            "data": data_options(folder),
            # What is not said is the quickstart's, which no other contender trains.
            "model": {
                "config": {name: value for name, value in shape.items() if name != "vocab_size"},
                "optimizer": asdict(OptimizerConfig()),
                "schedule": {**asdict(ScheduleConfig()), "warmup_steps": 10},
            },
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
            TimedCLI(["fit", "--config", str(path)], None, RankGuard(), ending).run_verb()
    return TimedCLI.stopwatch.stretches


CONTENDERS: dict[str, Callable[[Path, int, int], list[Seconds]]] = {
    "bare": bare,
    "off": off,
    "ours": ours,
    "lightning": partial(off, logs=True),
}


def _run(name: str, folder: Path, options: argparse.Namespace, log_every: int, results: Connection) -> None:
    """In a process of its own: its terminal is a file."""
    os.environ.update(FORCE_COLOR="1", COLUMNS="120", TERM="xterm-256color")
    screen = os.open(os.devnull, os.O_WRONLY)
    os.dup2(screen, 1)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    quiet_stderr = os.dup(2)
    os.dup2(screen, 2)
    try:
        results.send(CONTENDERS[name](folder, options.steps, log_every))
    except BaseException as error:
        os.write(quiet_stderr, f"{name}: {error!r}\n".encode())
        Stopwatch.ready.abort()
        raise


def one_round(folder: Path, options: argparse.Namespace, log_every: int) -> dict[str, list[Seconds]]:
    context = get_context("fork")
    turns = [context.Semaphore(number == 0) for number in range(len(CONTENDERS))]
    Stopwatch.ready = context.Barrier(len(CONTENDERS))
    ends, processes = {}, []
    for number, name in enumerate(CONTENDERS):
        Stopwatch.own_turn, Stopwatch.next_turn = turns[number], turns[(number + 1) % len(turns)]
        ends[name], results = context.Pipe(duplex=False)
        processes.append(context.Process(target=_run, args=(name, folder, options, log_every, results)))
        processes[-1].start()
        results.close()
    try:
        return {name: end.recv() for name, end in ends.items()}
    except EOFError:
        sys.exit("a contender has failed")
    finally:
        for process in processes:
            process.join(LONGEST)


def measure(log_every: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """A line each contender; the case of the JSON line."""
    data(folder).setup("fit")  # one of them would write the cache, the others wait
    found: dict[str, list[Seconds]] = {name: [] for name in CONTENDERS}
    for _ in range(options.rounds):
        for name, stretches in one_round(folder, options, log_every).items():
            found[name] += stretches
    cpu = {name: 1e3 * statistics.median(turn[0] for turn in turns) for name, turns in found.items()}
    wall = {name: 1e3 * statistics.median(turn[1] for turn in turns) for name, turns in found.items()}
    for name in CONTENDERS:
        above = _differences(found[name], found["off"])
        low, middle, high = statistics.quantiles(above, n=4) if len(above) > 1 else above * 3
        print(
            f"logging every {log_every:3} {name:10} {cpu[name]:6.3f} ms of CPU a step  "
            f"{wall[name]:6.3f} ms of wall time  {middle:+6.3f} (quartiles {low:+.3f}, {high:+.3f}) "
            "against a Trainer with everything off"
        )
    return {
        "ours_above_off_ms": _median_difference(found["ours"], found["off"]),
        "lightning_above_off_ms": _median_difference(found["lightning"], found["off"]),
        "off_above_bare_ms": _median_difference(found["off"], found["bare"]),
        "vs_lightning": round(cpu["lightning"] / cpu["ours"], 2),
    }


def _differences(some: list[Seconds], others: list[Seconds]) -> list[float]:
    """Of CPU time, in milliseconds, stretch by stretch."""
    return [1e3 * (a[0] - b[0]) for a, b in zip(some, others)]


def _median_difference(some: list[Seconds], others: list[Seconds]) -> float:
    return round(statistics.median(_differences(some, others)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help=f"of a round; a multiple of {SAVE_EVERY}")
    parser.add_argument("--log-every", type=int, nargs="+", default=[10])
    options = parser.parse_args()
    if options.steps <= 0 or options.steps % SAVE_EVERY:
        parser.error(f"--steps {options.steps} is no multiple of {SAVE_EVERY}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        cases = {f"log every {n}": measure(n, options, Path(folder)) for n in options.log_every}
    print(f"target: ours at most {TARGET_MS} ms above a Trainer with everything off")
    print(json.dumps(cases))


if __name__ == "__main__":
    sys.exit(main())
