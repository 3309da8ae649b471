"""Checkpoints of a run: Orbax, asynchronous, one layout whatever the mesh.

Saved is a flat dict: parameters by canonical name, the optimizer's arrays by path and the step, which is the place in
the data and in every random stream too. Loading takes any mesh and dtype.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llama_jax.config import UserError
from llama_jax.parallel import distributed
from llama_jax.training import TrainState

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_FAILURES = (OSError, RuntimeError, ValueError)  # TensorStore says ValueError of files, too


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves and what it keeps.

    every_steps: steps between checkpoints; the last step is always saved.
    keep_last: how many of the latest stay.
    keep_best: how many of those with the lowest validation loss stay as well; where validations and checkpoints meet, a
      validation between them that finds one of the best is saved, too.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_best: int = 1

    def __post_init__(self) -> None:
        for name, least in (("every_steps", 1), ("keep_last", 1), ("keep_best", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")


class SaveFailed(RuntimeError):
    """A checkpoint could not be written."""


class CheckpointStore:
    """The checkpoints under one directory, by step. Of several processes all do the same with it at the same time."""

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None):
        """With a config for writing, without one for reading only."""
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
        """Steps that can be loaded, ascending."""
        return sorted(checkpoint.step for checkpoint in self._orbax.checkpoints)

    def is_best(self, val_loss: float) -> bool:
        """Return whether a checkpoint with this validation loss would be one of the `keep_best` that stay."""
        assert self._config is not None
        # Process 0 says: others' view of a shared file system may be older.
        keep = self._config.keep_best
        better = sum(measured <= val_loss for measured in self._measured.values())
        return math.isfinite(val_loss) and distributed.broadcast_from_main(lambda: better < keep)

    def save(self, state: TrainState, *, val_loss: float | None = None) -> None:
        """Start saving `state` under its step; the arrays are copied before this returns, so they may be donated.

        A loss that is not finite counts as not measured. Raises SaveFailed where this or the save before it fails.
        """
        step = int(state.step)
        metrics: Any = None
        if val_loss is not None and math.isfinite(val_loss):
            metrics = {"val_loss": val_loss}
            self._measured[step] = val_loss
        self._settle()
        with self._told(step):
            # Forced, or Orbax skips a save while the one before it is still being written.
            response = self._orbax.save_checkpointables_async(
                step, {_STATE: to_disk(state)}, metrics=metrics, force=True
            )
        assert response is not None
        self._saving = step, response

    def _settle(self) -> None:
        """Wait for the save that is under way. Its response holds a thread and three descriptors until it is asked."""
        if self._saving is not None:
            (step, response), self._saving = self._saving, None
            with self._told(step):
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
            # What has failed and was told, Orbax would say once more.
            with contextlib.suppress(*_FAILURES) if self._failed else contextlib.nullcontext():
                self._orbax.close()

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Whatever keeps a checkpoint from being written, a full disk or a store that is away, as SaveFailed."""
        try:
            yield
        except _FAILURES as error:
            self._failed = True
            reason = " ".join(str(error).split())[:200]
            raise SaveFailed(
                f"the checkpoint of step {step} cannot be written to '{self.directory}' ({reason})"
            ) from error

    def load(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, bit for bit, in the shardings of `abstract` on the current mesh."""
        return from_disk(self._load(step, to_disk(abstract), whole=True), abstract)

    def load_params(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """The parameters of `step` in the shardings and dtypes of `abstract`, without the optimizer's."""
        loaded = self._load(step, {_param_key(name): value for name, value in abstract.items()}, whole=False)
        return {name: loaded[_param_key(name)] for name in abstract}

    def dtypes(self, step: int) -> dict[str, Any]:
        """The dtypes that the parameters of `step` are stored in, by name."""
        return {name.removeprefix(_param_key("")): value.dtype for name, value in self._saved(step).items()}

    def _load(self, step: int, abstract: dict[str, Any], *, whole: bool) -> dict[str, jax.Array]:
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
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        return UserError(
            f"checkpoint '{self.directory / str(step)}' is damaged ({reason}): remove it to use the one before"
        )

    def _saved(self, step: int) -> Any:
        """What a checkpoint says of its arrays, by name."""
        try:
            saved = self._orbax.checkpointables_metadata(step).metadata[_STATE]
        except (ValueError, OSError, KeyError, TypeError) as error:
            raise self._damaged(step, error) from error
        if saved is None:
            raise self._damaged(step, ValueError("its list of arrays cannot be read"))
        return saved

    def _compare(self, step: int, abstract: dict[str, Any], whole: bool) -> None:
        saved = self._saved(step)
        shapes = {name: tuple(value.shape) for name, value in saved.items()}
        for name, value in abstract.items():
            if name not in shapes:
                raise UserError(f"checkpoint '{self.directory / str(step)}' lacks '{name}', which this config has")
            if shapes[name] != tuple(value.shape):
                raise UserError(
                    f"checkpoint '{self.directory / str(step)}' has '{name}' of shape {shapes[name]}, "
                    f"and this config wants {tuple(value.shape)}"
                )
        if whole and (surplus := shapes.keys() - abstract.keys()):
            raise UserError(
                f"checkpoint '{self.directory / str(step)}' has '{min(surplus)}', which this config does not have"
            )


def _placed(abstract: Any) -> Sharding:
    """The sharding of an abstract array on the current mesh, or this host's first device where there is none.

    Without a sharding Orbax would take the one that it was saved with, on devices that need not exist here.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return abstract.sharding or SingleDeviceSharding(jax.local_devices()[0])
    assert isinstance(mesh, Mesh)
    return NamedSharding(mesh, jax.typeof(abstract).sharding.spec)


def _param_key(name: str) -> str:
    return f"params.{name}"


def to_disk(state: TrainState) -> dict[str, Any]:
    """A train state as the flat dict that is saved, buffers among the parameters."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state.opt_state)
    optimizer = {"optimizer." + jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in paths}
    return (
        {"step": state.step}
        | {_param_key(name): value for name, value in (state.params | state.buffers).items()}
        | optimizer
    )


def from_disk(flat: Mapping[str, Any], like: TrainState) -> TrainState:
    """The inverse of `to_disk`, in the structure of `like`."""
    opt_keys = [key for key in to_disk(like) if key.startswith("optimizer.")]
    return TrainState(
        step=flat["step"],
        params={name: flat[_param_key(name)] for name in like.params},
        opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), [flat[key] for key in opt_keys]),
        buffers={name: flat[_param_key(name)] for name in like.buffers},
    )
