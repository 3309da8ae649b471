"""The directory of a run, which has everything about it."""

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.checkpoint import (
    CHECKPOINTS_DIRECTORY,
    CONFIG_FILE,
    TOKENIZER_DIRECTORY,
    CheckpointStore,
    LanguageModel,
    MeshLike,
    committed_steps,
    kept_tokenizer,
    load,
    locate,
    run_files,
    write_manifest,
)
from llama_jax.config import UserError, read_json, to_json
from llama_jax.data import Batches, Dataset, HostBatch, Vocabulary, batches_passed, prepare_dataset
from llama_jax.files import lock, replacing, write_text
from llama_jax.parallel import distributed
from llama_jax.remote import as_local, local_copy, url_of
from llama_jax.run.metrics import METRICS_FILE, read_metrics
from llama_jax.run_config import RunConfig, read_config
from llama_jax.sampling import generate_text
from llama_jax.tokenizers import Tokenizer

SAMPLES_FILE = "samples.txt"
DATA_FILE = "data.json"
HISTORY_FILE = "run.json"
LOCK_FILE = ".lock"  # there while a process writes the run, or was killed


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
        return read_metrics(self.directory / METRICS_FILE)

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint."""
        with contextlib.closing(CheckpointStore(self.directory / CHECKPOINTS_DIRECTORY)) as store:
            return store.steps()

    def committed_steps(self) -> list[int]:
        """Return the steps with a checkpoint by their files' names, ascending: a process may do so alone."""
        return committed_steps(self.directory)

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """Changes of the config where the run was continued: `step`, `date`, and `changes`, key to [old, new]."""
        file = self.directory / HISTORY_FILE
        found = read_json(file) if file.is_file() else {"history": []}
        if not isinstance(found, dict) or not isinstance(found.get("history"), list):
            raise UserError(f"'{file}' is damaged, which says what was changed and when: bring it back")
        return found["history"]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run's directory has."""
        of_sources = self.config.model.has_source
        return kept_tokenizer(self.directory / TOKENIZER_DIRECTORY, of_sources=of_sources)

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
        began, found = self.summary(), _summary(dataset)
        if differing := [key for key in found if key in began and found[key] != began[key]]:
            changes = ", ".join(f"{key} {began[key]}, now {found[key]}" for key in differing)
            path = itertools.chain.from_iterable(own.path for _, own in self.config.data.corpora())
            raise UserError(
                f"the files of data.path={', '.join(path)} are not what '{self.directory}' began "
                f"with ({changes}): bring them back, or give another --run-dir"
            )

    def summary(self) -> dict[str, Any]:
        """Return what identifies the run's text, {} before it was started. Raises UserError for a damaged file."""
        file = self.directory / DATA_FILE
        found = read_json(file) if file.exists() else {}
        if not isinstance(found, dict) or (file.exists() and "content_hash" not in found):
            raise UserError(f"'{file}' is damaged: bring it back")
        return found

    def batch(self, step: int) -> HostBatch:
        """Return the exact global batch of the update from `step` to `step + 1`: numpy arrays [B, T].

        B is the batch size that the run had then. Raises UserError for a step that the run does not have.
        """
        if step not in range(self.config.num_steps):
            raise UserError(f"step={step!r} must be one of the run's, from 0 to {self.config.num_steps - 1}")
        return self.batches(self.dataset).batch(step)

    def batches(self, dataset: Dataset, rows: Sequence[int] | None = None) -> Batches:
        """Return the run's training batches; `rows` as in `Batches`."""
        config, size = self.config, self.config.global_batch_size
        earlier = [
            (batches_passed(entry["step"], config.data.skip_batches), entry["changes"]["global_batch_size"][0])
            for entry in self.history
            if "global_batch_size" in entry["changes"]
        ]
        return Batches(
            dataset.train,
            mixture=dataset.mixture(global_batch_size=size, num_steps=config.num_steps, earlier=earlier),
            global_batch_size=size,
            seed=config.seed,
            rows=rows,
            num_prefetch=config.data.num_prefetch,
            skip=config.data.skip_batches,
            earlier=earlier,
        )

    def load(self, step: int | None = None, *, mesh: MeshLike = None, dtype: str | None = None) -> LanguageModel:
        """Return the model as it was at `step` (default: the latest checkpoint)."""
        return load(self.url or self.directory, mesh=mesh, dtype=dtype, components=self.components, step=step)


def open_run(directory: str | Path, components: Sequence[type] = ()) -> Run:
    """Return the run in `directory`, which may be a URL, or a path in it. Raises UserError where there is none."""
    directory, _ = locate(directory)
    url = url_of(directory) if as_local(directory) is None else None
    directory = local_copy(directory, functools.partial(run_files, arrays=False))
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"'{directory}' is not a run directory: it has no {CONFIG_FILE}")
    if url is not None:  # a store has no empty directories
        (directory / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
    return Run(directory, read_config(directory / CONFIG_FILE, components), components, url=url)


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Be the only writer of a run's directory within the block; of several processes, process 0 holds the lock.

    A directory that is not there is made, and removed where the block leaves it empty. Raises UserError, with all as it
    was, where another process writes there. Says so where the file system has no locks.
    """
    with contextlib.ExitStack() as stack:
        distributed.all_agree(lambda: stack.enter_context(_locked(directory)) if distributed.is_main() else None)
        yield


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    file, holder = directory / LOCK_FILE, "another process"
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        for path in reversed(made):  # those that are empty at the end
            stack.callback(_removed, path)
        try:
            _lock_in(directory, stack)
            stack.callback(_removed, file)
            file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except TimeoutError:
            with contextlib.suppress(OSError):
                holder = file.read_text(errors="replace") or holder
            raise UserError(
                f"'{directory}' is written by {holder}: wait for its end, or give another --run-dir"
            ) from None
        except OSError as error:
            if directory.is_dir() and os.access(directory, os.W_OK):  # else it is refused, or nothing is written
                print(f"'{directory}' has no lock ({error.strerror}): start nothing else in it", file=sys.stderr)
        yield


def _lock_in(directory: Path, stack: contextlib.ExitStack) -> None:
    """Make a directory and take its lock: again where a process that ended meanwhile has removed it.

    `mkdir` says FileExistsError where the directory was there and is gone before it looks what it is. Raises
    TimeoutError where others hold the lock, or make and remove the directory all the time.
    """
    for _ in range(100):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(lock(directory / LOCK_FILE, timeout=0))
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(directory) and not directory.is_dir():
                raise
    raise TimeoutError


def _removed(path: Path) -> None:
    """Remove a lock that is held, or an empty directory; what stays stops nobody."""
    with contextlib.suppress(OSError):
        path.rmdir() if path.is_dir() else path.unlink()


def start_run(run: Run, dataset: Dataset) -> None:
    """Write the run's directory: history, config, tokenizer, and a summary that identifies its text.

    Raises UserError where the run that is continued had another text.
    """
    run.check_dataset(dataset)
    directory = run.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run directory '{directory}' cannot be made ({error.strerror}): give another") from None
    # Before the config, which is then compared with what the history ends with: a crash between them loses no change.
    if run.history:
        write_text(directory / HISTORY_FILE, json.dumps({"history": run.history}, indent=2) + "\n")
    # The config first: with it, a directory that was left half-made is a run to continue.
    write_text(directory / CONFIG_FILE, json.dumps(to_json(run.config), indent=2) + "\n")
    keep_tokenizer(run.tokenizer, directory)
    write_text(directory / DATA_FILE, json.dumps(_summary(dataset), indent=2) + "\n")


def write_samples(run: Run, lm: LanguageModel, max_new_tokens: int, name: str) -> None:
    """Continue the prompts of the run's config with `lm`, on all processes, and write the file `name` of the run."""
    prompts, seed = list(run.config.logging.sample_prompts), run.config.seed
    texts = generate_text(lm, prompts, max_new_tokens=max_new_tokens, temperature=0.8, seed=seed)
    between = "\n" if run.config.model.has_source else ""
    samples = "\n\n".join(prompt + between + text for prompt, text in zip(prompts, texts, strict=True))
    if distributed.is_main():
        (run.directory / name).parent.mkdir(exist_ok=True)
        write_text(run.directory / name, samples + "\n")


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Save a tokenizer in the directory of a run or a sweep, if none is there."""
    if not (directory / TOKENIZER_DIRECTORY).is_dir():
        with replacing(directory / TOKENIZER_DIRECTORY) as partial:
            tokenizer.save(partial)
            write_manifest(partial)


def _summary(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies a dataset in data.json."""
    return {"content_hash": dataset.content_hash, "num_tokens": dataset.num_tokens, "num_bytes": dataset.num_bytes}
