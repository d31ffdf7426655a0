"""Tokens a second of training on a CPU, beside nanoGPT, transformers, litgpt and the processor's limit.

    python tests/benchmarks/train.py                     ours and transformers (and litgpt, if it is installed)
    python tests/benchmarks/train.py --nanogpt PATH      also nanoGPT, from a checkout

Ours is the program's own `fit`, with logging, TensorBoard, throughput and guards as always; the others are
their models in a plain loop: forward, backward, clipping, AdamW. All read the same text, byte by byte. Each
contender has a process of its own; they take turns, and medians are shown. The limit is the best rate of
large bfloat16 products in the same rounds, and a contender's share of it counts what its model needs
(training/flops.py), not what it computes. Peak memory is the operating system's, of the whole process. First
each contender has to learn: the loss must fall. The last line is the result as JSON.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.config import GPTConfig
from gpt_lightning.training.flops import training_flops_per_token

LEARNS_BY = 0.5  # nats, in the first steps
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
    "V 50257": Case(50257, 6, 384, 256, 12, steps=3),
    "GPT-2 small": Case(50257, 12, 768, 512, 2, steps=2),
    "toy": Case(512, 1, 64, 32, 2, steps=2),  # to try the benchmark itself
}


# ---- what one process does


def serve(connection: Connection, name: str, case: Case, options: argparse.Namespace) -> None:
    """A contender's process: learns first, then takes the turns that it is told to take."""
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    try:
        if name.startswith("ours"):
            train_ours(connection, case, name.removeprefix("ours "), options, clock)
        else:
            train_peer(connection, case, name, options, clock)
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        connection.send(None)


def train_peer(
    connection: Connection, case: Case, name: str, options: argparse.Namespace, clock: Callable[[], float]
) -> None:
    project, precision = name.split()
    torch.manual_seed(0)
    step = {"nanoGPT": nanogpt, "transformers": transformers, "litgpt": litgpt}[project](
        case, precision, options
    )
    text = torch.tensor(list(Path(options.text).read_bytes()))
    turns = Turns(connection, options, clock)
    while turns.goes_on():
        starts = torch.randint(len(text) - case.seq_len, (case.batch_size,)).tolist()
        windows = torch.stack([text[start : start + case.seq_len + 1] for start in starts])
        turns.after_step(float(step(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())), case.steps)


class Turns:
    """Waits for its turn, and tells how long the steps of it took; the first turn is to learn."""

    def __init__(
        self, connection: Connection, options: argparse.Namespace, clock: Callable[[], float]
    ) -> None:
        self.connection, self.clock = connection, clock
        self.left = self.to_learn = options.learn
        self.begun = 0.0
        self.losses: list[float] = []

    def goes_on(self) -> bool:
        """Before a step: whether there is another turn."""
        if self.left == 0:
            if not self.connection.recv():
                return False
            self.left = -1
            self.begun = self.clock()
        return True

    def after_step(self, loss: float, steps: int) -> None:
        if self.losses is not None and self.to_learn:
            self.losses.append(loss)
            self.to_learn -= 1
            self.left = self.to_learn
            if self.left == 0:
                self.connection.send(self.losses[-1] < self.losses[0] - LEARNS_BY)
            return
        self.left = steps - 1 if self.left == -1 else self.left - 1
        if self.left == 0:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            self.connection.send(((self.clock() - self.begun) / steps, peak))


# ---- the contenders


def train_ours(
    connection: Connection,
    case: Case,
    precision: str,
    options: argparse.Namespace,
    clock: Callable[[], float],
) -> None:
    """The program, with one callback more."""
    from lightning.pytorch import Callback

    from gpt_lightning.cli import GPTLightningCLI, run

    turns = Turns(connection, options, clock)

    class TakeTurns(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            if not turns.goes_on():
                os._exit(0)

        def on_train_batch_end(self, *args: Any) -> None:
            turns.after_step(float(args[2]["loss"]), case.steps)

    GPTLightningCLI.before_fit = lambda cli: cli.trainer.callbacks.append(TakeTurns())  # type: ignore
    os.chdir(tempfile.mkdtemp(dir=options.folder))
    write_tokenizer(Path("tokenizer"), case.vocab_size)
    model = {name: getattr(case.config, name) for name in ("n_layers", "n_heads", "d_model", "activation")}
    settings = {
        "data.train_files": options.text,
        "data.val_fraction": 0,
        "data.tokenizer": "tokenizer",
        "data.seq_len": case.seq_len,
        "data.batch_size": case.batch_size,
        "model.config.max_position_embeddings": case.seq_len,
        **{f"model.config.{name}": value for name, value in model.items()},
        "model.optimizer.learning_rate": options.learning_rate,
        "model.schedule.warmup_steps": 0,
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


def plain_step(
    model: Any, loss_of: Step, optimizer: torch.optim.Optimizer, precision: str
) -> Step:
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
    module = _load(Path(options.nanogpt) / "model.py")
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


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.stdout = open(os.devnull, "w")
    spec.loader.exec_module(module)
    return module


# ---- the comparison


def matmul_rate(clock: Callable[[], float]) -> float:
    """Operations a second of large bfloat16 products, the best of five."""
    matrix = torch.randn(2048, 2048).bfloat16()
    seconds = []
    for _ in range(5):
        begin = clock()
        torch.nn.functional.linear(matrix, matrix)
        seconds.append(clock() - begin)
    return 2 * 2048**3 / min(seconds)


def measure(title: str, options: argparse.Namespace) -> dict[str, float]:
    case = CASES[title]
    context = get_context("spawn")
    contenders: dict[str, Connection] = {}
    processes = []
    for name in options.names:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, case, options), daemon=True)
        process.start()
        learns = ours.recv()  # one after the other: no one learns beside another's measurement
        if learns:
            contenders[name] = ours
            processes.append(process)
        else:
            print(f"{title:12} {name:22} {'failed' if learns is None else 'does not learn'}: left out")
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, float] = {}
    rate = 0.0
    for _ in range(options.rounds):
        rate = max(rate, matmul_rate(clock))
        for name, connection in contenders.items():
            connection.send(True)
            took, peaks[name] = connection.recv()
            seconds[name].append(took)
    for process in processes:
        process.kill()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return report(title, case, medians, peaks, rate)


def report(
    title: str, case: Case, medians: dict[str, float], peaks: dict[str, float], rate: float
) -> dict[str, float]:
    """A line each contender, and the ratios of ours."""
    tokens = case.batch_size * case.seq_len
    needed = training_flops_per_token(case.config, case.seq_len) * tokens
    shares = {name: needed / median / rate for name, median in medians.items()}
    for name, median in medians.items():
        print(
            f"{title:12} {name:22} {tokens / median:8,.0f} tokens/s {1e3 * median:8,.0f} ms a step "
            f"{shares[name]:6.1%} of {rate / 1e9:,.0f} GFLOPS {peaks[name]:7,.0f} MiB"
        )
    best, plain = "ours bfloat16", "ours float32"
    found: dict[str, float] = {"share_of_limit": shares[best]}
    for peer in ("nanoGPT", "transformers", "litgpt"):
        for precision, ending in (("float32", ""), ("bfloat16", "_bfloat16")):
            if f"{peer} {precision}" in medians:
                key = f"vs_{peer.lower()}{ending}"
                found[key] = medians[f"{peer} {precision}"] / medians[best]
                if precision == "float32":
                    found[f"float32_vs_{peer.lower()}"] = medians[f"{peer} {precision}"] / medians[plain]
                found[f"memory_{key}"] = peaks[best] / peaks[f"{peer} {precision}"]
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--learn", type=int, default=8, help="steps in which the loss has to fall")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: of busy machines")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES)[:3])
    parser.add_argument("--text", help="a text file; by default Python's own documentation")
    parser.add_argument("--nanogpt", help="path of a checkout")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers = ["transformers"]
    peers += ["nanoGPT"] if options.nanogpt else []
    peers += ["litgpt"] if importlib.util.find_spec("litgpt") else []
    options.names = [f"{who} {dtype}" for who in [*peers, "ours"] for dtype in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        options.text = str(Path(options.text).resolve() if options.text else write_text(Path(folder)))
        print(json.dumps({title: measure(title, options) for title in options.case}))


def write_text(folder: Path) -> Path:
    from pydoc_data.topics import topics

    path = folder / "text.txt"
    path.write_text("\n".join(topics.values()), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
