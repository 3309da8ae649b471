"""The training loop: data in, steps, metrics, validation, checkpoints, samples."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, CONFIG_FILE, CheckpointStore, SaveFailed, locate
from llama_jax.config import outside_classes
from llama_jax.data import Dataset, HostBatch, ValidationBatches
from llama_jax.models import abstract_params
from llama_jax.parallel import distributed, make_mesh, platform
from llama_jax.planning import mesh_of
from llama_jax.remote import with_urls
from llama_jax.run.callbacks import Callback, Event, check_callbacks
from llama_jax.run.clock import Clock
from llama_jax.run.continuing import check_directory
from llama_jax.run.directory import SAMPLES_FILE, Run, open_run, start_run, write_samples
from llama_jax.run.hardware import check_devices, release_freed_memory, settle, step_at
from llama_jax.run.preparing import check_shared, first_params, open_dataset, prepare
from llama_jax.run.profiling import Profile
from llama_jax.run.programs import RunFailed as RunFailed, checked, programs
from llama_jax.run.reporting import (
    Logger,
    configured_loggers,
    effects,
    measured,
    outcome,
    overview,
    peak_memory,
    receipt,
    shown,
)
from llama_jax.run.rewinding import rewinding
from llama_jax.run.signals import Preempted as Preempted, termination
from llama_jax.run.skipped import SkippedSteps, check_finite
from llama_jax.run.stored import StoredRun, local_run
from llama_jax.run.watchdog import CALLBACKS, Beat, watching
from llama_jax.run_config import RunConfig
from llama_jax.screen import Bar
from llama_jax.training import TrainState, peak_flops


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    components: Sequence[type] = (),
    loggers: Sequence[type[Logger]] = (),
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> Run:
    """Train `config` in `run_dir`, or continue what is in it, bit for bit as if it had never stopped.

    `run_dir` may be the URL of an object store (`s3://`, `gs://`): every checkpoint is uploaded when it is saved.
    `components` are classes from outside the package that the config had before; `loggers` are destinations of metrics
    beyond those of `config.logging`. Each of `callbacks` is called with every logged step (`Event`), on every process
    with the same numbers: it may save, stop the run and evaluate the model; numbers that it returns by name are logged,
    too. `quiet` leaves warnings and the lines of the end on the screen.

    Returns the finished run, one that a callback has stopped, or one that is beyond `num_steps`, unchanged. Raises
    UserError for a config that cannot run here or that is not this directory's and for a callback that fails, RunFailed
    for a loss that is not finite or jumps (`checks`), Preempted after a termination signal, with a checkpoint saved.
    """
    check_callbacks(callbacks)
    run_dir, asked = locate(run_dir)
    with (
        termination() as stopping,
        local_run(run_dir) as (directory, stored),
        watching(config.checks.stall_seconds) as beat,
    ):
        components = (*components, *outside_classes(config))
        options = loggers, callbacks, stopping, beat, quiet
        run = Run(directory, config, components)
        # When it rewinds, `stored` has started to upload.
        run = rewinding(run, lambda r: _train(r, *options, stored, asked), lambda r: _train(r, *options))
    run.url = None if stored is None else stored.url
    return run


def _train(
    run: Run,
    loggers: Sequence[type[Logger]],
    callbacks: Sequence[Callback],
    stopping: Callable[[int], bool],
    beat: Beat,
    quiet: bool,
    stored: StoredRun | None = None,
    asked: int | None = None,
) -> Run:
    """Train in the run's local directory; `asked` is the step to continue from, where one was given."""
    config = run.config
    devices = jax.devices()  # several processes find their devices together
    beat(CALLBACKS, 0)  # what takes any time; a rewind comes here from a step
    step, run.history, lines = distributed.broadcast_from_main(lambda: check_directory(run, asked))
    if step > config.num_steps:
        if distributed.is_main():
            print(with_urls(f"'{run.directory}' is at step {step}, past num_steps={config.num_steps}: nothing changed"))
        return open_run(run.directory, run.components)
    mesh = mesh_of(config, devices)
    # All that can be wrong is found out before anything is written; of several processes, the first does it for all.
    directories, vocabulary, sample_tokens = distributed.broadcast_from_main(
        lambda: prepare(run, mesh, len(devices), quiet)
    )
    if config.checks.hardware:
        distributed.all_agree(check_devices)
    jax_mesh = make_mesh(mesh)
    with jax.set_mesh(jax_mesh):
        loop = distributed.all_agree(
            lambda: Loop(
                run, open_dataset(run, directories, vocabulary), sample_tokens, lines, loggers, callbacks, quiet
            )
        )
        if config.compute.preflight and step < config.num_steps:
            batch = loop._on_devices(loop.batches.batch(step))
            loop.lines += distributed.all_agree(lambda: checked(config, batch))
    loop.beat = beat
    # After the check of the model's pieces, and outside the mesh: the estimate of memory sets another one.
    loop.begins = overview(run, dataclasses.replace(config, mesh=mesh), step)
    with jax.set_mesh(jax_mesh):
        distributed.broadcast_from_main(lambda: start_run(run, loop.dataset))
        distributed.all_agree(lambda: check_shared(run.directory / CONFIG_FILE, "--run-dir"))
        if stored is not None:
            stored.start()
        try:
            loop.run(stopping)
        except SaveFailed as error:
            raise RunFailed(f"{error}: make room there, then start again to continue") from error
    return run


class Loop:
    """One process's part of a run.

    `sample_tokens` is the length of samples, `begins` what the log begins with, `lines` what it has next, even where
    `quiet`; `loggers` and `callbacks` are those given to `train`.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        sample_tokens: int,
        lines: Sequence[str] = (),
        loggers: Sequence[type[Logger]] = (),
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ):
        config = run.config
        self.run_, self.config, self.dataset, self.sample_tokens = run, config, dataset, sample_tokens
        self.main = distributed.is_main()
        self.rows = distributed.local_rows((config.global_batch_size, config.sequence_length))
        self.batches = run.batches(dataset, self.rows)
        self.validation = ValidationBatches(
            dataset.validation,
            global_batch_size=config.global_batch_size,
            max_batches=config.logging.validation_batches,
            rows=self.rows,
        )
        self.programs = programs(config)
        self.hyper = config.optimizer.hyper(config.num_steps, config.seed)
        # All positions of a batch, those of padding and of sources, too: what is computed, not what is learned.
        self.tokens_per_step = config.global_batch_size * config.row_length
        flops = config.flops_per_token
        peak = peak_flops(jax.local_devices()[0], config.compute.jax_dtype)
        self.mfu_per_speed = None if peak is None else flops / (peak * jax.device_count())
        self.lines, self.loggers = list(lines), [*configured_loggers(config.logging), *loggers]
        self.callbacks, self.begins, self.quiet = tuple(callbacks), list[str](), quiet
        self.beat: Beat = lambda kind, step: None
        self.losses: list[float] = []  # since the last line
        self.skipped = SkippedSteps(run, self.batches.number)
        self.saved = time.monotonic()
        self.store: CheckpointStore

    def run(self, stopping: Callable[[int], bool]) -> None:
        """Train to the end, or to the step after which `stopping` returns True, then write samples."""
        config, directory, began = self.config, self.run_.directory, time.monotonic()
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(Bar("training", 0, config.num_steps, quiet=self.quiet, silent=not self.main))
            bar.say(*self.begins, *self.dataset.describe(self.batches, config.num_steps))
            self.store = CheckpointStore(directory / CHECKPOINTS_DIRECTORY, config.checkpoint)
            stack.callback(self.store.close)
            state, lines = distributed.all_agree(self._state)
            bar.step = start = int(state.step)
            stack.callback(lambda: self.beat("last save", bar.step))  # that the store waits for when it is closed
            loggers = [
                stack.enter_context(contextlib.closing(logger(self.run_, start)))
                for logger in (self.loggers if self.main else ())
            ]
            lines += [
                *receipt(self.run_, self.dataset, self.batches, state),
                *self.lines,
                *effects(self.run_, start, state, len(self.validation), self.mfu_per_speed),
                *(logger.notice for logger in loggers if logger.notice),
            ]
            bar.say(*lines, always=True)
            clock = Clock(start)
            profile = stack.enter_context(Profile(config, directory / "profile", start, bar.say, clock))
            state = self._steps(state, bar, loggers, clock, profile, stopping)
            self.beat("last save", bar.step)
            self._end_saving(state)
        if config.logging.sample_prompts:
            self.beat("samples", config.num_steps)
            write_samples(self.run_, self.run_.load(), self.sample_tokens, SAMPLES_FILE)
        if self.main:
            bar.say(*outcome(self.run_, time.monotonic() - began), always=True)

    def _state(self) -> tuple[TrainState, list[str]]:
        """Return the latest checkpoint's state, or a new one, and lines for the log that describe it."""
        # As process 0 sees it: others may see an older state of a shared file system.
        step = distributed.broadcast_from_main(lambda: max(self.store.steps(), default=None))
        if step is None:
            params, lines = first_params(self.config, self.run_.components)
            return self.programs.init_state(params, self.hyper), lines
        abstract = jax.eval_shape(self.programs.init_state, abstract_params(self.config.model), self.hyper)
        return self.store.load(step, abstract), []

    def _steps(
        self,
        state: TrainState,
        bar: Bar,
        loggers: Sequence[Logger],
        clock: Clock,
        profile: Profile,
        stopping: Callable[[int], bool],
    ) -> TrainState:
        """Take the steps to the end, or to where a callback stops; log, validate and save between them.

        Returns the last state. Raises Preempted after a termination signal, with a checkpoint saved, and what `_log`
        raises.
        """
        start, num_steps = int(state.step), self.config.num_steps
        batches = self.batches.iterate(start)
        pending: dict[str, Any] | None = None
        for step in range(start, num_steps):
            done = step + 1
            with profile.step(step, state):
                self.beat("batch", done)
                host_batch = next(batches)
                self.beat("step", done)
                batch = self._on_devices(host_batch)
                # A CPU may compute the next step within its call, which would hide where the last one ended.
                if pending is not None and platform() == "cpu":
                    self._log(pending, clock, bar, loggers)
                    pending = None
                with bar.timed("compiling the train step") if step == start else contextlib.nullcontext():
                    settle(step - start, self.programs.train_step, state, batch, self.hyper)
                    take = step_at(done, self.config.checks.every_steps, self.programs.train_step)
                    state, metrics = take(state, batch, self.hyper)
            # Elsewhere the host waits for the last one's numbers with the next step already on its way.
            if pending is not None:
                self._log(pending, clock, bar, loggers)
            entry = pending = {"step": done} | metrics
            bar.advance(done)
            preempted = stopping(done)
            saves = self._saves(done) or preempted
            if not (saves or self._validates(done) or self._samples(done) or (self.callbacks and self._logs(done))):
                continue
            jax.block_until_ready(metrics)
            with clock.paused():
                event = self._report(state, entry, clock, bar, loggers)
                self.beat("save", done)
                self._save(state, event, saves)
            pending = None
            if preempted:
                self.beat("last save", done)
                self._end_saving(state)
                raise Preempted(f"stopped at step {done} with a checkpoint saved: start again to continue")
            if event.reason is not None and done < num_steps:
                bar.say(
                    f"stopped at step {done}/{num_steps} by a callback" + (event.reason and f": {event.reason}"),
                    always=True,
                )
                break
        return state

    def _report(
        self, state: TrainState, metrics: dict[str, Any], clock: Clock, bar: Bar, loggers: Sequence[Logger]
    ) -> Event:
        """Validate where it is due, log the step and call the callbacks."""
        step = metrics["step"]
        val = self._validate(state, step) if self._validates(step) else {}
        bar.say(*measured(step, self.config.num_steps, val))
        if self._samples(step):
            self.beat("samples", step)
            write_samples(self.run_, Event(self.run_, step, state).load(), self.sample_tokens, f"samples/{step}.txt")
        self.beat(CALLBACKS if self.callbacks else "log", step)
        return self._log(metrics | val, clock, bar, loggers, state)

    def _save(self, state: TrainState, event: Event, saves: bool) -> None:
        """Save a checkpoint where one is due, a callback asks for one, or the validation finds one of the best."""
        saves = saves or event.saves or event.reason is not None
        val_loss = event.get("val_loss")
        # Where checkpoints are measured at all, what is measured between them may be the best.
        best = self.config.measures_checkpoints and val_loss is not None and self.store.is_best(val_loss)
        if saves or best:
            check_finite(state, event.step, self.store)
            self.store.save(state, val_loss=val_loss)
            self.saved, self.skipped.saved = time.monotonic(), event.step

    def _end_saving(self, state: TrainState) -> None:
        """Wait until the last checkpoint is on disk, and save the state again where it could not be written."""
        if self.store.check(wait=True):
            self.store.save(state)
        self.store.wait()

    def _logs(self, step: int) -> bool:
        """Return whether the metrics of `step` are logged, where it is not validated."""
        return step % self.config.logging.every_steps == 0 or step in (1, self.config.num_steps)

    def _validates(self, step: int) -> bool:
        every, num_steps = self.config.logging.validate_every_steps, self.config.num_steps
        return len(self.validation) > 0 and (step % every == 0 or step == num_steps)

    def _samples(self, step: int) -> bool:
        every, prompts = self.config.logging.sample_every_steps, self.config.logging.sample_prompts
        return every is not None and step % every == 0 and bool(prompts)

    def _saves(self, step: int) -> bool:
        """Return whether a checkpoint of `step` is due, or again where it failed; by time, process 0 decides."""
        config, checkpoint = self.config, self.config.checkpoint
        if self.store.check() or step == config.num_steps or any(step % every == 0 for every in checkpoint.intervals):
            return True
        minutes = checkpoint.every_minutes  # several processes wait for the decision: not at each step
        if minutes is None or (distributed.several() and not self._logs(step)):
            return False
        return distributed.broadcast_from_main(lambda: time.monotonic() - self.saved >= 60 * minutes)

    def _on_devices(self, batch: HostBatch) -> dict[str, jax.Array]:
        return to_devices(batch, self.rows, self.config.global_batch_size)

    def _log(
        self,
        metrics: dict[str, Any],
        clock: Clock,
        bar: Bar,
        loggers: Sequence[Logger],
        state: TrainState | None = None,
    ) -> Event:
        """Wait for the metrics of a step and report them where it is one to log; callbacks get its `state`.

        Raises RunFailed where too many steps were skipped, and what callbacks raise.
        """
        step = metrics["step"]
        event = Event(self.run_, step, state)
        if (line := self.skipped.count(metrics)) is None:
            self.losses.append(float(metrics["loss"]))
        else:
            bar.say(line, always=True)
        if self._logs(step) or "val_loss" in metrics:
            values = {k: v if isinstance(v, int) else np.asarray(v).tolist() for k, v in metrics.items()}
            if self.config.data.sources:
                values |= self.dataset.proportions(self.batches, step)
            speed = clock.speed(step)
            if speed is not None:
                values["tokens_per_second"] = per_second = speed * self.tokens_per_step
                if self.mfu_per_speed is not None:
                    values["mfu"] = per_second * self.mfu_per_speed
            values |= peak_memory()
            values["skipped"] = float(self.skipped.since_line)
            event |= values
            event.call(self.callbacks)
            bar.show(step, *shown(event, float(np.mean(self.losses or [math.nan])), speed and 1 / speed))
            self.losses.clear()
            self.skipped.since_line = 0
            bar.say(*measured(step, self.config.num_steps, {k: event[k] for k in event if k not in values}))
            values = dict(event)
            for logger in loggers:
                logger.write(values)
        self.skipped.check(metrics)
        return event

    def _validate(self, state: TrainState, step: int) -> dict[str, float]:
        """Return the loss on the held-out text, and its bits per byte where all of it is measured."""
        nats, targets = 0.0, 0.0
        for batch in self.validation:
            self.beat("validation", step)
            part = self.programs.eval_step(state.params | state.buffers, self._on_devices(batch))
            nats, targets = nats + float(part[0]), targets + float(part[1])
        release_freed_memory()
        if not targets:  # chats of which no answer is held out
            return {}
        values = {"val_loss": nats / targets}
        # Only over all of the text are nats and bytes those of the same tokens.
        if self.config.logging.validation_batches is None and (num_bytes := self.dataset.scored_bytes()):
            values["val_bits_per_byte"] = nats / math.log(2) / num_bytes
        return values


def to_devices(batch: HostBatch, rows: Sequence[int], num_rows: int) -> dict[str, jax.Array]:
    """Return a batch of `num_rows`, of which this process has `rows`, as global arrays on the current mesh."""
    return {name: distributed.place_rows(value, rows, num_rows) for name, value in batch.items()}
