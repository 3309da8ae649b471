"""Files from strangers: refused in a sentence, nothing run, no more memory and time than their size justifies."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_fuzz
import hostile_texts
import pytest
from hostile_cases import Hostile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PLACES = (ROOT, HERE, ROOT / "tests")
SECONDS = 20.0  # of processor time for an input
MEMORY = (
    560 << 20
)  # bytes beyond four times the input: a line of max_record_bytes, and its pieces before they are joined


def in_a_child(program: str, log: Path, count: int, *arguments: str) -> dict[int, dict[str, Any]]:
    """Return what the program logs about each of `count` inputs; it is started again behind one that killed it."""
    found: dict[int, dict[str, Any]] = {}
    environment = os.environ | {"PYTHONPATH": ":".join(map(str, PLACES)), "JAX_PLATFORMS": "cpu", "RUST_BACKTRACE": "0"}
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


def problem(case: Hostile, entry: dict[str, Any]) -> str:
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


def tell(cases: list[Hostile], outcomes: dict[int, dict[str, Any]], what: str, tally: Any) -> None:
    """Tally the inputs of each format. Fails with all that was not as promised."""
    held: dict[str, list[bool]] = collections.defaultdict(list)
    problems = []
    for number, case in enumerate(cases):
        found = problem(case, outcomes[number])
        held[case.format].append(not found)
        problems += [f"{case.format}, {case.name}: {found}"] if found else []
    most, longest = (max(entry[key] for entry in outcomes.values()) for key in ("grown", "seconds"))
    figures = f"at most {most >> 20} MB and {longest:.1f} s of processor time for one of all formats"
    assert not problems, "\n".join(problems)
    for format, good in held.items():
        promise = "read, or refused in a sentence; no code run, memory and time bounded"
        tally(f"{what}: {format}", promise, tried=len(good), held=sum(good), figures=figures)


@pytest.mark.slow
def test_files_that_were_made_to_harm(tmp_path: Path, tally):
    cases = hostile_texts.cases()
    assert len(cases) > 250
    tell(cases, in_a_child("hostile_child.py", tmp_path / "log.jsonl", len(cases)), "hostile files", tally)


def test_the_files_that_are_changed_are_whole(tmp_path: Path):
    for name, seed in hostile_fuzz.seeds(tmp_path).items():
        (folder := tmp_path / f"of {name}").mkdir()
        for file, content in seed.files.items():
            (folder / file).write_bytes(content)
        seed.enter(folder / seed.name)


def test_files_that_are_changed_at_random(tmp_path: Path, tally, num_trials):
    count = num_trials(10, 1000)
    cases = list(hostile_fuzz.cases(tmp_path, count))
    outcomes = in_a_child("hostile_child.py", tmp_path / "log.jsonl", len(cases), str(count))
    tell(cases, outcomes, "files changed at random", tally)
