"""Checkpoints of a run, saved by Orbax in the background, in one layout for every mesh.

A checkpoint is a flat dict: parameters by canonical name, the optimizer's arrays by path, and the step, which is the
place in the data and in every random stream too. It loads on any mesh and in any dtype. Of a run in an object store,
the names of its files show which checkpoints are whole, and which files have to be fetched.
"""

import contextlib
import dataclasses
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llama_jax.config import UserError
from llama_jax.parallel import distributed
from llama_jax.training import TrainState

# Orbax writes this file into every checkpoint. It is uploaded last and removed first, so it marks a whole one.
COMMIT_FILE = "_CHECKPOINT_METADATA"
_STEP_FILE = re.compile(r"checkpoints/(\d+)/(.+)")
_ARRAYS = "state/"  # the large files of a checkpoint
# Files for other libraries, and those that a run writes for viewers.
_UNUSED = re.compile(r".*\.(h5|msgpack|ot|onnx|onnx_data|tflite|gguf|mlmodel)$|(tensorboard|profile|wandb|samples)\b.*")
# Weights of a Hugging Face directory, and other forms of them that are not read where the first are there.
_PREFERRED = re.compile(r"model(-.*)?\.safetensors")
_SAME_WEIGHTS = re.compile(r"pytorch_model.*\.bin(\.index\.json)?|consolidated\..*")

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_FAILURES = (OSError, RuntimeError, ValueError)  # TensorStore raises ValueError for files, too
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # by Orbax for a damaged checkpoint


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Times of checkpoints, and how many are kept.

    every_steps: steps between checkpoints; None: none by steps. The last step is always saved.
    every_minutes: save, too, when so many minutes have passed since the last checkpoint; None: none by time. Of several
      processes process 0 decides, at steps that are logged.
    keep_last: how many of the latest stay.
    keep_best: how many of those with the lowest validation loss stay as well; where validations and checkpoints meet, a
      validation between them that finds one of the best is saved, too.
    keep_every_steps: steps between checkpoints that are saved and never removed; None: none of them.
    """

    every_steps: int | None = 1000
    every_minutes: float | None = None
    keep_last: int = 2
    keep_best: int = 1
    keep_every_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0), ("keep_every_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value} must be at least {least}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise UserError(f"every_minutes={self.every_minutes} must be above 0, or none")

    @property
    def intervals(self) -> list[int]:
        """Numbers of steps at whose multiples a checkpoint is saved."""
        return [every for every in (self.every_steps, self.keep_every_steps) if every is not None]


class SaveFailed(RuntimeError):
    """A checkpoint could not be written."""


class CheckpointStore:
    """The checkpoints under one directory, by step.

    With a config it is for writing, without one for reading only. Several processes have to make the same calls in the
    same order: Orbax synchronizes them.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None):
        self.directory = Path(directory).absolute()
        self._config = config
        if config is None:
            if not self.directory.is_dir():
                raise UserError(f"'{directory}' has no checkpoints: is it the directory of a run that saved one?")
        else:
            distributed.broadcast_from_main(self._make_directory)
        policies = ocp.training.preservation_policies
        keep = config and policies.AnyPreservationPolicy(
            [
                policies.LatestN(config.keep_last),
                policies.BestN(
                    get_metric_fn=lambda metrics: -metrics["val_loss"],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                ),
                *([policies.EveryNSteps(config.keep_every_steps)] if config.keep_every_steps else []),
            ]
        )
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            preservation_policy=keep or policies.PreserveAll(),  # type: ignore[arg-type]
        )
        metrics: dict[int, Any] = {c.step: c.metrics for c in self._orbax.checkpoints if c.metrics}
        self._measured: dict[int, float] = {step: values["val_loss"] for step, values in metrics.items()}
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None  # the step that is being written
        self._failed = False

    def _make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(f"*{_TEMPORARY}*"):  # of a process that was killed while saving
            shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """Return the steps that can be loaded, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def is_best(self, val_loss: float) -> bool:
        """Return whether a checkpoint with this validation loss would be one of the `keep_best` that stay."""
        assert self._config is not None
        # Process 0 decides: the others' view of a shared file system may be older.
        keep = self._config.keep_best
        better = sum(measured <= val_loss for measured in self._measured.values())
        return math.isfinite(val_loss) and distributed.broadcast_from_main(lambda: better < keep)

    def save(self, state: TrainState, *, val_loss: float | None = None) -> None:
        """Start saving `state` under its step; the arrays are copied before this returns, so they may be donated.

        A loss that is not finite is not kept. Raises SaveFailed where this save or the one before it fails.
        """
        step = int(state.step)
        metrics: Any = None
        if val_loss is not None and math.isfinite(val_loss):
            metrics = {"val_loss": val_loss}
            self._measured[step] = val_loss
        self._settle()
        context = ocp.Context()
        # Replicas of a small array would each write a slice of it, and compile it.
        context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
        with context, self._save_errors(step):
            # Forced, or Orbax skips a save while the one before it is still being written.
            response = self._orbax.save_checkpointables_async(
                step, {_STATE: to_disk(state)}, metrics=metrics, force=True
            )
        assert response is not None
        self._saving = step, response

    def _settle(self) -> None:
        """Wait for the save that is under way. Until `result` its response holds a thread and three descriptors."""
        if self._saving is not None:
            (step, response), self._saving = self._saving, None
            with self._save_errors(step):
                response.result()

    def wait(self) -> None:
        """Return when everything saved is on disk. Raises SaveFailed where it cannot be written."""
        self._settle()
        self._orbax.wait()

    def close(self) -> None:
        """Wait as `wait` does, and end the threads that save."""
        try:
            self._settle()
        finally:
            # Orbax would raise once more for a failure that was raised already.
            with contextlib.suppress(*_FAILURES) if self._failed else contextlib.nullcontext():
                self._orbax.close()

    @contextlib.contextmanager
    def _save_errors(self, step: int) -> Iterator[None]:
        """Raise SaveFailed for all that keeps a checkpoint from being written: a full disk, an absent store."""
        try:
            yield
        except _FAILURES as error:
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            raise SaveFailed(
                f"the checkpoint of step {step} cannot be written to '{self.directory}' ({reason})"
            ) from error

    def load(self, step: int, abstract: TrainState) -> TrainState:
        """Return the state of `step`, bit for bit, in the shardings of `abstract` on the current mesh."""
        return from_disk(self._load(step, to_disk(abstract), whole=True), abstract)

    def load_params(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return the parameters of `step` in the shardings and dtypes of `abstract`, without the optimizer's arrays."""
        loaded = self._load(step, {_param_key(name): value for name, value in abstract.items()}, whole=False)
        return {name: loaded[_param_key(name)] for name in abstract}

    def dtypes(self, step: int) -> dict[str, np.dtype]:
        """Return the stored dtypes of the parameters of `step`, by name."""
        return {name.removeprefix(_param_key("")): value.dtype for name, value in self._saved(step).items()}

    def _load(self, step: int, abstract: dict[str, Any], *, whole: bool) -> dict[str, jax.Array]:
        """Return the arrays of `abstract`, all that the checkpoint has (`whole`) or some of them.

        Raises UserError for a checkpoint that is missing, damaged or of another config.
        """
        if step not in self.steps():
            there = ", ".join(map(str, self.steps())) or "none"
            raise UserError(f"'{self.directory}' has no checkpoint of step {step}: there are {there}")
        self._compare(step, abstract, whole)
        placed = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_placed(a)) for name, a in abstract.items()}
        context = ocp.Context()
        context.pytree.loading.partial_load = not whole
        try:
            with context:
                return self._orbax.load_checkpointables(step, {_STATE: placed})[_STATE]
        except _UNREADABLE as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"checkpoint '{self.directory / str(step)}' is damaged ({reason}): remove it to use the one before"
        )

    def _saved(self, step: int) -> Any:
        """Return the metadata of a checkpoint's arrays, by name."""
        try:
            saved = self._orbax.checkpointables_metadata(step).metadata[_STATE]
        except _UNREADABLE as error:
            raise self._damaged(step, error) from error
        if saved is None:
            raise self._damaged(step, ValueError("its list of arrays cannot be read"))
        return saved

    def _compare(self, step: int, abstract: dict[str, Any], whole: bool) -> None:
        """Raise UserError for the first array that a checkpoint and a config do not have in the same shape."""
        shapes = {name: tuple(value.shape) for name, value in self._saved(step).items()}
        place = f"checkpoint '{self.directory / str(step)}'"
        for name, value in abstract.items():
            if name not in shapes:
                raise UserError(f"{place} lacks '{name}', which this config has")
            if shapes[name] != tuple(value.shape):
                wanted = tuple(value.shape)
                raise UserError(f"{place} has '{name}' of shape {shapes[name]}, and this config needs {wanted}")
        if whole and (surplus := shapes.keys() - abstract.keys()):
            raise UserError(f"{place} has '{min(surplus)}', which this config does not have")


def _placed(abstract: Any) -> Sharding:
    """Return the sharding of an abstract array on the current mesh, or this host's first device without a mesh.

    Orbax would otherwise take the sharding that the array was saved with, on devices that need not exist here.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return abstract.sharding or SingleDeviceSharding(jax.local_devices()[0])
    assert isinstance(mesh, Mesh)
    return NamedSharding(mesh, jax.typeof(abstract).sharding.spec)


def _param_key(name: str) -> str:
    return f"params.{name}"


def to_disk(state: TrainState) -> dict[str, Any]:
    """Return a train state as the flat dict that is saved, with buffers among the parameters."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state.opt_state)
    optimizer = {"optimizer." + jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in paths}
    return (
        {"step": state.step}
        | {_param_key(name): value for name, value in (state.params | state.buffers).items()}
        | optimizer
    )


def from_disk(flat: dict[str, Any], like: TrainState) -> TrainState:
    """Return the train state of a flat dict, in the structure of `like`: the inverse of `to_disk`."""
    opt_keys = [key for key in to_disk(like) if key.startswith("optimizer.")]
    return TrainState(
        step=flat["step"],
        params={name: flat[_param_key(name)] for name in like.params},
        opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), [flat[key] for key in opt_keys]),
        buffers={name: flat[_param_key(name)] for name in like.buffers},
    )


def step_of(name: str) -> int | None:
    """Return the step of the checkpoint that a file of a run directory belongs to, None for other files.

    `name` is relative to the directory.
    """
    match = _STEP_FILE.fullmatch(name)
    return int(match[1]) if match else None


def whole_steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the checkpoints whose upload was finished, ascending."""
    steps = (step_of(name) for name in names if name.endswith(f"/{COMMIT_FILE}"))
    return sorted(step for step in steps if step is not None)


def committed_steps(directory: Path) -> list[int]:
    """Return the steps with a checkpoint in the local directory of a run by their files' names, ascending.

    A process may do so alone; a `CheckpointStore` all processes open together.
    """
    files = directory.glob(f"checkpoints/*/{COMMIT_FILE}")
    return whole_steps(file.relative_to(directory).as_posix() for file in files)


def run_files(names: Iterable[str], step: int | None = None, *, arrays: bool = True) -> list[str]:
    """Return those files of a run or a saved model that are read, of its checkpoints `step` (None: the latest).

    Of other whole checkpoints they are all but the arrays; without `arrays`, of every checkpoint.
    """
    names = list(names)
    steps = whole_steps(names)
    wanted = max(steps, default=None) if step is None else step
    found = []
    for name in names:
        own = step_of(name)
        if own is None:
            if not name.startswith("checkpoints/"):  # a checkpoint that was never finished
                found.append(name)
        elif own in steps and ((own == wanted and arrays) or not name.split("/", 2)[2].startswith(_ARRAYS)):
            found.append(name)
    return found


def model_files(names: Iterable[str], step: int | None = None) -> list[str]:
    """Return those files of a directory, of any kind, that `load` reads; `step` as in `run_files`."""
    found = run_files(names, step)
    names = [name for name in found if not _UNUSED.fullmatch(name)]
    models = [name for name in found if name.endswith(".gguf") and "/" not in name]
    if len(models) == 1 and not any(_PREFERRED.fullmatch(n) or _SAME_WEIGHTS.fullmatch(n) for n in names):
        names += models
    if "config.json" in names and any(_PREFERRED.fullmatch(name) for name in names):
        names = [name for name in names if not _SAME_WEIGHTS.fullmatch(name)]
    # In released directories, folders hold other forms of the same weights.
    kept = ("checkpoints/", "tokenizer/", "additional_chat_templates/")
    return [name for name in names if "/" not in name or name.startswith(kept)]
