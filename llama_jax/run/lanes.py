"""Runs of a sweep in one process: what they share is prepared once, and their loops print nothing."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, override

import jax
from jax.sharding import Mesh

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, CheckpointStore
from llama_jax.config import UserError
from llama_jax.data import Dataset
from llama_jax.parallel import make_mesh
from llama_jax.planning import mesh_of
from llama_jax.run.callbacks import Event
from llama_jax.run.clock import Clock
from llama_jax.run.continuing import check_directory
from llama_jax.run.directory import Run, keep_tokenizer, start_run, writing
from llama_jax.run.preparing import open_dataset, prepare
from llama_jax.run.profiling import Profile
from llama_jax.run.programs import RunFailed, checked
from llama_jax.run.reporting import effects
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

    def changed(self, config: RunConfig) -> "Prepared":
        """Return the same for a config of other numbers of the optimizer."""
        return dataclasses.replace(self, config=config)

    def run(self, directory: Path, seed: int) -> Run:
        """Return the run of a seed in a directory, which may not be there yet."""
        run = Run(directory, dataclasses.replace(self.config, seed=seed), self.components)
        run.tokenizer = self.tokenizer
        return run

    def lane(self, run: Run, tick: Callable[[], None], until: int | None = None) -> "Lane":
        """Return the lane of a run. Call it on the mesh that the lane is used on."""
        return Lane(run, self.dataset(run), tick, until)

    def dataset(self, run: Run) -> Dataset:
        """Return the dataset of a run, opened once for each seed."""
        seed = run.config.seed
        if seed not in self.datasets:
            self.datasets[seed] = open_dataset(run, self.directories, self.vocabulary)
        return self.datasets[seed]

    def save(self, place: Path) -> None:
        """Keep the tokenizer in the directory `place`, if it is not there."""
        place.mkdir(parents=True, exist_ok=True)
        keep_tokenizer(self.tokenizer, place)

    def check(self, seed: int) -> None:
        """Check pieces and kernel of the model, as every run does before its first step.

        Raises UserError for a piece, and where no text is held out, and RunFailed for a kernel that is wrong.
        """
        run = self.run(Path(), seed)
        with jax.set_mesh(self.mesh):
            lane = self.lane(run, lambda: None)
            if not len(lane.validation):
                raise UserError("there is no held-out text to compare val_loss on: raise data.validation_fraction")
            if self.config.compute.preflight:
                self.lines.extend(checked(self.config, lane.first_batch()))


def prepare_runs(config: RunConfig, place: Path, components: Sequence[type] = (), *, quiet: bool = False) -> Prepared:
    """Prepare the tokenizer and the data of a config's runs.

    The tokenizer is the one in the directory `place` if it is there, or a new one. Raises UserError for everything that
    cannot run here.
    """
    devices = jax.devices()
    run, mesh = Run(place, config, components), mesh_of(config, devices)
    directories, vocabulary, _ = prepare(run, mesh, len(devices), quiet)
    return Prepared(config, tuple(components), make_mesh(mesh), run.tokenizer, directories, vocabulary)


class Lane(Loop):
    """A run that ends at the step `until` (default: its last), prints nothing, and calls `tick` after each step.

    After it, `lines` are the warnings that `train` would print, `failure` the sentence of a run that has failed,
    and `memory` the compiler's figures of the train step in bytes: the state, and all of its arguments and temporary
    arrays. Make and use it on the run's mesh.
    """

    def __init__(self, run: Run, dataset: Dataset, tick: Callable[[], None], until: int | None = None):
        super().__init__(run, dataset, 0, quiet=True)
        self.until = run.config.num_steps if until is None else until
        self.bar = _Silent(tick)
        self.failure: str | None = None
        self.memory: tuple[int, int] | None = None

    def first_batch(self) -> dict[str, jax.Array]:
        """Return the batch of the first step, on the devices."""
        return self._on_devices(self.batches.batch(0))

    def train(self, stopping: Callable[[int], bool], *, measured: bool = False) -> None:
        """Train to the end. `measured` sets `memory`.

        Raises Preempted where `stopping` returns True after a step.
        """
        with contextlib.ExitStack() as stack:
            state = self.begin(stack)
            if measured:  # the first step then compiles nothing
                self.memory = memory_of(self.programs.train_step, state, self.first_batch(), self.hyper)
            start, directory = int(state.step), self.run_.directory / "profile"
            profile = stack.enter_context(Profile(self.config, directory, start, self.bar.say, self.clock))
            try:
                self._end_saving(self._steps(state, self.bar, self.outputs, self.clock, profile, stopping))
            except RunFailed as error:
                self.failure = str(error)

    def begin(self, stack: contextlib.ExitStack) -> TrainState:
        """Write the run's directory, open its outputs until the end of `stack`, and return the state to begin with."""
        directory = self.run_.directory
        stack.enter_context(writing(directory))
        start, self.run_.history, lines = check_directory(self.run_)
        start_run(self.run_, self.dataset)
        self.store = CheckpointStore(directory / CHECKPOINTS_DIRECTORY, self.config.checkpoint)
        stack.callback(self.store.close)
        state, more = self._state()
        self.lines += [*lines, *more, *effects(self.run_, start, state, len(self.validation), self.mfu_per_speed)]
        self.outputs = [stack.enter_context(contextlib.closing(logger(self.run_, start))) for logger in self.loggers]
        self.clock = Clock(start)
        return state

    def due(self, step: int) -> bool:
        """Return whether the run is validated or saved after this step."""
        return self._validates(step) or self._saves(step)

    def log(self, metrics: dict[str, Any], state: TrainState | None, *, saves: bool = False) -> None:
        """Log the metrics of a step; with its state, validate and save where this is due, or `saves`."""
        step, given = metrics["step"], (self.clock, self.bar, self.outputs)
        try:
            if state is None:
                self._log(metrics, *given)
            else:
                with self.clock.paused():
                    event = self._report(state, metrics, *given)
                    self._save(state, event, saves or self._saves(step))
        except RunFailed as error:
            self.failure = str(error)

    @override
    def _report(self, *args: Any, **kwargs: Any) -> Event:
        event = super()._report(*args, **kwargs)
        if event.step == self.until:
            event.stop()
        return event

    @override
    def _validates(self, step: int) -> bool:
        return super()._validates(step) or (len(self.validation) > 0 and step == self.until)

    @override
    def _samples(self, step: int) -> bool:
        return False

    @override
    def _saves(self, step: int) -> bool:
        return super()._saves(step) or step == self.until


def memory_of(train_step: Any, *args: Any) -> tuple[int, int]:
    """Return the compiler's figures of a train step in bytes: its state, and all arguments and temporary arrays."""
    found = train_step.lower(*args).compile().memory_analysis()
    state = found.alias_size_in_bytes  # it is donated
    return state, found.argument_size_in_bytes + found.output_size_in_bytes - state + found.temp_size_in_bytes


class _Silent(Bar):
    """A bar that shows nothing and counts its steps elsewhere."""

    def __init__(self, tick: Callable[[], None]):
        super().__init__("", 0, None, silent=True)
        self._tick = tick

    @override
    def advance(self, step: int, total: int | None = None) -> None:
        self._tick()
