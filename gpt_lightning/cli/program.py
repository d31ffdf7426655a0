"""Knows how this program was called."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def called_as() -> str:
    """Returns how this program was called, so that a line works when it is pasted."""
    if Path(sys.argv[0]).name == "gpt-lightning":
        return sys.argv[0]
    on_path = shutil.which("python") == sys.executable
    return f"{'python' if on_path else shlex.quote(os.path.relpath(sys.executable))} -m gpt_lightning"
