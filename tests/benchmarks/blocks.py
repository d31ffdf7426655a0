"""What the modern block costs beside GPT-2's, at equal parameters, and what grouped queries save.

    python tests/benchmarks/blocks.py

The modern block is that of Qwen3: rotary positions, RMS norms, SwiGLU, norms of queries and keys, no biases;
`grouped` has a head of keys and values for every four of queries. A training step is forward, backward and
AdamW of 6 layers of 512 (T 256, batch 8); decoding is greedy, of 12 layers of 768 with packed weights, after
a prompt of 32 tokens. `long` is 6 layers of 512 on texts of 2,048 tokens: a training step of one, and
decoding after 1,984 tokens, batch 4. The blocks take turns in one process, and medians are
shown, as times that of GPT-2's block. The last line is the result as JSON: case -> block -> that ratio.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from recipes import MODERN

from gpt_lightning.generation.engine import generate
from gpt_lightning.generation.sampling import GenerationConfig
from gpt_lightning.kernels.device import keep_freed_memory
from gpt_lightning.kernels.packed_linear import packed
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.training.optim import OptimizerConfig, build_optimizer

BLOCKS = ("GPT-2", "modern", "grouped")
V, HEAD_DIM, GROUP, N_NEW = 8192, 64, 4, 32


@dataclass(frozen=True)
class Case:
    name: str
    layers: int
    width: int
    T: int
    batch: int
    prompt: int | None = None  # a training step where there is none
    dtype: torch.dtype = torch.float32


CASES = [
    Case("train float32", 6, 512, 256, 8),
    Case("train bf16-mixed", 6, 512, 256, 8, dtype=torch.bfloat16),
    Case("decode float32, batch 1", 12, 768, 256, 1, prompt=32),
    Case("decode float32, batch 8", 12, 768, 256, 8, prompt=32),
    Case("decode bfloat16, batch 1", 12, 768, 256, 1, prompt=32, dtype=torch.bfloat16),
    Case("long, train bf16-mixed", 6, 512, 2048, 1, dtype=torch.bfloat16),
    Case("long, decode float32", 6, 512, 2048, 4, prompt=1984),
]


def training_step(model: GPTModel, case: Case) -> Callable[[], None]:
    optimizer = build_optimizer(model, OptimizerConfig())
    ids = torch.randint(V, (case.batch, case.T + 1))
    is_mixed = case.dtype != torch.float32

    def step() -> None:
        with torch.autocast("cpu", case.dtype, enabled=is_mixed):
            loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(model: GPTModel, case: Case, n_new: int) -> Callable[[], None]:
    prompts = torch.randint(V, (case.batch, case.prompt or 0)).tolist()
    settings = GenerationConfig(max_new_tokens=n_new, do_sample=False)
    copy = packed(model.to(case.dtype).eval(), quantize=None, n_rows=case.batch)

    def run() -> None:
        list(generate(copy, prompts, settings, eos_token_id=None, batch_size=case.batch))

    return run


def make_model(block: str, case: Case) -> GPTModel:
    n_heads = case.width // HEAD_DIM
    options: dict[str, Any] = {} if block == "GPT-2" else dict(MODERN)
    if block == "grouped":
        options["n_kv_heads"] = n_heads // GROUP
    torch.manual_seed(0)
    shape = GPTConfig(V, case.T, n_layers=case.layers, n_heads=n_heads, d_model=case.width, **options)
    return GPTModel(shape)


def timed(runs: list[Callable[[], None]], rounds: int) -> Iterator[list[float]]:
    """Yields the seconds of each run, in turns; the first turn warms up."""
    for number in range(rounds + 1):
        seconds = []
        for run in runs:
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        if number:
            yield seconds


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Returns median seconds of each block: of a step, or of a token of each row."""
    models = [make_model(block, case) for block in BLOCKS]
    if case.prompt is None:
        columns = zip(*timed([training_step(model, case) for model in models], rounds))
        return dict(zip(BLOCKS, map(statistics.median, columns)))
    # One token takes the whole prompt with it; the others are what decoding is.
    runs = [decoding(model, case, n) for model in models for n in (1, 1 + N_NEW)]
    columns = [statistics.median(column) for column in zip(*timed(runs, rounds))]
    return {block: (columns[2 * i + 1] - columns[2 * i]) / N_NEW for i, block in enumerate(BLOCKS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs="+", default=[case.name for case in CASES])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as every training of the program
    result = {}
    print(f"{'case':28} {'GPT-2 ms':>9} {'modern':>8} {'grouped':>8}")
    for case in CASES:
        if case.name in options.case:
            seconds = measure(case, options.rounds)
            result[case.name] = {block: round(seconds[block] / seconds["GPT-2"], 3) for block in BLOCKS}
            modern, grouped = result[case.name]["modern"], result[case.name]["grouped"]
            print(f"{case.name:28} {1000 * seconds['GPT-2']:9.1f} {modern:7.2f}x {grouped:7.2f}x", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
