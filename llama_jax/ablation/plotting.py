"""The figure of a sweep: curves with bands, the final metric against costs, differences with intervals."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_jax.ablation.statistics import t_interval
from llama_jax.ablation.tables import COSTS
from llama_jax.figures import UNITS, clean, color_of, counted, new_figure, smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from llama_jax.ablation.isoflop import Scaling
    from llama_jax.ablation.result import Sweep

STYLES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
AXES = {
    "FLOPs": "training FLOPs",
    "cache B/token": "KV cache (bytes per token)",
    "memory": "peak memory (bytes)",
    "tokens/s": "throughput (tokens/s)",
}
NAME = 24  # characters of a variant's name that a figure shows


def plot_sweep(sweep: "Sweep") -> "Figure":
    """Return the figure of a sweep: the variants' names, two panels in a row, and the differences below them."""
    records = sweep.records()
    panels = _panels(sweep)
    compared = [i for i, record in enumerate(records) if record["difference"] is not None]
    names = [_short_names(sweep)[record["variant"]] for record in records]
    columns = max(1, min(len(names), 64 // (6 + max(map(len, names), default=1))))
    rows = math.ceil(len(panels) / 2)
    heights = [2.8 * rows] * bool(rows) + [0.9 + 0.3 * len(compared)] * bool(compared)
    figure = new_figure(7.2, max(sum(heights), 1) + 0.25 * math.ceil(len(names) / columns))
    if not heights:
        figure.text(0.5, 0.5, "no run has logged two steps yet", ha="center")
        return figure
    from matplotlib.lines import Line2D

    # Two subfigures: long names at the left of the differences take no width from the panels above.
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    grid = parts[0].add_gridspec(max(rows, 1), 2)
    for place, draw in enumerate(panels):
        alone = place == len(panels) - 1 and not place % 2  # the last one has a whole row
        draw(clean(parts[0].add_subplot(grid[place // 2, slice(None) if alone else place % 2])))
    if compared:
        _differences(sweep, compared, clean(parts[-1].add_subplot()))
    handles = [Line2D([], [], label=name, **_style(i)) for i, name in enumerate(names)]
    parts[0].legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)
    return figure


def _panels(sweep: "Sweep") -> list[Callable[["Axes"], None]]:
    """Return the functions that draw curves, and the final metric against the costs that differ by more than 2 %."""
    records = sweep.records()
    panels: list[Callable[[Axes], None]] = []
    for metric in dict.fromkeys(("loss", sweep.metric)):
        places = [i for i in range(len(records)) if len(_curve(sweep, i, metric)[0]) > 1]
        panels += [functools.partial(_curves, sweep, metric, places)] * bool(places)
    for title, key, _ in COSTS:
        places = [i for i, record in enumerate(records) if record["mean"] is not None and record[key]]
        costs = [records[i][key] for i in places]
        if costs and max(costs) > 1.02 * min(costs):
            panels.append(functools.partial(_cost, sweep, title, key, places))
    return panels


def _style(place: int, **changes: Any) -> dict[str, Any]:
    # The first seven differ in colour; the next seven have the same colours with other lines and markers.
    again = place // 7
    return {
        "color": color_of(place),
        "linestyle": STYLES[(place % 7 + 2 * again) % len(STYLES)],
        "marker": MARKERS[(place % 7 + 2 * again) % len(MARKERS)],
        "markersize": 7,
    } | changes


def _short_names(sweep: "Sweep") -> dict[str, str]:
    """Return short forms of the variants' names, so long that no two are the same."""
    names = [variant.name for variant in sweep.record.variants] + [sweep.record.baseline]
    for size in range(NAME, max(map(len, names)) + 1):
        short = {name: name if len(name) <= size else f"{name[: size // 2 - 1]}…{name[-size // 2 :]}" for name in names}
        if len(set(short.values())) == len(set(names)):
            return short
    return {name: name for name in names}


def _unit(metric: str) -> str:
    return f"{metric.replace('val_', 'validation ')}\n({UNITS[metric]})" if metric in UNITS else metric


def _curve(sweep: "Sweep", place: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps [T] that all seeds of a variant have, and the metric [T, S] there; a loss is a running mean."""
    curves: list[Mapping[int, float]] = []
    for trial in sweep.record.trials_of(sweep.record.variants[place].name):
        values = {line["step"]: line[metric] for line in trial.metrics if isinstance(line.get(metric), int | float)}
        if values and trial.state != "failed":
            curves.append(smooth(values) if metric == "loss" else values)
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array(steps), np.array([[curve[step] for curve in curves] for step in steps], dtype=float)


def _curves(sweep: "Sweep", metric: str, places: Sequence[int], axes: "Axes") -> None:
    seen: list[np.ndarray] = []
    every: list[np.ndarray] = []
    for i in places:
        steps, values = _curve(sweep, i, metric)
        every.append(values)
        mean, low, high = t_interval(values, sweep.level)
        axes.plot(steps, mean, **_style(i, marker=""), linewidth=1.6)
        if values.shape[1] > 1:
            axes.fill_between(steps, low, high, color=color_of(i), alpha=0.2, linewidth=0)
        seen.append(mean[steps > steps[-1] / 5])
    low, high = np.concatenate(seen).min(), np.concatenate(seen).max()  # without the first fifth, far above the rest
    if any(values.shape[1] > 1 for values in every):
        axes.set_title(f"bands: {100 * sweep.level:g} % over seeds", fontsize="medium", loc="right")
    bottom = low - 0.1 * (high - low) - 1e-9
    axes.set_ylim(max(bottom, 0) if metric in UNITS else bottom, high + 0.1 * (high - low) + 1e-9)
    unit = _unit(metric)
    axes.set(xlabel="step", ylabel=f"training {unit[:-1]}, running mean)" if metric == "loss" else unit)


def _cost(sweep: "Sweep", title: str, key: str, places: Sequence[int], axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    records = sweep.records()
    for i in places:
        record = records[i]
        half = None if record["low"] is None else (record["high"] - record["low"]) / 2
        axes.errorbar(record[key], record["mean"], half, **_style(i, linestyle=""), capsize=4)
    low, high = (end(records[i][key] for i in places) for end in (min, max))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if high > 5 * low:
        axes.set_xscale("log")
        _few_ticks(axes, [low, high])
    axes.set(xlabel=AXES.get(title, title), ylabel=f"final {_unit(sweep.metric)}")
    if sweep.metric in UNITS:  # an interval may reach below 0, a loss does not
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 0))


def _few_ticks(axes: "Axes", values: Sequence[float], count: int = 4, form: Callable[[float], str] = counted) -> None:
    """Give a logarithmic axis few ticks: matplotlib's are too many in half a decade, and too few in another."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xticks(np.geomspace(min(values), max(values), count))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _differences(sweep: "Sweep", places: Sequence[int], axes: "Axes") -> None:
    records, short = sweep.records(), _short_names(sweep)
    axes.axvline(0, color="0.3", linewidth=1)
    for row, i in enumerate(places):
        record, color = records[i], color_of(i)
        if record["difference_low"] is not None:
            axes.hlines(row, record["simultaneous_low"], record["simultaneous_high"], color=color, linewidth=1.5)
            axes.hlines(row, record["difference_low"], record["difference_high"], color=color, linewidth=4)
        axes.plot(record["difference"], row, **_style(i, linestyle=""))
    if any(records[i]["difference_low"] is not None for i in places):
        axes.set_title(f"thick: {100 * sweep.level:g} % each, thin: all together", fontsize="medium", loc="right")
    axes.set_yticks(range(len(places)), [short[records[i]["variant"]] for i in places])
    axes.set_ylim(len(places) - 0.5, -0.5)
    unit = f" ({UNITS[sweep.metric]})" if sweep.metric in UNITS else ""
    axes.set_xlabel(
        f"{sweep.metric.replace('val_', 'validation ')} minus that of\n{short[sweep.record.baseline]}{unit}"
    )


def plot_scaling(found: "Scaling") -> "Figure":
    """Return the figure of a scaling law: profiles above, best sizes and predictions below."""
    figure = new_figure(7.2, 6.4)
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1))
    _profiles(found, clean(figure.add_subplot(grid[0, :])))
    _best_sizes(found, clean(figure.add_subplot(grid[1, 0])))
    _predictions(found, clean(figure.add_subplot(grid[1, 1])))
    return figure


def _profiles(found: "Scaling", axes: "Axes") -> None:
    for i, profile in enumerate(found.profiles()):
        runs = [point for point in found.points if point.budget == profile["budget"]]
        sizes = np.array([float(point.parameters) for point in runs])
        label, shape = f"{profile['budget']:.2g} FLOPs", _style(i, linestyle="")
        axes.plot(sizes, [point.loss for point in runs], **shape, label=label)
        line = np.geomspace(sizes.min(), sizes.max(), 50)
        if profile["coefficients"] is not None:
            axes.plot(line, np.polyval(profile["coefficients"], np.log(line)), **_style(i, marker="", linestyle="-"))
        tokens = profile["budget"] / (found.cost.factor * line**found.cost.power)
        axes.plot(line, found.fit.loss(line, tokens), **_style(i, marker="", linestyle=":"))
        if profile["inside"]:
            axes.plot(profile["parameters"], profile["loss"], marker="*", markersize=14, color=color_of(i), mec="black")
    axes.set_xscale("log")
    _few_ticks(axes, [float(point.parameters) for point in found.points])
    axes.set(xlabel="parameters", ylabel=f"final {_unit('val_loss')}")
    axes.set_title("solid: parabola, star: its minimum, dotted: law", fontsize="medium", loc="right")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _best_sizes(found: "Scaling", axes: "Axes") -> None:
    budgets = np.geomspace(found.budgets[0], 3 * found.budgets[-1], 25)
    best = [found.recommend(float(budget)) for budget in budgets]
    low, high = zip(*(one.parameters_interval for one in best), strict=True)
    axes.plot(budgets, [one.parameters for one in best], **_style(0, marker=""))
    axes.fill_between(budgets, low, high, color=color_of(0), alpha=0.2, linewidth=0)
    for profile in found.profiles():
        if profile["inside"]:
            axes.plot(
                profile["budget"], profile["parameters"], marker="*", markersize=12, color=color_of(1), mec="black"
            )
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="best number of parameters")
    _few_ticks(axes, [float(budget) for budget in budgets], 3, "{:.1e}".format)
    sizes = [float(point.parameters) for point in found.points]
    axes.set_ylim(min(sizes) / 3, max(sizes) * 3)
    axes.set_title(f"line: law, {100 * found.level:g} %", fontsize="medium", loc="right")


def _predictions(found: "Scaling", axes: "Axes") -> None:
    names = {(entry["size"], entry["budget"]) for entry in found.holdout}
    points = [point for point in found.points if (point.size, point.budget) not in names]
    fitted = [(float(found.fit.loss(float(p.parameters), float(p.tokens))), p.loss) for p in points]
    held = [(entry["predicted"], entry["measured"]) for entry in found.holdout]
    axes.plot(*zip(*fitted, strict=True), **_style(0, linestyle=""), alpha=0.5)
    for entry in found.holdout:
        bars = [[entry["predicted"] - entry["low"]], [entry["high"] - entry["predicted"]]]
        axes.errorbar(entry["predicted"], entry["measured"], xerr=bars, **_style(5, linestyle=""), capsize=4)
    losses = [loss for pair in fitted + held for loss in pair]
    ends = min(losses), max(losses)
    axes.plot(ends, ends, color="0.3", linewidth=1)
    axes.set(xlabel="predicted loss (nats per token)", ylabel="measured loss")
    axes.set_title("plus: not fitted" if held else "all are fitted", fontsize="medium", loc="right")
