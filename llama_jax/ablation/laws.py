"""Scaling laws: the loss as a function of parameters and tokens, fitted, with its optimum for a budget."""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

DELTA = 1e-3  # of the Huber loss, in log loss (Hoffmann et al. 2022, appendix D.2)
NUM_TERMS = 5  # numbers that a fit finds
EXPONENTS = (0.3, 0.8)  # to start from
BOUNDS = np.array([[-20, -20, 1e-3, -20, 1e-3], [20, 20, 3, 20, 3]])  # of log E, log A, alpha, log B, beta, centred
MAX_STEPS = 200

Array = np.ndarray[Any, np.dtype[Any]]


class Law(NamedTuple):
    """Loss E + A / N^alpha + B / D^beta of N parameters after D tokens, in nats per token (Hoffmann et al. 2022)."""

    E: Any
    A: Any
    alpha: Any
    B: Any
    beta: Any

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Return the loss of models with so many parameters after so many tokens."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


class Cost(NamedTuple):
    """FLOPs of a training token of N parameters, factor N^power; 6 N of the paper is `Cost(6, 1)`."""

    factor: float
    power: float

    def optimum(self, law: Law, budget: Any) -> tuple[Any, Any]:
        """Return the (parameters, tokens) of the least loss at a budget of training FLOPs: equation 4 of the paper.

        The derivative of the law along budget = factor N^power D is zero there.
        """
        ratio = law.alpha * law.A / (self.power * law.beta * law.B)
        parameters = (ratio * (budget / self.factor) ** law.beta) ** (1 / (law.alpha + self.power * law.beta))
        return parameters, budget / (self.factor * parameters**self.power)


def fit_cost(parameters: Array, flops_per_token: Array) -> Cost:
    """Return the power law of FLOPs per token through models of different sizes [S]."""
    power, log_factor = np.polyfit(np.log(parameters), np.log(flops_per_token), 1)
    return Cost(float(np.exp(log_factor)), float(power))


def fit_law(parameters: Array, tokens: Array, losses: Array) -> Law:
    """Return the law of R runs: the least Huber loss between logs, the best of descents from several starts.

    It is the objective of Hoffmann et al. 2022, appendix D.2.
    """
    shares = itertools.product((0.3, 0.6, 0.9), (0.3, 0.7), EXPONENTS, EXPONENTS)
    starts = [
        [math.log(of_e), math.log((1 - of_e) * of_a), alpha, math.log((1 - of_e) * (1 - of_a)), beta]
        for of_e, of_a, alpha, beta in shares
    ]
    n, d, log_losses = _centred(parameters), _centred(tokens), np.log(losses)
    typical = log_losses.mean() * np.array([1, 1, 0, 1, 0])
    x, objective = _descend(np.array(starts) + typical, n, d, log_losses)
    return _law(x[objective.argmin()], parameters, tokens)


def _centred(sizes: Array) -> Array:
    # Logs around their mean: else A and alpha, B and beta hardly differ in what they change, and a descent stops early
    # (Besiroglu et al. 2024).
    return np.log(sizes) - np.log(sizes).mean()


def _law(x: Array, parameters: Array, tokens: Array) -> Law:
    """Return the law of the numbers of `_descend`, whose logs are around their means."""
    e, a, alpha, b, beta = map(float, x)
    middle_n, middle_d = np.log(parameters).mean(), np.log(tokens).mean()
    return Law(math.exp(e), math.exp(a + alpha * middle_n), alpha, math.exp(b + beta * middle_d), beta)


def _descend(x: Array, n: Array, d: Array, log_losses: Array) -> tuple[Array, Array]:
    """Return the numbers (log E, log A, alpha, log B, beta) [K, 5] at minima near `x`, and the objective [K] there.

    All descend together, each to its log losses [K, R] or [R]: Levenberg and Marquardt's steps, on squares whose
    weights make them Huber's loss.
    """

    def at(x: Array) -> tuple[Array, Array, Array]:
        """Return the objective [K], the residuals [K, R] in units of DELTA, and the shares [K, 3, R] of the terms."""
        e, a, alpha, b, beta = x.T[:, :, None]
        terms = np.exp(np.stack([e + 0 * n, a - alpha * n, b - beta * d], axis=1))
        residuals = (np.log(terms.sum(1)) - log_losses) / DELTA
        linear = np.clip(residuals, -1, 1)
        return (linear * (residuals - linear / 2)).sum(-1), residuals, terms / terms.sum(1, keepdims=True)

    damping, (objective, residuals, share) = np.full(len(x), 1e-2), at(x)
    for _ in range(MAX_STEPS):
        slopes = np.stack([share[:, 0], share[:, 1], -n * share[:, 1], share[:, 2], -d * share[:, 2]], axis=1) / DELTA
        weights = 1 / np.maximum(np.abs(residuals), 1)
        square = np.einsum("kir,kjr,kr->kij", slopes, slopes, weights)
        gradient = np.einsum("kir,kr->ki", slopes, weights * residuals)
        ridge = damping[:, None] * np.einsum("kii->ki", square) + 1e-12
        step = np.linalg.solve(square + ridge[:, :, None] * np.eye(5), gradient[:, :, None])[:, :, 0]
        new = np.clip(x - step, *BOUNDS)
        at_new = at(new)
        better = at_new[0] < objective
        settled = np.where(better, objective - at_new[0] < 1e-8 * objective, damping > 1e8)
        x = np.where(better[:, None], new, x)
        objective, residuals, share = (
            np.where(better.reshape(-1, *[1] * (old.ndim - 1)), changed, old)
            for changed, old in zip(at_new, (objective, residuals, share), strict=True)
        )
        damping = np.clip(np.where(better, damping / 5, damping * 4), 1e-10, 1e12)
        if settled.all():
            break
    return x, objective


class Resampled(NamedTuple):
    """A law, the laws of repeated runs (its numbers are arrays), and the deviation of a run's log loss around it."""

    law: Law
    laws: Law
    deviation: float

    @classmethod
    def fit(cls, parameters: Array, tokens: Array, losses: Array, resamples: int, seed: int = 0) -> "Resampled":
        """Fit the law of R runs, and `resamples` laws of losses that are drawn around it.

        It is the parametric bootstrap (Efron and Tibshirani 1993, section 6.5), with normal log losses: the runs'
        sizes stay as they were chosen, and the deviation is that of R - 5 degrees of freedom.
        """
        law, n, d = fit_law(parameters, tokens, losses), _centred(parameters), _centred(tokens)
        predicted = np.log(law.loss(parameters, tokens))
        deviation = float(np.sqrt(np.sum((np.log(losses) - predicted) ** 2) / (len(losses) - NUM_TERMS)))
        draws = predicted + deviation * np.random.default_rng(seed).standard_normal((resamples, len(losses)))
        a = math.log(law.A) - law.alpha * np.log(parameters).mean()
        b = math.log(law.B) - law.beta * np.log(tokens).mean()
        x, _ = _descend(np.tile([math.log(law.E), a, law.alpha, b, law.beta], (resamples, 1)), n, d, draws)
        return cls(law, Law(*np.array([_law(one, parameters, tokens) for one in x]).T), deviation)

    def measurements(self, parameters: Array, tokens: Array, seed: int = 0) -> Array:
        """Return losses [resamples, R] of new runs: of each of the laws, with a run's deviation."""
        losses = Law(*np.array(self.laws)[:, :, None]).loss(parameters, tokens)
        return losses * np.exp(self.deviation * np.random.default_rng(seed).standard_normal(losses.shape))


def quantiles(values: Any, level: float) -> tuple[Any, Any]:
    """Return the ends [...] of the interval that has `level` of the values [resamples, ...]."""
    low, high = np.quantile(np.asarray(values), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
