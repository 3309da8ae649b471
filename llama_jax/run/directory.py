"""The directory of a run, which has everything about it, and what may change when the run is continued."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import (
    CHECKPOINTS_DIRECTORY,
    COMMIT_FILE,
    CONFIG_FILE,
    TOKENIZER_DIRECTORY,
    CheckpointStore,
    LanguageModel,
    MeshLike,
    load,
    run_files,
    whole_steps,
)
from llama_jax.config import UserError, leaves, read_json, to_json
from llama_jax.data import Batches, Dataset, HostBatch, Vocabulary, prepare_dataset
from llama_jax.files import PARTIAL, replacing, write_text
from llama_jax.remote import as_local, local_copy, url_of
from llama_jax.run_config import RunConfig, read_config
from llama_jax.tokenizers import Tokenizer, load_saved_tokenizer, load_tokenizer
from llama_jax.training import learning_rate

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
DATA_FILE = "data.json"
# Keys that may differ when a run is continued: how it is computed and reported, not what it learns.
CHANGEABLE = (
    "num_steps",
    "mesh.",
    "compute.",
    "checkpoint.",
    "logging.",
    "profile.",
    "resume.",
    "optimizer.accumulation_steps",
    "data.path",  # the same texts: `check_dataset`
    "data.num_prefetch",
    "data.cache_dir",
    "data.max_bad_records",
)
# Keys that `resume.allow` is for: they change the rest of the run, not what it has learned.
ADVISED = ("optimizer.", "data.skip_batches", "num_steps")


class Run:
    """A run that was started: its config, metrics, data and checkpoints.

    Of a run in an object store, `directory` is its local copy and `url` its place; else `url` is None.
    """

    def __init__(self, directory: Path, config: RunConfig, components: Sequence[type] = (), *, url: str | None = None):
        self.directory, self.config, self.components, self.url = directory, config, tuple(components), url

    def __repr__(self) -> str:
        return f"Run({self.url or str(self.directory)!r})"

    def metrics(self) -> list[dict[str, Any]]:
        """Return a dict per logged step: `step`, `loss`, `learning_rate`, `grad_norm`, ..., `val_loss` where measured.

        Values that were not finite are None. Lines that a crash has damaged are left out.
        """
        return self.read_metrics()[0]

    def read_metrics(self) -> tuple[list[dict[str, Any]], int]:
        """Return what `metrics` does, and the number of damaged lines."""
        file = self.directory / METRICS_FILE
        text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
        # A killed process may leave a line without its end; after the machine itself went down, a file may have zeros
        # in place of what was not yet on disk.
        lines = [line.strip("\0\r ") for line in text.split("\n")[:-1]]
        found = [_metrics_of(line) for line in lines]
        return [metrics for metrics in found if metrics is not None], found.count(None)

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint."""
        with contextlib.closing(CheckpointStore(self.directory / CHECKPOINTS_DIRECTORY)) as store:
            return store.steps()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run's directory has."""
        of_sources = self.config.model.has_source
        return load_saved_tokenizer(self.directory / TOKENIZER_DIRECTORY, of_sources=of_sources)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The run's text, tokenized; prepared again where the cache is gone. Raises UserError where it has changed."""
        config = self.config
        directories = prepare_dataset(config.data, self.tokenizer, sequence_length=config.sequence_length)
        dataset = self.open_dataset(directories, Vocabulary.of(self.tokenizer, config.data.objective.texts()))
        self.check_dataset(dataset)
        return dataset

    def open_dataset(self, directories: Sequence[Path], vocabulary: Vocabulary) -> Dataset:
        """Return the dataset of the directories that `prepare_dataset` made."""
        config = self.config
        return Dataset(config.data, directories, vocabulary, sequence_length=config.sequence_length, seed=config.seed)

    def check_dataset(self, dataset: Dataset) -> None:
        """Raise UserError where `dataset` is not the one that this run began with."""
        file = self.directory / DATA_FILE
        if file.exists() and read_json(file) != _summary(dataset):
            path = itertools.chain.from_iterable(own.path for _, own in self.config.data.corpora())
            raise UserError(
                f"the files of data.path={', '.join(path)} are not what '{self.directory}' began "
                "with: bring them back, or give another --run-dir"
            )

    def batch(self, step: int) -> HostBatch:
        """Return the exact global batch of the update from `step` to `step + 1`: numpy arrays [B, T].

        Raises UserError for a step that the run does not have.
        """
        if step not in range(self.config.num_steps):
            raise UserError(f"step={step!r} must be one of the run's, from 0 to {self.config.num_steps - 1}")
        return self.batches(self.dataset).batch(step)

    def batches(self, dataset: Dataset, rows: Sequence[int] | None = None) -> Batches:
        """Return the run's training batches; `rows` as in `Batches`."""
        config = self.config
        return Batches(
            dataset.train,
            mixture=dataset.mixture(global_batch_size=config.global_batch_size, num_steps=config.num_steps),
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            rows=rows,
            num_prefetch=config.data.num_prefetch,
            skip=config.data.skip_batches,
        )

    def load(self, step: int | None = None, *, mesh: MeshLike = None, dtype: str | None = None) -> LanguageModel:
        """Return the model as it was at `step` (default: the latest checkpoint)."""
        return load(self.url or self.directory, mesh=mesh, dtype=dtype, components=self.components, step=step)


def open_run(directory: str | Path, components: Sequence[type] = ()) -> Run:
    """Return the run in `directory`, which may be a URL. Raises UserError where there is none."""
    url = url_of(directory) if as_local(directory) is None else None
    directory = local_copy(directory, functools.partial(run_files, arrays=False))
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"'{directory}' is not a run directory: it has no {CONFIG_FILE}")
    if url is not None:  # a store has no empty directories
        (directory / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
    return Run(directory, read_config(directory / CONFIG_FILE, components), components, url=url)


def _metrics_of(line: str) -> dict[str, Any] | None:
    """Return a line of metrics, or None for a damaged one. Constants that JSON does not have (NaN) are None, too."""
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def check_directory(run: Run) -> list[str]:
    """Check that the run is new or can be continued in its directory, and write nothing.

    Returns lines for the log: the differences of a continued run from before. Raises UserError where another run is
    there, or files of something else.
    """
    directory = run.directory
    if not (directory / CONFIG_FILE).exists():
        if directory.exists() and not directory.is_dir():
            raise UserError(f"'{directory}' is a file: give another --run-dir")
        if directory.is_dir() and any(PARTIAL not in file.name for file in directory.iterdir()):
            raise UserError(f"'{directory}' is not empty and not a run: give another --run-dir")
        return []
    before = open_run(directory, run.components)
    changes = _changes(before, run)
    # By names: all processes have to open a store together, and this is process 0 alone.
    commits = (directory / CHECKPOINTS_DIRECTORY).glob(f"*/{COMMIT_FILE}")
    step = max(whole_steps(commit.relative_to(directory).as_posix() for commit in commits), default=0)
    if step > run.config.num_steps:
        raise UserError(
            f"'{directory}' is at step {step}, beyond num_steps={run.config.num_steps}: give more, or load an earlier "
            "checkpoint of it"
        )
    _check_skipped(before, run, step)
    lines = [f"changed: {change}" for change in changes]
    old, new = (float(learning_rate(step, c.optimizer.hyper(c.num_steps))) for c in (before.config, run.config))
    if 0 < step < run.config.num_steps and new > 1.001 * old:
        lines.append(
            f"the learning rate goes up: from step {step} on it is {new:.3g}, where it would have been {old:.3g}"
        )
    return lines


def _changes(before: Run, run: Run) -> list[str]:
    """Return the differences as `key=old -> new`. Raises UserError with all that are not allowed."""
    old, new = _values(before.config), _values(run.config)
    keys = list(dict.fromkeys([*new, *old]))
    changeable = CHANGEABLE
    if len({source.epochs is None for source in run.config.data.sources}) > 1:
        changeable = tuple(key for key in CHANGEABLE if key != "num_steps")  # the order of the data depends on it
    differing = [key for key in keys if old.get(key) != new.get(key) and not key.startswith("resume.")]
    refused = [
        key
        for key in differing
        if not key.startswith(changeable)
        and not run.config.resume.allows(key)
        and not _same(key, old.get(key), new.get(key), before)
    ]
    if refused:
        found = "; ".join(f"{key}={old.get(key)!r}, not {new.get(key)!r}" for key in refused)
        advised = all(key.startswith(ADVISED) for key in refused)
        allow = f", allow this with --resume.allow {','.join(refused)}," if advised else ","
        raise UserError(
            f"'{before.directory}' holds a run with {found}: continue it unchanged{allow} or give another --run-dir"
        )
    return [f"{key}={_shown(old.get(key))} -> {_shown(new.get(key))}" for key in differing]


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
    old, new = (set(r.config.data.skip_batches) for r in (before, run))
    count = step  # batches passed before `step`, the skipped ones included
    while (grown := step + sum(number < count for number in old)) > count:
        count = grown
    if early := [number for number in old ^ new if number < count]:
        raise UserError(
            f"data.skip_batches={_shown(run.config.data.skip_batches)} changes what '{run.directory}' has learned "
            f"before its checkpoint of step {step} (batch {min(early)}): change only batches from {count} on"
        )


def _values(config: RunConfig) -> dict[str, Any]:
    """Return the leaves by key; a component is its class name, and its fields are leaves."""
    return {key: type(value).__name__ if dataclasses.is_dataclass(value) else value for key, _, value in leaves(config)}


def start_run(run: Run, dataset: Dataset) -> None:
    """Write the run's directory: config, tokenizer, and a summary that identifies its text.

    Raises UserError where the run that is continued had another text.
    """
    run.check_dataset(dataset)
    directory = run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run directory '{directory}' cannot be made ({error.strerror}): give another") from None
    # The config first: with it, a directory that was left half-made is a run to continue.
    write_text(directory / CONFIG_FILE, json.dumps(to_json(run.config), indent=2) + "\n")
    if not (directory / TOKENIZER_DIRECTORY).is_dir():
        with replacing(directory / TOKENIZER_DIRECTORY) as partial:
            run.tokenizer.save(partial)
    write_text(directory / DATA_FILE, json.dumps(_summary(dataset), indent=2) + "\n")


def _summary(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies a dataset in data.json."""
    return {"content_hash": dataset.content_hash, "num_tokens": dataset.num_tokens, "num_bytes": dataset.num_bytes}
