"""The training loop: data in, steps, metrics, validation, checkpoints, samples."""

import contextlib
import functools
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, CONFIG_FILE, CheckpointStore, SaveFailed, locate
from llama_jax.config import outside_classes
from llama_jax.data import Dataset, HostBatch, ValidationBatches
from llama_jax.files import write_text
from llama_jax.models import abstract_params, buffers
from llama_jax.parallel import distributed, make_mesh, mesh_axis_sizes, platform
from llama_jax.planning import mesh_of
from llama_jax.remote import with_urls
from llama_jax.run.continuing import check_directory
from llama_jax.run.directory import SAMPLES_FILE, Run, open_run, start_run
from llama_jax.run.preparing import check_shared, first_params, open_dataset, prepare
from llama_jax.run.reporting import Bar, Logger, configured_loggers
from llama_jax.run.stored import StoredRun, local_run
from llama_jax.run_config import RunConfig
from llama_jax.sampling import generate_text
from llama_jax.training import (
    PreflightFailed,
    TrainState,
    compiler_options,
    init_state,
    make_eval_step,
    make_train_step,
    peak_flops,
    preflight,
    train_flops_per_token,
)


class RunFailed(RuntimeError):
    """The run cannot go on; the command line exits with 1."""


class Preempted(Exception):
    """The run was asked to stop and saved a checkpoint; the command line exits with 75."""


def train(
    config: RunConfig,
    run_dir: str | Path,
    *,
    components: Sequence[type] = (),
    loggers: Sequence[type[Logger]] = (),
) -> Run:
    """Train `config` in `run_dir`, or continue what is in it, bit for bit as if it had never stopped.

    `run_dir` may be the URL of an object store (`s3://`, `gs://`): every checkpoint is uploaded when it is saved.
    `components` are classes from outside the package that the config has had; `loggers` are destinations of metrics
    beyond those of `config.logging`.

    Returns the finished run, unchanged where it is beyond `num_steps`. Raises UserError for a config that cannot run
    here or that is not this directory's, RunFailed when the loss is no longer finite, Preempted after a termination
    signal, with a checkpoint saved.
    """
    run_dir, asked = locate(run_dir)
    with local_run(run_dir) as (directory, stored):
        run = _train(Run(directory, config, (*components, *outside_classes(config))), stored, loggers, asked)
    run.url = None if stored is None else stored.url
    return run


def _train(run: Run, stored: StoredRun | None, loggers: Sequence[type[Logger]], asked: int | None = None) -> Run:
    """Train in the run's local directory; `asked` is the step to continue from, where one was given."""
    config = run.config
    devices = jax.devices()  # several processes find their devices together
    step, run.history, lines = distributed.broadcast_from_main(lambda: check_directory(run, asked))
    if step > config.num_steps:
        if distributed.is_main():
            print(with_urls(f"'{run.directory}' is at step {step}, past num_steps={config.num_steps}: nothing changed"))
        return open_run(run.directory, run.components)
    mesh = mesh_of(config, devices)
    # All that can be wrong is found out before anything is written; of several processes, the first does it for all.
    directories, vocabulary, sample_tokens = distributed.broadcast_from_main(lambda: prepare(run, mesh, len(devices)))
    with jax.set_mesh(make_mesh(mesh)):
        loop = distributed.all_agree(
            lambda: _Loop(run, open_dataset(run, directories, vocabulary), sample_tokens, lines, loggers)
        )
        distributed.broadcast_from_main(lambda: start_run(run, loop.dataset))
        distributed.all_agree(lambda: check_shared(run.directory / CONFIG_FILE, "--run-dir"))
        if stored is not None:
            stored.start()
        try:
            loop.run()
        except SaveFailed as error:
            if distributed.several():  # others may still wait for this one: the command line ends them
                raise
            raise RunFailed(f"{error}: make room there, then start again to continue") from error
    return run


class _Loop:
    """One process's part of a run.

    `sample_tokens` is the length of samples, `lines` what the log begins with, `loggers` those given to `train`.
    """

    def __init__(
        self,
        run: Run,
        dataset: Dataset,
        sample_tokens: int,
        lines: Sequence[str] = (),
        loggers: Sequence[type[Logger]] = (),
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
        self.train_step = make_train_step(
            config.model,
            config.compute,
            accumulation_steps=config.optimizer.accumulation_steps,
            compiler_options=compiler_options(config.model, platform()),
        )
        self.eval_step = make_eval_step(config.model, config.compute)
        self.hyper = config.optimizer.hyper(config.num_steps, config.seed)
        self.tokens_per_step = config.global_batch_size * config.row_length
        flops = train_flops_per_token(config.model, config.sequence_length, config.data.objective.source_length or 0)
        peak = peak_flops(jax.local_devices()[0], config.compute.jax_dtype)
        self.mfu_per_speed = None if peak is None else flops / (peak * jax.device_count())
        self.lines, self.loggers = list(lines), [*configured_loggers(config.logging), *loggers]
        every, validates = config.checkpoint.every_steps, config.logging.validate_every_steps
        self.measures_checkpoints = validates >= config.num_steps or math.lcm(every, validates) < config.num_steps
        self.stopped_by: int | None = None

    def run(self) -> None:
        """Train to the end, then write samples."""
        config, directory = self.config, self.run_.directory
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(
                contextlib.closing(CheckpointStore(directory / CHECKPOINTS_DIRECTORY, config.checkpoint))
            )
            state, lines = distributed.all_agree(lambda: self._state(store))
            start = int(state.step)
            loggers = [
                stack.enter_context(contextlib.closing(logger(self.run_, start)))
                for logger in (self.loggers if self.main else ())
            ]
            bar = stack.enter_context(Bar("training", start, config.num_steps, quiet=not self.main))
            stack.enter_context(self._signals())
            if start:
                bar.say(f"continuing '{directory}' from step {start}")
            lines += [
                *self.lines,
                *self._warnings(start, state),
                *(logger.notice for logger in loggers if logger.notice),
            ]
            for line in [*lines, *self.dataset.describe(self.batches, config.num_steps)]:
                bar.say(line)
            if axes := ", ".join(f"{axis} {size}" for axis, size in mesh_axis_sizes().items() if size > 1):
                bar.say(f"mesh: {axes}")
            if config.compute.preflight and start < config.num_steps:
                self._preflight(start, bar)
            self._steps(state, start, store, bar, loggers)
        if config.logging.sample_prompts:
            self._sample()

    def _state(self, store: CheckpointStore) -> tuple[TrainState, list[str]]:
        """Return the latest checkpoint's state, or a new one, and lines for the log that describe it."""
        make = jax.jit(functools.partial(init_state, buffer_names=frozenset(buffers(self.config.model))))
        # As process 0 sees it: others may see an older state of a shared file system.
        step = distributed.broadcast_from_main(lambda: max(store.steps(), default=None))
        if step is None:
            params, lines = first_params(self.config, self.run_.components)
            return make(params, self.hyper), lines
        abstract = jax.eval_shape(make, abstract_params(self.config.model), self.hyper)
        return store.load(step, abstract), []

    def _warnings(self, start: int, state: TrainState) -> list[str]:
        """Return a line for each part of the config that will have no effect, or another one than expected."""
        config, lines = self.config, []
        warmup, steps, profile = config.optimizer.warmup_steps, config.num_steps, config.profile
        if warmup > steps:
            lines.append(
                f"optimizer.warmup_steps={warmup} is longer than num_steps={steps}: the learning rate ends at "
                f"{steps / warmup:.1%} of its peak"
            )
        if not len(self.validation):
            lines.append(f"no validation: data.validation_fraction={config.data.validation_fraction} holds out no text")
        if profile.start_step is not None and not self._recorded(start):
            window = f"steps {profile.start_step} to {profile.start_step + profile.num_steps}"
            lines.append(
                f"profile records nothing: {window} are not among those from {start} to {steps} that this run does"
            )
        if config.checkpoint.keep_best and len(self.validation) and not self.measures_checkpoints:
            every, validates = config.checkpoint.every_steps, config.logging.validate_every_steps
            lines.append(
                f"checkpoint.keep_best keeps none but the last: checkpoints (every {every} steps) and validations "
                f"(every {validates}) do not meet before"
            )
        free, size = shutil.disk_usage(self.run_.directory).free, sum(x.nbytes for x in jax.tree.leaves(state))
        if size > free:
            lines.append(f"the disk has {free / 1e9:.3g} GB free, and a checkpoint may take {size / 1e9:.3g} GB")
        if self.mfu_per_speed is None:
            lines.append(f"no MFU: the peak of '{jax.local_devices()[0].device_kind}' is not known")
        return lines

    def _recorded(self, start: int) -> range:
        """Return the steps of this start that are in the profile's window."""
        profile, steps = self.config.profile, range(start, self.config.num_steps)
        if profile.start_step is None:
            return range(0)
        return range(max(profile.start_step, start), min(profile.start_step + profile.num_steps, steps.stop))

    def _preflight(self, start: int, bar: Bar) -> None:
        """Compare the attention kernel with the reference, before anything is trained with it."""
        try:
            agreements = preflight(self.config.model, self.config.compute, self._on_devices(self.batches.batch(start)))
        except PreflightFailed as error:
            raise RunFailed(str(error)) from error
        for agreement in agreements:
            error = max(agreement.errors.values())
            bar.say(f"attention kernel '{agreement.kernel}' agrees with the reference: relative error {error:.1e}")

    def _steps(
        self, state: TrainState, start: int, store: CheckpointStore, bar: Bar, loggers: Sequence[Logger]
    ) -> None:
        """Take the steps from `start` to the end; log, validate and save between them.

        Raises Preempted after a termination signal, with a checkpoint saved, and what `_log` raises.
        """
        config, log, num_steps = self.config, self.config.logging, self.config.num_steps
        batches = self.batches.iterate(start)
        pending: dict[str, Any] | None = None
        clock, recorded = _Clock(start), self._recorded(start)
        with contextlib.ExitStack() as recording:
            for step in range(start, num_steps):
                self._profile(step, recorded, state, recording)
                batch = self._on_devices(next(batches))
                # A CPU may compute the next step within its call, which would hide where the last one ended.
                if pending is not None and platform() == "cpu":
                    self._log(pending, clock, bar, loggers)
                    pending = None
                state, metrics = self.train_step(state, batch, self.hyper)
                done = step + 1
                # Elsewhere the host waits for the last one's numbers with the next step already on its way.
                if pending is not None:
                    self._log(pending, clock, bar, loggers)
                pending = {"step": done} | metrics
                bar.advance(done)
                stopping = self._stopping(done)
                validates = len(self.validation) > 0 and (done % log.validate_every_steps == 0 or done == num_steps)
                saves = done % config.checkpoint.every_steps == 0 or done == num_steps or stopping
                if validates or saves:
                    val: dict[str, float] = {}
                    jax.block_until_ready(metrics)
                    with clock.paused():
                        if validates:
                            val = self._validate(state)
                            bar.say(f"step {done}/{num_steps}  " + "  ".join(f"{k} {v:.4f}" for k, v in val.items()))
                        self._log(pending | val, clock, bar, loggers)
                        pending = None
                        # Where checkpoints are measured at all, what is measured between them may be the best.
                        best = self.measures_checkpoints and "val_loss" in val and store.is_best(val["val_loss"])
                        if saves or best:
                            store.save(state, val_loss=val.get("val_loss"))
                if stopping:
                    store.wait()
                    raise Preempted(f"stopped at step {done} with a checkpoint saved: start again to continue")

    def _on_devices(self, batch: HostBatch) -> dict[str, jax.Array]:
        return to_devices(batch, self.rows, self.config.global_batch_size)

    def _log(self, metrics: dict[str, Any], clock: "_Clock", bar: Bar, loggers: Sequence[Logger]) -> None:
        """Wait for the metrics of a step and report them where it is one to log. Raises RunFailed for a loss or a
        gradient that is not finite.
        """
        step, every = metrics["step"], self.config.logging.every_steps
        if step % every == 0 or step in (1, self.config.num_steps) or "val_loss" in metrics:
            values = {k: v if isinstance(v, int) else np.asarray(v).tolist() for k, v in metrics.items()}
            if self.config.data.sources:
                values |= self.dataset.proportions(self.batches, step)
            speed = clock.speed(step)
            if speed is not None:
                values["tokens_per_second"] = speed * self.tokens_per_step
                if self.mfu_per_speed is not None:
                    values["mfu"] = values["tokens_per_second"] * self.mfu_per_speed
            bar.show(values)
            for logger in loggers:
                logger.write(values)
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not math.isfinite(value := float(metrics[name])):
                raise RunFailed(
                    f"the {what} at step {step} is {value}: lower optimizer.learning_rate, raise "
                    f"optimizer.warmup_steps or add {self.batches.number(step - 1)} to data.skip_batches, and continue "
                    "from the checkpoint before it with --resume.allow and the key"
                )

    def _validate(self, state: TrainState) -> dict[str, float]:
        """Return the loss on the held-out text, and its bits per byte where all of it is measured."""
        nats, targets = 0.0, 0.0
        for batch in self.validation:
            part = self.eval_step(state.params | state.buffers, self._on_devices(batch))
            nats, targets = nats + float(part[0]), targets + float(part[1])
        if not targets:  # chats of which no answer is held out
            return {}
        values = {"val_loss": nats / targets}
        # Only over all of the text are nats and bytes those of the same tokens.
        if self.config.logging.validation_batches is None and (num_bytes := self.dataset.scored_bytes()):
            values["val_bits_per_byte"] = nats / math.log(2) / num_bytes
        return values

    def _sample(self) -> None:
        """Continue the prompts of the config, into samples.txt."""
        prompts = list(self.config.logging.sample_prompts)
        texts = generate_text(
            self.run_.load(), prompts, max_new_tokens=self.sample_tokens, temperature=0.8, seed=self.config.seed
        )
        between = "\n" if self.config.model.has_source else ""
        samples = "\n\n".join(prompt + between + text for prompt, text in zip(prompts, texts, strict=True))
        if self.main:
            write_text(self.run_.directory / SAMPLES_FILE, samples + "\n")

    def _profile(self, step: int, recorded: range, state: TrainState, recording: contextlib.ExitStack) -> None:
        """Start the profile before the first step of its window and end it after the last."""
        if not recorded or not self.main:
            return
        if step == recorded.start:
            recording.enter_context(jax.profiler.trace(str(self.run_.directory / "profile")))
        elif step == recorded.stop:
            jax.block_until_ready(state)
            recording.close()

    def _stopping(self, step: int) -> bool:
        """Return whether the run ends after `step`: all of several processes do at the same one, without waiting."""
        if distributed.several():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.stopped_by is not None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """End the run after the current step at the first termination signal, and at once at the second."""

        def stop(number: int, _: Any) -> None:
            if self.stopped_by is not None:
                raise KeyboardInterrupt
            self.stopped_by = number
            if distributed.several():
                signal.raise_signal(signal.SIGTERM)
            else:
                print("stopping after this step; once more to stop at once", file=sys.stderr)

        # Of several processes, JAX itself receives a SIGTERM, and brings it to the others.
        numbers = (signal.SIGINT,) if distributed.several() else (signal.SIGTERM, signal.SIGINT)
        try:
            before = {number: signal.signal(number, stop) for number in numbers}
        except ValueError:  # not the main thread (a notebook server): no signals to handle
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Clock:
    """Steps per second of training alone, without the first step (compilation) and pauses."""

    def __init__(self, start: int):
        self._step, self._seconds, self._first = start, 0.0, True
        self._since: float | None = time.perf_counter()  # None in a pause

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        self._count()
        self._since = None
        yield
        self._since = time.perf_counter()

    def speed(self, step: int) -> float | None:
        """Return the steps per second since the last call; None for the first."""
        self._count()
        seconds, steps, first = self._seconds, step - self._step, self._first
        self._step, self._seconds, self._first = step, 0.0, False
        return None if first or seconds <= 0 or steps <= 0 else steps / seconds

    def _count(self) -> None:
        """Add the time since the last count."""
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now


def to_devices(batch: HostBatch, rows: Sequence[int], num_rows: int) -> dict[str, jax.Array]:
    """Return a batch of `num_rows`, of which this process has `rows`, as global arrays on the current mesh."""
    return {name: distributed.place_rows(value, rows, num_rows) for name, value in batch.items()}
