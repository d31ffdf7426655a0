"""The benchmark for a GPU still runs: two of its parts at toy sizes on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_two_parts_run_at_toy_sizes(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--toy", "--parts", "limits", "not_compiled", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    cases = json.loads(output.read_text())
    assert not [case for case, figures in cases.items() if "failed" in figures]
    ours = cases["124M B2 ours, not compiled"]
    assert ours["share_of_limit"] == ours["flops_per_second"] / cases["bf16 matmul"]["flops_per_second"]
    assert json.loads(done.stdout.splitlines()[-1]).keys() == {"124M B2 ours, not compiled"}
