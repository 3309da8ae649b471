"""Files from strangers: refused in a sentence, nothing run, no more memory and time than their size justifies."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_cases
import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SECONDS = 20.0  # of processor time for an input
MEMORY = 400 << 20  # bytes beyond four times the input


def in_a_child(program: str, log: Path, count: int, *arguments: str) -> dict[int, dict[str, Any]]:
    """Return what the program logs about each of `count` inputs; it is started again behind one that killed it."""
    found: dict[int, dict[str, Any]] = {}
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}", "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
    while len(found) < count:
        done = subprocess.run(
            [sys.executable, HERE / program, log, str(len(found)), *arguments],
            env=environment, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        before = len(found)
        for line in log.read_text().splitlines() if log.exists() else ():
            entry = json.loads(line)
            if "outcome" in entry:
                found[entry["number"]] = entry
        if len(found) < count:  # the process ended within an input
            assert json.loads(log.read_text().splitlines()[-1])["number"] == len(found), done.stderr[-2000:]
            found[len(found)] = {"outcome": f"ended by {-done.returncode}", "size": 0, "seconds": 0, "grown": 0}
        assert len(found) > before, done.stderr[-2000:]
    return found


def problem(case: hostile_cases.Hostile, entry: dict[str, Any]) -> str:
    """Return what was not as promised with an input, or ""."""
    outcome = entry["outcome"]
    if entry.get("canary"):
        return "it ran code"
    if not outcome.startswith("refused: ") and (case.refused or outcome != "read"):
        return outcome
    if entry["seconds"] > SECONDS:
        return f"it took {entry['seconds']:.0f} s"
    if entry["grown"] > 4 * entry["size"] + MEMORY:
        return f"it took {entry['grown'] >> 20} MB"
    return ""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    log = tmp_path_factory.mktemp("hostile") / "log.jsonl"
    return in_a_child("hostile_child.py", log, len(hostile_cases.cases()))


def test_hostile_files_are_refused(outcomes, tally):
    cases = hostile_cases.cases()
    assert len(cases) > 200
    by_format: dict[str, list[int]] = collections.defaultdict(list)
    problems = []
    for number, case in enumerate(cases):
        found = problem(case, outcomes[number])
        by_format[case.format].append(not found)
        if found:
            problems.append(f"{case.format}, {case.name}: {found}")
    most, longest = (max(entry[key] for entry in outcomes.values()) for key in ("grown", "seconds"))
    figures = f"at most {most >> 20} MB and {longest:.1f} s of processor time for one of all formats"
    assert not problems, "\n".join(problems)
    for format, held in by_format.items():
        promise = "refused in a sentence, no code run, memory and time bounded"
        tally(f"hostile files: {format}", promise, tried=len(held), held=sum(held), figures=figures)
