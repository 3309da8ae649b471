"""The directory of a run: everything about it."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint.language_model import (
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    TOKENIZER_DIRECTORY,
    LanguageModel,
    MeshLike,
    load,
)
from llama_jax.checkpoint.store import CheckpointStore
from llama_jax.config import UserError, from_json, leaves, read_json, to_json
from llama_jax.data import Batches, Dataset, Vocabulary, prepare_dataset
from llama_jax.data.windows import Batch
from llama_jax.models import EncoderDecoderConfig
from llama_jax.run.config import RunConfig
from llama_jax.tokenizers import Tokenizer, load_saved_tokenizer

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
DATA_FILE = "data.json"
_PARTIAL = ".partial"
# What may differ when a run is continued: how it is computed and told, not what it learns.
CHANGEABLE = (
    "num_steps",
    "mesh.",
    "compute.",
    "checkpoint.",
    "logging.",
    "profile.",
    "data.num_prefetch",
    "data.cache_dir",
    "data.max_bad_records",
)


class Run:
    """A run that was started: its config, metrics, data and checkpoints."""

    def __init__(self, directory: Path, config: RunConfig, components: Sequence[type] = ()):
        self.directory, self.config, self.components = directory, config, tuple(components)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per logged step: `step`, `loss`, `learning_rate`, `grad_norm`, ..., `val_loss` where measured."""
        file = self.directory / METRICS_FILE
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        # A line without its end is one that a killed process did not finish.
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def steps(self) -> list[int]:
        """Steps with a checkpoint."""
        return CheckpointStore(self.directory / CHECKPOINTS_DIRECTORY).steps()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        of_sources = isinstance(self.config.model, EncoderDecoderConfig)
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
        """What `prepare_dataset` made."""
        config = self.config
        return Dataset(config.data, directories, vocabulary, sequence_length=config.sequence_length, seed=config.seed)

    def check_dataset(self, dataset: Dataset) -> None:
        """Raises UserError where `dataset` is not the one that this run began with."""
        file = self.directory / DATA_FILE
        if file.exists() and read_json(file) != _summary(dataset):
            path = itertools.chain.from_iterable(own.path for _, own in self.config.data.corpora())
            raise UserError(
                f"the files of data.path={', '.join(path)} are not what '{self.directory}' began "
                "with: bring them back, or give another --run-dir"
            )

    def batch(self, step: int) -> Batch:
        """The exact global batch that the update from `step` to `step + 1` used: numpy arrays [B, T]."""
        return self.batches(self.dataset).batch(step)

    def batches(self, dataset: Dataset, rows: Sequence[int] | None = None) -> Batches:
        """The run's training batches; `rows` as in `Batches`."""
        config = self.config
        return Batches(
            dataset.train,
            mixture=dataset.mixture(global_batch_size=config.global_batch_size, num_steps=config.num_steps),
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            rows=rows,
            num_prefetch=config.data.num_prefetch,
        )

    def load(self, step: int | None = None, *, mesh: MeshLike = None, dtype: str | None = None) -> LanguageModel:
        """The model as it was at `step` (default: the latest checkpoint)."""
        return load(self.directory, mesh=mesh, dtype=dtype, components=self.components, step=step)


def open_run(directory: str | Path, components: Sequence[type] = ()) -> Run:
    """The run in `directory`. Raises UserError where there is none."""
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"'{directory}' is not a run directory: it has no {CONFIG_FILE}")
    return Run(directory, from_json(RunConfig, read_json(directory / CONFIG_FILE), components), components)


def check_directory(run: Run) -> None:
    """That the run is new or can be continued in its directory; writes nothing.

    Raises UserError where another run is there, or files of something else.
    """
    directory = run.directory
    if (directory / CONFIG_FILE).exists():
        before, now = _values(open_run(directory, run.components).config), _values(run.config)
        changeable = CHANGEABLE
        if len({source.epochs is None for source in run.config.data.sources}) > 1:
            changeable = tuple(key for key in CHANGEABLE if key != "num_steps")  # the order of the data depends on it
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key) and not key.startswith(changeable):
                raise UserError(
                    f"'{directory}' holds a run with {key}={before.get(key)!r}, not {now.get(key)!r}: "
                    "continue it unchanged, or give another --run-dir"
                )
    elif directory.exists() and not directory.is_dir():
        raise UserError(f"'{directory}' is a file: give another --run-dir")
    elif directory.is_dir() and any(not file.name.endswith(_PARTIAL) for file in directory.iterdir()):
        raise UserError(f"'{directory}' is not empty and not a run: give another --run-dir")


def _values(config: RunConfig) -> dict[str, Any]:
    """Leaves by key, of a component its class name: its fields are leaves of their own."""
    return {key: type(value).__name__ if dataclasses.is_dataclass(value) else value for key, _, value in leaves(config)}


def start_run(run: Run, dataset: Dataset) -> None:
    """Writes the run's directory: config, tokenizer, and what identifies its text.

    Raises UserError where the text is not that of the run that is continued.
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
        partial = directory / f".{TOKENIZER_DIRECTORY}{_PARTIAL}"
        run.tokenizer.save(partial)
        partial.rename(directory / TOKENIZER_DIRECTORY)
    write_text(directory / DATA_FILE, json.dumps(_summary(dataset), indent=2) + "\n")


def _summary(dataset: Dataset) -> dict[str, Any]:
    return {"content_hash": dataset.content_hash, "num_tokens": dataset.num_tokens, "num_bytes": dataset.num_bytes}


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f".{file.name}{_PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
