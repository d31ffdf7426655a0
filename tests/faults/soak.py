"""Kills runs at random moments, and asks whether each, resumed, is the run that was never killed.

    python -m tests.faults.soak --kills 100
    python -m tests.faults.soak --kills 20 --ranks 4
"""

import argparse
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from gpt_lightning.checkpoint.checkpoint import Checkpoint
from gpt_lightning.checkpoint.files import verify
from tests.faults.harness import PHASES, TRAINING, VALIDATING, Process, run, weights_hash
from tests.faults.runs import newest_last, tensor_parallel, write_run
from tests.faults.trace import differences

MOMENTS = ("training", "saving", "validating", "starting")


@dataclass
class Tally:
    """What the kills hit, and what was wrong afterwards."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumes: int = 0
    wrong: list[str] = field(default_factory=list)

    def table(self) -> str:
        rows = [f"| killed while {moment} | {self.kills[moment]} |" for moment in MOMENTS]
        rows += [
            f"| kills in all | {sum(self.kills.values())} |",
            f"| runs brought to their end | {self.runs} |",
            f"| resumes | {self.resumes} |",
            f"| differences from the run that was never killed, files lost or torn | {len(self.wrong)} |",
        ]
        return "\n".join(["| soak | count |", "|---|---|", *rows])


def soak(folder: Path, *, kills: int, ranks: int = 1, seed: int = 0, steps: int = 60) -> Tally:
    """Kill runs of one configuration until that many kills are done."""
    generator, tally = random.Random(seed), Tally()
    options = tensor_parallel(ranks) if ranks > 1 else {}
    data = {"batch_size": 8 if ranks == 1 else 16 // ranks}  # 8 samples a step, by pairs of ranks
    sections = {"trainer": {"max_steps": steps, **options}, "data": data}
    words = write_run(folder, "whole", **sections)
    started = time.monotonic()
    code, output = run(words, folder, ranks=ranks)
    assert code == 0, output
    whole_seconds = time.monotonic() - started
    whole_hash = weights_hash(folder / "checkpoints" / "whole" / "last.ckpt")
    while sum(tally.kills.values()) < kills:
        name = f"run{tally.runs}"
        words = write_run(folder, name, **sections)
        _kill_to_the_end(words, folder, name, ranks, kills, whole_seconds, generator, tally)
        if weights_hash(newest_last(folder, name)) != whole_hash:
            tally.wrong.append(f"{name}: other weights")
        for rank in range(ranks):
            found = differences(folder / name, folder / "whole", rank)
            tally.wrong += [f"{name} rank {rank}: {difference}" for difference in found]
        tally.runs += 1
        for run_folder in folder.glob(f"checkpoints/{name}*"):
            shutil.rmtree(run_folder)
    return tally


def _kill_to_the_end(
    words: list[str],
    folder: Path,
    name: str,
    ranks: int,
    kills: int,
    whole_seconds: float,
    generator: random.Random,
    tally: Tally,
) -> None:
    """Start one run again and again, until it ends by itself."""
    while True:
        left_behind = _temporaries(folder, name)
        workers = str(generator.choice([0, 0, 0, 2]))  # which must not matter
        process = Process([*words, "--data.num_workers", workers], folder, ranks=ranks, log=f"{name}.log")
        if sum(tally.kills.values()) < kills:
            _kill(process, generator, whole_seconds, tally)
        codes = process.exit_codes(180)
        if codes[0] == 0:
            if still := left_behind & _temporaries(folder, name):
                tally.wrong.append(f"{name}: left behind {sorted(still)}")
            return
        if -signal.SIGKILL not in codes:
            tally.wrong.append(f"{name}: exit codes {codes}: {process.output()[-1000:]}")
            return
        tally.resumes += 1
        tally.wrong += _torn(folder, name)


def _kill(process: Process, generator: random.Random, whole_seconds: float, tally: Tally) -> None:
    moment = generator.choices(MOMENTS, weights=(5, 5, 4, 1))[0]
    if moment == "starting":
        process.run_for(generator.uniform(0, whole_seconds / 3))
    else:
        process.wait_until(lambda: process.phase >= TRAINING)
        process.run_for(generator.uniform(0, whole_seconds / 8))
        if moment == "saving":
            process.wait_until(lambda: process.is_writing)
            process.run_for(generator.uniform(0, 0.004))
        elif moment == "validating":
            process.wait_until(lambda: process.phase == VALIDATING)
            process.run_for(generator.uniform(0, 0.004))
    hit = "saving" if process.is_writing else PHASES[process.phase]
    if process.is_alive and hit != "ended":
        process.send(signal.SIGKILL)
        tally.kills[hit] += 1


def _temporaries(folder: Path, name: str) -> set[str]:
    return {str(path) for path in folder.glob(f"checkpoints/{name}*/.*") if path.name != ".lock"}


def _torn(folder: Path, name: str) -> list[str]:
    """Every checkpoint is whole at every moment."""
    wrong = []
    for path in folder.glob(f"checkpoints/{name}*/*.ckpt"):
        try:
            verify(path)
            Checkpoint.open(path).contents
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 4))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(Path(folder), kills=options.kills, ranks=options.ranks, seed=options.seed)
    print(tally.table())
    print("\n".join(tally.wrong))
    raise SystemExit(bool(tally.wrong))


if __name__ == "__main__":
    main()
