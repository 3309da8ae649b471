"""`scaling`: models of several sizes trained with several budgets, the law of their losses, and what it recommends."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llama_jax.ablation.laws import NUM_TERMS, Law, Resampled, fit_cost, quantiles
from llama_jax.ablation.result import Sweep
from llama_jax.ablation.sweep import ablate
from llama_jax.ablation.tables import Columns, as_markdown, as_text
from llama_jax.ablation.variants import Variants, config_of_base, make_variants
from llama_jax.config import UserError, override
from llama_jax.figures import as_html, counted
from llama_jax.remote import local_path
from llama_jax.run_config import RunConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def scaling(
    base: RunConfig | str,
    budgets: Sequence[float],
    sizes: Variants,
    *,
    seeds: int | Sequence[int] = 1,
    holdout: str | None = "auto",
    run_dir: str | Path | None = None,
    level: float = 0.95,
    components: Sequence[type] = (),
    quiet: bool = False,
) -> "Scaling":
    """Train `sizes` of `base` with each of `budgets`, in training FLOPs, and return the law of their losses.

    `sizes` are changes of the model as `ablate` takes them, at least three; a run has as many steps as its budget pays
    for, and its learning rate decays until its own end (Hoffmann et al. 2022, approaches 2 and 3). `holdout` says which
    runs are predicted by a fit without them: those of the largest "size" or "budget", of the size of that name, none
    (None), or "auto": of the largest size of at least four, else of the largest of three budgets. The other arguments
    are those of `ablate`, and the same call continues what was stopped.

    What small runs show is the law of small runs: on a CPU, of models with 10^4 to 10^6 parameters, whose embeddings
    and head are most of them, on texts that repeat. Their exponents are not those of large models, the interval of a
    budget beyond a few times the largest one is too narrow where the law bends, and the learning rate has to suit every
    size. Raises UserError for sizes and budgets that no law can be fitted to.
    """
    config = config_of_base(base, None)
    run_dir = None if run_dir is None else local_path(run_dir, "run_dir")
    made = make_variants(config, sizes, components)
    if len(made) < 3 or len(set(budgets)) < 2 or min(budgets) <= 0:
        raise UserError(
            f"{len(made)} sizes with budgets={list(budgets)} do not show a law: give at least 3 and 2 budgets in FLOPs"
        )
    runs: list[tuple[str, RunConfig]] = []
    points: list[Point] = []
    for budget in sorted(set(map(float, budgets))):
        for size in made:
            a_step = _tokens_per_step(size.config)
            flops = size.config.flops_per_token
            if (steps := round(budget / (flops * a_step))) < 1:
                raise UserError(f"budget={budget:g} pays for no step of '{size.name}': one takes {flops * a_step:.3g}")
            runs.append((f"{size.name}, {budget:.3g} FLOPs", override(size.config, {"num_steps": steps})))
            points.append(Point(size.name, budget, 0, steps * a_step, flops, 0.0))
    sweep = ablate(config, runs, seeds=seeds, run_dir=run_dir, components=components, quiet=quiet)
    done = [
        dataclasses.replace(point, parameters=variant.num_parameters or 0, loss=loss)
        for point, variant in zip(points, sweep.record.variants, strict=True)
        for trial in sweep.record.trials_of(variant.name)
        if (loss := trial.final("val_loss")) is not None
    ]
    return Scaling(done, holdout=holdout, level=level, sweep=sweep)


def _tokens_per_step(config: RunConfig) -> int:
    source = getattr(config.data.objective, "source_length", None) or 0
    return config.global_batch_size * (config.sequence_length + source)


@dataclasses.dataclass(frozen=True)
class Point:
    """A finished run: its size's name, its budget and exact counts, and its final validation loss.

    size: name of the size.
    budget: training FLOPs that were asked for.
    parameters: exact number.
    tokens: positions that it was trained on.
    flops_per_token: of training.
    loss: in nats per token.
    """

    size: str
    budget: float
    parameters: int
    tokens: int
    flops_per_token: float
    loss: float


class Recommendation(NamedTuple):
    """The size and tokens of the least loss for a budget of training FLOPs, each with the ends of its interval."""

    budget: float
    parameters: float
    parameters_interval: tuple[float, float]
    tokens: float
    tokens_interval: tuple[float, float]
    loss: float
    loss_interval: tuple[float, float]


class Scaling:
    """The losses of sizes and budgets, with the law that was fitted to all of them.

    Intervals are of repeated runs (`Resampled`), at `level`; they hold where the law does. `points` are the runs, and
    `sweep` is where they are on disk. Raises UserError where they are too few for a fit.
    """

    def __init__(
        self,
        points: Sequence[Point],
        *,
        holdout: str | None = "auto",
        level: float = 0.95,
        resamples: int = 200,
        sweep: Sweep | None = None,
    ):
        self.points, self.level, self.sweep, self._resamples = list(points), level, sweep, resamples
        self.budgets = sorted({point.budget for point in points})
        self._resampled = self._fit(self.points)
        counts = {point.parameters: point.flops_per_token for point in self.points}
        self.cost = fit_cost(np.array(list(counts), dtype=float), np.array(list(counts.values())))
        left_out = self._left_out(holdout)
        self.holdout = self._predicted(left_out) if left_out else []

    @property
    def fit(self) -> Law:
        """The law of all runs."""
        return self._resampled.law

    @functools.cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """The interval of each number of the law."""
        low, high = quantiles(np.array(self._resampled.laws).T, self.level)
        return {name: (float(a), float(b)) for name, a, b in zip(Law._fields, low, high, strict=True)}

    def _fit(self, points: Sequence[Point]) -> Resampled:
        sizes = {point.parameters for point in points}
        if len(points) <= NUM_TERMS or len(sizes) < 3:
            raise UserError(
                f"{len(points)} runs of {len(sizes)} sizes do not show a law: give more sizes, budgets or seeds, at "
                f"least {NUM_TERMS + 1} runs of 3 sizes that are fitted"
            )
        columns = [[float(value) for value in (p.parameters, p.tokens, p.loss)] for p in points]
        return Resampled.fit(*np.array(columns).T, resamples=self._resamples)

    def _left_out(self, holdout: str | None) -> list[Point]:
        """Return the runs that are predicted without them."""
        largest = max(self.points, key=lambda point: point.parameters).size
        names = {point.size for point in self.points}
        if holdout == "auto":
            holdout = "size" if len(names) > 3 else "budget" if len(self.budgets) > 2 else None
        if holdout not in (None, "size", "budget", *names):
            raise UserError(f"holdout='{holdout}' must be size, budget, auto or one of {', '.join(sorted(names))}")
        if holdout == "budget":
            return [point for point in self.points if point.budget == self.budgets[-1]]
        return [point for point in self.points if point.size == (largest if holdout == "size" else holdout)]

    def _predicted(self, left_out: Sequence[Point]) -> list[dict[str, Any]]:
        """Return measured and predicted losses of runs that were not fitted, with the intervals of such a run."""
        fitted = self._fit([point for point in self.points if point not in left_out])
        parameters, tokens = (np.array([float(getattr(p, k)) for p in left_out]) for k in ("parameters", "tokens"))
        low, high = quantiles(fitted.measurements(parameters, tokens), self.level)
        predicted = fitted.law.loss(parameters, tokens)
        return [
            {
                "size": point.size,
                "budget": point.budget,
                "measured": point.loss,
                "predicted": float(value),
                "low": float(bottom),
                "high": float(top),
                "inside": bool(bottom <= point.loss <= top),
            }
            for point, value, bottom, top in zip(left_out, predicted, low, high, strict=True)
        ]

    def profiles(self) -> list[dict[str, Any]]:
        """Return the IsoFLOP profile of each budget: the parabola of the loss in log parameters, and its minimum.

        `coefficients` are those of its powers 2, 1 and 0; `parameters`, `tokens` and `loss` are at the minimum, None
        where it has none; `inside` says whether that is among the sizes (Hoffmann et al. 2022, approach 2).
        """
        found: list[dict[str, Any]] = []
        for budget in self.budgets:
            runs = [point for point in self.points if point.budget == budget]
            entry = dict.fromkeys(("coefficients", "parameters", "tokens", "loss")) | {
                "budget": budget,
                "inside": False,
            }
            sizes, losses = np.array([(float(point.parameters), point.loss) for point in runs]).T
            if len(set(sizes)) > 2:
                a, b, c = map(float, np.polyfit(np.log(sizes), losses, 2))
                entry["coefficients"] = (a, b, c)
                if a > 0 and abs(best := -b / (2 * a)) < 100:
                    parameters = float(np.exp(best))
                    tokens = budget / (self.cost.factor * parameters**self.cost.power)
                    entry |= {"parameters": parameters, "tokens": tokens, "loss": c - b * b / (4 * a)}
                    entry["inside"] = bool(sizes.min() <= parameters <= sizes.max())
            found.append(entry)
        return found

    def recommend(self, budget: float) -> Recommendation:
        """Return the parameters and tokens of the least loss at `budget` training FLOPs, by the law, with intervals.

        FLOPs per token are a power of the parameters through the sizes that were trained.
        """
        if budget <= 0:
            raise UserError(f"budget={budget} must be training FLOPs, such as 1e15")
        law, laws = self.fit, self._resampled.laws
        with np.errstate(over="ignore", invalid="ignore"):
            parameters, tokens = self.cost.optimum(law, budget)
            every = self.cost.optimum(laws, budget)
            ends = [quantiles(values, self.level) for values in (*every, laws.loss(*every))]
        around = [(_rounded(low), _rounded(high)) for low, high in ends]
        loss = _rounded(law.loss(parameters, tokens))
        return Recommendation(budget, _rounded(parameters), around[0], _rounded(tokens), around[1], loss, around[2])

    def _tables(self) -> list[tuple[Columns, list[str]]]:
        percent = f"{100 * self.level:g} %"
        law: Columns = {"number": list(Law._fields), "fit": [f"{value:.4g}" for value in self.fit]}
        law[percent] = [f"{low:.4g} to {high:.4g}" for low, high in self.intervals.values()]
        best = [self.recommend(budget) for budget in self.budgets]
        profiles = self.profiles()
        isoflop: Columns = {
            "budget": [f"{budget:.3g}" for budget in self.budgets],
            "best size (parabola)": [_minimum(entry) for entry in profiles],
            "best size (law)": [counted(found.parameters) for found in best],
            percent: [f"{counted(low)} to {counted(high)}" for low, high in (r.parameters_interval for r in best)],
            "its tokens": [counted(found.tokens) for found in best],
            "its loss": [f"{found.loss:.4f}" for found in best],
        }
        form = "loss = E + A / parameters^alpha + B / tokens^beta, in nats per token, fitted to"
        wide = [name for name in ("E", "alpha", "beta") if self.intervals[name][1] > 10 * self.intervals[name][0]]
        unsure = [f"note: the interval of {', '.join(wide)} spans a factor of 10: these runs hardly determine it"]
        tables = [
            (
                law,
                [
                    f"{form} {len(self.points)} runs; intervals of {self._resamples} parametric bootstraps",
                    *unsure * bool(wide),
                ],
            ),
            (
                isoflop,
                ["budget: training FLOPs; outside: the parabola's minimum is not among the sizes"],
            ),
        ]
        if self.holdout:
            held: Columns = {"not fitted": [f"{e['size']}, {e['budget']:.3g} FLOPs" for e in self.holdout]}
            held |= {key: [f"{entry[key]:.4f}" for entry in self.holdout] for key in ("measured", "predicted")}
            held[percent] = [f"{entry['low']:.4f} to {entry['high']:.4f}" for entry in self.holdout]
            inside = sum(entry["inside"] for entry in self.holdout)
            tables.append((held, [f"{inside} of {len(self.holdout)} runs that were not fitted are in their intervals"]))
        return tables

    def to_markdown(self) -> str:
        """Return the law, the best sizes and what was not fitted, as Markdown."""
        return "\n\n".join(as_markdown(*table) for table in self._tables())

    def __repr__(self) -> str:
        return "\n\n".join(as_text(*table) for table in self._tables())

    def _repr_html_(self) -> str:
        return "<br>".join(as_html(*table) for table in self._tables())

    def plot(self) -> "Figure":
        """Return a figure: IsoFLOP profiles, the best size against the budget, and measured against predicted loss."""
        from llama_jax.ablation.plotting import plot_scaling

        return plot_scaling(self)


def _rounded(number: Any) -> float:
    """Return a number with five digits, more than any interval of a law has."""
    return float(f"{number:.5g}")


def _minimum(profile: dict[str, Any]) -> str:
    """Return the size at the minimum of a profile as text."""
    if profile["parameters"] is None:
        return "-"
    return counted(profile["parameters"]) if profile["inside"] else f"outside: {counted(profile['parameters'])}"
