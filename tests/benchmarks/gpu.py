"""Training and generation on one GPU, beside nanoGPT, transformers and what the card can multiply.

    python tests/benchmarks/gpu.py --nanogpt PATH --luxun FILE --output gpu.json
    python tests/benchmarks/gpu.py --toy                             on a CPU, at toy sizes, to try it

It needs what the project itself needs, and no network. PATH is a checkout of nanoGPT, or a folder with its
model.py; FILE is Lu Xun's prose, for configs/luxun.yaml as it stands, in bf16. Without them their cases are
left out. The parts run one after another, the most telling first, each in a process of its own that may take
so long and no longer. What finds no time within `--minutes` is left out and said to be; `--parts` runs some
of them alone.

Every contender trains on the same synthetic stream and must learn it, else it is refused: a dead optimizer is
fast. MFU counts operations as PaLM's appendix B, with attention, and is a share of the rate of large bf16
products measured in the same run; beside it that of the data sheet. B is the batch, "large" one as large as
fits, and a case is compared with the peer's of the same name. "modern" gives the block of configs/modern.yaml
with Muon, and GPT-2's with AdamW, the same seconds on torch's own source: their losses at equal time.

The table is printed as it comes, each point of a curve when it is known, and written to `--output` as it
grows. The last line is the result as JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# In order of importance, with the most seconds that each may take.
SECONDS = {
    "limits": 30,
    "luxun": 240,
    "ours": 100,
    "nanogpt": 120,
    "modern": 200,
    "checks": 60,
    "350M": 90,
    "1.5B": 100,
    "not_compiled": 40,
    "syncs": 30,
    "documents": 60,
    "attention": 45,
    "transformers": 80,
    "generation": 40,
}
HEAD = f"{'case':46} {'tokens/s':>10} {'step ms':>9} {'MFU':>6} {'sheet':>6} {'GiB':>6}  more"


def run_process(name: str, words: list[str], seconds: float, report: "Report") -> None:
    """Cases are taken as they come, so those that were finished when the time ran out are kept."""
    command = [sys.executable, str(HERE / "gpu.py"), "--part", name, *words]
    path = [str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,  # with its own children, to end all of them at once
        )
        timer = threading.Timer(seconds, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith("CASE ") and line.endswith("\n"):  # else it ended in the middle of it
                    report.add(*json.loads(line.removeprefix("CASE ")))
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:  # interrupted: it would keep the GPU
                os.killpg(process.pid, signal.SIGKILL)
        if code == -signal.SIGKILL:
            report.add(name, {"failed": f"took more than its {seconds:.0f} seconds"})
        elif code:
            errors.seek(0)
            report.add(name, {"failed": f"exit {code}: {errors.read().strip()[-300:]}"})


class Report:
    """The cases so far: a table on the terminal, a file, and ratios at the end."""

    def __init__(self, output: Path | None) -> None:
        self.cases: dict[str, dict[str, Any]] = {}
        self.output = output
        print(HEAD, flush=True)

    def add(self, case: str, figures: dict[str, Any]) -> None:
        """The limit comes first; without it there are no shares."""
        limit = self.cases.get("bf16 matmul", {})
        if "flops_per_second" in figures and "flops_per_second" in limit:
            figures["share_of_limit"] = figures["flops_per_second"] / limit["flops_per_second"]
            if limit.get("data_sheet"):
                figures["share_of_data_sheet"] = figures["flops_per_second"] / limit["data_sheet"]
        self.cases[case] = figures
        print(self._line(case, figures), flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.cases, indent=1, ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def _line(case: str, figures: dict[str, Any]) -> str:
        columns = (
            ("tokens_per_second", "10,.0f"),
            ("step_ms", "9.2f"),
            ("share_of_limit", "6.1%"),
            ("share_of_data_sheet", "6.1%"),
            ("peak_gib", "6.1f"),
        )
        widths = (10, 9, 6, 6, 6)
        cells = [
            format(figures[name], form) if figures.get(name) is not None else " " * width
            for (name, form), width in zip(columns, widths)
        ]
        shown = {name for name, _ in columns} | {"curve", "flops_per_second"}
        more = ", ".join(f"{key} {_short(value)}" for key, value in figures.items() if key not in shown)
        return f"{case:46} {' '.join(cells)}  {more}"

    def ratios(self) -> dict[str, dict[str, float]]:
        """Of this project's cases: to a peer's of the same name, and to the limit."""
        result: dict[str, dict[str, float]] = {}
        for case, figures in self.cases.items():
            if " ours" not in case or "tokens_per_second" not in figures:
                continue
            own = {}
            for peer in ("nanogpt", "transformers"):
                theirs = self.cases.get(case.replace("ours", peer), {}).get("tokens_per_second")
                if theirs is not None:
                    own[f"vs_{peer}"] = figures["tokens_per_second"] / theirs
            if "share_of_limit" in figures:
                own["share_of_limit"] = figures["share_of_limit"]
            result[case] = {name: round(value, 3) for name, value in own.items()}
        return result


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " -> ".join(map(_short, value))
    return str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--nanogpt", help="path of a checkout, or a folder with its model.py")
    parser.add_argument("--luxun", help="Lu Xun's prose, a .jsonl file with the key `text`")
    parser.add_argument("--output", type=Path, help="where to write all figures as JSON")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins or goes on after them")
    parser.add_argument("--parts", nargs="+", choices=SECONDS, default=list(SECONDS))
    parser.add_argument("--toy", action="store_true", help="on the CPU, to try the benchmark itself")
    parser.add_argument("--part", choices=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        from gpu_parts import run_part

        return run_part(options.part, options)
    deadline = time.monotonic() + 60 * options.minutes
    report = Report(options.output)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--folder", folder, *(["--toy"] if options.toy else [])]
        for name in ("nanogpt", "luxun"):
            if getattr(options, name) is not None:
                words += [f"--{name}", getattr(options, name)]
        for name in options.parts:
            seconds = deadline - time.monotonic()
            if seconds < (1 if options.toy else 20):
                report.add(name, {"failed": f"left out: no time within {options.minutes:g} minutes"})
            else:
                run_process(name, words, min(seconds, SECONDS[name]), report)
    print(json.dumps(report.ratios()))


if __name__ == "__main__":
    main()
