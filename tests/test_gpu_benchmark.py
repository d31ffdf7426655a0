"""The benchmark for a GPU still runs: some parts at toy sizes on the CPU; and keeps what ended ones told."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_some_parts_run_at_toy_sizes(tmp_path: Path) -> None:
    output, prose = tmp_path / "gpu.json", tmp_path / "prose.jsonl"
    prose.write_text("".join(json.dumps({"text": 60 * f"{n} 我要为"}) + "\n" for n in range(30)))
    command = [sys.executable, SCRIPT, "--toy", "--luxun", prose, "--output", output]
    command += ["--parts", "limits", "luxun", "modern"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    cases = json.loads(output.read_text())
    assert not [case for case, figures in cases.items() if "failed" in figures]
    curve = cases["luxun fit"]["curve"]
    assert [*curve] == ["4", "8"]
    for step, point in curve.items():
        told = cases[f"luxun step {step}"]
        assert {name: told[name] for name in point} == pytest.approx(point, rel=1e-3)
    limit = cases["bf16 matmul"]["flops_per_second"]
    for name in ("124M AdamW", "135M modern, Muon"):
        figures = cases[name]
        assert figures["share_of_limit"] == figures["flops_per_second"] / limit
        assert cases[f"{name}, 1 s"]["loss"] == figures["loss"][1] < figures["loss"][0]
    assert json.loads(done.stdout.splitlines()[-1]) == {}


PARTS = """
import sys, time
print("of no case", 'CASE ["step 4", {"val/loss": 5.0}]', sep="\\n", flush=True)
sys.stderr.buffer.write(b"\\xff")
if "slow" in sys.argv:
    print('CASE ["step 8", {"val/l', end="", flush=True)
    time.sleep(100)
sys.exit(3)
"""


@pytest.mark.parametrize("name, why", [("slow", "took more than its 1 seconds"), ("bad", "exit 3: \ufffd")])
def test_what_a_part_told_before_it_ended_is_kept(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    gpu: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    (tmp_path / "gpu.py").write_text(PARTS)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    report = gpu.Report(tmp_path / "gpu.json")
    gpu.run_process(name, [], 1.0, report)
    expected = {"step 4": {"val/loss": 5.0}, name: {"failed": why}}
    assert json.loads((tmp_path / "gpu.json").read_text()) == report.cases == expected
