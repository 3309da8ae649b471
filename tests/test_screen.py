"""What a user sees while something takes long: the bar by its width in columns, lines in order, and what is silent."""

import io
import re
import time
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from llama_jax import screen
from llama_jax.screen import Bar, duration

NUMBERS = ("loss 4.5453", "2,849 tokens/s", "MFU 13.2%", "359 ms/step")
WIDTHS = (40, 60, 80, 120)


def terminal(width: int) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(width=width, force_terminal=True, file=file, color_system=None), file


def drawn(bar: Bar, width: int) -> str:
    """The line that a terminal of this width gets."""
    console, file = terminal(width)
    console.print(bar)
    lines = file.getvalue().splitlines()
    assert len(lines) == 1
    assert cell_len(lines[0]) <= width
    return lines[0]


def training(step: int, total: int | None, numbers: tuple[str, ...] = NUMBERS) -> Bar:
    bar = Bar("training", 0, total, silent=True)
    bar.advance(1)
    bar.show(step, numbers)
    return bar


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("step", "total"), [(350, 700), (123456, 1000000)])
def test_step_and_time_stay_at_every_width(step: int, total: int, width: int, monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 0.0, *[100.0] * 20])
    monkeypatch.setattr(screen, "time", SimpleNamespace(monotonic=lambda: next(now)))  # other threads keep theirs
    line = drawn(training(step, total), width)
    assert f"{step}/{total}" in line
    assert re.search(r"(1m40s|\d+m\d\ds) left", line)
    assert re.search("[━╸]", line) or (width == 40 and step == 123456)  # what is left there is for the loss
    # Whatever has no room is left out from its end on.
    there = [number in line for number in NUMBERS]
    assert there == sorted(there, reverse=True)


def test_more_columns_show_more():
    shown = [sum(part in drawn(training(350, 700), width) for part in ("training", *NUMBERS)) for width in WIDTHS]
    assert shown == sorted(shown)
    assert shown[0] >= 1  # the loss, at 40 columns
    assert shown[-1] == 5


@pytest.mark.parametrize("width", [1, 10, 20, 40])
def test_nothing_wraps_however_narrow(width: int):
    drawn(training(350, 700), width)
    drawn(training(5, None, ()), width)


def test_a_terminal_gets_lines_above_one_bar():
    console, file = terminal(60)
    with Bar("training", 0, 3, console=console) as bar:
        for step in (1, 2, 3):
            bar.advance(step)
            bar.show(step, NUMBERS)
            bar.say(f"line {step} " + "long " * 20)
    text = file.getvalue()
    assert "3/3" in text.splitlines()[-2]  # the bar stays, below the lines
    places = [text.index(f"line {step} ") for step in (1, 2, 3)]
    assert places == sorted(places)
    assert text.count("line 2 ") == 1
    for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", text).splitlines():
        for part in line.split("\r"):
            assert cell_len(part) <= 60 or part.startswith("line "), part


def plain(is_terminal: bool = False, **options: Any) -> tuple[Bar, io.StringIO]:
    file = io.StringIO()
    return Bar("training", 0, 3, console=Console(file=file, width=80, force_terminal=is_terminal), **options), file


def test_plain_output_is_one_line_a_step_of_any_length():
    bar, file = plain()
    with bar:
        bar.show(1, NUMBERS, ("lr 1e-3", "x" * 100))
        bar.say("said")
    first, second = file.getvalue().splitlines()
    assert first.startswith("step 1/3  loss 4.5453  2,849 tokens/s  MFU 13.2%  359 ms/step  lr 1e-3  xxx")
    assert second == "said"


@pytest.mark.parametrize(("options", "lines"), [({"quiet": True}, ["always"]), ({"silent": True}, [])])
def test_quiet_leaves_what_is_always_said(options: dict[str, bool], lines: list[str]):
    for is_terminal in (False, True):
        bar, file = plain(is_terminal, **options)
        with bar:
            bar.advance(1)
            bar.show(1, NUMBERS)
            bar.say("sometimes")
            bar.say("always", always=True)
        assert file.getvalue().splitlines() == lines


def test_slow_work_says_so_on_plain_output_only_if_it_is_long(monkeypatch: pytest.MonkeyPatch):
    bar, file = plain(slow=True)
    with bar:
        bar.advance(1)
    assert file.getvalue() == ""
    monkeypatch.setattr(screen, "PATIENCE", 0.01)
    monkeypatch.setattr(screen, "PLAIN_SECONDS", 0.05)
    bar, file = plain(slow=True)
    with bar:
        time.sleep(0.1)
        bar.advance(2)
    assert file.getvalue().splitlines()[0] == "training..."
    assert file.getvalue().splitlines()[1].startswith("training  2/3")


def test_a_notebook_gets_a_bar_that_fits_the_page_and_lines_that_wrap(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    updates: list[str] = []

    class Handle:
        def update(self, bar: Bar) -> None:
            updates.append(bar._repr_html_())

    display = pytest.importorskip("IPython.display")
    shown: list[Any] = []
    monkeypatch.setattr(display, "display", lambda bar, display_id: shown.append(bar) or Handle())
    monkeypatch.setattr(screen, "NOTEBOOK_SECONDS", 0.0)
    with Bar("training", 0, 3, console=Console(force_jupyter=True)) as bar:
        bar.show(1, ("loss <4>",))
        bar.advance(2)
        bar.say("a line " * 40)
    assert shown == [bar]
    assert len(updates) == 2
    assert 'value="2" max="3"' in updates[0]
    assert "flex-wrap:wrap" in updates[0]
    assert "loss &lt;4&gt;" in updates[0]
    assert capsys.readouterr().out == "a line " * 40 + "\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0161, "0.016s"),
        (4.23, "4.2s"),
        (59.7, "1m00s"),
        (248, "4m08s"),
        (3720, "1h02m"),
        (2 * 86400 + 3 * 3600, "2d03h"),
    ],
)
def test_times(seconds: float, text: str):
    assert duration(seconds) == text
