"""nanoGPT's model.py, from a checkout of it: a benchmark's peer, of which nothing is copied here."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType


def load_nanogpt(checkout: str | os.PathLike[str]) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(checkout) / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks for itself there
    spec.loader.exec_module(module)
    return module
