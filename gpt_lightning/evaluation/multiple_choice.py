"""Has a model choose among answers: the likeliest, and the likeliest for its length."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gpt_lightning.evaluation.items import Item, read_items
from gpt_lightning.evaluation.scoring import Pair, Scorer, encode_pairs


@dataclass(frozen=True)
class Result:
    """Holds a task's figures, such as `acc`, their standard errors, and a row for each item."""

    task: str
    metrics: dict[str, float]
    errors: dict[str, float]
    rows: list[dict[str, Any]]


class ItemTask:
    """Is a user's own file of questions; its name is the file's."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        self._name = path.stem
        self._items = read_items(path)[:limit]
        self._pairs: list[Pair] = []

    @property
    def names(self) -> list[str]:
        return [self._name]

    def prepare(self, scorer: Scorer) -> None:
        """Encodes the questions; raises UserError for one that the model cannot take."""
        texts = [(item.question, f" {choice}") for item in self._items for choice in item.choices]
        places = (f"{item.place}: choices[{n}]" for item in self._items for n in range(len(item.choices)))
        self._pairs = encode_pairs(scorer.tokenizer, texts)
        for pair, place in zip(self._pairs, places):
            scorer.check(pair, place)

    def evaluate(self, scorer: Scorer) -> Result:
        scores = iter(scorer.score(self._pairs))
        rows = [
            _row(self._name, item, [next(scores).log_probability for _ in item.choices])
            for item in self._items
        ]
        figures = {name: [float(row[name]) for row in rows] for name in ("acc", "acc_norm")}
        metrics = {name: fmean(values) for name, values in figures.items()}
        errors = {name: standard_error(values) for name, values in figures.items()}
        return Result(self._name, metrics, errors, rows)


def _row(task: str, item: Item, log_probabilities: Sequence[float]) -> dict[str, Any]:
    lengths = map(len, item.choices)  # in characters, without the space before them
    chosen = _greatest(log_probabilities)
    chosen_norm = _greatest(value / length for value, length in zip(log_probabilities, lengths))
    return {
        "task": task,
        "question": item.question,
        "choices": item.choices,
        "answer": item.answer,
        "log_probabilities": [round(value, 6) for value in log_probabilities],
        "acc": int(chosen == item.answer),
        "acc_norm": int(chosen_norm == item.answer),
    }


def _greatest(values: Iterable[float]) -> int:
    """Returns the index of the greatest, the first of several."""
    listed = list(values)
    return listed.index(max(listed))


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean; NaN of one value, which does not show any."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
