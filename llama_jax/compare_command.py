"""The work of the command `compare`: a table of runs, and a plot of their curves in the terminal or in a file."""

import argparse
import importlib.util
import json
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from llama_jax.config import UserError
from llama_jax.figures import COLORS, EXTRA, UNITS, counted, smooth
from llama_jax.remote import local_path
from llama_jax.run import LAST_LINES, Row, choose_metric, compare_runs, differing_keys, find_runs, rows_of
from llama_jax.screen import duration
from llama_jax.values import printable as printable

MAX_CURVES = len(COLORS)  # in a plot: those of the best rows
MARKS = "abcdefg"  # of curves on a terminal without colours
WIDTH = 28  # at most, of a key's value

Columns = dict[str, list[str]]  # cells of each row, by title


def compare_command(args: argparse.Namespace) -> int:
    """Compare runs, and print or write what is asked for."""
    if args.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError(f"--png needs matplotlib: {EXTRA}")
    png = None if args.png is None else local_path(args.png, "--png")
    places, without = find_runs(args.runs)
    records = compare_runs(places)
    metric, notes = choose_metric(records, args.metric)
    rows, keys = rows_of(records, metric, every=args.all), differing_keys(records, every=args.all)
    if len(rows) < len(records):
        keys.pop("seed", None)
    notes += [f"left out, there is no run in {place}" for place in without]
    if args.json:
        print(json.dumps({"metric": metric, "notes": notes, "rows": [as_json(row, keys, metric) for row in rows]}))
        return 0
    console = Console()
    numbers, about = numbers_of(rows, metric)
    print_tables(console, named(rows), settings_of(rows, keys), numbers)
    print_lines(console, ["; ".join(about), *(f"note: {note}" for note in notes)])
    if png is None:
        print_plot(console, rows, metric)
    else:
        write_image(png, rows, metric)
        print(f"curves: {png}")
    return 0


def print_tables(console: Console, *columns: Columns) -> None:
    """Print the tables of names, settings and numbers, as wide as a terminal is."""
    for table in tables(*columns, width=console.width if console.is_terminal else None):
        print(table, end="\n\n")


def print_lines(console: Console, texts: Sequence[str]) -> None:
    """Print lines, on a terminal broken where it ends."""
    for line in map(printable, texts):
        print(textwrap.fill(line, console.width) if console.is_terminal else line)


def as_json(row: Row, keys: Mapping[str, str], metric: str) -> dict[str, Any]:
    """Return a row as plain data, with the numbers of each of its runs."""
    config = row.runs[0].config
    means, deviations = row.numbers(metric)
    found = {"name": row.name, "num_parameters": row.runs[0].num_parameters, "num_steps": config["num_steps"]}
    runs = [{"path": run.path, "seed": run.config["seed"]} | run.numbers(metric) for run in row.runs]
    return found | {"config": {key: config.get(key) for key in keys}, "mean": means, "std": deviations, "runs": runs}


def named(rows: Sequence[Row]) -> Columns:
    """Return the column of the rows' names."""
    return {"run": [row.name + (f" n={len(row.runs)}" if len(row.runs) > 1 else "") for row in rows]}


def settings_of(rows: Sequence[Row], keys: Mapping[str, str]) -> Columns:
    """Return a column for each key; `-` where a row's config has no such key."""
    configs = [row.runs[0].config for row in rows]
    return {short: [shown(config[key]) if key in config else "-" for config in configs] for key, short in keys.items()}


def numbers_of(rows: Sequence[Row], metric: str) -> tuple[Columns, list[str]]:
    """Return the columns of numbers, and notes on them; what is the same in all of several rows is a note."""
    found = [row.numbers(metric) for row in rows]

    def column(name: str, form: Callable[[float], str] = "{:.4f}".format) -> list[str]:
        return ["-" if means[name] is None else form(means[name] or 0) for means, _ in found]

    columns = {"params": [counted(row.runs[0].num_parameters) for row in rows]}
    if metric != "loss":
        columns["loss"] = column("loss")
    spreads = ["" if spread["best"] is None else f" ±{spread['best']:.2g}" for _, spread in found]
    best, steps = column("best"), column("best_step", "@{:.0f}".format)
    columns[f"best {metric}"] = [
        value + (f"{spread} {step}" if step != "-" else "")
        for value, spread, step in zip(best, spreads, steps, strict=True)
    ]
    if column("last") != best:
        columns["last"] = column("last")
    if metric == "val_loss" and any(means["val_bits_per_byte"] for means, _ in found):
        columns["bits/byte"] = column("val_bits_per_byte")
    columns["tokens/s"] = column("tokens_per_second", "{:,.0f}".format)
    total, done = [f"{row.runs[0].config['num_steps']}" for row in rows], column("step", "{:.0f}".format)
    columns["steps"] = [step if step == end else f"{step}/{end}" for step, end in zip(done, total, strict=True)]
    columns["time"] = column("seconds", duration)
    same = [title for title in ("params", "steps") if len(rows) > 1 and len(set(columns[title])) == 1]
    about = [f"{title} {columns.pop(title)[0]}" for title in same]
    about += [f"loss: mean of the last {LAST_LINES} logged", "@: its step", "time: of the steps alone"]
    return columns, about + ["±: standard deviation over seeds (--all: each)"] * any(spreads)


def tables(names: Columns, settings: Columns, numbers: Columns, width: int | None) -> list[str]:
    """Return one table, or where it is wider than `width` those of settings, with a line for each key where that takes
    fewer tables, and those of numbers.
    """
    whole = packed(names | settings | numbers, width)
    if len(whole) == 1:
        return whole
    runs = zip(*names.values(), *settings.values(), strict=True)
    by_key = {"key": list(settings)} | {name: cells for name, *cells in runs}
    return [*min(packed(names | settings, width), packed(by_key, width), key=len), *packed(names | numbers, width)]


def packed(columns: Columns, width: int | None) -> list[str]:
    """Return as few tables as are not wider than `width`, each with the first column."""
    (first, names), *others = columns.items()
    parts: list[Columns] = [{first: names}]
    for title, cells in others:
        if width and len(parts[-1]) > 1 and len(lines({**parts[-1], title: cells})[0]) > width:
            parts.append({first: names})
        parts[-1][title] = cells
    return ["\n".join(lines(part)) for part in parts]


def lines(columns: Columns) -> list[str]:
    """Return the lines of a table, the first column to the left and the others to the right."""
    padded = []
    for number, cells in enumerate([printable(cell) for cell in (title, *values)] for title, values in columns.items()):
        spaces = [" " * (max(map(cell_len, cells)) - cell_len(cell)) for cell in cells]
        padded.append([space + cell if number else cell + space for space, cell in zip(spaces, cells, strict=True)])
    return ["  ".join(line) for line in zip(*padded, strict=True)]


def shown(value: Any) -> str:
    """Return a key's value as the command line takes it, its middle left out where it is long."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, list):
        text = ",".join(part if isinstance(part, str) else json.dumps(part) for part in value)
    return text if len(text) <= WIDTH else f"{text[: WIDTH // 2 - 1]}…{text[-WIDTH // 2 :]}"


def curves_of(rows: Sequence[Row], metric: str) -> tuple[str, dict[str, dict[int, float]], float]:
    """Return (what is drawn, the curves of the best rows by name, the highest value to draw).

    It is the training loss where the metric was hardly measured yet, as a mean over neighbours. The first tenth of the
    steps, where values are far above the rest, does not count for the highest value.
    """
    drawn = "loss" if max(len(row.curve(metric)) for row in rows) < 3 else metric
    curves = {row.name: curve for row in rows[:MAX_CURVES] if (curve := row.curve(drawn))}
    if drawn == "loss":
        curves = {name: smooth(curve) for name, curve in curves.items()}
    end = max((max(curve) for curve in curves.values()), default=0)
    top = max((value for curve in curves.values() for step, value in curve.items() if step > end / 10), default=0.0)
    mean = "running mean, " if drawn == "loss" else ""
    return f"{drawn} ({mean}{UNITS[drawn]})" if drawn in UNITS else drawn, curves, top


def print_plot(console: Console, rows: Sequence[Row], metric: str) -> None:
    """Draw the curves with plotext, or print how to get it; nothing where there are no curves yet."""
    title, curves, top = curves_of(rows, metric)
    if not curves:
        return
    if importlib.util.find_spec("plotext") is None:
        print(f"a plot needs plotext: {EXTRA}")
        return
    import plotext  # type: ignore[import-untyped]

    colored, end = console.color_system is not None, max(max(curve) for curve in curves.values())
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plot_size(min(console.width, 100), 18)
    plotext.title(title)
    plotext.xlabel("step")
    plotext.xlim(0, end)
    plotext.xticks([round(part * end / 4) for part in range(5)])
    for i, (name, curve) in enumerate(curves.items()):
        style = {"color": COLORS[i], "marker": "braille"} if colored else {"marker": MARKS[i]}
        plotext.plot(list(curve), [min(value, top) for value in curve.values()], label=printable(shown(name)), **style)
    print(plotext.build() if colored else plotext.uncolorize(plotext.build()))
    if len(rows) > MAX_CURVES:
        print(f"drawn: the best {MAX_CURVES} of {len(rows)}")


def write_image(path: Path, rows: Sequence[Row], metric: str) -> None:
    """Draw the curves with matplotlib into a file of one of its kinds."""
    from matplotlib.figure import Figure

    title, curves, top = curves_of(rows, metric)
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=title)
    for i, (name, curve) in enumerate(curves.items()):
        color = [part / 255 for part in COLORS[i]]
        axes.plot(list(curve), list(curve.values()), label=name, color=color, linestyle=("-", "--", "-.", ":")[i % 4])
    if curves:
        axes.set_ylim(top=top + 0.02 * abs(top))
        axes.legend()
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: of the name's ending
        raise UserError(f"--png={path} cannot be written ({error}): give a path that ends with .png") from None
