import ctypes
import subprocess
import sys

import pytest

HAS_GLIBC = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")
PROGRAM = """
import sys, torch
from gpt_lightning.freed_memory import keep_freed_memory

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
