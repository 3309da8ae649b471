"""The directory of a run: everything about it."""

import functools
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
from llama_jax.data import Batches, Corpus, prepare
from llama_jax.data.windows import Batch
from llama_jax.run.config import RunConfig
from llama_jax.tokenizers import Tokenizer, load_tokenizer

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
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
)


class Run:
    """A run that was started: its config, metrics, data and checkpoints."""

    def __init__(self, directory: Path, config: RunConfig, components: Sequence[type] = ()):
        self.directory, self.config, self._components = directory, config, tuple(components)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    def metrics(self) -> list[dict[str, Any]]:
        """One dict per logged step: `step`, `loss`, `learning_rate`, `grad_norm`, ..., `val_loss` where measured."""
        file = self.directory / METRICS_FILE
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def steps(self) -> list[int]:
        """Steps with a checkpoint."""
        return CheckpointStore(self.directory / CHECKPOINTS_DIRECTORY).steps()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.directory / TOKENIZER_DIRECTORY)

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The run's text, tokenized; prepared again where the cache is gone."""
        return prepare(self.config.data, self.tokenizer)

    def batch(self, step: int) -> Batch:
        """The exact global batch that the update from `step` to `step + 1` used: numpy arrays [B, T]."""
        config = self.config
        return Batches(
            self.corpus.train,
            global_batch_size=config.global_batch_size,
            sequence_length=config.sequence_length,
            seed=config.seed,
        ).batch(step)

    def load(self, step: int | None = None, *, mesh: MeshLike = None, dtype: str | None = None) -> LanguageModel:
        """The model as it was at `step` (default: the latest checkpoint)."""
        return load(self.directory, mesh=mesh, dtype=dtype, components=self._components, step=step)


def open_run(directory: str | Path, components: Sequence[type] = ()) -> Run:
    """The run in `directory`. Raises UserError where there is none."""
    directory = Path(directory)
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"'{directory}' is not a run directory: it has no {CONFIG_FILE}")
    return Run(directory, from_json(RunConfig, read_json(directory / CONFIG_FILE), components), components)


def start_run(directory: Path, config: RunConfig, components: Sequence[type]) -> Run:
    """A run of `config` in `directory`, new or continued. Raises UserError where another run is there."""
    if (directory / CONFIG_FILE).exists():
        before = {key: value for key, _, value in leaves(open_run(directory, components).config)}
        now = {key: value for key, _, value in leaves(config)}
        for key in [*now, *(key for key in before if key not in now)]:
            if before.get(key) != now.get(key) and not key.startswith(CHANGEABLE):
                raise UserError(
                    f"'{directory}' holds a run with {key}={before.get(key)!r}, not {now.get(key)!r}: "
                    "continue it unchanged, or give another --run-dir"
                )
    elif directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"'{directory}' is not empty and not a run: give another --run-dir")
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / CONFIG_FILE, json.dumps(to_json(config), indent=2) + "\n")
    return Run(directory, config, components)


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
