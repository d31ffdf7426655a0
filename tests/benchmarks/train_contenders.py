"""What `train.py` times: the program's own `fit`, and other projects' models in a plain loop.

Each contender is a process that waits for the number of steps of its next turn, and tells how they went.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from nanogpt_checkout import load_nanogpt
from torch import Tensor

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training.optim import OptimizerConfig, ScheduleConfig

Step = Callable[[Tensor, Tensor], Tensor]  # one optimizer step on inputs and targets: the loss


@dataclass(frozen=True)
class Case:
    vocab_size: int
    n_layers: int
    d_model: int
    seq_len: int
    batch_size: int
    steps: int  # a turn

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            vocab_size=self.vocab_size,
            max_position_embeddings=self.seq_len,
            n_layers=self.n_layers,
            n_heads=self.d_model // 64,
            d_model=self.d_model,
            activation="gelu",  # nanoGPT's
        )


CASES = {
    "V 512": Case(512, 6, 384, 256, 12, steps=5),
    "V 50257": Case(50257, 6, 384, 256, 12, steps=2),
    "GPT-2 small": Case(50257, 12, 768, 512, 2, steps=2),
    "toy": Case(512, 1, 64, 32, 2, steps=2),  # to try the benchmark itself
}


def serve(connection: Connection, name: str, case: Case, options: argparse.Namespace) -> None:
    """A contender's process."""
    torch.set_num_threads(options.threads)
    turns = Turns(connection, CLOCKS[options.clock])
    project, precision = name.split()
    try:
        if project == "ours":
            train_ours(turns, case, precision, options)
        else:
            train_peer(turns, case, PEERS[project](case, precision, options), options)
    except BaseException:  # the program ends by SystemExit
        traceback.print_exc(file=sys.__stderr__)
        connection.send(None)


def train_peer(turns: "Turns", case: Case, step: Step, options: argparse.Namespace) -> None:
    text = torch.tensor(list(Path(options.text).read_bytes()))
    while True:
        turns.before_step()
        starts = torch.randint(len(text) - case.seq_len, (case.batch_size,)).tolist()
        windows = torch.stack([text[start : start + case.seq_len + 1] for start in starts])
        turns.after_step(float(step(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())))


class Turns:
    """Waits for its turn; the first step of one is not timed, since others have emptied the caches."""

    def __init__(self, connection: Connection, clock: Callable[[], float]) -> None:
        self.connection, self.clock = connection, clock
        self.left = 0

    def before_step(self) -> None:
        if self.left == 0:
            self.left = self.connection.recv()
            self.losses: list[float] = []

    def after_step(self, loss: float) -> None:
        self.losses.append(loss)
        self.left -= 1
        if len(self.losses) == 1:
            self.begun = self.clock()
        if self.left == 0:
            seconds = (self.clock() - self.begun) / (len(self.losses) - 1)
            peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.connection.send((self.losses, seconds, peak_mib))


def train_ours(turns: Turns, case: Case, precision: str, options: argparse.Namespace) -> None:
    """The program, with one callback more."""
    from lightning.pytorch import Callback

    from gpt_lightning.cli.app import GPTLightningCLI, run

    class TakeTurns(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            turns.before_step()

        def on_train_batch_end(self, *args: Any) -> None:
            turns.after_step(float(args[2]["loss"]))

    add = lambda cli: cli.trainer.callbacks.append(TakeTurns())  # noqa: E731
    GPTLightningCLI.after_instantiate_classes = add  # type: ignore
    os.chdir(tempfile.mkdtemp(dir=options.folder))
    write_tokenizer(Path("tokenizer"), case.vocab_size)
    # All of the model and its recipe: what is not said is the quickstart's, which no other contender trains.
    model = {name: value for name, value in asdict(case.config).items() if name != "vocab_size"}
    optimizer = {**asdict(OptimizerConfig()), "learning_rate": options.learning_rate}
    schedule = {**asdict(ScheduleConfig()), "warmup_steps": 0}
    parts = {"config": model, "optimizer": optimizer, "schedule": schedule}
    settings = {
        "data.train_files": options.text,
        "data.val_fraction": 0,
        "data.tokenizer": "tokenizer",
        "data.seq_len": case.seq_len,
        "data.batch_size": case.batch_size,
        **{f"model.{part}": json.dumps(values) for part, values in parts.items()},
        "trainer.max_steps": 10**6,
        "trainer.gradient_clip_val": 1.0,
        "trainer.precision": {"float32": "32-true", "bfloat16": "bf16-mixed"}[precision],
    }
    sys.stderr = open(os.devnull, "w")  # what the program reports is not of interest here
    run(["fit", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte a token, and so many more that no text has, for the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<unused {index}>" for index in range(vocab_size - len(tokens) - 1)] + ["<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))


def plain_step(model: Any, loss_of: Step, optimizer: torch.optim.Optimizer, precision: str) -> Step:
    """The loop that every tutorial has."""

    def step(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext():
            loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def nanogpt(case: Case, precision: str, options: argparse.Namespace) -> Step:
    module = load_nanogpt(options.nanogpt)
    sys.stdout = open(os.devnull, "w")  # of what it prints about itself
    sizes = {"n_layer": case.n_layers, "n_head": case.config.n_heads, "n_embd": case.d_model}
    model = module.GPT(
        module.GPTConfig(block_size=case.seq_len, vocab_size=case.vocab_size, dropout=0.0, bias=True, **sizes)
    )
    optimizer = model.configure_optimizers(0.1, options.learning_rate, (0.9, 0.95), "cpu")
    return plain_step(model, lambda inputs, targets: model(inputs, targets)[1], optimizer, precision)


def transformers(case: Case, precision: str, options: argparse.Namespace) -> Step:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": case.n_layers, "n_head": case.config.n_heads, "n_embd": case.d_model}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=case.vocab_size, n_positions=case.seq_len, **sizes, **none)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (0.9, 0.95), weight_decay=0.1)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())

    return plain_step(model, loss_of, optimizer, precision)


def litgpt(case: Case, precision: str, options: argparse.Namespace) -> Step:
    """With rotary positions and an untied head, which it has more parameters for."""
    from litgpt import GPT, Config

    sizes = {"n_layer": case.n_layers, "n_head": case.config.n_heads, "n_embd": case.d_model}
    model = GPT(
        Config(
            block_size=case.seq_len,
            vocab_size=case.vocab_size,
            padded_vocab_size=case.vocab_size,
            intermediate_size=4 * case.d_model,
            parallel_residual=False,
            **sizes,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, (0.9, 0.95), weight_decay=0.1)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return plain_step(model, loss_of, optimizer, precision)


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PEERS = {"nanoGPT": nanogpt, "transformers": transformers, "litgpt": litgpt}
