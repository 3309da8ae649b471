"""What a report shows, as plain data: it is embedded in the page as JSON."""

import base64
import dataclasses
import datetime
import glob
import io
import itertools
import math
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llama_jax import __version__
from llama_jax.ablation import SWEEP_FILE, columns_of, open_sweep, read_sweep
from llama_jax.compare_command import Columns, named, numbers_of, printable, settings_of, shown
from llama_jax.config import read_json
from llama_jax.evaluation import stderr_of
from llama_jax.figures import UNITS, counted
from llama_jax.remote import as_local
from llama_jax.run import (
    STARTS_FILE,
    RunRecord,
    choose_metric,
    compare_runs,
    differing_keys,
    find_runs,
    read_metrics,
    rows_of,
)

MAX_LINES = 20_000  # of a run's curves: of more, each n-th is shown
MORE_UNITS = {
    "grad_norm": "L2 norm",
    "tokens_per_second": "positions/s",
    "mfu": "share of the peak FLOP/s",
    "peak_memory_bytes": "of a device",
}
DIGITS = 7  # of numbers: those of float32


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a report's runs are.

    runs: paths of runs.
    sweeps: directories of sweeps.
    without: paths that have no run.
    """

    runs: list[str]
    sweeps: list[Path]
    without: list[str]


def find_places(paths: Iterable[str | Path]) -> Places:
    """Return the runs and sweeps at paths (see `find_runs`); the runs of a sweep are among the runs.

    Raises UserError for a path where nothing is, and where none has a run.
    """
    runs: list[str] = []
    sweeps: list[Path] = []
    for path in map(str, paths):
        local = as_local(path)
        if local is None:
            runs.append(path)
            continue
        places = sorted(glob.glob(os.path.abspath(local.expanduser()))) or [path]
        for place in places:
            own = Path(place.removesuffix(SWEEP_FILE))
            inside = [own / SWEEP_FILE] if (own / SWEEP_FILE).is_file() else sorted(own.glob(f"*/{SWEEP_FILE}"))
            sweeps += (file.parent for file in inside)
            trials = [trial.directory for file in inside for trial in read_sweep(file).trials]
            runs += (str(trial) for trial in trials if (trial / "config.json").is_file())
            if not inside or glob.glob(f"{glob.escape(place)}/*/config.json"):
                runs.append(place)
    found, without = find_runs(runs) if runs or not sweeps else ([], [])
    return Places(found, list(dict.fromkeys(sweeps)), without)


def collect(paths: Iterable[str | Path], metric: str | None = None) -> dict[str, Any]:
    """Return what a report of the runs and sweeps at `paths` shows, as JSON.

    Raises UserError for a path where nothing is, where none has a run, and for files that cannot be read.
    """
    places = find_places(paths)
    records = compare_runs(places.runs) if places.runs else []
    metric, notes = choose_metric(records, metric)
    rows, keys = rows_of(records, metric, every=True), differing_keys(records)
    numbers, about = numbers_of(rows, metric) if rows else ({}, [])
    ordered = [row.runs[0] for row in rows]
    seeds = rows_of(records, metric)
    groups = {run.path: min(one.path for one in row.runs) for row in seeds for run in row.runs}
    averages = named(seeds) | numbers_of(seeds, metric)[0] if len(seeds) < len(records) else {}
    return {
        "version": __version__,
        "date": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "title": _title([*map(operator.attrgetter("name"), places.sweeps or ordered)]),
        "metric": metric,
        "units": UNITS | MORE_UNITS,
        "notes": notes + [f"left out, there is no run in {place}" for place in places.without] + _thinned(ordered),
        "columns": named(rows) | numbers | _machines(ordered) if rows else {},
        "about": about,
        "averages": averages,
        "settings": settings_of(rows, keys),
        "evaluations": _evaluations(ordered),
        "runs": [_run(record) | {"group": groups[record.path]} for record in ordered],
        "sweeps": [_sweep(directory) for directory in places.sweeps],
    }


def stamps(paths: Iterable[str | Path]) -> list[tuple[str, int, int]] | None:
    """Return the name, time and size of each file that a report reads; None where some of them are in a store.

    Raises what `find_places` does.
    """
    places = find_places(paths)
    if any(as_local(place) is None for place in places.runs):
        return None
    names = ("*.json*", "samples.txt", "samples/*", "evaluations/*.json")
    directories = [*places.runs, *map(str, places.sweeps)]
    found = (glob.glob(f"{glob.escape(place)}/{name}") for place in directories for name in names)
    files = sorted(itertools.chain.from_iterable(found))
    return [(file, (stat := os.stat(file)).st_mtime_ns, stat.st_size) for file in files]


def _machines(records: Sequence[RunRecord]) -> Columns:
    """Return the columns of tokens and of the devices that each run has last started on."""
    starts = [read_metrics(record.directory / STARTS_FILE)[0] for record in records]
    devices = [" x ".join(str(last[-1].get(key)) for key in ("devices", "device")) if last else "-" for last in starts]
    columns = {"tokens": [counted(max(record.tokens(), default=0)) for record in records], "devices": devices}
    return columns if any(starts) else {"tokens": columns["tokens"]}


def _title(names: Sequence[str]) -> str:
    """Return the page's title: the first names, without what a terminal would obey."""
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return printable(f"Report: {', '.join(names[:3] if more else names)}{more}")


def _thinned(records: Sequence[RunRecord]) -> list[str]:
    """Return a note on each run of which not every line is shown."""
    return [
        f"{record.name}: one of {every} logged lines is shown, and those of validations"
        for record in records
        if (every := _every(record)) > 1
    ]


def _every(record: RunRecord) -> int:
    return math.ceil(len(record.metrics) / MAX_LINES)


def _run(record: RunRecord) -> dict[str, Any]:
    """Return a run as plain data; of its numbers a column for each metric."""
    every, tokens, seconds = _every(record), record.tokens(), record.seconds()
    chosen = [i for i, line in enumerate(record.metrics) if i % every == 0 or "val_loss" in line]
    lines = [record.metrics[i] for i in chosen]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    columns = {name: [_number(line.get(name)) for line in lines] for name in names}
    directory, steps = record.directory, record.steps
    return {
        "name": record.name,
        "path": record.path,
        "parameters": record.num_parameters,
        "config": {key: shown(value) for key, value in record.config.items()},
        "num_steps": record.config["num_steps"],
        "step": max(steps, default=0),
        "steps": [line["step"] for line in lines],
        "tokens": [tokens[i] for i in chosen],
        "seconds": [_number(seconds[i]) for i in chosen] if seconds else [],
        "metrics": {name: values for name, values in columns.items() if not any(isinstance(v, list) for v in values)},
        "lists": {name: values for name, values in columns.items() if any(isinstance(v, list) for v in values)},
        "history": record.history,
        "starts": read_metrics(directory / STARTS_FILE)[0],
        "samples": _samples(directory),
    }


def _number(value: Any) -> Any:
    """Return a number with `DIGITS` digits, of a list each; None for what is not a number or not finite."""
    if isinstance(value, list):
        return [_number(part) for part in value]
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{DIGITS}g}")


def _samples(directory: Path) -> list[dict[str, Any]]:
    """Return the texts that a run has written: those of steps in their order, then those of its end."""
    files = [file for file in directory.glob("samples/*.txt") if file.stem.isdecimal()]
    found = [{"step": int(file.stem), "text": file.read_text("utf-8", "replace")} for file in files]
    end = directory / "samples.txt"
    last = [{"step": None, "text": end.read_text("utf-8", "replace")}] if end.is_file() else []
    return sorted(found, key=lambda sample: sample["step"]) + last


def _evaluations(records: Sequence[RunRecord]) -> Columns:
    """Return the results of all evaluations: a row for each task and metric, a column for each evaluation."""
    found: dict[str, dict[tuple[str, str], str]] = {}
    for record in records:
        for file in sorted(record.directory.glob("evaluations/*.json")):
            data = read_json(file)
            data = data if isinstance(data, dict) else {}
            title = f"{record.name} @{data['step']}" if isinstance(data.get("step"), int) else record.name
            title = title if title not in found else f"{title} {file.stem}"
            found[title] = _results(data.get("results"))
    rows = list(dict.fromkeys(itertools.chain.from_iterable(found.values())))
    cells = {title: [results.get(row, "-") for row in rows] for title, results in found.items()}
    return {"task": [task for task, _ in rows], "metric": [metric for _, metric in rows]} | cells if rows else {}


def _results(tasks: Any) -> dict[tuple[str, str], str]:
    """Return the numbers of an evaluation as text by task and metric, with ± its standard error where there is one."""
    found: dict[tuple[str, str], str] = {}
    for task, values in tasks.items() if isinstance(tasks, dict) else ():
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            error = numbers.get(stderr_of(name))
            if not name.partition(",")[0].endswith("_stderr"):
                found[task, name.removesuffix(",none")] = f"{value:.6g}" + ("" if error is None else f" ±{error:.2g}")
    return found


def _sweep(directory: Path) -> dict[str, Any]:
    """Return a sweep's state, table and plot."""
    record = read_sweep(directory)
    done = sum(trial.state == "done" for trial in record.trials)
    found: dict[str, Any] = {"table": {}, "lines": [], "plots": []}
    if done:
        result, picture = open_sweep(directory), io.BytesIO()
        result.plot().savefig(picture, format="png", dpi=150)
        found["table"], same = columns_of(result.records(), result.metric, record.baseline)
        found["lines"] = [*same, result.legend(), *result.notes()]
        found["plots"] = [f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"]
    state = f"{done} of {len(record.trials)} runs are done"
    return {"name": directory.name, "state": state, "baseline": record.baseline} | found
