"""Runs compared: the numbers of each, the keys that differ, and runs that differ only in their seed as one row.

It reads the files of runs, also of those that are going on, and needs JAX only to count parameters.
"""

import collections
import dataclasses
import difflib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import UserError, from_json, read_json
from llama_jax.remote import as_local, local_copy, url_of
from llama_jax.run.metrics import METRICS_FILE, read_metrics

LAST_LINES = 10  # logged lines whose mean is the training loss
# Keys that change neither what a run learns nor its speed: shown only where all are asked for.
MINOR = (
    "checkpoint.",
    "logging.",
    "checks.",
    "profile.",
    "resume.",
    "data.cache_dir",
    "data.num_prefetch",
    "data.max_bad_records",
)
# Of a run, the files that are read here and by reports.
_FILES = re.compile(
    r"(config|data|run)\.json|(metrics|starts)\.jsonl|samples\.txt|(tokenizer|samples|evaluations)/[^/]+"
)
_INSIDE = re.compile(
    r"/((config|data|run)\.json|(metrics|starts)\.jsonl|samples\.txt|(checkpoints|tokenizer|samples|evaluations)(/.*)?)$"
)
HIGHER = ("accuracy", "mfu", "tokens_per_second")  # ends of the names of metrics of which more is better
_WARNINGS = {  # keys that change what the losses measure
    "data.objective": "objectives differ: losses are of different targets",
    "logging.validation_batches": "logging.validation_batches differs: validation is on different parts of the text",
}

Numbers = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run as its files describe it, whether it has ended or not.

    name: end of its path that no other of the runs has.
    path: directory or URL.
    config: value of each dotted key, as in JSON; of a component, its class name.
    num_parameters: exact number; None with pieces that are not the package's.
    tokenizer: hash of the tokenizer's files; None before they are written.
    num_bytes: bytes of the text by split; None before it is known.
    metrics: a dict per logged step.
    directory: the local directory of its files, of a URL a copy.
    num_damaged: number of damaged lines of its metrics, which are left out.
    history: what was changed where it was continued (`Run.history`).
    """

    name: str
    path: str
    config: dict[str, Any]
    num_parameters: int | None
    tokenizer: str | None
    num_bytes: Any
    metrics: list[dict[str, Any]]
    directory: Path
    num_damaged: int
    history: list[dict[str, Any]]

    @property
    def steps(self) -> list[int]:
        """The logged steps."""
        return [line["step"] for line in self.metrics]

    def tokens(self, steps: Sequence[int] | None = None) -> list[int]:
        """Return the positions computed until each of `steps` (None: each logged one), also of padding and sources."""
        changed = ((entry["step"], entry["changes"].get("global_batch_size")) for entry in self.history)
        sizes = [(step, sizes[0]) for step, sizes in changed if sizes]  # until a step, the rows of a batch
        steps = self.steps if steps is None else steps
        sizes.append((max(steps, default=0), self.config["global_batch_size"]))
        length = self.config["sequence_length"] + (self.config.get("data.objective.source_length") or 0)
        begins = [0, *(end for end, _ in sizes)]
        spans = [(begin, end, size) for begin, (end, size) in zip(begins, sizes, strict=False)]
        return [length * sum(size * max(0, min(step, end) - begin) for begin, end, size in spans) for step in steps]

    def seconds(self) -> list[float]:
        """Return the time of the steps until each logged one, without compilation, validation and saving.

        It is empty where no speed is logged. A line without a speed has the compilation in it: it counts as the median.
        """
        speeds = self.curve("tokens_per_second")
        if not any(speeds.values()):
            return []
        median = statistics.median(speeds.values())
        done = [0, *self.tokens()]
        times = (
            (after - before) / (speeds.get(step) or median)
            for step, before, after in zip(self.steps, done, done[1:], strict=False)
        )
        return list(itertools.accumulate(times))

    def curve(self, metric: str) -> dict[int, float]:
        """Return a metric's finite values by step."""
        return {line["step"]: line[metric] for line in self.metrics if isinstance(line.get(metric), int | float)}

    def numbers(self, metric: str) -> Numbers:
        """Return the numbers of a row: `loss` is a mean, `best` and `last` are the metric's, None is not measured.

        `tokens_per_second` is a median, of positions, padding included; `seconds` the time of all steps alone, without
        compilation, validation and saving.
        """
        curve, losses, speeds = self.curve(metric), self.curve("loss"), self.curve("tokens_per_second")
        best = (max if metric.endswith(HIGHER) else min)(curve, key=curve.__getitem__, default=None)
        return {
            "loss": statistics.fmean(list(losses.values())[-LAST_LINES:]) if losses else None,
            "best": None if best is None else curve[best],
            "best_step": best,
            "last": next(reversed(curve.values()), None),
            "val_bits_per_byte": min(self.curve("val_bits_per_byte").values(), default=None),
            "tokens_per_second": statistics.median(speeds.values()) if speeds else None,
            "step": max(self.steps, default=0),
            "seconds": next(reversed(self.seconds()), None),
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed, or one run."""

    runs: tuple[RunRecord, ...]

    @property
    def name(self) -> str:
        """The runs' name, with * where they differ."""
        names = [run.name for run in self.runs]
        start = os.path.commonprefix(names)  # noqa: RUF071 - of characters is what is meant
        end = os.path.commonprefix([name[len(start) :][::-1] for name in names])[::-1]  # noqa: RUF071
        return names[0] if len(names) == 1 else f"{start}*{end}"

    def curve(self, metric: str) -> dict[int, float]:
        """Return the mean over the runs at the steps that all of them have."""
        first, *others = (run.curve(metric) for run in self.runs)
        steps = [step for step in first if all(step in curve for curve in others)]
        return {step: statistics.fmean(curve[step] for curve in (first, *others)) for step in steps}

    def numbers(self, metric: str) -> tuple[Numbers, Numbers]:
        """Return the means of the runs' numbers over those that have them, and their standard deviations."""
        means: Numbers = {}
        spreads: Numbers = {}
        every = [run.numbers(metric) for run in self.runs]
        for name in every[0]:
            values = [value for numbers in every if (value := numbers[name]) is not None]
            means[name] = statistics.fmean(values) if values else None
            spreads[name] = statistics.stdev(values) if len(values) > 1 else None
        return means, spreads


def find_runs(paths: Iterable[str | Path]) -> tuple[list[str], list[str]]:
    """Return the runs at paths, and the paths that have none: runs, URLs of runs, paths inside, globs, their folders.

    Raises UserError for a path where nothing is, and where none has a run.
    """
    found: list[str] = []
    without: list[str] = []
    for path in map(str, paths):
        if (local := as_local(path)) is None:
            found.append(_INSIDE.sub("", url_of(path).rstrip("/")))
            continue
        places = sorted(glob.glob(_INSIDE.sub("", os.path.abspath(local.expanduser()))))
        if not places:
            raise UserError(f"there is nothing at '{path}': give the directories of runs, such as runs/*")
        for place in places:
            files = glob.glob(f"{place}/config.json") or sorted(glob.glob(f"{place}/*/config.json"))
            runs = [os.path.dirname(file) for file in files if _is_run(read_json(Path(file)))]
            (found if runs else without).extend(runs or [place])
    if not found:
        raise UserError(f"'{without[0]}' has no run: give the directories of runs, such as runs/*")
    return list(dict.fromkeys(found)), without


def compare_runs(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Return the records of the runs at paths (see `find_runs`), in their order.

    Raises UserError where there is no run, and for a config that cannot be read.
    """
    records: list[RunRecord] = []
    for place, name in _ends(find_runs(paths)[0], "/").items():
        directory = local_copy(place, lambda names: filter(_FILES.fullmatch, names))
        if not (directory / "config.json").is_file() or not _is_run(config := read_json(directory / "config.json")):
            raise UserError(f"'{place}' is not a run: it has no config.json of one")
        data, changes = directory / "data.json", directory / "run.json"
        metrics, num_damaged = read_metrics(directory / METRICS_FILE)
        records.append(
            RunRecord(
                name=name,
                path=place,
                config=dict(_flat(config)),
                num_parameters=_num_parameters(json.dumps(config["model"])),
                tokenizer=_digest(directory / "tokenizer"),
                num_bytes=read_json(data).get("num_bytes") if data.is_file() else None,
                metrics=metrics,
                directory=directory,
                num_damaged=num_damaged,
                history=read_json(changes)["history"] if changes.is_file() else [],
            )
        )
    return records


def rows_of(records: Sequence[RunRecord], metric: str, *, every: bool = False) -> list[Row]:
    """Return the records as rows, the best first; with `every` each is a row, else seeds of one config are one."""
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        learned = {key: value for key, value in record.config.items() if key != "seed" and not key.startswith(MINOR)}
        groups.setdefault(record.path if every else json.dumps(learned, sort_keys=True), []).append(record)
    sign = -1 if metric.endswith(HIGHER) else 1

    def order(row: Row) -> float:
        best = row.numbers(metric)[0]["best"]
        return math.inf if best is None else sign * best

    return sorted((Row(tuple(group)) for group in groups.values()), key=order)


def differing_keys(records: Sequence[RunRecord], *, every: bool = False) -> dict[str, str]:
    """Return the keys that differ among the records that have them, with their shortest ends that name no other key.

    Without `every`, `MINOR` keys are left out. A key that an older version did not write is empty or zero there.
    """
    values: dict[str, set[str]] = collections.defaultdict(set)
    for key in dict.fromkeys(key for record in records for key in record.config):
        parent = key.rpartition(".")[0]
        owners = {record.config.get(parent) for record in records if key in record.config}
        for config in (record.config for record in records):
            if key in config or (config.get(parent) in owners and parent in config):
                values[key].add(json.dumps(config.get(key) or None))
    ends = _ends(list(values), ".")
    return {key: ends[key] for key, v in values.items() if len(v) > 1 and (every or not key.startswith(MINOR))}


def choose_metric(records: Sequence[RunRecord], metric: str | None) -> tuple[str, list[str]]:
    """Return the metric that runs are compared by, by default `val_loss`, and notes on what cannot be compared.

    Raises UserError for a metric that none has.
    """
    known = sorted({name for record in records for line in record.metrics for name in line} - {"step"})
    if metric is not None and metric not in known:
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"they have {', '.join(known) or 'none yet'}"
        raise UserError(f"no run has the metric '{metric}': {hint}")
    measured = [record for record in records if record.curve("val_loss")]
    chosen, different = metric or ("val_loss" if measured else "loss"), differing_keys(records, every=True)
    notes = [note for key, note in _WARNINGS.items() if key in different]
    if len({record.tokenizer for record in records} - {None}) > 1:
        notes.append("tokenizers differ: losses are per token of different vocabularies and cannot be compared")
        if metric is None and measured and all(record.curve("val_bits_per_byte") for record in measured):
            chosen = "val_bits_per_byte"
            notes[-1] += ", val_bits_per_byte can"
    if len({json.dumps(record.num_bytes) for record in records if record.num_bytes is not None}) > 1:
        notes.append("texts differ: validation is on different texts")
    for record in records:
        if record.num_damaged:
            notes.append(f"{record.name}: {record.num_damaged} damaged lines of {METRICS_FILE} are left out")
        if step := next((line["step"] for line in record.metrics if line.get("loss", 0) is None), None):
            notes.append(f"{record.name}: the loss is not finite at step {step}")
    return chosen, notes


def _is_run(config: Any) -> bool:
    return isinstance(config, dict) and {"model", "num_steps", "optimizer"} <= config.keys()


def _ends(names: Sequence[str], separator: str) -> dict[str, str]:
    """Return the shortest end of each dotted name or path that no other of them has, by name."""
    parts = {name: name.split(separator) for name in names}
    ends = {
        name: [separator.join(part[start:]) for start in reversed(range(len(part)))] for name, part in parts.items()
    }
    counts = collections.Counter(itertools.chain.from_iterable(ends.values()))
    return {name: next((end for end in own if counts[end] == 1), name) for name, own in ends.items()}


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value); of a part of the config its class name, then what it has."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield prefix + name, value.get("type")
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "type":
            yield prefix + name, value


@functools.cache
def _num_parameters(model: str) -> int | None:
    """Return the number of parameters of a model's config, which is JSON; None with classes from outside."""
    from llama_jax.models import ModelConfig, num_parameters

    try:
        return num_parameters(from_json(ModelConfig, json.loads(model)))
    except UserError:
        return None


def _digest(directory: Path) -> str | None:
    """Return a hash of a tokenizer's files; chat templates and what surrounds a prompt do not change its tokens."""
    from llama_jax.tokenizers import deciding  # with numpy

    files = deciding([file.name for file in directory.glob("*") if file.is_file()])
    contents = b"".join(name.encode() + (directory / name).read_bytes() for name in files)
    return hashlib.sha256(contents).hexdigest() if files else None
