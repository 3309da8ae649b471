"""Shared parts of tables and figures: colours, units, counts, and the matplotlib figure that a `plot()` returns."""

import html
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which the colour-blind can tell apart; grey for its yellow and black.
COLORS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (128, 128, 128))
UNITS = {"loss": "nats per token", "val_loss": "nats per token", "val_bits_per_byte": "bits per byte"}
EXTRA = "pip install 'llama_jax[compare]'"


def color_of(place: int) -> tuple[float, float, float]:
    """Return the matplotlib colour of the curve at `place`; after the last comes the first again."""
    red, green, blue = COLORS[place % len(COLORS)]
    return red / 255, green / 255, blue / 255


def new_figure(width: float, height: float) -> "Figure":
    """Return a matplotlib figure in inches that a notebook shows where it is a cell's last value, and only there.

    pyplot, which shows its figures by itself, does not know it. Raises UserError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError(f"a figure needs matplotlib: {EXTRA}") from None

    class Shown(Figure):
        """A figure with its picture for notebooks, whether or not pyplot was imported there."""

        def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
            picture, (wide, high) = io.BytesIO(), self.get_size_inches() * 100
            self.savefig(picture, format="png", dpi=200)  # twice as many pixels as are shown: sharp on any screen
            return picture.getvalue(), {"width": int(wide), "height": int(high)}

    return Shown(figsize=(width, height), dpi=100, layout="constrained")


def clean(axes: "Axes") -> "Axes":
    """Return the axes with a light grid and without the frame's upper and right side."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def counted(number: float | None) -> str:
    """Return a count with three digits: 3.8M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number is not None and number >= 0.9995 * size:  # 999,999 is 1M
            return f"{number / size:.3g}{unit}"
    return "-" if number is None else f"{number:.4g}"


def smooth(curve: Mapping[int, float]) -> dict[int, float]:
    """Return means over the last fortieth of the points."""
    values, width = list(curve.values()), 1 + len(curve) // 40
    return {step: statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i, step in enumerate(curve)}


def as_html(columns: Mapping[str, Sequence[str]], lines: Sequence[str] = (), left: int = 1) -> str:
    """Return an HTML table that takes its colours from the page and scrolls where the page is narrow.

    `columns` are cells by title, the first `left` of them texts and the others numbers; `lines` are notes below it.
    """

    def row(kind: str, cells: Sequence[str]) -> str:
        line = "padding:3px 6px;border:0;border-bottom:1px solid rgba(128,128,128,.4);text-align:"
        whole = "right;white-space:nowrap" if kind == "td" else "right"  # numbers do not break, titles may
        styles = [f"{line}{whole if number >= left else 'left'}" for number in range(len(cells))]
        filled = zip(styles, map(html.escape, cells), strict=True)
        return "<tr>" + "".join(f'<{kind} style="{style}">{cell}</{kind}>' for style, cell in filled) + "</tr>"

    body = "".join(row("td", cells) for cells in zip(*columns.values(), strict=True))
    notes = "".join(f'<p style="margin:2px 0;opacity:.8">{html.escape(line)}</p>' for line in lines)
    table = '<table style="border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:1em">'
    return (
        '<div style="overflow-x:auto;scrollbar-color:gray transparent;font-size:.85em">'
        f"{table}<thead>{row('th', list(columns))}</thead><tbody>{body}</tbody></table></div>"
        f'<div style="font-size:.8em;margin-top:4px">{notes}</div>'
    )
