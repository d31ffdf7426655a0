"""Tells whose window each position of a mixture's training order is: a pure function of (weights, position).

A phase of constant weights deals one period again and again. In every prefix of it each source is within
one window of its share: each window of a source has an earliest and a latest place, and of those that may
be dealt the one goes first that must be dealt first, which always fits where the shares add up to all.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from gpt_lightning.data.windows import Epochs, Ints, SampleOrder

PERIOD = 65_536  # windows, of which a weight is a whole number
_BLOCK = 1024
_FAR = 1 << 60  # windows, which no run takes


@lru_cache(maxsize=64)
def whole_shares(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Rounds weights to whole numbers that add up to PERIOD, by the largest remainders, in lowest terms."""
    exact = [weight * PERIOD / math.fsum(weights) for weight in weights]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: PERIOD - sum(shares)]:
        shares[index] += 1
    divisor = math.gcd(*shares)
    return tuple(share // divisor for share in shares)


@lru_cache(maxsize=64)
def dealt(shares: tuple[int, ...]) -> NDArray[np.int16]:
    """Tells the source of each place of a period.

    Of a share a of L the first place that may hold window j is j L / a, rounded down, and the last is the one
    before (j + 1) L / a, rounded up.
    """
    length = sum(shares)
    order = np.empty(length, dtype=np.int16)
    coming = [(0, source, 0) for source, share in enumerate(shares) if share]  # place, source, its window
    heapify(coming)
    ready: list[tuple[int, int]] = []  # before which place, source
    for place in range(length):
        while coming and coming[0][0] <= place:
            _, source, window = coming[0]
            heappush(ready, (-(-(window + 1) * length // shares[source]), source))
            heapreplace(coming, ((window + 1) * length // shares[source], source, window + 1))
        order[place] = heappop(ready)[1]
    return order


class Phase:
    """Deals by constant weights from a position on, when so many windows of each source are dealt already."""

    def __init__(self, start: int, weights: tuple[float, ...], already: Sequence[int]) -> None:
        self.start, self._already = start, np.array(already, dtype=np.int64)
        self._shares = np.array(whole_shares(weights), dtype=np.int64)
        self._order = dealt(whole_shares(weights))
        self._nth = np.empty(len(self._order), dtype=np.int64)  # window of its source in the period
        for source in range(len(weights)):
            here = self._order == source
            self._nth[here] = np.arange(here.sum())

    def locate(self, positions: Ints) -> tuple[NDArray[np.int16], Ints]:
        """Tells the source of each position, and which window of all that are dealt of it."""
        since, period = positions - self.start, len(self._order)
        periods, place = since // period, since % period
        source = self._order[place]
        return source, self._already[source] + periods * self._shares[source] + self._nth[place]

    def consumed(self, position: int) -> list[int]:
        """Counts the windows of each source before a position, which the phase reaches."""
        periods, place = divmod(position - self.start, len(self._order))
        partly = np.bincount(self._order[:place], minlength=len(self._shares))
        shares, already = self._shares.tolist(), self._already.tolist()
        return [a + periods * share + n for a, share, n in zip(already, shares, partly.tolist(), strict=True)]


def phases_of(weights: Sequence[tuple[float, ...]], starts: Sequence[int]) -> tuple[Phase, ...]:
    """Makes the phases of a curriculum, whose weights each hold from a position on."""
    phases: list[Phase] = []
    already = [0] * len(weights[0])
    for start, of_sources in zip(starts, weights, strict=True):
        if phases:
            already = phases[-1].consumed(start)
        phases.append(Phase(start, of_sources, already))
    return tuple(phases)


@dataclass(frozen=True, kw_only=True, eq=False)
class MixtureOrder(SampleOrder):
    """Deals the windows of several sources, each without replacement within epochs of its own.

    What the run counts as an epoch has as many windows as all sources together. A window's start counts the
    tokens of the sources before its own, too.
    """

    sources: tuple[Epochs, ...]
    phases: tuple[Phase, ...] = ()

    @cached_property
    def windows(self) -> int:
        return sum(source.windows for source in self.sources)

    @cached_property
    def _begins(self) -> list[int]:
        return np.cumsum([0, *(source.n_tokens for source in self.sources)]).tolist()

    @override
    def cut(self, positions: Ints) -> tuple[Ints, Ints]:
        block = int(positions[0]) // _BLOCK if len(positions) else 0
        if not len(positions) or int(positions[-1]) // _BLOCK != block:
            return self._cut(positions)
        starts, lengths = self._cut_block(block)
        place = positions - block * _BLOCK
        return starts[place], lengths[place]

    @lru_cache(maxsize=4)
    def _cut_block(self, block: int) -> tuple[Ints, Ints]:
        return self._cut(np.arange(block * _BLOCK, (block + 1) * _BLOCK))

    def _cut(self, positions: Ints) -> tuple[Ints, Ints]:
        """Cuts any windows, in the order of their positions."""
        starts, lengths = np.empty_like(positions), np.empty_like(positions)
        of_phase = np.searchsorted([phase.start for phase in self.phases], positions, side="right") - 1
        for number in np.unique(of_phase).tolist():
            here = (of_phase == number).nonzero()[0]
            source, window = self.phases[number].locate(positions[here])
            for index in np.unique(source).tolist():
                own = source == index
                rows = here[own]
                starts[rows], lengths[rows] = self._cut_own(index, window[own])
        return starts, lengths

    def _cut_own(self, index: int, window: Ints) -> tuple[Ints, Ints]:
        """Cuts windows of one source, which may reach into another epoch of it."""
        source = self.sources[index]
        epoch = window // source.windows
        ends = np.flatnonzero(np.diff(epoch)) + 1
        cuts = [source.cut(part) for part in np.split(window, ends)]
        starts, lengths = (np.concatenate(column) for column in zip(*cuts, strict=True))
        return starts + self._begins[index], lengths

    def epochs(self, position: int) -> list[float]:
        """Tells how often each source was gone through before a position."""
        used = zip(self.consumed(position), self.sources, strict=True)
        return [windows / source.windows for windows, source in used]

    @cached_property
    def first_end(self) -> tuple[int, int] | None:
        """Finds the first position at which a source begins again, and which one; None if none ever does."""
        ends = []
        for index, source in enumerate(self.sources):
            end = bisect_right(range(_FAR), source.windows, key=lambda at: self.consumed(at + 1)[index])
            if end < _FAR:
                ends.append((end, index))
        return min(ends, default=None)

    def steps_until(self, position: int) -> int:
        """Counts the whole steps from `start` on that end at a position or before."""
        steps = range(_FAR // (self.global_batch * self.accumulate))
        return bisect_right(steps, position, key=lambda step: self.span((step + 1) * self.accumulate - 1)[1])

    def consumed(self, position: int) -> list[int]:
        """Counts the windows of each source before a position."""
        return next(phase for phase in reversed(self.phases) if phase.start <= position).consumed(position)
