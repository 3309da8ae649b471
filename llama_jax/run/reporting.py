"""Where a run's numbers go: the terminal, metrics.jsonl, TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from llama_jax.config import UserError, to_json
from llama_jax.files import write_text
from llama_jax.remote import with_urls
from llama_jax.run.directory import METRICS_FILE, Run
from llama_jax.run_config import LoggingConfig

Metrics = dict[str, Any]
WANDB_FILE = "wandb_id.txt"
NOTEBOOK_SECONDS = 0.2  # between two drawings of a bar in a notebook


class Writer(Protocol):
    def write(self, metrics: Metrics) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl. Lines of steps that are going to be repeated after a restart are dropped.

    `damaged` counts lines that could not be read. What is no finite number, JSON has no word for: null.
    """

    def __init__(self, run: Run, start_step: int):
        file = run.directory / METRICS_FILE
        lines, self.damaged = run.read_metrics()
        write_text(file, "".join(_json(line) for line in lines if line["step"] <= start_step))
        self._file = file.open("a", encoding="utf-8")

    def write(self, metrics: Metrics) -> None:
        self._file.write(_json(metrics))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _json(metrics: Metrics) -> str:
    def finite(value: Any) -> Any:
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: finite(value) for name, value in metrics.items()}, allow_nan=False) + "\n"


def _scalars(metrics: Metrics) -> Metrics:
    """All but the step, what has several numbers under `name/0`, `name/1`..."""
    found: Metrics = {}
    for name, value in metrics.items():
        if isinstance(value, list):
            found |= {f"{name}/{i}": part for i, part in enumerate(value)}
        elif name != "step" and value is not None:
            found[name] = value
    return found


class TensorBoard:
    """A file of events for every start of the run; what an earlier one has of steps after `start_step` is not shown."""

    def __init__(self, directory: Path, start_step: int):
        from tensorboardX import SummaryWriter

        # Files are told apart by second and suffix.
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1, filename_suffix=f".{start_step}")

    def write(self, metrics: Metrics) -> None:
        for name, value in _scalars(metrics).items():
            self._writer.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run there, however often it is continued here: its id is kept in the run directory. Steps that are repeated
    after a restart, W&B has already."""

    def __init__(self, project: str, run: Run):
        import wandb  # type: ignore[import-not-found]

        file = run.directory / WANDB_FILE
        if not file.exists():
            write_text(file, secrets.token_hex(4) + "\n")
        self._run = wandb.init(
            project=project,
            id=file.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=run.directory.name,
            dir=str(run.directory),
            config=to_json(run.config),
            allow_val_change=True,
        )

    def write(self, metrics: Metrics) -> None:
        self._run.log(_scalars(metrics), step=metrics["step"])

    def close(self) -> None:
        self._run.finish()


def check_writers(config: LoggingConfig) -> None:
    """Raises UserError where a writer that is asked for is not installed."""
    for key, wanted, module, extra in (
        ("tensorboard", config.tensorboard, "tensorboardX", "tensorboard"),
        ("wandb_project", config.wandb_project is not None, "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"logging.{key} needs an extra: pip install 'llama_jax[{extra}]'")


class Bar:
    """A progress bar on a terminal or in a notebook, plain lines elsewhere; a quiet one (other processes) says nothing.

    `total` counts steps; the bar's own clock estimates the rest from the steps of this process.
    """

    def __init__(
        self, description: str, start: int, total: int, *, quiet: bool = False, console: Console | None = None
    ):
        self._console = console or Console(quiet=quiet)
        self._total = total
        self._first: tuple[int, float] | None = None  # step and time of the first metrics, compilation behind them
        self._notebook = self._console.is_jupyter and not quiet
        self._plain = quiet or not (self._console.is_terminal or self._notebook)
        self._cell: Any = None  # the notebook's handle on the bar
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
        self._progress.update(self._task, completed=step)
        if self._cell is not None and time.monotonic() - self._drawn > NOTEBOOK_SECONDS:
            self._drawn = time.monotonic()
            self._cell.update(self._progress)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        self._progress.console.print(with_urls(text), markup=False, highlight=False, soft_wrap=True)

    def show(self, metrics: Metrics) -> None:
        """The metrics of a step."""
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
