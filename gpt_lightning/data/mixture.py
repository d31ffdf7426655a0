"""Mixes several texts by shares of tokens, which may change at given steps."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_lightning.data.dealing import PERIOD, MixtureOrder, phases_of, whole_shares
from gpt_lightning.data.text_source import TextSource
from gpt_lightning.data.windows import Epochs, keyed_hash
from gpt_lightning.exit_codes import UserError

_OWN = ("text_key", "document_separator")


@dataclass(frozen=True)
class MixtureSource:
    """Names one text of a mixture.

    Args:
        name: What logs and reports call it.
        files: Files, folders or globs of its text, as `data.train_files` takes them.
        weight: Its share of the tokens, beside the other sources' weights; or weights by the optimizer step
            from which each holds, such as {0: 1, 500: 2}.
        val_files: Its text to validate on; without it `data.val_fraction` of its text is held out.
        test_files: Its text to test on; without it the validation text is.
        text_key: As `data.text_key`, where its own differs.
        document_separator: As `data.document_separator`, where its own differs.
    """

    name: str
    files: list[str] | str
    weight: float | dict[int, float]
    val_files: list[str] | str | None = None
    test_files: list[str] | str | None = None
    text_key: str | None = None
    document_separator: str | None = None

    def weight_at(self, step: int) -> float:
        if not isinstance(self.weight, Mapping):
            return self.weight
        return self.weight[max(begin for begin in self.weight if begin <= step)]


class Mixture:
    """Is the sources of a run with their weights, and where in the training order these change.

    The steps of a curriculum are counted as the run that begins deals samples to steps. What follows is a
    place in the order of samples, which a checkpoint keeps: a run that goes on otherwise changes there.
    """

    def __init__(self, sources: Sequence[MixtureSource | dict[str, Any]]) -> None:
        self.sources = [MixtureSource(**each) if isinstance(each, dict) else each for each in sources]
        _check(self.sources)
        by_step = (each.weight for each in self.sources if isinstance(each.weight, Mapping))
        self.steps = sorted({0}.union(*by_step))
        self.weights = [tuple(each.weight_at(step) for each in self.sources) for step in self.steps]
        for step, weights in zip(self.steps, self.weights, strict=True):
            _check_weights(self.names, weights, step)
        self.starts: list[int] | None = None  # in the order of samples, of a run that goes on

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def texts(self, patterns: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[TextSource, ...]:
        """Makes the text of each source; what it does not say itself, the `settings` do."""
        return tuple(
            TextSource(
                {"train_files": each.files, "val_files": each.val_files, "test_files": each.test_files},
                {**settings, **{name: own for name in _OWN if (own := getattr(each, name)) is not None}},
                each.name,
            )
            for each in self.sources
        )

    def order(self, n_tokens: Sequence[int], seed: int, **deal: Any) -> MixtureOrder:
        """Orders the windows of sources of so many tokens; each order is of (seed, name)."""
        own_seeds = [keyed_hash(seed, 0, f"source {name}") for name in self.names]
        sources = tuple(
            Epochs(n_tokens=count, seq_len=deal["seq_len"], seed=own)
            for count, own in zip(n_tokens, own_seeds, strict=True)
        )
        if self.starts is None:
            from_the_beginning = MixtureOrder(sources=sources, **{**deal, "start": 0})
            steps = (step * deal["accumulate"] for step in self.steps)
            self.starts = [from_the_beginning.span(batch)[0] for batch in steps]
        return MixtureOrder(sources=sources, phases=phases_of(self.weights, self.starts), **deal)

    def state(self) -> dict[str, Any]:
        """Describes what a run that goes on must find again."""
        weights = {name: list(of_phases) for name, of_phases in zip(self.names, zip(*self.weights))}
        return {"steps": self.steps, "starts": self.starts or [], "weights": weights}

    def described_weights(self) -> dict[str, str]:
        """Writes down the weights of each source."""
        by_source = zip(self.names, zip(*self.weights, strict=True), strict=True)
        return {name: _by_step(self.steps, weights) for name, weights in by_source}

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Goes on with a run's order; refuses other sources or weights than that had."""
        weights: dict[str, list[float]] = saved["weights"]
        if [*weights] != self.names:
            problem = f"data.mixture has the sources {', '.join(self.names)}, and the checkpoint's run has"
            remedy = "leave them as they were, or train anew, from it by --init_from"
            raise UserError(f"{problem} {', '.join(weights)}; {remedy}")
        own = self.state()
        for name in self.names:
            now, then = (_by_step(state["steps"], state["weights"][name]) for state in (own, saved))
            if now != then:
                problem = f"data.mixture: the weight of {name} is {now}, and in the checkpoint {then}"
                raise UserError(f"{problem}; leave it as it was, or train anew, from it by --init_from")
        self.starts = saved["starts"] or None


def _by_step(steps: Sequence[int], weights: Sequence[float]) -> str:
    """Writes down a source's weights without those that change nothing."""
    changes = [0, *(n for n in range(1, len(steps)) if weights[n] != weights[n - 1])]
    if len(changes) == 1:
        return f"{weights[0]:g}"
    return "{" + ", ".join(f"{steps[n]}: {weights[n]:g}" for n in changes) + "}"


def _check(sources: Sequence[MixtureSource]) -> None:
    if not sources:
        raise UserError("data.mixture=[] names no source; give some, or data.train_files")
    names = [source.name for source in sources]
    for name in names:
        if not re.fullmatch(r"[\w.-]+", name):
            remedy = "use letters, digits and . _ -, for it is part of the names in logs"
            raise UserError(f"data.mixture: the name {name!r} does not do; {remedy}")
        if names.count(name) > 1:
            raise UserError(f"data.mixture names {name} {names.count(name)} times; give each its own name")
    for source in sources:
        if source.document_separator == "":
            problem = f"data.mixture: document_separator='' of {source.name} separates nothing"
            raise UserError(f"{problem}; leave it out or give some text")
        weights = source.weight if isinstance(source.weight, Mapping) else {0: source.weight}
        if 0 not in weights or min(weights) < 0:
            problem = f"data.mixture: the weights of {source.name} are for the steps {sorted(weights)}"
            raise UserError(f"{problem}; begin with the one at step 0")
        for weight in weights.values():
            if not 0 <= weight < math.inf:
                problem = f"data.mixture: the weight of {source.name} is {weight}, which is no share"
                raise UserError(f"{problem}; give 0 or more")


def _check_weights(names: Sequence[str], weights: tuple[float, ...], step: int) -> None:
    """Refuses weights by which nothing, or less than one window of a period, is taken of a source."""
    if not any(weights):
        raise UserError(f"data.mixture: all weights are 0 from step {step} on; raise one")
    for name, weight, share in zip(names, weights, whole_shares(weights), strict=True):
        if weight and not share:
            problem = f"data.mixture: the weight {weight:g} of {name} from step {step} on is under one"
            raise UserError(f"{problem} {PERIOD:,}th of all; raise it, or give 0")
