"""Shares are exact over every window, nothing is lost or doubled, and any place is found without those before it."""

import collections
from fractions import Fraction

import numpy as np
from hypothesis import given, settings, strategies as st

from llama_jax.data.mixture import BLOCK, Mixture, Schedule

parts = st.lists(st.integers(1, 60), min_size=1, max_size=7)


def walk(schedule: Schedule | Mixture, start: int, stop: int) -> list[tuple[int, int]]:
    return [schedule.locate(place) for place in range(start, stop)]


@given(parts=parts)
def test_prefixes_are_as_near_as_can_be_and_windows_within_two(parts: list[int]):
    total, k = sum(parts), len(parts)
    schedule = Schedule([Fraction(part, total) for part in parts])
    errors = [[Fraction(0)] * k]
    for n, (source, _) in enumerate(walk(schedule, 0, total + 20), 1):
        errors.append([e - Fraction(part, total) for e, part in zip(errors[-1], parts, strict=True)])
        errors[-1][source] += 1
        assert max(map(abs, errors[-1])) <= (1 - Fraction(1, 2 * k - 2) if k > 1 else 0), n
    for own in zip(*errors, strict=True):
        window = max(own) - min(own)  # the worst of all windows
        assert window <= 1 if k <= 2 else window < 2


@given(
    shares=st.lists(st.floats(0.01, 1) | st.floats(1e-9, 1e-3), min_size=2, max_size=6),
    block=st.sampled_from([0, 3, 10**6]),
    offset=st.integers(-500, 500),
)
@settings(max_examples=12, deadline=None)
def test_any_shares_stay_exact_however_long_the_run(shares: list[float], block: int, offset: int):
    """Shares without a common denominator: ends of blocks do not add up errors, at 65 billion sequences either."""
    schedule = Schedule(shares)
    start = max(block * BLOCK + offset, 0)
    bound = 2 + sum(share < 8 / BLOCK for share in schedule.shares) / 2
    counts = schedule.counts(start)
    for place, (source, number) in enumerate(walk(schedule, start, start + 1000), start):
        assert number == counts[source]  # none lost, none doubled
        counts[source] += 1
        assert all(abs(n - share * (place + 1)) < bound for n, share in zip(counts, schedule.shares, strict=True))
    assert counts == schedule.counts(start + 1000)


def test_decimal_shares_are_what_they_say():
    schedule = Schedule([0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02])
    assert schedule.counts(200 * 10**9) == [round(200 * 10**9 * share) for share in schedule.shares]
    assert Schedule([2, 1]).counts(3 * 10**12) == [2 * 10**12, 10**12]


def test_no_order_is_within_one_over_all_windows():
    """Why the bound is 2 for three sources: tried are all orders of twenty sequences."""
    shares = (Fraction(67, 100), Fraction(15, 100), Fraction(18, 100))

    def longest(errors: tuple[Fraction, ...], low: tuple[Fraction, ...], high: tuple[Fraction, ...], left: int) -> bool:
        if not left:
            return True
        for source in range(3):
            new = tuple(e - share + (i == source) for i, (e, share) in enumerate(zip(errors, shares, strict=True)))
            lows, highs = tuple(map(min, low, new)), tuple(map(max, high, new))
            fits = all(b - a <= 1 for a, b in zip(lows, highs, strict=True))
            if fits and longest(new, lows, highs, left - 1):
                return True
        return False

    zeros = (Fraction(0),) * 3
    assert longest(zeros, zeros, zeros, 15)
    assert not longest(zeros, zeros, zeros, 20)


@given(data=st.data())
@settings(max_examples=40)
def test_stages_go_on_where_the_last_one_left(data: st.DataObject):
    num_sources = data.draw(st.integers(1, 4))
    shares = st.lists(st.integers(0, 9), min_size=num_sources, max_size=num_sources).filter(any)
    starts = [0, *sorted(data.draw(st.sets(st.integers(1, 300), max_size=3)))]
    stages = tuple((start, Schedule(data.draw(shares))) for start in starts)
    mixture = Mixture(stages)
    seen: collections.Counter[int] = collections.Counter()
    for place, (source, number) in enumerate(walk(mixture, 0, 400)):
        assert number == seen[source]
        start, schedule = next(stage for stage in reversed(stages) if stage[0] <= place)
        assert source == schedule.locate(place - start)[0]
        assert mixture.counts(place) == [seen[i] for i in range(num_sources)]
        seen[source] += 1


def test_a_source_that_is_left_out():
    assert {source for source, _ in walk(Schedule([1, 0, 3]), 0, 50)} == {0, 2}


@given(shares=st.lists(st.floats(0.01, 1) | st.floats(1e-7, 1e-4), min_size=3, max_size=6))
@settings(max_examples=30, deadline=None)
def test_totals_never_fall(shares: list[float]):
    """Also of sources with less than a sequence a block, whose rounding would waver."""
    schedule = Schedule(shares)
    totals = np.array([schedule._totals(block) for block in range(60)])
    assert (np.diff(totals, axis=0) >= 0).all()
    assert (totals.sum(1) == np.arange(60) * schedule._block).all()
