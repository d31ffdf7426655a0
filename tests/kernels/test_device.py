import ctypes
import subprocess
import sys

import pytest

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.training import module as training_module
from gpt_lightning.training.module import GPTLightningModule

HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
PROGRAM = """
import sys, torch
from gpt_lightning.kernels.device import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

if sys.argv[1] == "keep":
    keep_freed_memory()
before = resident()
tensor = torch.ones(25 * 2**20)
del tensor
print((resident() - before) >> 20)
"""


@pytest.mark.skipif(not HAS_GLIBC, reason="of glibc")
@pytest.mark.slow
def test_what_is_freed_stays_with_the_process() -> None:
    """100 MiB: given back at once by default, and kept when asked for."""
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert kept > 90 and given_back < 50


def test_a_fit_on_a_cpu_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr(training_module, "keep_freed_memory", lambda: calls.append(None))
    GPTLightningModule(GPTConfig(vocab_size=8, n_layers=1, n_heads=1, d_model=8)).on_fit_start()
    assert len(calls) == 1
