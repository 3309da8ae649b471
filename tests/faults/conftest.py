"""Trials of faults, and the page with their counts.

A test of this directory tells what it tried: `tally("one flipped byte of a checkpoint", tried=208, held=208)`, and
asserts it. With `--reliability FILE` (`make faults`) all of them are made in full, and the counts are written to the
FILE; without it each makes the few of `num_trials(few, all)`.
"""

import dataclasses
import datetime
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

TITLE = """# Reliability

What was tried to lose or damage a run, and how often what is promised held. `make faults` makes all trials and writes
this page; `make test` makes a part of them.
"""


@dataclasses.dataclass(frozen=True)
class Tally:
    """Trials of one kind of fault: how many, how many of them ended as promised, and figures worth a line."""

    fault: str
    promise: str
    tried: int
    held: int
    figures: str = ""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("reliability") and not hasattr(config, "workerinput"):
        for old in _parts(config).glob("*.json"):
            old.unlink()


def _parts(config: pytest.Config) -> Path:
    """Return where the workers of a run leave their tallies."""
    directory = config.rootpath / ".cache" / "reliability"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def num_trials(pytestconfig: pytest.Config) -> Callable[[int, int], int]:
    """Return `f(few, all)`: the number of trials to make in this run."""
    share = pytestconfig.getoption("trials") if pytestconfig.getoption("reliability") else 0
    return lambda few, most: max(few, round(share * most))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return `f(fault, promise, tried=, held=, figures="")`, which keeps the counts and asserts that all held."""

    def keep(fault: str, promise: str, *, tried: int, held: int, figures: str = "") -> None:
        if request.config.getoption("reliability"):
            part = Tally(fault, promise, tried, held, figures)
            name = f"{os.getpid()}-{abs(hash((request.node.nodeid, fault))):x}.json"
            (_parts(request.config) / name).write_text(json.dumps(dataclasses.asdict(part)))
        assert tried > 0
        assert held == tried, f"{fault}: {promise} in {held} of {tried}"

    return keep


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the page, in the process that has no workers above it."""
    config = session.config
    if not config.getoption("reliability") or hasattr(config, "workerinput"):
        return
    parts = [Tally(**json.loads(file.read_text())) for file in _parts(config).glob("*.json")]
    rows = [
        f"| {part.fault} | {part.promise} | {part.tried} | {part.held} | {part.figures} |"
        for part in sorted(parts, key=lambda part: part.fault)
    ]
    made = f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    head = ["| fault | what is promised | trials | held | |", "|---|---|---:|---:|---|"]
    share = "" if config.getoption("trials") == 1 else f" (`TRIALS={config.getoption('trials')}`)"
    page = [TITLE, f"Made on {made}: {sum(part.tried for part in parts)} trials{share}.", "", *head, *rows]
    Path(config.getoption("reliability")).write_text("\n".join(page) + "\n")
