"""What may change when a run is continued, and its record."""

import dataclasses
import datetime
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llama_jax.checkpoint import (
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    TOKENIZER_DIRECTORY,
    newest_good,
    to_disk,
)
from llama_jax.config import UserError, leaves, to_json
from llama_jax.data import batches_passed
from llama_jax.files import PARTIAL
from llama_jax.models import abstract_params, frozen
from llama_jax.parallel import make_mesh
from llama_jax.run.directory import DATA_FILE, LOCK_FILE, Run, open_run
from llama_jax.run.metrics import STARTS_FILE, read_metrics
from llama_jax.run.programs import preference_of
from llama_jax.run.reporting import this_start
from llama_jax.run_config import RunConfig
from llama_jax.tokenizers import load_tokenizer
from llama_jax.training import copies_reference, init_state, learning_rate

# Keys that may differ when a run is continued: how it is computed and reported, not what it learns.
CHANGEABLE = (
    "num_steps",  # the first: not where it decides the order of the data
    "mesh.",
    "compute.",
    "checkpoint.",
    "logging.",
    "checks.",
    "profile.",
    "resume.",
    "optimizer.accumulation_steps",
    "data.path",  # the same texts: `check_dataset`
    "data.num_prefetch",
    "data.cache_dir",
    "data.max_bad_records",
)
# Keys that `resume.allow` is for: they change the rest of the run, not what it has learned.
ADVISED = ("optimizer.", "data.skip_batches", "num_steps", "global_batch_size")


def check_directory(run: Run, asked: int | None = None) -> tuple[int, list[dict[str, Any]], list[str]]:
    """Check that the run is new or can be continued in its directory; only a damaged checkpoint is moved aside.

    `asked` is the step to continue from where one was given. Returns (step of the latest checkpoint, the run's history,
    lines for the log). Raises UserError where another run is there, or files of something else.
    """
    run.config.check_allowed()
    directory = run.directory
    if not (directory / CONFIG_FILE).exists():
        if directory.exists() and not directory.is_dir():
            raise UserError(f"'{directory}' is a file: give another --run-dir")
        if directory.is_dir() and any(PARTIAL not in f.name and f.name != LOCK_FILE for f in directory.iterdir()):
            raise UserError(f"'{directory}' is not empty and not a run: give another --run-dir")
        _check_writable(directory)
        return 0, [], []
    before = open_run(directory, run.components)
    changes, allowed = _changes(before, run)
    step, lines = newest_good(directory)  # this is process 0 alone
    if asked is not None and asked != step:
        raise UserError(
            f"'{directory}' continues from its latest checkpoint, of step {step}, not from step {asked}: give "
            f"'{directory}', or begin a new run with these weights by --init-from and another --run-dir"
        )
    starts = _check_files(before, step)
    if step <= run.config.num_steps:
        _check_writable(directory)
    _check_skipped(before, run, step)
    if allowed and step:
        _check_state(before, run, allowed, step)
    # A checkpoint may have been removed to go back: what was changed after it holds from it on.
    history = [{**entry, "step": min(entry["step"], step)} for entry in before.history]
    if changes:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        pairs = {key: [to_json(value) for value in values] for key, values in changes.items()}
        history.append({"step": step, "date": date, "changes": pairs})
    return step, history, [*lines, *_lines(before, run, step, changes), *starts]


def _check_files(before: Run, step: int) -> list[str]:
    """Return lines on where and by what versions the run is continued, if not as it was started last.

    Raises UserError where a file is missing that the run had when it was at `step`, or is another one.
    """
    directory = before.directory
    logged = max((line["step"] for line in before.metrics()), default=0)
    if logged and not (directory / CHECKPOINTS_DIRECTORY).is_dir():
        raise UserError(
            f"'{directory}' has metrics up to step {logged} and no '{CHECKPOINTS_DIRECTORY}': bring it back, or give "
            "another --run-dir"
        )
    for name in (TOKENIZER_DIRECTORY, DATA_FILE) if step else ():
        if not (directory / name).exists():
            raise UserError(f"'{directory / name}' is missing, which the run at step {step} had: bring it back")
    starts, _ = read_metrics(directory / STARTS_FILE)
    last, now = (_flat(start) for start in (starts[-1] if starts else {}, this_start()))
    return [f"changed: {key}={last[key]} -> {now[key]}" for key in now if key in last and last[key] != now[key]]


def _flat(start: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a line of `STARTS_FILE` says, the versions as keys of their own."""
    versions = start.get("versions")
    return {**start, **(versions if isinstance(versions, dict) else {}), "versions": None}


def _check_writable(directory: Path) -> None:
    """Raise UserError where a directory, or the one that it would be made in, cannot be written."""
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"run directory '{directory}' cannot be written: give another --run-dir")


def _lines(before: Run, run: Run, step: int, changes: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return lines for the log: all changes, and what they mean for learning rate and data."""
    texts = {key: f"{key}={_shown(old)} -> {_shown(new)}" for key, (old, new) in changes.items()}
    lines = [f"changed: {text}" for text in texts.values()]
    hypers = [(c.num_steps, c.optimizer.hyper(c.num_steps)) for c in (before.config, run.config)]
    old, new = (float(learning_rate(step, hyper)) for _, hyper in hypers)
    if 0 < step < run.config.num_steps and abs(new - old) > 1e-3 * old:
        last = max(run.config.num_steps - 1, step)
        because = [text for key, text in texts.items() if key == "num_steps" or key.startswith("optimizer")]
        lines.append(
            f"learning rate at step {step}: {old:.3g} -> {new:.3g}, because {', '.join(because)}; it ends at "
            f"{float(learning_rate(last, hypers[1][1])):.3g}"
        )
    if step and changes.keys() & {"num_steps", "global_batch_size"}:
        if _length_decides_order(run.config):
            lines.append("the order of the data is another one from here on: sequences may come again or never")
        elif "global_batch_size" in changes:
            lines.append("the order of the data goes on where it was: no sequence is repeated or left out")
    return lines


def _length_decides_order(config: RunConfig) -> bool:
    """Return whether the order of the data depends on the number of the run's sequences: epochs and shares together."""
    return len({source.epochs is None for source in config.data.sources}) > 1


def _changes(before: Run, run: Run) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Return (the differences by key as (old, new), the keys that `resume.allow` is needed for).

    Raises UserError with all that are not allowed.
    """
    old, new = _values(before.config), _values(run.config)
    keys = list(dict.fromkeys([*new, *old]))
    changeable = CHANGEABLE[_length_decides_order(run.config) :]
    changes = {
        key: (old.get(key), new.get(key))
        for key in keys
        if old.get(key) != new.get(key) and not key.startswith("resume.")
    }
    needed = [
        key for key in changes if not key.startswith(changeable) and not _same(key, old.get(key), new.get(key), before)
    ]
    if refused := [key for key in needed if not run.config.resume.allows(key)]:
        found = "; ".join(f"{key}={old.get(key)!r}, not {new.get(key)!r}" for key in refused)
        allow = ",".join(key for key in refused if key.startswith(ADVISED))
        fixed = [key for key in refused if not key.startswith(ADVISED)]
        way = f", allow this with --resume.allow {allow}," if allow and not fixed else ","
        rest = f" ({', '.join(fixed)} cannot change; for the others there is --resume.allow {allow})"
        raise UserError(
            f"'{before.directory}' holds a run with {found}: continue it unchanged{way} or give another "
            f"--run-dir{rest if allow and fixed else ''}"
        )
    return changes, needed


def _shown(value: Any) -> str:
    """Return a value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _same(key: str, old: Any, new: Any, before: Run) -> bool:
    """Return whether two values mean the same: another spelling of a path, another place of one tokenizer or texts."""
    if old is None or new is None:
        return False
    if key == "data.sources":  # `check_dataset` compares their texts
        return [dataclasses.replace(source, path=()) for source in old] == [
            dataclasses.replace(source, path=()) for source in new
        ]
    if key not in ("tokenizer.path", "init_from"):
        return False
    if "://" not in old + new and os.path.realpath(old) == os.path.realpath(new):
        return True
    if key == "init_from" or not (before.directory / TOKENIZER_DIRECTORY).is_dir():
        return False
    return load_tokenizer(new).fingerprint == before.tokenizer.fingerprint


def _check_skipped(before: Run, run: Run, step: int) -> None:
    """Raise UserError where other batches are skipped among those that were learned before `step`."""
    old, new = (r.config.data.skip_batches for r in (before, run))
    count = batches_passed(step, old)
    if early := [number for number in {*old} ^ {*new} if number < count]:
        raise UserError(
            f"data.skip_batches={_shown(new)} changes what '{run.directory}' has learned before its checkpoint of "
            f"step {step} (batch {min(early)}): change only batches from {count} on"
        )


def _check_state(before: Run, run: Run, allowed: Sequence[str], step: int) -> None:
    """Raise UserError where the state of training has other arrays than that of the checkpoint at `step`."""

    def arrays(config: RunConfig) -> dict[str, Any]:
        hyper = config.optimizer.hyper(config.num_steps)
        reference = copies_reference(config.model, preference_of(config))
        make = functools.partial(init_state, buffer_names=frozen(config.model), reference=reference)
        with jax.set_mesh(make_mesh({}, jax.local_devices()[:1])):
            return to_disk(jax.eval_shape(make, abstract_params(config.model), hyper))

    old, new = ({name: a.shape for name, a in arrays(r.config).items()} for r in (before, run))
    if differing := [name for name in old | new if old.get(name) != new.get(name)]:
        raise UserError(
            f"the checkpoint of step {step} in '{run.directory}' does not have the arrays of "
            f"{', '.join(allowed)} (such as {differing[0]}): leave that as it was, or begin a new run with its weights "
            f"by --init-from {run.directory} and another --run-dir"
        )


def _values(config: RunConfig) -> dict[str, Any]:
    """Return the leaves by key; a component is its class name, and its fields are leaves."""
    return {key: type(value).__name__ if dataclasses.is_dataclass(value) else value for key, _, value in leaves(config)}
