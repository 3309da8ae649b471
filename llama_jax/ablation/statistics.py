"""Statistics of a sweep: t intervals, paired differences, Holm's correction, and how many seeds would be needed.

All functions take the values of a seed along the last axis and broadcast over the others. A comparison is paired: both
variants of a seed have the same data order and the same first values, so what they share cancels.
"""

import bisect
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

MOST_SEEDS = 10_000  # the answer is not looked for beyond
POWER = 0.8  # Cohen 1988, section 2.4

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class Interval(NamedTuple):
    """A mean and the ends of its interval; the ends are NaN with fewer than two values."""

    mean: Array
    low: Array
    high: Array


def t_interval(values: Array, level: float = 0.95) -> Interval:
    """Return the mean of values [..., S] and Student's interval that covers the true mean at `level`."""
    size = values.shape[-1]
    mean = np.asarray(values.mean(-1))
    if size < 2:
        return Interval(mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan))
    half = stats.t.isf((1 - level) / 2, size - 1) * values.std(-1, ddof=1) / np.sqrt(size)
    return Interval(mean, np.asarray(mean - half), np.asarray(mean + half))


def paired_p(differences: Array) -> Array:
    """Return the two-sided p of Student's paired test for differences [..., S]; NaN with fewer than two.

    Without any spread it is the test's limit: 1 where the differences are zero, else 0.
    """
    size = differences.shape[-1]
    mean = np.asarray(np.abs(differences.mean(-1)))
    if size < 2:
        return np.full_like(mean, np.nan)
    error = differences.std(-1, ddof=1) / np.sqrt(size)
    ratio = np.divide(mean, error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    return np.asarray(2 * stats.t.sf(ratio, size - 1))


def holm(p: Array) -> Array:
    """Return p-values [..., M] corrected for M comparisons (Holm 1979); NaN stays and does not count.

    Where those below `alpha` are called different, the chance of any false one is at most `alpha`.
    """
    order = np.argsort(p, axis=-1)  # NaN last
    count = np.sum(~np.isnan(p), axis=-1, keepdims=True)
    scaled = np.take_along_axis(p, order, -1) * np.maximum(count - np.arange(p.shape[-1]), 1)
    corrected = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1)
    return np.take_along_axis(corrected, np.argsort(order, axis=-1), -1)


def simultaneous(level: float, comparisons: int) -> float:
    """Return the level of each of several intervals that all cover together at `level` (Bonferroni)."""
    return 1 - (1 - level) / max(comparisons, 1)


def paired_power(effect: float, seeds: int, alpha: float) -> float:
    """Return the chance that the paired t test at `alpha` finds a difference of `effect` standard deviations.

    The deviation is that of the differences; the test's statistic has a noncentral t distribution.
    """
    shift, bound = effect * np.sqrt(seeds), stats.t.isf(alpha / 2, seeds - 1)
    return float(stats.nct.sf(bound, seeds - 1, shift) + stats.nct.cdf(-bound, seeds - 1, shift))


def seeds_needed(effect: float, alpha: float, power: float = POWER) -> int | None:
    """Return the fewest seeds that show a difference of `effect` standard deviations with the given power.

    None where `MOST_SEEDS` are not enough, as for no difference at all.
    """
    if np.isnan(effect) or paired_power(effect, MOST_SEEDS, alpha) < power:
        return None
    return bisect.bisect_left(range(MOST_SEEDS), power, lo=2, key=lambda seeds: paired_power(effect, seeds, alpha))
