"""Runs of a sweep in one process: what they share is prepared once, and their loops print nothing."""

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, override

import jax
from jax.sharding import Mesh

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, TOKENIZER_DIRECTORY, CheckpointStore
from llama_jax.data import Dataset
from llama_jax.files import replacing
from llama_jax.parallel import make_mesh
from llama_jax.planning import mesh_of
from llama_jax.run.callbacks import Event
from llama_jax.run.clock import Clock
from llama_jax.run.continuing import check_directory
from llama_jax.run.directory import Run, start_run
from llama_jax.run.preparing import open_dataset, prepare
from llama_jax.run.profiling import Profile
from llama_jax.run.programs import checked
from llama_jax.run.training import Loop
from llama_jax.run_config import RunConfig
from llama_jax.screen import Bar
from llama_jax.tokenizers import Tokenizer
from llama_jax.training import TrainState


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Parts that runs of one config share, whatever their seeds, steps and other numbers are.

    config: the config that was prepared.
    components: classes from outside the package that it has.
    mesh: devices of the runs.
    tokenizer: of the runs.
    directories: of the tokenized corpora.
    vocabulary: fields of the objective's `Vocabulary`.
    datasets: opened so far, by seed.
    lines: warnings of its checks.
    """

    config: RunConfig
    components: tuple[type, ...]
    mesh: Mesh
    tokenizer: Tokenizer
    directories: list[str]
    vocabulary: dict[str, Any]
    datasets: dict[int, Dataset] = dataclasses.field(default_factory=dict[int, Dataset])
    lines: list[str] = dataclasses.field(default_factory=list[str])

    def run(self, directory: Path, seed: int) -> Run:
        """Return the run of a seed in a directory, which may not be there yet."""
        run = Run(directory, dataclasses.replace(self.config, seed=seed), self.components)
        run.tokenizer = self.tokenizer
        return run

    def dataset(self, run: Run) -> Dataset:
        """Return the dataset of a run, opened once for each seed."""
        seed = run.config.seed
        if seed not in self.datasets:
            self.datasets[seed] = open_dataset(run, self.directories, self.vocabulary)
        return self.datasets[seed]

    def save(self, place: Path) -> None:
        """Keep the tokenizer in the directory `place`, if it is not there."""
        if not (place / TOKENIZER_DIRECTORY).is_dir():
            place.mkdir(parents=True, exist_ok=True)
            with replacing(place / TOKENIZER_DIRECTORY) as partial:
                self.tokenizer.save(partial)

    def check(self, seed: int) -> None:
        """Check the model's pieces and its attention kernel, as every run does before its first step.

        Raises UserError for a piece, and RunFailed for a kernel that is wrong.
        """
        if self.config.compute.preflight:
            run = self.run(Path(), seed)
            with jax.set_mesh(self.mesh):
                lane = Lane(run, self.dataset(run), lambda step: None)
                self.lines.extend(checked(self.config, lane.first_batch()))


def prepare_runs(
    config: RunConfig,
    place: Path,
    components: Sequence[type] = (),
    *,
    tokenizer: Tokenizer | None = None,
    quiet: bool = False,
) -> Prepared:
    """Prepare the tokenizer and the data of a config's runs.

    The tokenizer is the given one, the one in the directory `place` if it is there, or a new one.
    Raises UserError for everything that cannot run here.
    """
    devices = jax.devices()
    run, mesh = Run(place, config, components), mesh_of(config, devices)
    if tokenizer is not None:
        run.tokenizer = tokenizer
    directories, vocabulary, _ = prepare(run, mesh, len(devices), quiet)
    return Prepared(config, tuple(components), make_mesh(mesh), run.tokenizer, directories, vocabulary)


class Lane(Loop):
    """A run that ends at the step `until` (default: its last), says nothing, and reports each step to `advance`.

    `lines` are the warnings that `train` would print, `memory` the compiler's figures of the train step in bytes: the
    state, and all of its arguments and temporary arrays. Make and use it on the run's mesh.
    """

    def __init__(self, run: Run, dataset: Dataset, advance: Callable[[int], None], until: int | None = None):
        super().__init__(run, dataset, 0, quiet=True)
        self.until = run.config.num_steps if until is None else until
        self.bar = _Silent(advance)
        self.val_loss: float | None = None
        self.memory: tuple[int, int] | None = None

    def first_batch(self) -> dict[str, jax.Array]:
        """Return the batch of the first step, on the devices."""
        return self._on_devices(self.batches.batch(0))

    def train(self, closing: "Closing", stopping: Callable[[int], bool], *, measured: bool = False) -> None:
        """Train to the end; the last checkpoint is on disk when `closing` has closed. `measured` sets `memory`.

        Raises RunFailed where the run fails, and Preempted where `stopping` returns True after a step.
        """
        config, directory = self.config, self.run_.directory
        start, self.run_.history, lines = check_directory(self.run_)
        self.lines += lines
        start_run(self.run_, self.dataset)
        with contextlib.ExitStack() as stack:
            store = CheckpointStore(directory / CHECKPOINTS_DIRECTORY, config.checkpoint)
            stack.callback(closing.close, store)
            state, lines = self._state(store)
            self.lines += [*lines, *self._warnings(start, state)]
            loggers = [stack.enter_context(contextlib.closing(logger(self.run_, start))) for logger in self.loggers]
            if measured:
                self.memory = self._memory(state)
            clock = Clock(start)
            profile = stack.enter_context(Profile(config, directory / "profile", start, self.bar.say, clock))
            self._steps(state, store, self.bar, loggers, clock, profile, stopping)

    def _memory(self, state: TrainState) -> tuple[int, int]:
        """Return the compiler's figures of the train step; the first step then compiles nothing."""
        step: Any = self.programs.train_step
        found = step.lower(state, self.first_batch(), self.hyper).compile().memory_analysis()
        state_bytes = found.alias_size_in_bytes  # it is donated
        return (
            state_bytes,
            found.argument_size_in_bytes + found.output_size_in_bytes - state_bytes + found.temp_size_in_bytes,
        )

    @override
    def _report(self, *args: Any, **kwargs: Any) -> Event:
        event = super()._report(*args, **kwargs)
        self.val_loss = event.get("val_loss", self.val_loss)
        if event.step == self.until:
            event.stop()
        return event

    @override
    def _validates(self, step: int) -> bool:
        return super()._validates(step) or (len(self.validation) > 0 and step == self.until)

    @override
    def _saves(self, step: int) -> bool:
        return super()._saves(step) or step == self.until


class Closing(contextlib.AbstractContextManager["Closing"]):
    """Stores that are closed by a thread, while the next run begins; at the end of the block, all of them are."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "closing")
        self._waiting: list[concurrent.futures.Future[None]] = []

    def close(self, store: CheckpointStore) -> None:
        """Begin to close a store, after the one before it. Raises SaveFailed where that one could not be written."""
        self.wait()
        self._waiting.append(self._thread.submit(store.close))

    def wait(self) -> None:
        """Return when all stores are closed. Raises SaveFailed where one cannot be written."""
        while self._waiting:
            self._waiting.pop().result()

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


class _Silent(Bar):
    """A bar that shows nothing and passes its steps on."""

    def __init__(self, passed_on: Callable[[int], None]):
        super().__init__("", 0, None, silent=True)
        self._passed_on = passed_on

    @override
    def advance(self, step: int, total: int | None = None) -> None:
        self._passed_on(step)
