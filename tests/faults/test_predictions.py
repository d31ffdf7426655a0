"""Predictions that are killed on one set of ranks and go on on another are those that were never killed."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import Process, run

pytestmark = [pytest.mark.slow, pytest.mark.faults]
DDP = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
TENSOR_PARALLEL = ["--trainer.devices", "2", "--trainer.strategy", "gpt_lightning.TensorParallelDDPStrategy"]
TENSOR_PARALLEL += ["--trainer.strategy.tensor_parallel_size", "2"]


def kept(folder: Path) -> list[tuple[int, int]]:
    """Prompt and sample of each whole line of the journals, their first lines aside."""
    lines = [line for path in folder.glob(".p.jsonl.part-*") for line in path.read_bytes().split(b"\n")[1:-1]]
    return [(row["index"], row["sample"]) for row in map(json.loads, lines)]


def test_killed_predictions_go_on_on_other_ranks(tiny_config: Callable[..., Path], tmp_path: Path) -> None:
    code, output = run(["fit", "--config", str(tiny_config())], tmp_path)
    assert code == 0, output
    (tmp_path / "prompts.txt").write_text("".join(f"The {'cat ' * (n % 7)}{n}\n" for n in range(40)))
    words = ["predict", "--data.prompts_file", "prompts.txt", "--data.batch_size", "2"]
    words += ["--generation.num_samples", "2", "--generation.max_new_tokens", "24"]
    code, output = run([*words, "--output", "whole.jsonl"], tmp_path)
    assert code == 0, output
    for strategy, enough in ((DDP, 12), (TENSOR_PARALLEL, 30)):
        process = Process([*words, *strategy, "--output", "p.jsonl"], tmp_path, ranks=2)
        assert process.wait_until(lambda: len(kept(tmp_path)) >= enough), process.output()
        process.send(signal.SIGKILL)
        process.exit_codes()
        assert not (tmp_path / "p.jsonl").exists()
    found = kept(tmp_path)
    again = len(found) - len(set(found))
    assert again <= 6, "only a prompt with a sample to go, of six rows under way, is run again"
    finished = 2 * sum({(number, 0), (number, 1)} <= set(found) for number in range(40))
    code, output = run([*words, "--output", "p.jsonl"], tmp_path)
    assert code == 0 and f"resuming: {finished} of 80 completions were finished" in output, output
    assert f"of {80 - finished} completions in" in output
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".p.jsonl.part-*"))
