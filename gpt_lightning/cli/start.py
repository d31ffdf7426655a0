"""The start of the program, for which somebody waits."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Around the slow imports, whose half a million objects stay until the program ends.

    To look through them for garbage took a third of the time: while they came, at every full collection
    after that, and in the end.
    """
    n_modules, was_on = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        if len(sys.modules) > n_modules:
            gc.freeze()
