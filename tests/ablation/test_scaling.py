"""Scaling laws: recovered from data whose law is known, with intervals that cover, and held to account on real runs."""

import math

import numpy as np
import pytest
from scipy import optimize, special

import llama_jax
from llama_jax.ablation.isoflop import Point, Scaling
from llama_jax.ablation.laws import DELTA, Cost, Law, Resampled, fit_cost, fit_law, quantiles
from llama_jax.config import UserError, override
from llama_jax.run import RunConfig
from llama_jax.training import train_flops_per_token

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al. 2022, equation 10
PAPER = Cost(6.0, 1.0)
SIZES, BUDGETS = np.geomspace(5e7, 2e9, 5), (1e18, 1e19, 1e20)


def design() -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens of all sizes at all budgets."""
    n, c = map(np.ravel, np.meshgrid(SIZES, BUDGETS))
    return n, c / (6 * n)


def points(noise: float, seed: int = 0, law: Law = CHINCHILLA) -> list[Point]:
    random = np.random.default_rng(seed)
    return [
        Point(f"{n:.2g}", c, int(n), int(c / (6 * n)), 6 * n, law.loss(n, c / 6 / n) * math.exp(noise * draw))
        for (n, c), draw in zip([(n, c) for c in BUDGETS for n in SIZES], random.standard_normal(15), strict=True)
    ]


@pytest.mark.parametrize("law", [CHINCHILLA, Law(0.8, 30.0, 0.15, 2000.0, 0.4)])
def test_a_law_without_noise_is_found_exactly(law: Law):
    n, d = design()
    np.testing.assert_allclose(fit_law(n, d, law.loss(n, d)), law, rtol=1e-6)


@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_the_fit_is_at_least_as_good_as_that_of_lbfgs(noise: float):
    """The objective of Hoffmann et al. 2022, appendix D.2, written as there, and minimised by scipy."""
    n, d = design()
    losses = CHINCHILLA.loss(n, d) * np.exp(noise * np.random.default_rng(1).standard_normal(len(n)))

    def objective(x: np.ndarray) -> float:
        a, b, e, alpha, beta = x
        terms = np.stack([a - alpha * np.log(n), b - beta * np.log(d), np.full_like(n, e)])
        return float(special.huber(DELTA, special.logsumexp(terms, axis=0) - np.log(losses)).sum() / DELTA**2)

    law = fit_law(n, d, losses)
    ours = objective(np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta]))
    starts = [(5, 5, 0, 0.5, 0.5), (10, 5, 0.5, 0.5, 0.5), (6, 6, 0.5, 0.3, 0.3)]
    theirs = [optimize.minimize(objective, start, method="L-BFGS-B", options={"maxfun": 10_000}) for start in starts]
    assert ours <= min(end.fun for end in theirs) * (1 + 1e-9)
    assert ours >= min(end.fun for end in theirs) * 0.9


@pytest.mark.slow
def test_intervals_cover_at_the_stated_rate():
    n, d = design()
    truth = np.array([*CHINCHILLA, CHINCHILLA.loss(3e9, 6e10), PAPER.optimum(CHINCHILLA, 1e21)[0]])
    random, sweeps, covered, new = np.random.default_rng(0), 60, np.zeros(7), 0
    for seed in range(sweeps):
        losses = CHINCHILLA.loss(n, d) * np.exp(0.004 * random.standard_normal(len(n)))
        found = Resampled.fit(n, d, losses, 60, seed)
        values = np.array([*found.laws, found.laws.loss(3e9, 6e10), PAPER.optimum(found.laws, 1e21)[0]])
        low, high = quantiles(values.T, 0.9)
        covered += (low <= truth) & (truth <= high)
        measured = CHINCHILLA.loss(3e9, 6e10) * math.exp(0.004 * random.standard_normal())
        low, high = quantiles(found.measurements(np.array([3e9]), np.array([6e10])), 0.9)
        new += bool(low[0] <= measured <= high[0])
    least = 0.9 - 3 * math.sqrt(0.9 * 0.1 / sweeps)
    assert covered.min() / sweeps > least, covered / sweeps
    assert covered.mean() / sweeps < 0.98, "intervals are wider than stated"
    assert new / sweeps > least


@pytest.mark.parametrize("cost", [PAPER, Cost(31.0, 0.9)])
def test_the_recommendation_is_the_closed_form_optimum(cost: Cost):
    parameters, tokens = cost.optimum(CHINCHILLA, 1e21)
    assert cost.factor * parameters**cost.power * tokens == pytest.approx(1e21)
    around = parameters * np.geomspace(0.5, 2, 201)
    losses = CHINCHILLA.loss(around, 1e21 / (cost.factor * around**cost.power))
    assert losses.argmin() == 100
    if cost is PAPER:  # equation 4 of the paper
        g, a = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62), 0.28 / 0.62
        assert parameters == pytest.approx(g * (1e21 / 6) ** a)
    assert fit_cost(SIZES, cost.factor * SIZES**cost.power) == pytest.approx(cost)
    found = Scaling(points(0.0)).recommend(1e21)
    if cost is PAPER:
        np.testing.assert_allclose([found.parameters, found.tokens], [parameters, tokens], rtol=1e-4)


def test_what_was_not_fitted_is_predicted():
    found = Scaling(points(0.003))
    assert [entry["size"] for entry in found.holdout] == ["2e+09"] * 3
    assert sum(entry["inside"] for entry in found.holdout) >= 2
    assert {entry["budget"] for entry in Scaling(points(0.003), holdout="budget").holdout} == {1e20}
    assert Scaling(points(0.003), holdout=None).holdout == []
    bent = [
        Point(p.size, p.budget, p.parameters, p.tokens, p.flops_per_token, 9.0 if p.size == "2e+09" else p.loss)
        for p in points(0.003)
    ]
    entry = Scaling(bent).holdout[0]
    assert not entry["inside"]
    assert entry["predicted"] < 5, "the run itself was fitted"


def test_profiles_have_their_minimum():
    for profile in Scaling(points(0.0)).profiles():
        best, _ = PAPER.optimum(CHINCHILLA, profile["budget"])
        assert profile["inside"]
        assert profile["parameters"] == pytest.approx(best, rel=0.1)  # a parabola is not quite the law's profile
        assert profile["loss"] == pytest.approx(CHINCHILLA.loss(best, profile["budget"] / 6 / best), rel=0.01)
    falling = [p for p in points(0.0) if p.parameters < 1e8 or p.budget == 1e18]
    falling += [Point("x", 1e20, 6 * 10**7, 10**11, 3.6e8, 3.0)]
    assert Scaling(falling, holdout=None).profiles()[1]["coefficients"] is None


def test_forms_and_mistakes():
    found = Scaling(points(0.003))
    assert "3 of 3 runs that were not fitted are in their intervals" in repr(found)
    assert found.to_markdown().count("| --- |") == 3
    assert "alpha" in found._repr_html_()
    assert [axes.get_xlabel() for axes in found.plot().axes] == [
        "parameters", "training FLOPs", "predicted loss (nats per token)",
    ]  # fmt: skip
    assert "hardly determine" not in repr(found)
    assert "spans a factor of 10: these runs hardly determine it" in repr(Scaling(points(0.2), holdout=None))
    with pytest.raises(UserError, match="5 runs of 5 sizes do not show a law"):
        Scaling(points(0.0)[:5])
    with pytest.raises(UserError, match=r"holdout='7B' must be size, budget, auto or one of"):
        Scaling(points(0.0), holdout="7B")


SIZES_OF_RUNS = [{"model.hidden_size": 16, "model.attention.head_dim": 4}, {}, {"model.hidden_size": 48}]


def test_budgets_that_pay_for_nothing_are_refused(sweep_base: RunConfig):
    with pytest.raises(UserError, match=r"pays for no step of"):
        llama_jax.scaling(sweep_base, [1e3, 1e9], SIZES_OF_RUNS)
    with pytest.raises(UserError, match="2 sizes with budgets"):
        llama_jax.scaling(sweep_base, [1e8, 1e9], SIZES_OF_RUNS[:2])


@pytest.mark.slow
def test_real_runs_have_the_steps_of_their_budgets(sweep_base: RunConfig, tmp_path):
    base = override(sweep_base, {"logging.validate_every_steps": 100})
    budgets = [1e8, 2e8, 4e8]
    found = llama_jax.scaling(base, budgets, SIZES_OF_RUNS, run_dir=tmp_path / "scaling", quiet=True)
    assert len(found.points) == 9
    for point in found.points:
        half_a_step = point.flops_per_token * 8 * 32 / 2
        assert point.flops_per_token * point.tokens == pytest.approx(point.budget, abs=half_a_step)
    assert found.points[1].flops_per_token == train_flops_per_token(base.model, base.sequence_length)
    assert found.sweep is not None
    assert [trial["step"] * 8 * 32 for trial in found.sweep.trials()] == [point.tokens for point in found.points]
    assert {entry["budget"] for entry in found.holdout} == {4e8}
    assert all(0 < entry["low"] < entry["high"] < 10 for entry in found.holdout)
    again = llama_jax.scaling(base, budgets, SIZES_OF_RUNS, run_dir=tmp_path / "scaling", quiet=True)
    assert again.fit == found.fit
