"""The statistics hold what they state: on thousands of simulated sweeps whose truth is known, and against scipy."""

import numpy as np
import pytest
from scipy import stats

from llama_jax.ablation.statistics import (
    MOST_SEEDS,
    holm,
    paired_p,
    paired_power,
    seeds_needed,
    simultaneous,
    t_interval,
)

SWEEPS = 4000


def within(hits: np.integer | float, stated: float, sweeps: int = SWEEPS) -> bool:
    """Whether a count of hits is likely (99.9 %) at the stated rate."""
    low, high = stats.binom.interval(0.999, sweeps, stated)
    return bool(low <= hits <= high)


def simulated(means: list[float], seeds: int, *, common: float = 0.3, noise: float = 0.1) -> np.ndarray:
    """Final losses [sweeps, variants, seeds]: a part common to a seed, as data order is, and one of each run."""
    random = np.random.default_rng(seeds)
    shared = common * random.standard_normal((SWEEPS, 1, seeds))
    return np.array(means)[:, None] + shared + noise * random.standard_normal((SWEEPS, len(means), seeds))


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_at_the_stated_rate(seeds: int, level: float):
    means = [2.0, 2.1, 1.9, 2.0, 2.4]
    losses = simulated(means, seeds)
    interval = t_interval(losses[:, 0], level)
    assert within(np.sum((interval.low < 2) & (interval.high > 2)), level)
    truth = np.array(means[1:]) - 2
    differences = losses[:, 1:] - losses[:, :1]
    interval = t_interval(differences, level)
    assert within(np.sum((interval.low < truth) & (interval.high > truth), axis=0)[0], level)
    together = t_interval(differences, simultaneous(level, len(truth)))
    covered = np.all((together.low < truth) & (together.high > truth), axis=-1)
    assert covered.mean() > level - 3.3 * np.sqrt(level * (1 - level) / SWEEPS)


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("true_differences", [[0.0] * 4, [0.3, 0.0, 0.0, -0.3]])
def test_corrected_comparisons_are_rarely_false(seeds: int, true_differences: list[float]):
    losses = simulated([2.0, *(2 + d for d in true_differences)], seeds)
    p = paired_p(losses[:, 1:] - losses[:, :1])
    null = np.array(true_differences) == 0
    false = np.any(holm(p)[:, null] < 0.05, axis=-1).mean()
    assert false < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / SWEEPS)
    assert within(np.sum(p[:, np.flatnonzero(null)[0]] < 0.05), 0.05)
    if null.all():
        assert np.any(p < 0.05, axis=-1).mean() > 0.1  # without the correction it would not hold


@pytest.mark.parametrize("effect", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 3])
def test_the_needed_seeds_have_the_promised_power(effect: float, alpha: float):
    seeds = seeds_needed(effect, alpha)
    assert seeds is not None
    random = np.random.default_rng(seeds)
    found = paired_p(effect + random.standard_normal((SWEEPS, seeds))) < alpha
    assert within(found.sum(), paired_power(effect, seeds, alpha))
    assert paired_power(effect, seeds, alpha) >= 0.8
    assert seeds == 2 or paired_power(effect, seeds - 1, alpha) < 0.8


def test_seeds_beyond_reach_are_not_a_number():
    assert seeds_needed(0.0, 0.05) is None
    assert seeds_needed(float("nan"), 0.05) is None
    assert seeds_needed(1e-3, 0.05) is None
    assert seeds_needed(0.03, 0.05) in range(8000, MOST_SEEDS)
    assert seeds_needed(1e6, 0.05) == 2


def test_the_paired_test_is_scipys():
    random = np.random.default_rng(0)
    first, second = random.standard_normal((2, 50, 5))
    result = stats.ttest_rel(first, second, axis=-1)
    np.testing.assert_allclose(paired_p(first - second), result.pvalue, rtol=1e-9)
    theirs, ours = result.confidence_interval(0.9), t_interval(first - second, 0.9)
    np.testing.assert_allclose([ours.low, ours.high], [theirs.low, theirs.high], rtol=1e-9)


def test_holm_by_hand():
    """Holm 1979: the smallest times M, the next times M - 1; never falling, never above 1, NaN left out."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, np.nan])), [0.03, 0.06, 0.06, np.nan])
    np.testing.assert_allclose(holm(np.array([[0.9, 0.2], [0.5, 0.01]])), [[0.9, 0.4], [0.5, 0.02]])


def test_degenerate_differences():
    differences = np.array([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    np.testing.assert_allclose(paired_p(differences), [1, 0], atol=1e-30)
    np.testing.assert_allclose(t_interval(differences), [[0, 0.1]] * 3)
    assert np.isnan(paired_p(differences[:, :1])).all()
    mean, low, high = t_interval(differences[:, :1])
    assert mean.tolist() == [0, 0.1]
    assert np.isnan([low, high]).all()
