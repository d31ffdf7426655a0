"""What is no mistake, but may not be meant, is told in a line before the run begins."""

from types import SimpleNamespace
from typing import Any

import pytest

from gpt_lightning.cli.checks import warn_of_no_validation


@pytest.mark.parametrize(
    ("max_steps", "interval", "limit", "told"),
    [
        (50, 100, 1.0, True),
        (100, 100, 1.0, False),
        (50, 100, 0, False),  # none is wanted
        (-1, 100, 1.0, False),
        (50, 0.5, 1.0, False),
        (50, None, 1.0, False),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(
    max_steps: int, interval: Any, limit: float, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"max_steps": max_steps, "val_check_interval": interval, "limit_val_batches": limit}
    warn_of_no_validation(SimpleNamespace(**given))
    said = capsys.readouterr().err
    assert said.count("\n") == told and (f"trainer.max_steps={max_steps}" in said) is told
