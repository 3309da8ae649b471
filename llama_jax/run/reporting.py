"""A run's numbers: as text for the screen, and their other destinations, loggers, each a class.

A destination of one's own is a class that derives from `Logger`, given to `train(..., loggers=(MyLogger,))`.
"""

import datetime
import errno
import importlib.util
import json
import math
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, override

import jax

from llama_jax import __version__
from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY
from llama_jax.config import UserError, to_json
from llama_jax.data import Batches, Dataset
from llama_jax.files import naming, write_text
from llama_jax.models import num_parameters
from llama_jax.planning import device_memory
from llama_jax.remote import with_urls
from llama_jax.run.directory import SAMPLES_FILE, Run
from llama_jax.run.metrics import METRICS_FILE, STARTS_FILE, read_metrics
from llama_jax.run.profiling import recorded
from llama_jax.run_config import LoggingConfig, RunConfig
from llama_jax.screen import duration
from llama_jax.training import TrainState

Metrics = dict[str, Any]
WANDB_FILE = "wandb_id.txt"
ROUNDING = 0.01  # of a loss: in bfloat16, on another number of devices


class Logger:
    """Base of the destinations of a run's metrics.

    Process 0 constructs it as `Logger(run, start_step)` when the run starts or continues: steps after `start_step` that
    an earlier start has logged are going to come again.
    """

    module: ClassVar[str | None] = None
    """Module that it requires, of an extra of the package."""
    extra: ClassVar[str] = ""
    notice: str | None = None
    """Line for the run's log, where there is something to mention at its start."""

    def __init__(self, run: Run, start_step: int):
        self.run, self.start_step = run, start_step

    def write(self, metrics: Metrics) -> None:
        """Record the metrics of a step: `step` is an int, the others are floats, lists of floats or None."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish, also where the run has failed."""


class JsonLines(Logger):
    """metrics.jsonl; numbers that are not finite, for which JSON has no word, are null there.

    Lines of steps that come again are dropped, and so are lines that a crash has damaged. Each start of a run is a line
    of starts.jsonl.
    """

    def __init__(self, run: Run, start_step: int):
        super().__init__(run, start_step)
        file = run.directory / METRICS_FILE
        lines, damaged = run.read_metrics()
        if damaged:
            self.notice = f"{damaged} damaged lines of '{METRICS_FILE}' are dropped"
        write_text(file, "".join(_json(line) for line in lines if line["step"] <= start_step))
        self._replayed = next((line for line in lines if line["step"] > start_step), None)
        self._file = file.open("a", encoding="utf-8")
        if start_step < run.config.num_steps:
            starts, _ = read_metrics(run.directory / STARTS_FILE)
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            starts.append({"step": start_step, "date": date, **this_start()})
            write_text(run.directory / STARTS_FILE, "".join(map(_json, starts)))

    @override
    def write(self, metrics: Metrics) -> None:
        if self._replayed is not None and self._replayed["step"] <= metrics["step"]:
            before, self._replayed = self._replayed, None
            old, new = before.get("loss"), metrics["loss"]
            if before["step"] == metrics["step"] and isinstance(old, float) and abs(new - old) > ROUNDING * abs(old):
                print(
                    f"WARNING: the loss of step {metrics['step']} was {old:.6g} and is now {new:.6g}, more than "
                    "rounding: this start does not repeat what the run did",
                    file=sys.stderr,
                )
        with naming(self.run.directory / METRICS_FILE):
            self._file.write(_json(metrics))
            self._file.flush()
            if not os.fstat(self._file.fileno()).st_nlink:  # the directory was removed: all of it would be lost
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    @override
    def close(self) -> None:
        with naming(self.run.directory / METRICS_FILE):
            self._file.close()


class TensorBoard(Logger):
    """A file of events for every start of the run, in its `tensorboard/`; of an earlier one, steps after `start_step`
    are not shown.
    """

    module, extra = "tensorboardX", "tensorboard"

    def __init__(self, run: Run, start_step: int):
        from tensorboardX import SummaryWriter

        super().__init__(run, start_step)
        # Two starts within a second would else write one file.
        directory, suffix = str(run.directory / "tensorboard"), f".{start_step}"
        self._writer = SummaryWriter(directory, purge_step=start_step + 1, filename_suffix=suffix)

    @override
    def write(self, metrics: Metrics) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    @override
    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """One run of `logging.wandb_project`, however often this run is continued: its id is kept in the run directory.

    W&B itself ignores steps that come again.
    """

    module, extra = "wandb", "wandb"

    def __init__(self, run: Run, start_step: int):
        import wandb  # type: ignore[import-not-found]

        super().__init__(run, start_step)
        file = run.directory / WANDB_FILE
        known = file.read_text(encoding="utf-8", errors="replace").strip() if file.exists() else ""
        if not re.fullmatch(r"[\w-]{1,64}", known, re.ASCII):
            if file.exists():
                self.notice = f"'{WANDB_FILE}' was damaged: this start is another run on W&B"
            known = secrets.token_hex(4)
            write_text(file, known + "\n")
        self._run = wandb.init(
            project=run.config.logging.wandb_project,
            id=known,
            resume="allow",
            name=run.directory.name,
            dir=str(run.directory),
            config=to_json(run.config),
            allow_val_change=True,
        )

    @override
    def write(self, metrics: Metrics) -> None:
        self._run.log(_scalars(metrics), step=metrics["step"])

    @override
    def close(self) -> None:
        self._run.finish()


def configured_loggers(config: LoggingConfig) -> list[type[Logger]]:
    """Return the loggers that a config chooses. Raises UserError where the extra of one is not installed."""
    chosen: list[type[Logger]] = [JsonLines]
    for key, logger in (("tensorboard", TensorBoard), ("wandb_project", WeightsAndBiases)):
        if getattr(config, key):
            if logger.module is not None and importlib.util.find_spec(logger.module) is None:
                raise UserError(f"logging.{key} needs an extra: pip install 'llama_jax[{logger.extra}]'")
            chosen.append(logger)
    return chosen


def this_start() -> Metrics:
    """Return the devices and the versions of this process, as `STARTS_FILE` has them."""
    devices, versions = jax.devices(), {"llama_jax": __version__, "jax": jax.__version__}
    place = {"devices": len(devices), "device": devices[0].device_kind, "processes": jax.process_count()}
    return {**place, "versions": versions}


def receipt(run: Run, dataset: Dataset, batches: Batches, state: TrainState) -> list[str]:
    """Return a line that says what a continued run has at its first step; none for a new one."""
    step = int(state.step)
    if not step:
        return []
    sequences = sum(batches.num_sequences(step))
    epochs = [v for k, v in dataset.proportions(batches, step).items() if k.startswith("epochs/")]
    arrays = len(jax.tree.leaves(state.opt_state))
    return [
        f"restored: step {step}, {sequences * run.config.row_length:,} tokens seen, the data at batch "
        f"{batches.number(step)} (epoch {', '.join(f'{epoch:.3f}' for epoch in epochs)}), "
        f"{len(state.params)} parameters, {arrays} arrays of the optimizer {type(run.config.optimizer).__name__}"
    ]


def _json(metrics: Metrics) -> str:
    """Return the metrics as a line of JSON."""

    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: finite(value) for name, value in metrics.items()}, allow_nan=False) + "\n"


def _scalars(metrics: Metrics) -> Metrics:
    """Return all but the step, lists under `name/0`, `name/1`..."""
    found: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": part for i, part in enumerate(value)}
        elif name != "step" and value is not None:
            found[name] = value
    return found


def shown(metrics: Metrics, mean_loss: float, step_seconds: float | None) -> tuple[list[str], list[str]]:
    """Return the numbers of a step as text: those of a bar, the most important first, and more for a plain line.

    `mean_loss` is the mean since the last line, `step_seconds` the time of a step in it; None where not known.
    """
    numbers = [f"loss {mean_loss:.4f}"]
    if metrics.get("tokens_per_second"):
        numbers.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if metrics.get("mfu"):
        numbers.append(f"MFU {100 * metrics['mfu']:.1f}%")
    if step_seconds is not None:
        numbers.append(f"{1000 * step_seconds:,.{0 if step_seconds > 0.0995 else 1}f} ms/step")
    return numbers, [f"lr {metrics['learning_rate']:.2e}", f"grad norm {metrics['grad_norm']:.2f}"]


def peak_memory() -> dict[str, int]:
    """Return the most bytes that this process's first device has given out since it started, as a metric.

    The figure is the allocator's; the dict is empty for devices without one, as CPUs are.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"peak_memory_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def measured(step: int, num_steps: int, values: Metrics) -> list[str]:
    """Return a line with the numbers that were measured at a step, or none where there are none."""
    shown = [f"{name} {value:.4f}" for name, value in values.items() if isinstance(value, float)]
    return ["  ".join([f"step {step}/{num_steps}", *shown])] if shown else []


def aligned(rows: Mapping[str, str]) -> list[str]:
    """Return a line for each name and value, the values below one another."""
    width = max(map(len, rows), default=0)
    return [f"{name:<{width}}  {value}" for name, value in rows.items()]


def overview(run: Run, config: RunConfig, step: int) -> list[str]:
    """Return the lines that a run begins with at `step`, `config` with the mesh that it has here."""
    devices = jax.devices()
    tokens = config.global_batch_size * config.row_length
    memory = device_memory(config, devices)
    pieces = [piece for stack in config.model.stacks().values() for _, piece in stack if piece is not None]
    idle = sum(piece.idle_parameters(config.model.hidden_size) for piece in pieces)
    total, trained = num_parameters(config.model), num_parameters(config.model, trained=True)
    mesh = ", ".join(f"{axis} {size}" for axis, size in config.mesh.sizes(len(devices)).items() if size > 1)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    rows = {
        "run": str(run.directory),
        "model": f"{total:,} parameters"
        + (f", {total - idle:,} of them active for a token" if idle else "")
        + (f", {trained:,} of them trained" if trained < total else ""),
        "devices": f"{len(devices)} x {devices[0].device_kind}"
        + (f" of {n} processes" if (n := jax.process_count()) > 1 else "")
        + (f", mesh {mesh}" if mesh else ""),
        "memory": f"{_size(memory)}{f' of {_size(limit)}' if limit else ''} a device, estimated" if memory else "",
        "batch": f"{config.global_batch_size:,} x {config.row_length:,} = {tokens:,} tokens a step",
        "steps": f"{config.num_steps:,}, {config.num_steps * tokens:,} tokens in all",
    }
    begins = [f"continuing '{run.directory}' from step {step}"] if step else []
    return begins + aligned({name: value for name, value in rows.items() if value})


def effects(run: Run, start: int, state: Any, num_validation: int, mfu_per_speed: float | None) -> list[str]:
    """Return a line for each part of the config that will have no effect from `start`, or another one than expected."""
    config, lines = run.config, list[str]()
    warmup, steps, profile = config.optimizer.warmup_steps, config.num_steps, config.profile
    if warmup > steps:
        lines.append(
            f"optimizer.warmup_steps={warmup} is longer than num_steps={steps}: the learning rate ends at "
            f"{steps / warmup:.1%} of its peak"
        )
    if not num_validation:
        lines.append(f"no validation: data.validation_fraction={config.data.validation_fraction} holds out no text")
    if profile.start_step is not None and not recorded(config, start):
        window = f"steps {profile.start_step} to {profile.start_step + profile.num_steps}"
        lines.append(
            f"profile records nothing: {window} are not among those from {start} to {steps} that this run does"
        )
    if config.checkpoint.keep_best and num_validation and not config.measures_checkpoints:
        validates, intervals = config.logging.validate_every_steps, config.checkpoint.intervals
        saves = f"every {' or '.join(map(str, intervals))} steps" if intervals else "by time"
        lines.append(
            f"checkpoint.keep_best keeps none but the last: checkpoints ({saves}) and validations "
            f"(every {validates}) do not meet before"
        )
    free, size = shutil.disk_usage(run.directory).free, sum(x.nbytes for x in jax.tree.leaves(state))
    if size > free:
        lines.append(f"the disk has {free / 1e9:.3g} GB free, and a checkpoint may take {size / 1e9:.3g} GB")
    if mfu_per_speed is None:
        lines.append(f"no MFU: the peak of '{jax.local_devices()[0].device_kind}' is not known")
    return lines


def _size(num_bytes: float) -> str:
    """Return bytes as text, in GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def outcome(run: Run, seconds: float) -> list[str]:
    """Return the lines that a run ends with: the time, the best and the last checkpoint, how to sample and to go on."""
    lines = run.metrics()
    losses = [(line["val_loss"], line["step"]) for line in lines if line.get("val_loss") is not None]
    config, steps = run.config, run.committed_steps()
    rows = {"done": f"in {duration(seconds)}"}
    if losses:
        loss, step = min(losses)
        rows["best"] = f"val_loss {loss:.4f} at step {step}" + ("" if step in steps else ", not kept as a checkpoint")
    if steps:
        rows["checkpoint"] = str(run.directory / CHECKPOINTS_DIRECTORY / str(steps[-1]))
    if config.logging.sample_prompts:
        rows["samples"] = str(run.directory / SAMPLES_FILE)
    longer = 2 * config.num_steps if steps and steps[-1] >= config.num_steps else None
    prompt = next((p for p in config.logging.sample_prompts if p.strip()), "...")
    found = dict(zip(("sample", "continue"), commands(str(run.directory), prompt, longer), strict=True))
    return aligned(
        rows | {name: command for name, command in found.items() if name != "sample" or config.model.generates}
    )


def commands(place: str, prompt: str, num_steps: int | None) -> tuple[str, str]:
    """Return how to sample from a run in `place` and how to go on, as one would here: in a notebook or a shell."""
    if "ipykernel" in sys.modules:
        changes = "" if num_steps is None else f", {{'num_steps': {num_steps}}}"
        return f"llama_jax.generate_text(run.load(), [{prompt!r}])", f"llama_jax.resume({place!r}{changes})"
    script, place = Path(sys.argv[0]), shlex.quote(with_urls(place))
    sample, train = "-m llama_jax sample", "-m llama_jax train"
    if script.name == "train.py" and script.with_name("sample.py").is_file():
        sample, train = str(script.with_name("sample.py")), str(script)
    changes = "" if num_steps is None else f" --num-steps {num_steps}"
    return f"python {sample} {place} --prompt {shlex.quote(prompt)}", f"python {train} {place}{changes}"
