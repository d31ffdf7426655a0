"""Samples have a figure that tells whether they go round in circles."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gpt_lightning.__main__ import main
from gpt_lightning.callbacks.text_samples import repeated_share
from gpt_lightning.report.run import read_run
from gpt_lightning.training.notes import REPETITION


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["one two three four five six"], 0.0),
        (["to be or not to be or not to be"], 3 / 7),  # by hand: three of seven were there before
        (["a a a a a a a a"], 4 / 5),
        (["to be, or not", "to be, or not; to be, or not"], (0 + 2 / 8) / 2),
        (["我们我们我们"], 1 / 3),  # each character is a word
        (["a b c d", "a b c"], 0.0),  # of which the second has none
        (["a b c", ""], None),
        ([], None),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(
    texts: list[str], expected: float | None
) -> None:
    assert repeated_share(texts) == (None if expected is None else pytest.approx(expected))


@pytest.mark.slow
def test_the_figure_of_each_validation_is_that_of_its_samples(
    tiny_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(tiny_config()), "--generation.max_new_tokens", "30"])
    run = read_run(tmp_path / "checkpoints" / "tiny", "tiny")
    found = {step: value for step, value, _ in run.curves[REPETITION]}
    assert found and found.keys() == run.samples.keys()
    for step, samples in run.samples.items():
        assert found[step] == pytest.approx(repeated_share([sample.completion for sample in samples]))
