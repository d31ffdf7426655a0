"""Reads what a sweep varies: `NAME=a..b` is a range of numbers, `NAME=a,b,c` a choice."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt_lightning.exit_codes import UserError

if TYPE_CHECKING:
    from optuna.trial import Trial

RULE = (
    "NAME=a..b tries numbers from a to b: whole ones where both ends are, evenly in the logarithm where b is "
    "ten times a or more, else evenly; NAME=a,b,c tries each of these."
)
_LOG_FROM = 10  # times the lower end
_DIGITS = 4  # of a number that is tried, so that a command can be read


@dataclass(frozen=True)
class Range:
    """Numbers between two, both included."""

    name: str
    low: float
    high: float
    is_whole: bool

    @property
    def is_log(self) -> bool:
        return self.low > 0 and self.high >= _LOG_FROM * self.low

    @property
    def examples(self) -> tuple[str, ...]:
        return self._text(self.low), self._text(self.high)

    def at(self, share: float) -> float:
        """Returns the number that lies at this share of the way from the one end to the other, below 1."""
        if self.is_whole and not self.is_log:
            return int(self.low) + math.floor(share * (self.high - self.low + 1))
        if not self.is_log:
            return self.low + share * (self.high - self.low)
        number = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        number = min(max(number, self.low), self.high)
        return round(number) if self.is_whole else number

    def suggest(self, trial: "Trial") -> str:
        if self.is_whole:
            return str(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.is_log))
        return self._text(trial.suggest_float(self.name, self.low, self.high, log=self.is_log))

    def _text(self, value: float) -> str:
        return str(int(value)) if self.is_whole else f"{value:.{_DIGITS}g}"


@dataclass(frozen=True)
class Choice:
    """Values as they stand on the command line."""

    name: str
    values: tuple[str, ...]

    @property
    def examples(self) -> tuple[str, ...]:
        return self.values

    def at(self, share: float) -> str:
        return self.values[int(share * len(self.values))]

    def suggest(self, trial: "Trial") -> str:
        return str(trial.suggest_categorical(self.name, self.values))


Varied = Range | Choice


def read_varied(texts: Iterable[str]) -> tuple[Varied, ...]:
    """Reads what stands behind each --vary."""
    varied = tuple(_read(text) for text in texts)
    if not varied:
        example = "--vary model.optimizer.learning_rate=1e-3..1e-2"
        raise UserError(f"nothing is varied; say what, as in {example}")
    for name, count in Counter(each.name for each in varied).items():
        if count > 1:
            raise UserError(f"--vary {name} is given {count} times; give its values once")
    return varied


def spread_evenly(varied: Sequence[Varied], number: int) -> dict[str, float | str]:
    """Returns the values of trial `number` of those that come before any is known to be good.

    The first is in the middle, and each next one where most room is (Roberts' sequence R_d, 2018): values
    drawn at random would leave much of each range, and some of the choices, untried.
    """
    ratio = 2.0
    for _ in range(50):  # the root of x^(d+1) = x + 1, the golden ratio of d dimensions
        ratio = (1 + ratio) ** (1 / (len(varied) + 1))
    shares = [(0.5 + number / ratio**dimension) % 1 for dimension in range(1, len(varied) + 1)]
    return {each.name: each.at(share) for each, share in zip(varied, shares)}


def short_names(varied: Iterable[Varied]) -> dict[str, str]:
    """Returns the last words of the options, or whole names where these would be the same."""
    names = [each.name for each in varied]
    counts = Counter(name.rpartition(".")[2] for name in names)
    return {
        name: last if counts[last := name.rpartition(".")[2]] == 1 else name for name in names
    }


def _read(text: str) -> Varied:
    name, equals, values = text.lstrip("-").partition("=")
    if not equals or not name or not values.strip():
        raise UserError(f"--vary {text} gives no values; write NAME=a..b or NAME=a,b,c")
    if (ends := re.fullmatch(r"\s*([^.,\s]\S*?|\.\d\S*?)\.\.(\S*?)\s*", values)) is not None:
        return _read_range(text, name, ends[1], ends[2])
    choices = tuple(choice.strip() for choice in _split(values))
    if "" in choices:
        raise UserError(f"--vary {text} has an empty value between two commas; leave one out")
    if len({*choices}) < len(choices):
        raise UserError(f"--vary {text} names a value twice; leave one out")
    if len(choices) == 1:
        raise UserError(f"--vary {text} has one value; give another, or --{name}={choices[0]} instead")
    return Choice(name, choices)


def _read_range(text: str, name: str, low: str, high: str) -> Range:
    try:
        ends = float(low), float(high)
    except ValueError:
        raise UserError(f"--vary {text} is no range of numbers; write a..b, or a,b,c for words") from None
    if not all(math.isfinite(end) for end in ends):
        raise UserError(f"--vary {text} has no end; give two finite numbers")
    if not ends[0] < ends[1]:
        raise UserError(f"--vary {text} is empty; the first number must be below the second")
    is_whole = all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high))
    return Range(name, *ends, is_whole)


def _split(values: str) -> list[str]:
    """Splits at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
