"""The source of every sequence of a run: exact shares, in closed form."""

import bisect
import dataclasses
import functools
import heapq
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

BLOCK = 1 << 16  # sequences that are ordered together; shares are exact at their ends
RARE = 8  # sequences in a block


class Schedule:
    """A fixed, unending order of sequences from several sources in the proportion of `shares`.

    After any n sequences, source i of k has given shares_i n of them: to within 1 - 1 / (2k - 2) where the shares have
    a common denominator of at most `BLOCK` (0.045, 2/3...), to within less than 2 for others, however large n is. In a
    block the order is that of Tijdeman 1980, "The chairman assignment problem", and none does better. Over any window,
    that is within 1 for two sources and within less than 2 for more, where shares such as (0.67, 0.15, 0.18) have no
    order at all that would be within 1 (a test tries them all).
    Sources with less than `RARE` sequences in a block are placed by themselves first, and may shift the others by one
    half each.
    """

    def __init__(self, shares: Sequence[float | Fraction]):
        exact = [Fraction(share) if isinstance(share, Fraction) else Fraction(str(share)) for share in shares]
        total = sum(exact)
        self.shares = [share / total for share in exact]
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._block = denominator if denominator <= BLOCK else BLOCK

    def locate(self, place: int) -> tuple[int, int]:
        """Return (source, number of its sequences before) of the sequence at `place`."""
        if len(self.shares) == 1:
            return 0, place
        block, offset = divmod(place, self._block)
        before, order, ranks = self._ordered(block)
        source = int(order[offset])
        return source, before[source] + int(ranks[offset])

    def counts(self, stop: int) -> list[int]:
        """Return the number of sequences of each source among the first `stop`."""
        block, offset = divmod(stop, self._block)
        before, order, _ = self._ordered(block)
        within = np.bincount(order[:offset], minlength=len(before))
        return [a + int(b) for a, b in zip(before, within, strict=True)]

    def _ordered(self, block: int) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
        before, after = self._totals(block), self._totals(block + 1)
        return before, *_order(tuple(b - a for a, b in zip(before, after, strict=True)))

    @functools.lru_cache(maxsize=1 << 10)  # noqa: B019 - a run has few schedules
    def _totals(self, block: int) -> tuple[int, ...]:
        """Return the sequences of each source in the blocks before: shares, rounded so that all places are taken."""
        ideal = [share * block * self._block for share in self.shares]
        # A source's total must not fall from one block to the next, as rounding all to a sum would make rare ones do.
        rare = [share * self._block < RARE and share * self._block % 1 != 0 for share in self.shares]
        totals = [math.floor(n + Fraction(1, 2)) if few else math.floor(n) for n, few in zip(ideal, rare, strict=True)]
        by_rest = sorted((i for i, few in enumerate(rare) if not few), key=lambda i: totals[i] - ideal[i])
        left = block * self._block - sum(totals)
        for i in itertools.islice(itertools.cycle(by_rest if left > 0 else by_rest[::-1]), abs(left)):
            totals[i] += 1 if left > 0 else -1
        return tuple(totals)


@functools.lru_cache(maxsize=64)
def _order(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return (sources, numbers among the source's) of the sequences of a block with `counts` of each source."""
    size, width = sum(counts), max(2 * len(counts) - 2, 1)
    order, ranks = np.zeros(size, np.uint16), np.zeros(size, np.int32)
    # Sequence j of a source is due at (j - 1 / width) / share, and may come from (j - 1 + 1 / width) / share on. Those
    # that may not yet are in one heap by that time; of the others, in a second heap, the one that is due first comes.
    waiting = [(-(-size // (width * count)), i, 1) for i, count in enumerate(counts) if count]
    heapq.heapify(waiting)
    ready: list[tuple[float, int, int]] = []
    for time in range(1, size + 1):
        while waiting and waiting[0][0] <= time:
            _, i, j = heapq.heappop(waiting)
            heapq.heappush(ready, ((j * width - 1) / counts[i], i, j))
        _, i, j = heapq.heappop(ready)
        order[time - 1], ranks[time - 1] = i, j - 1
        if j < counts[i]:
            heapq.heappush(waiting, (-(-(j * width + 1) * size // (width * counts[i])), i, j + 1))
    return order, ranks


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Schedules one after another, each from the sequence at its place on; the first one's place is 0.

    A source goes on where the stage before left it.
    """

    stages: tuple[tuple[int, Schedule], ...]

    def locate(self, place: int) -> tuple[int, int]:
        """Return (source, number of its sequences before) of the run's sequence at `place`."""
        start, schedule, before = self._stage(place)
        source, number = schedule.locate(place - start)
        return source, before[source] + number

    def counts(self, stop: int) -> list[int]:
        """Return the number of sequences of each source among the run's first `stop`."""
        start, schedule, before = self._stage(stop)
        return [a + b for a, b in zip(before, schedule.counts(stop - start), strict=True)]

    def _stage(self, place: int) -> tuple[int, Schedule, list[int]]:
        number = bisect.bisect_right([start for start, _ in self.stages], place) - 1
        return *self.stages[number], self._before[number]

    @functools.cached_property
    def _before(self) -> list[list[int]]:
        """Sequences of each source before each stage."""
        found = [[0] * len(self.stages[0][1].shares)]
        for (start, schedule), (end, _) in itertools.pairwise(self.stages):
            found.append([a + b for a, b in zip(found[-1], schedule.counts(end - start), strict=True)])
        return found
