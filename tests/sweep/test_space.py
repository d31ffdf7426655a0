"""What can stand behind --vary, and the one line that refuses all else."""

import math

import pytest

from gpt_lightning.exit_codes import UserError
from gpt_lightning.sweep.space import Choice, Range, read_varied, short_names, spread_evenly

optuna = pytest.importorskip("optuna")


@pytest.mark.parametrize(
    ("text", "expected", "is_log"),
    [
        ("rate=1e-3..1e-2", Range("rate", 1e-3, 1e-2, False), True),
        ("rate=.001..0.002", Range("rate", 1e-3, 2e-3, False), False),
        ("share=0..1", Range("share", 0, 1, True), False),
        ("share=0.0..1", Range("share", 0, 1, False), False),
        ("--shift=-2..2", Range("shift", -2, 2, True), False),
        ("batch=8..512", Range("batch", 8, 512, True), True),
    ],
)
def test_a_range_is_logarithmic_from_a_ratio_of_ten(text: str, expected: Range, is_log: bool) -> None:
    (varied,) = read_varied([text])
    assert varied == expected and isinstance(varied, Range) and varied.is_log is is_log


def test_a_choice_is_of_words_as_they_stand() -> None:
    texts = ["n=2,4", "betas=[0.9, 0.95],[0.8,0.99]", "files=a.txt, ../b.txt", "name=adamw,muon"]
    assert read_varied(texts) == (
        Choice("n", ("2", "4")),
        Choice("betas", ("[0.9, 0.95]", "[0.8,0.99]")),
        Choice("files", ("a.txt", "../b.txt")),
        Choice("name", ("adamw", "muon")),
    )


@pytest.mark.parametrize(
    "text",
    ["rate", "rate=", "=1,2", "rate=1e-2..1e-3", "rate=1..1", "rate=1..inf", "rate=a..b", "rate=1..", "n=2"]
    + ["n=2,,4", "n=2,4,2", "n= "],
)
def test_what_varies_nothing_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--vary") as refusal:
        read_varied([text])
    assert "\n" not in str(refusal.value) and text in str(refusal.value)


def test_nothing_and_the_same_twice_are_refused() -> None:
    with pytest.raises(UserError, match="nothing is varied"):
        read_varied([])
    with pytest.raises(UserError, match="given 2 times"):
        read_varied(["n=1,2", "n=3,4"])


def test_what_is_tried_lies_in_the_range_evenly_in_the_logarithm() -> None:
    (rate, size) = read_varied(["rate=1e-4..1e-1", "size=1..1000"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [(rate.suggest(trial), size.suggest(trial)) for trial in (study.ask() for _ in range(400))]
    rates, sizes = [float(each) for each, _ in drawn], [int(each) for _, each in drawn]
    for values, low, high in ((rates, 1e-4, 1e-1), (sizes, 1, 1000)):
        assert low <= min(values) and max(values) <= high
        below = sum(value < math.sqrt(low * high) for value in values)  # the middle of the logarithm
        assert 150 < below < 250
    assert max(len(text.strip("0.").partition("e")[0]) for text, _ in drawn) <= 4


def test_the_first_values_leave_no_part_of_the_space_out() -> None:
    varied = read_varied(["rate=1e-4..1e-1", "n=2,4", "size=1..8"])
    tried = [spread_evenly(varied, number) for number in range(8)]
    assert tried[0]["rate"] == pytest.approx(math.sqrt(1e-5)) and tried[0]["size"] == 5
    logs = sorted(math.log10(float(each["rate"])) for each in tried)
    gaps = [after - before for before, after in zip([-4, *logs], [*logs, -1])]
    assert max(gaps) < 3 * 2 / 8  # evenly spread they would be a ninth of the way; random ones leave a third
    assert [each["n"] for each in tried].count("2") in (3, 4, 5)
    assert len({each["size"] for each in tried}) >= 6
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for values in tried:
        study.enqueue_trial(values)
        trial = study.ask()
        assert [each.suggest(trial) for each in varied[1:]] == [values["n"], str(values["size"])]
        assert float(varied[0].suggest(trial)) == pytest.approx(values["rate"], rel=1e-3)


def test_short_names_tell_options_apart() -> None:
    varied = read_varied(["a.name=x,y", "b.name=x,y", "a.rate=1..2"])
    assert short_names(varied) == {"a.name": "a.name", "b.name": "b.name", "a.rate": "rate"}
