"""Checkpoints of a run, saved by Orbax in the background, in one layout for every mesh.

A checkpoint is a flat dict: parameters by canonical name, the optimizer's arrays by path, and the step, which is the
place in the data and in every random stream too. It loads on any mesh and in any dtype. When Orbax has written it, its
manifest is written, and only then older checkpoints are removed.
"""

import concurrent.futures
import dataclasses
import errno
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from llama_jax.checkpoint.flat_state import from_disk, param_key, to_disk
from llama_jax.checkpoint.manifest import write_manifest
from llama_jax.checkpoint.steps import COMMIT_FILE, damage, saved_steps
from llama_jax.config import UserError
from llama_jax.nn import check_above_zero, check_at_least
from llama_jax.parallel import distributed
from llama_jax.training import TrainState

_STATE = "state"
_TEMPORARY = ".orbax-checkpoint-tmp"
_LOSS = "val_loss"
_FAILURES = (OSError, RuntimeError, ValueError)  # TensorStore raises ValueError for files, too
_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # by Orbax for a damaged checkpoint
_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)  # these are not damage


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
        check_at_least(self, 1, "every_steps", "keep_last", "keep_every_steps")
        check_at_least(self, 0, "keep_best")
        check_above_zero(self, "every_minutes", hint=", or none")

    @property
    def intervals(self) -> list[int]:
        """Numbers of steps at whose multiples a checkpoint is saved."""
        return [every for every in (self.every_steps, self.keep_every_steps) if every is not None]


class SaveFailed(RuntimeError):
    """A checkpoint could not be written."""


class CheckpointStore:
    """The checkpoints under one directory, by step.

    With a config it is for writing, without one for reading only: what is read is compared with its manifest. Several
    processes have to make the same calls in the same order: Orbax synchronizes them.
    """

    def __init__(self, directory: str | Path, config: CheckpointConfig | None = None):
        self.directory = Path(directory).absolute()
        self._config = config
        if config is None:
            if not self.directory.is_dir():
                raise UserError(f"'{directory}' has no checkpoints: is it the directory of a run that saved one?")
        else:
            distributed.broadcast_from_main(self._make_directory)
        losses = {step: _stored_loss(self.directory / str(step)) for step in (self.steps() if config else ())}
        self._measured = {step: loss for step, loss in losses.items() if loss is not None}
        self._saving: tuple[int, concurrent.futures.Future[None]] | None = None  # the step that is being written
        self._failed: SaveFailed | None = None  # of a save that the next one repeats
        self._repeats = False  # the save under way
        self._checked: set[int] = set()

    def _make_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._clear()

    def _clear(self, *, ignore_errors: bool = False) -> None:
        """Remove what a save has left that was killed or has failed."""
        for leftover in self.directory.glob(f"*{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=ignore_errors)

    def steps(self) -> list[int]:
        """Return the steps that can be loaded, ascending."""
        return saved_steps(self.directory)

    def is_best(self, val_loss: float) -> bool:
        """Return whether a checkpoint with this validation loss would be one of the `keep_best` that stay."""
        assert self._config is not None
        keep = self._config.keep_best

        def decide() -> bool:
            there = {*self.steps(), self._saving and self._saving[0]}  # not those that could not be written
            return sum(loss <= val_loss for step, loss in self._measured.items() if step in there) < keep

        # Process 0 decides: the others' view of a shared file system may be older.
        return math.isfinite(val_loss) and distributed.broadcast_from_main(decide)

    def save(self, state: TrainState, *, val_loss: float | None = None) -> None:
        """Start saving `state` under its step; the arrays are copied before this returns, so they may be donated.

        A loss that is not finite is not kept. A save that fails is told on stderr, and the next one repeats it: see
        `check`. Raises SaveFailed where that fails too.
        """
        step = int(state.step)
        self._settle()
        self._repeats, self._failed = self._failed is not None, None
        if val_loss is not None and math.isfinite(val_loss):
            self._measured[step] = val_loss
        arrays = to_disk(state)
        context = ocp.Context()
        # Replicas of a small array would each write a slice of it, and compile it.
        context.array.saving.min_slice_bytes_for_replica_parallel = 1 << 20
        context.array.saving.use_compression = False  # a twelfth of the bytes of float32, for eight times the processor
        if missing := distributed.broadcast_from_main(lambda: self._missing_space(arrays)):
            return self._fail(step, missing)
        try:
            with context:
                response = ocp.save_checkpointables_async(
                    str(self.directory / str(step)),
                    {_STATE: arrays},
                    overwrite=self._repeats,  # written whole, perhaps, but for its manifest
                    custom_metadata={_LOSS: self._measured[step]} if step in self._measured else None,
                )
        except _FAILURES as error:
            if distributed.several():  # the others wait for this one in Orbax
                raise
            return self._fail(step, _reason(error), error)
        self._saving = step, _in_background(self._finish, step, response)
        return None

    def _missing_space(self, arrays: Mapping[str, Any]) -> str:
        """Return a text where a checkpoint does not fit, which is known before anything is written, else an empty one.

        Mounted stores that have no size are not asked.
        """
        needed = sum(value.nbytes for value in arrays.values())
        disk = shutil.disk_usage(self.directory) if self.directory.is_dir() else None
        if disk is None or not disk.total or disk.free >= needed:
            return ""
        return f"{os.strerror(errno.ENOSPC)}: it has {needed / 1e6:,.1f} MB, and {disk.free / 1e6:,.1f} MB are free"

    def _finish(self, step: int, response: Any) -> None:
        """Wait until a checkpoint is on disk, write its manifest, then remove those that are not kept."""
        response.result()
        if distributed.is_main():
            write_manifest(self.directory / str(step), step)
            for old in set(self.steps()) - self._kept():
                # Its name goes at once: a process that is killed here leaves no part of a checkpoint.
                shutil.rmtree((self.directory / str(old)).rename(self.directory / f"{old}{_TEMPORARY}"))

    def _kept(self) -> set[int]:
        """Return the steps that the config keeps."""
        config, steps = self._config, self.steps()
        assert config is not None
        best = sorted((loss, step) for step, loss in self._measured.items() if step in steps)[: config.keep_best]
        every = config.keep_every_steps
        regular = [step for step in steps if every and step % every == 0]
        return {*steps[-config.keep_last :], *(step for _, step in best), *regular}

    def check(self, *, wait: bool = False) -> bool:
        """Return whether a save has failed and has to be made again: of those that have ended, or of all (`wait`).

        Of several processes the failure of one is that of all. Raises SaveFailed where the repetition has failed.
        """
        self._settle(wait=wait)
        return self._failed is not None

    def _settle(self, *, wait: bool = True) -> None:
        """Look for the end of the save under way, or `wait` for it; if this is interrupted, it can be called again."""
        while self._saving is not None:
            step, saving = self._saving
            if wait:  # several processes look again and again: where one has failed, Orbax lets the others wait for it
                concurrent.futures.wait([saving], 1 if distributed.several() else None)
            error = saving.exception() if saving.done() else None
            if error is not None and not isinstance(error, _FAILURES):
                raise error
            place = f", on {distributed.own_name()}" if distributed.several() else ""
            ends = distributed.exchange([saving.done(), error and f"{_reason(error)}{place}"])
            reasons = [reason for _, reason in ends if reason is not None]
            if reasons or all(done for done, _ in ends):
                self._saving = None
            elif not wait:
                return
            if reasons:
                self._fail(step, reasons[0], error)

    def _fail(self, step: int, reason: str, error: BaseException | None = None) -> None:
        """Report a save that has failed: a full disk, an absent store. Raises SaveFailed where it is not repeated."""
        good = max({*self.steps()} - {step}, default=None)
        failed = SaveFailed(
            f"the checkpoint of step {step} cannot be written to '{self.directory}' ({reason}), "
            + ("and there is none before it" if good is None else f"the last good one is of step {good}")
        )
        failed.__cause__ = error
        if distributed.is_main():
            self._clear(ignore_errors=True)
        if self._repeats:
            raise failed
        if distributed.is_main():
            print(f"warning: {failed}: trying once more", file=sys.stderr)
        self._failed = failed

    def wait(self) -> None:
        """Return when everything saved is on disk. Raises SaveFailed where it cannot be written."""
        if self.check(wait=True):
            failed, self._failed = self._failed, None
            assert failed is not None
            raise failed

    def close(self) -> None:
        """Wait as `wait` does; one of several processes waits for its own part, since it may be the only one to end."""
        if not distributed.several():
            self.wait()
        elif self._saving is not None:
            concurrent.futures.wait([self._saving[1]])

    def load(self, step: int, abstract: TrainState) -> TrainState:
        """Return the state of `step`, bit for bit, in the shardings of `abstract` on the current mesh."""
        return from_disk(self._load(step, to_disk(abstract), whole=True), abstract)

    def load_params(self, step: int, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return the parameters of `step` in the shardings and dtypes of `abstract`, without the optimizer's arrays."""
        wanted = {"step": jax.ShapeDtypeStruct((), jnp.int32)} | {param_key(n): value for n, value in abstract.items()}
        loaded = self._load(step, wanted, whole=False)
        return {name: loaded[param_key(name)] for name in abstract}

    def dtypes(self, step: int) -> dict[str, np.dtype]:
        """Return the stored dtypes of the parameters of `step`, by name."""
        return {name.removeprefix(param_key("")): value.dtype for name, value in self._saved(step).items()}

    def _load(self, step: int, abstract: dict[str, Any], *, whole: bool) -> dict[str, jax.Array]:
        """Return the arrays of `abstract`, all that the checkpoint has (`whole`) or some of them.

        Raises UserError for a checkpoint that is missing, damaged or of another config.
        """
        self._compare(step, abstract, whole)
        placed = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_placed(a)) for name, a in abstract.items()}
        context = ocp.Context()
        context.pytree.loading.partial_load = not whole
        try:
            with context:
                loaded = ocp.load_checkpointables(str(self.directory / str(step)), {_STATE: placed})[_STATE]
        except _UNREADABLE as error:
            raise self._damaged(step, error) from error
        if int(loaded["step"]) != step:
            raise self._damaged(step, ValueError(f"it has the state of step {int(loaded['step'])}"))
        return loaded

    def _check(self, step: int) -> None:
        """Raise UserError for a step that is missing, and for one that is not what its manifest lists.

        A writer does not compare: `newest_good` did so before the run was continued.
        """
        if step not in self._checked:
            distributed.broadcast_from_main(lambda: self._compare_manifest(step))
            self._checked.add(step)

    def _compare_manifest(self, step: int) -> None:
        if step not in (steps := self.steps()):
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"'{self.directory}' has no checkpoint of step {step}: there are {there}")
        if self._config is None and (problem := damage(self.directory / str(step), step)) is not None:
            raise UserError(f"checkpoint {problem}: {self._others(step)}")

    def _others(self, step: int) -> str:
        """Return which steps to use in place of a damaged one."""
        good = [
            str(other) for other in self.steps() if other != step and not damage(self.directory / str(other), other)
        ]
        return f"good is step {', '.join(good)}, to be chosen with --step" if good else "no other one is good"

    def _damaged(self, step: int, error: Exception) -> UserError:
        reason = " ".join(str(error).split())[:200]
        place = self.directory / str(step)
        for number in _SYSTEM:  # TensorStore has its text in a ValueError
            if (isinstance(error, OSError) and error.errno == number) or os.strerror(number) in str(error):
                return UserError(f"checkpoint '{place}' cannot be read ({reason}): check its permissions and its disk")
        return UserError(f"checkpoint '{place}' is damaged ({reason}): {self._others(step)}")

    def _saved(self, step: int) -> Any:
        """Return the metadata of a checkpoint's arrays, by name."""
        self._check(step)
        try:
            saved = ocp.checkpointables_metadata(str(self.directory / str(step))).metadata[_STATE]
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


def _in_background(function: Callable[..., None], *args: Any) -> concurrent.futures.Future[None]:
    """Return the result of a call in a thread, which a process does not wait for when it ends."""
    future = concurrent.futures.Future[None]()

    def call() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name="checkpoint", daemon=True).start()
    return future


def _reason(error: BaseException) -> str:
    """Return the operating system's text for an error, or the beginning of its own."""
    return error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:200]


def _stored_loss(checkpoint: Path) -> float | None:
    """Return the validation loss that a checkpoint was saved with, None without one and where it cannot be read."""
    for name in (COMMIT_FILE, "metrics/metrics"):  # the second is an earlier version's
        try:
            found = json.loads((checkpoint / name).read_text(encoding="utf-8"))
            loss = (found.get("custom_metadata") or found)[_LOSS]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(loss, float) and math.isfinite(loss):
            return loss
    return None


def _placed(abstract: Any) -> Sharding:
    """Return the sharding of an abstract array on the current mesh, or this host's first device without a mesh.

    Orbax would otherwise take the sharding that the array was saved with, on devices that need not exist here.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return abstract.sharding or SingleDeviceSharding(jax.local_devices()[0])
    assert isinstance(mesh, Mesh)
    return NamedSharding(mesh, jax.typeof(abstract).sharding.spec)
