"""Destinations of a run's numbers: the terminal, and loggers, each a class.

A destination of one's own is a class that derives from `Logger`, given to `train(..., loggers=(MyLogger,))`.
"""

import importlib.util
import json
import math
import secrets
import time
from types import TracebackType
from typing import Any, ClassVar, override

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llama_jax.config import UserError, to_json
from llama_jax.files import naming, write_text
from llama_jax.remote import with_urls
from llama_jax.run.directory import METRICS_FILE, Run
from llama_jax.run_config import LoggingConfig

Metrics = dict[str, Any]
WANDB_FILE = "wandb_id.txt"
NOTEBOOK_SECONDS = 0.2  # between two drawings of a bar in a notebook


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

    Lines of steps that come again are dropped, and so are lines that a crash has damaged.
    """

    def __init__(self, run: Run, start_step: int):
        super().__init__(run, start_step)
        file = run.directory / METRICS_FILE
        lines, damaged = run.read_metrics()
        if damaged:
            self.notice = f"{damaged} damaged lines of '{METRICS_FILE}' are dropped"
        write_text(file, "".join(_json(line) for line in lines if line["step"] <= start_step))
        self._file = file.open("a", encoding="utf-8")

    @override
    def write(self, metrics: Metrics) -> None:
        with naming(self.run.directory / METRICS_FILE):
            self._file.write(_json(metrics))
            self._file.flush()

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
        if not file.exists():
            write_text(file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=run.config.logging.wandb_project,
            id=file.read_text(encoding="utf-8").strip(),
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


class Bar:
    """A progress bar on a terminal or in a notebook, plain lines elsewhere, nothing where `quiet` (other processes).

    `start` and `total` count steps; the time that is left is estimated from the steps of this process.
    """

    def __init__(
        self, description: str, start: int, total: int, *, quiet: bool = False, console: Console | None = None
    ):
        self._console = console or Console(quiet=quiet)
        self._total = total
        self._first: tuple[int, float] | None = None  # step and time of the first metrics, compilation behind them
        self._notebook = self._console.is_jupyter and not quiet
        self._plain = quiet or not (self._console.is_terminal or self._notebook)
        self._cell: Any = None  # IPython's handle on the bar
        self._drawn = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=self._plain,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task(description, total=total, completed=start, numbers="")

    def __enter__(self) -> "Bar":
        if self._notebook:  # rich's own live display needs ipywidgets there
            from IPython.display import display  # type: ignore[import-not-found]

            self._cell = display(self._progress, display_id=True)
        else:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._notebook:
            self._cell.update(self._progress)
        else:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """Move the bar to a step."""
        self._progress.update(self._task, completed=step)
        if self._cell is not None and time.monotonic() - self._drawn > NOTEBOOK_SECONDS:
            self._drawn = time.monotonic()
            self._cell.update(self._progress)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(with_urls(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, metrics: Metrics) -> None:
        """Show the metrics of a step."""
        parts = [f"loss {metrics['loss']:.4f}"]
        if metrics.get("tokens_per_second"):
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if metrics.get("mfu"):
            parts.append(f"MFU {100 * metrics['mfu']:.1f}%")
        if self._plain:
            step = metrics["step"]
            parts += [f"lr {metrics['learning_rate']:.2e}", f"grad norm {metrics['grad_norm']:.2f}"]
            first_step, began = self._first = self._first or (step, time.monotonic())
            if step > first_step:
                left = (time.monotonic() - began) / (step - first_step) * (self._total - step)
                parts.append(f"{left // 60:.0f}m{left % 60:02.0f}s left")
            self.say(f"step {step}/{self._total}  " + "  ".join(parts))
        else:
            self._progress.update(self._task, numbers="  ".join(parts))
