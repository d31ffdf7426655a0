"""How long the program takes to start, beside what `import lightning, transformers` takes.

    python tests/benchmarks/startup.py

From the start of a process to the first byte that it writes to its standard output, which is: the end of
the imports; the first token of `predict` and `generate`, of which only one is asked; the end of the first
optimizer step of `fit`, told by a callback; the help page. The checkpoint is the quickstart's after a few
steps; it is made before, and every process runs once to warm the page cache. The cases take turns, and
medians are shown: of wall time, and of processor time, which other work on the machine disturbs less. Both
ratios are in the last line, as JSON; below 1 is faster than the imports. `import lightning` imports parts of
transformers, by way of torchmetrics, and `import transformers` only its top: models come when they are used.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = [sys.executable, "-m", "gpt_lightning"]
IMPORT = "import lightning, transformers"
FIRST_STEP = """
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, *args):
        print("step", flush=True)
"""
SMALL = ["--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"]
STEP = ["--trainer.max_steps", "1", "--allow_import", "first_step"]
STEP += ["--trainer.callbacks", "[{class_path: first_step.FirstStep}]"]
ONE_TOKEN = ["--generation.max_new_tokens", "1"]
CASES = {
    IMPORT: [sys.executable, "-c", f"{IMPORT}; print('imported', flush=True)"],
    "fit, first step": [*PROGRAM, "fit", *SMALL, *STEP, "--run_name", "started"],
    "predict, first token": [*PROGRAM, "predict", "--data.prompts", "Return the", *ONE_TOKEN],
    "generate, first token": [*PROGRAM, "generate", "--prompt", "Return the", *ONE_TOKEN],
    "fit --help": [*PROGRAM, "fit", "--help"],
    "predict --help": [*PROGRAM, "predict", "--help"],
    "generate --help": [*PROGRAM, "generate", "--help"],
    "--help": [*PROGRAM, "--help"],
}


def first_output(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first byte on standard output: of wall time, and of processor time."""
    with (folder / "messages").open("wb+") as messages:
        begin = time.perf_counter()
        process = subprocess.Popen(
            words, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=messages, bufsize=0
        )
        assert process.stdout is not None
        byte = process.stdout.read(1)
        wall = time.perf_counter() - begin
        processor = processor_seconds(process.pid)
        process.stdout.read()
        if process.wait() or not byte:
            messages.seek(0)
            raise RuntimeError(f"{words} wrote {byte!r} and ended with {messages.read().decode()}")
    return wall, processor


def processor_seconds(process: int) -> float:
    """Of a process that runs, and of its children that have ended, as Linux tells; NaN elsewhere."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return float("nan")
    ticks = text.rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def measure(folder: Path, rounds: int, environment: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Median seconds of each case, of wall time and of processor time."""
    (folder / "first_step.py").write_text(FIRST_STEP)
    train = [*PROGRAM, "fit", *SMALL, "--trainer.max_steps", "20", "--run_name", "small"]
    done = subprocess.run(train, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    for number in range(rounds + 1):
        for name, words in CASES.items():
            seconds = first_output(words, folder, environment)
            if number:
                times[name].append(seconds)
    return {name: (_median(0, taken), _median(1, taken)) for name, taken in times.items()}


def _median(column: int, rows: list[tuple[float, float]]) -> float:
    return statistics.median(row[column] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "PYTHONPATH": os.pathsep.join([name, str(Path(__file__).parents[2])]),
        }
        medians = measure(Path(name), options.rounds, environment)
    wall_limit, processor_limit = medians[IMPORT]
    cases = {}
    print(f"{'':32} {'wall s':>7} {'ratio':>6} {'CPU s':>7} {'ratio':>6}")
    for name, (wall, processor) in medians.items():
        ratios = wall / wall_limit, processor / processor_limit
        print(f"{name:32} {wall:7.2f} {ratios[0]:6.2f} {processor:7.2f} {ratios[1]:6.2f}")
        if name != IMPORT:
            names = ("vs_import", "vs_import_cpu")
            cases[name] = {key: round(ratio, 2) for key, ratio in zip(names, ratios) if ratio == ratio}
    print(json.dumps(cases))


if __name__ == "__main__":
    main()
