"""Peak memory of one training step with the chunked loss and with the logits held whole, side by side.

    python tests/benchmarks/loss_memory.py

Each variant runs in a process of its own, since the peak is the operating system's (ru_maxrss). The last line
is JSON: case -> {"before_mib": ..., "peak_mib": ...} and the ratio of what the step itself took.
"""

import json
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel

CASES = ("naive", "chunked")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(case: str) -> dict[str, float]:
    """Forward and backward of a small model with GPT-2's vocabulary, 8 windows of 512 tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    config = GPTConfig(vocab_size=50257, max_position_embeddings=512, n_layers=2, n_heads=4, d_model=256)
    model = GPTModel(config)
    input_ids = torch.randint(50257, (8, 512))
    targets = torch.randint(50257, (8, 512))
    before = peak_mib()
    if case == "naive":
        loss = F.cross_entropy(model(input_ids).logits.flatten(0, 1), targets.flatten())
    else:
        loss = model(input_ids, targets).loss
    loss.backward()
    return {"before_mib": round(before), "peak_mib": round(peak_mib()), "loss": round(float(loss), 5)}


def main() -> None:
    results = {}
    for case in CASES:
        command = [sys.executable, __file__, case]
        results[case] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        print(f"{case:8} {results[case]}", file=sys.stderr)
    taken = [results[case]["peak_mib"] - results[case]["before_mib"] for case in CASES]
    print(json.dumps({**results, "step_memory_ratio": round(taken[0] / taken[1], 2)}))


if __name__ == "__main__":
    print(json.dumps(step(sys.argv[1]))) if len(sys.argv) > 1 else main()
