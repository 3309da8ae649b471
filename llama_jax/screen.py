"""A progress bar and the lines above it: on a terminal, in a notebook, or plain lines elsewhere."""

import contextlib
import html
import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llama_jax.remote import with_urls

NOTEBOOK_SECONDS = 0.2  # between two drawings of a bar in a notebook
PLAIN_SECONDS = 30.0  # between two plain lines of slow work
PATIENCE = 5.0  # until the first of them
UNKNOWN = "? left"
GAP, LEAST = 2, 4  # columns between the parts of a bar, and of the bar itself
HTML = (
    '<div style="display:flex;flex-wrap:wrap;gap:0 1em;align-items:center;font-family:monospace"><b>{}</b>'
    '<progress style="flex:1 1 8em;min-width:4em;max-width:32em" {}></progress>{}</div>'
)


def duration(seconds: float) -> str:
    """Return a time as text by its two largest units: `0.42s`, `4m08s`, `1h02m`, `2d03h`."""
    if seconds < 10:
        return f"{seconds:.2g}s" if seconds >= 0.001 else "0s"
    whole = round(seconds)
    for size, unit, small, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02}{name}"
    return f"{whole}s"


def speed(times: Sequence[tuple[int, float]]) -> str:
    """Return a line about (tokens so far, seconds so far); the speed is that after the first, which may compile."""
    if not times:
        return "0 tokens"
    (first, compiled), (tokens, seconds) = times[0], times[-1]
    rate = (tokens - first) / (seconds - compiled) if tokens > first and seconds > compiled else tokens / seconds
    return f"{tokens} token{'s' * (tokens != 1)} in {duration(seconds)}, {rate:,.{0 if rate > 9.95 else 1}f} tokens/s"


class Bar:
    """A progress bar on a terminal or in a notebook, plain lines elsewhere.

    `start` and `total` count steps; the time that is left is estimated from the steps of this process. A `total` of
    None is of work whose end is not known. Where `quiet`, only lines that are `always` said are; where `silent`, as in
    all processes but the first, nothing is. `slow` work, which says nothing itself, has a plain line now and then.
    """

    def __init__(
        self,
        description: str,
        start: int,
        total: int | None,
        *,
        quiet: bool = False,
        silent: bool = False,
        slow: bool = False,
        console: Console | None = None,
    ):
        self.description, self.step, self.total = description, start, total
        self._console = console or Console()
        self._quiet, self._silent = quiet or silent, silent
        self._notebook = self._console.is_jupyter
        self._plain = not self._notebook and (not self._console.is_terminal or self._console.is_dumb_terminal)
        self._numbers: Sequence[str] = ()
        self._began = time.monotonic()
        self._first: tuple[int, float] | None = None  # step and time of the first sign, compilation behind it
        self._cell: Any = None  # IPython's handle on the bar
        self._live: Live | None = None
        self._drawn = self._began
        self._slow = slow and self._plain and not self._quiet
        self._timer = threading.Timer(PATIENCE, self.say, [f"{description}..."])
        self._timer.daemon = True

    def __enter__(self) -> "Bar":
        if self._slow:
            self._timer.start()
        if self._quiet or self._plain:
            return self
        if self._notebook:  # rich's own live display needs ipywidgets there
            from IPython.display import display  # type: ignore[import-not-found]

            self._cell = display(self, display_id=True)
        else:
            self._live = Live(console=self._console, get_renderable=lambda: self)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self.total is None and error is None:
            self.total = self.step
        if self._cell is not None:
            self._cell.update(self)
        if self._live is not None:
            self._live.stop()
            self._live = None

    def advance(self, step: int, total: int | None = None) -> None:
        """Move the bar to a step, and its end to `total` where one is given."""
        now = time.monotonic()
        if self._first is None or total not in (None, self.total):
            self._first = step, now
        self.step, self.total = step, total or self.total
        if self._cell is not None and now - self._drawn > NOTEBOOK_SECONDS:
            self._drawn = now
            self._cell.update(self)
        if self._slow and now - self._drawn > PLAIN_SECONDS:
            self._drawn = now
            self.say("  ".join((self.description, *self._place())))

    def say(self, *lines: str, always: bool = False) -> None:
        """Print lines above the bar."""
        if self._silent or (self._quiet and not always):
            return
        for line in map(with_urls, lines):
            if self._notebook:  # a page wraps what is printed; what rich displays there is scrolled
                print(line)
            else:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def counted[T](self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, each a step."""
        for number, item in enumerate(items, 1):
            yield item
            self.advance(number)

    @contextlib.contextmanager
    def timed(self, work: str) -> Iterator[None]:
        """Print a line before the block, and its time after it."""
        self.say(f"{work}...")
        began = time.monotonic()
        yield
        self.say(f"{work} took {duration(time.monotonic() - began)}")

    def show(self, step: int, numbers: Sequence[str], details: Sequence[str] = ()) -> None:
        """Show the numbers of a step, of which the first are the most important; `details` only on plain lines."""
        self._first = self._first or (step, time.monotonic())
        self.step, self._numbers = step, numbers
        if self._plain:
            place, left = self._place()
            self.say("  ".join((f"step {place}", *numbers, *details, *([] if left == UNKNOWN else [left]))))

    def _place(self) -> tuple[str, str]:
        """Return the step with the total, and the time that is left, or was needed where that is not known."""
        if self.total is None:
            return f"{self.step:,}", duration(time.monotonic() - self._began)
        place = f"{self.step}/{self.total}"
        if self.step >= self.total:
            return place, f"in {duration(time.monotonic() - self._began)}"
        if self._first is None or self.step <= self._first[0]:
            return place, UNKNOWN
        step, began = self._first
        left = (time.monotonic() - began) / (self.step - step) * (self.total - self.step)
        return place, f"{duration(math.ceil(left))} left"

    def _parts(self, width: int) -> tuple[str, str, int]:
        """Return (text before the bar, text after it, columns of the bar) of a bar of at most `width` columns.

        Step and time always stay; then the first number, the bar, the description, and more numbers have room.
        """
        first, *more = self._numbers or ("",)
        place, chosen = self._place(), list[str | None]()
        room = width - len((" " * GAP).join(place))
        for part in (first, None, self.description, *more) if first else (self.description, None):
            room -= GAP + (LEAST if part is None else cell_len(part))
            if room < 0:
                break
            chosen.append(part)
        before = self.description if self.description in chosen else ""
        after = (" " * GAP).join((*place, *(number for number in self._numbers if number in chosen)))
        columns = width - cell_len(after) - GAP - (len(before) + GAP if before else 0)
        return before, after, columns if None in chosen else 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        before, after, columns = self._parts(options.max_width)
        row = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        bar = ProgressBar(self.total, self.step, width=columns, pulse=self.total is None)
        cells = (Text(before, style="bold", no_wrap=True), bar, Text(after, no_wrap=True, overflow="crop"))
        row.add_row(*(cell for cell, there in zip(cells, (before, columns, after), strict=True) if there))
        yield row

    def _repr_html_(self) -> str:
        values = "" if self.total is None else f'value="{self.step}" max="{self.total}"'
        parts = "".join(f"<span>{html.escape(part)}</span>" for part in (*self._place(), *self._numbers))
        return HTML.format(html.escape(self.description), values, parts)

    def __repr__(self) -> str:
        before, after, _ = self._parts(1000)
        return f"{before}{' ' * GAP}{after}"
