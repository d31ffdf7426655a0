from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from gpt_lightning.__main__ import main
from tests.distributed import run_ranks


class Said(NamedTuple):
    """What a program has written to standard output, and its messages."""

    out: str
    err: str


Program = Callable[..., Said]


@pytest.fixture
def program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Program:
    """Runs the program to its end, on ranks forked in torchrun's environment where there are several."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str, ranks: int = 1) -> Said:
        capfd.readouterr()
        main(list(words)) if ranks == 1 else run_ranks(main, ranks, list(words))
        return Said(*capfd.readouterr())

    return run
