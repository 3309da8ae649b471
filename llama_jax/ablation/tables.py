"""The table of a sweep: its columns as text, and their forms for terminals, Markdown and notebooks."""

import functools
import io
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_jax.figures import counted

Columns = dict[str, list[str]]  # cells of each variant, by title


def columns_of(records: Sequence[Mapping[str, Any]], metric: str, baseline: str) -> tuple[Columns, list[str]]:
    """Return the columns, and lines on those that are left out: costs that are the same in all or known of none."""
    columns = {"variant": [record["variant"] for record in records]}
    runs = [f"{record['n']}" + (f", {record['failed']} failed" if record["failed"] else "") for record in records]
    columns["seeds"] = runs
    columns[metric] = [with_interval(record, "mean", "low", "high") for record in records]
    columns["difference"] = [
        "baseline"
        if record["variant"] == baseline
        else with_interval(record, "difference", "simultaneous_low", "simultaneous_high", "+")
        for record in records
    ]
    columns["p"] = [
        "-" if (p := record["p_holm"]) is None else f"{p:.3f}" if p >= 0.001 else "<0.001" for record in records
    ]
    columns["seeds needed"] = [_needed(record) for record in records]
    for title, key, form in COSTS:
        columns[title] = ["-" if record[key] is None else form(record[key]) + _range(record, key) for record in records]
    titles = [title for title, _, _ in COSTS] + ["seeds"]
    unknown = [title for title in titles if set(columns[title]) == {"-"}]
    same = [title for title in titles if len(records) > 1 and len(set(columns[title])) == 1 and title not in unknown]
    lines = [f"the same in all: {', '.join(f'{title} {columns[title][0]}' for title in same)}"] if same else []
    lines += [f"not measured: {', '.join(unknown)}"] if unknown else []
    return {title: cells for title, cells in columns.items() if title not in same + unknown}, lines


def with_interval(record: Mapping[str, Any], mean: str, low: str, high: str, sign: str = "") -> str:
    """Return `mean ± half of the interval`, to the second digit of the half, and small numbers to the third decimal."""
    value, bottom, top = (record.get(key) for key in (mean, low, high))
    if value is None:
        return "-"
    half = 0.0 if bottom is None or top is None else (top - bottom) / 2
    least = 3 if abs(value) < 100 else 0
    decimals = min(max(1 - math.floor(math.log10(half)), least), 6) if half > 0 else 4
    return f"{value:{sign},.{decimals}f}" + ("" if bottom is None else f" ± {half:.{decimals}f}")


def _needed(record: Mapping[str, Any]) -> str:
    if record["difference"] is None or record["p"] is None:
        return "-"
    return ">10,000" if record["seeds_needed"] is None else f"{record['seeds_needed']:,}"


def _range(record: Mapping[str, Any], key: str) -> str:
    low, high = (record.get(f"{key}_{end}") for end in ("low", "high"))
    return "" if low is None or high is None else f" ({low:,.0f}-{high:,.0f})"


def _mebibytes(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def _flops(number: float) -> str:
    return f"{number:.3g}".replace("e+", "e")


def _whole(number: float) -> str:
    return f"{number:,.0f}"


# (title, key of the record, form of the number)
COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "num_parameters", counted),
    ("FLOPs", "train_flops", _flops),
    ("cache B/token", "cache_bytes_per_token", _whole),
    ("tokens/s", "tokens_per_second", _whole),
    ("memory", "peak_bytes", _mebibytes),
)


def as_text(columns: Columns, lines: Sequence[str]) -> str:
    """Return a table for a terminal of its width, or of 120 characters; a wide one has its costs in a second part."""
    from rich.console import Console
    from rich.table import Table

    # In a notebook a console shows what it prints, by itself.
    new = functools.partial(Console, force_jupyter=False, color_system=None, markup=False, highlight=False, emoji=False)
    width = new().width if new().is_terminal else 120
    (first, names), *others = columns.items()
    wide = sum(2 + max(map(len, [title, *cells])) for title, cells in columns.items()) > width + 2
    costs = [title for title, _, _ in COSTS]
    parts = [[(t, c) for t, c in others if (t in costs) == cost] for cost in (False, True)] if wide else [others]
    console = new(file=io.StringIO(), width=width)
    for part in filter(None, parts):
        table = Table(box=None, pad_edge=False)
        table.add_column(first, overflow="fold")
        for title, _ in part:
            table.add_column(title, justify="right", no_wrap=True)
        for cells in zip(names, *(cells for _, cells in part), strict=True):
            table.add_row(*cells)
        console.print(table, end="\n\n")
    for line in lines:
        console.print(line)
    return typing.cast("io.StringIO", console.file).getvalue().rstrip()


def as_markdown(columns: Columns, lines: Sequence[str]) -> str:
    """Return a table of GitHub's Markdown, the first column to the left and the others to the right."""
    rows = [list(columns), ["---", *["--:"] * (len(columns) - 1)], *map(list, zip(*columns.values(), strict=True))]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n\n".join([table, *lines])
