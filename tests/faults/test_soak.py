"""Runs killed at random, again and again; `--kills 100` for the long form, whose table the README shows."""

from pathlib import Path

import pytest

from tests.faults.soak import soak

pytestmark = [pytest.mark.slow, pytest.mark.faults]


@pytest.mark.parametrize("ranks", [1, 4], ids=["one rank", "tp 2 x dp 2"])
def test_every_killed_run_is_the_run_that_was_never_killed(
    ranks: int, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    kills = pytestconfig.getoption("kills") // (1 if ranks == 1 else 5)
    tally = soak(tmp_path, kills=max(2, kills), ranks=ranks, steps=30)
    with capsys.disabled():
        print(f"\n{tally.table()}")
    assert not tally.wrong, "\n".join(tally.wrong)
