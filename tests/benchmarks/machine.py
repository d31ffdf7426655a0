"""Says on what a benchmark ran, and whether the machine was its own."""

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version

from gpt_lightning.kernels.device import processor

MOST_LOAD = 1.5  # of each thread; the benchmark's own is 1


def describe(threads: int, peers: list[str]) -> None:
    """Prints the day, the processor and the versions of the packages that take part."""
    cores = os.cpu_count()
    print(f"{date.today()}, {processor()} ({platform.machine()}, {cores} cores), {threads} threads")
    print(", ".join(f"{name} {found}" for name in ["torch", *peers] if (found := _version(name))))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Watch:
    """Notes the machine's load in every round, and refuses ratios of one that had other work."""

    def __init__(self, threads: int) -> None:
        self._most, self._loads = MOST_LOAD * threads, [0.0]

    def look(self) -> None:
        self._loads.append(os.getloadavg()[0])

    @property
    def was_quiet(self) -> bool:
        """Tells whether ratios mean something, and prints why not."""
        if max(self._loads) <= self._most:
            return True
        print(f"no ratios: a load of {max(self._loads):.1f}, above {self._most:g}; run it on a quiet machine")
        return False
