"""A run in an object store: a local copy to work in, of which every checkpoint is uploaded when it is complete.

A run is continued from the store, which always has a complete checkpoint once the first was uploaded, or from what this
machine has saved since, where no other has started the run meanwhile.
"""

import contextlib
import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llama_jax.checkpoint import (
    CHECKPOINTS_DIRECTORY,
    COMMIT_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    damage,
    run_files,
    step_of,
    whole_steps,
)
from llama_jax.config import UserError
from llama_jax.parallel import distributed
from llama_jax.remote import Mirror, Stamps, as_local
from llama_jax.run.directory import writing

_POLL_SECONDS = 1.0  # between two looks for a new checkpoint
_MAX_PAUSE_SECONDS = 60.0  # between two attempts while the store cannot be reached
_LAST_ATTEMPTS = 5  # at the end of a run, with pauses that double


class StoredRun:
    """The local directory of a run at a URL, and the thread that uploads what is new in it."""

    def __init__(self, url: str | Path):
        """Fetch the run's files and its latest checkpoint, of the older ones their metrics.

        Raises UserError for a URL that cannot be written, and one that has files of something else.
        """
        self._mirror = Mirror(url, kind="runs")
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._mirror.check_writable()
        names = self._mirror.stamps()
        if names and CONFIG_FILE not in names:
            raise UserError(f"'{self._mirror.url}' is not empty and not a run: give another --run-dir")
        self.directory = self._mirror.path
        self._before: list[int] = []  # steps at the start: those of an earlier version have no manifest
        if self._is_ahead(names):
            return
        self._mirror.fetch(run_files, prune=True)
        if names:  # a store has no empty directories
            (self.directory / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
        for step in reversed(whole_steps(self._mirror.local_files())):  # of damaged ones, the one before is fetched
            self._mirror.fetch(functools.partial(run_files, step=step))
            if damage(self.directory / CHECKPOINTS_DIRECTORY / str(step), step) is None:
                break

    def _is_ahead(self, there: Stamps) -> bool:
        """Return whether this machine has a good checkpoint newer than all of the store's, of the run as it is there.

        An earlier process has saved it, and was killed before it was uploaded.
        """
        if not self._mirror.is_uploaded([CONFIG_FILE], there):  # another machine has started it since
            return False
        newest, names = max(whole_steps(there), default=-1), self._mirror.local_files()
        steps = [step for step in whole_steps(names) if step > newest and _manifest(step) in names]
        return any(damage(self.directory / CHECKPOINTS_DIRECTORY / str(step), step) is None for step in steps)

    @property
    def url(self) -> str:
        """The run's URL."""
        return self._mirror.url

    def start(self) -> None:
        """Upload all files and begin to upload every checkpoint. Raises UserError where the store cannot be written."""
        steps = self._before = whole_steps(self._mirror.local_files())
        self.upload()
        self._thread = threading.Thread(target=self._watch, args=(steps,), name="upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload the rest of a run that was started. Raises UserError where the store cannot be written."""
        if self._thread is None:
            return
        self._closing.set()
        self._thread.join()
        for attempt in range(_LAST_ATTEMPTS):
            try:
                self.upload()
                return
            except UserError as error:
                if attempt == _LAST_ATTEMPTS - 1:
                    raise UserError(f"{error}; what is missing there is in {self.directory.parent}") from error
                time.sleep(_POLL_SECONDS * 2**attempt)

    def upload(self) -> bool:
        """Make the store's files those of the directory: checkpoints last, the older ones then removed.

        Return False where a checkpoint was removed before its upload began.
        """
        names = self._mirror.local_files()
        self._mirror.upload([name for name in names if not name.startswith(f"{CHECKPOINTS_DIRECTORY}/")])
        steps = whole_steps(names)
        for step in reversed(self._ready(names)):
            if not self._upload_step(step):
                return False
        there = self._mirror.stamps()
        for step in {step_of(name) for name in there} - {None, *steps}:
            self._delete_step([name for name in there if step_of(name) == step])
        return True

    def _ready(self, names: list[str]) -> list[int]:
        """Return the steps to upload: those of before, and those that have their manifest, which is written last."""
        return [step for step in whole_steps(names) if step in self._before or _manifest(step) in names]

    def _upload_step(self, step: int) -> bool:
        """Upload a checkpoint, the file that makes it complete last; return False where it is not there any more.

        It stays as it is now until then: where runs save more often than a store takes, none would ever be uploaded.
        """
        names, there = self._files_of(step), self._mirror.stamps()
        if self._mirror.is_uploaded(names, there):
            return True
        commit = f"{CHECKPOINTS_DIRECTORY}/{step}/{COMMIT_FILE}"
        # From an interrupted upload, or from another checkpoint of this step.
        self._delete_step([name for name in there if step_of(name) == step and (name == commit or name not in names)])
        with tempfile.TemporaryDirectory(prefix=".upload-", dir=self.directory) as held:
            try:
                for name in names:
                    Path(held, name).parent.mkdir(parents=True, exist_ok=True)
                    os.link(self.directory / name, Path(held, name))
            except FileNotFoundError:  # removed just now: a newer one is there
                return False
            self._mirror.upload([name for name in names if name != commit], source=Path(held))
            self._mirror.upload([commit], source=Path(held))
        return True

    def _delete_step(self, names: list[str]) -> None:
        """Delete a checkpoint's files from the store, first the one that makes it complete."""
        self._mirror.delete(sorted(names, key=lambda name: not name.endswith(f"/{COMMIT_FILE}")))

    def _files_of(self, step: int) -> list[str]:
        return [name for name in self._mirror.local_files() if step_of(name) == step]

    def _watch(self, uploaded: list[int]) -> None:
        """Upload whenever the set of local checkpoints changes, until the run closes."""
        pause = _POLL_SECONDS
        while not self._closing.wait(pause):
            steps = self._ready(self._mirror.local_files())
            if steps == uploaded:
                continue
            try:
                if self.upload():
                    uploaded = steps
                pause = _POLL_SECONDS
            except (UserError, OSError) as error:  # also of a file that went away meanwhile
                if pause == _POLL_SECONDS:
                    print(f"checkpoints wait to be uploaded: {error}", file=sys.stderr)
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)


def _manifest(step: int) -> str:
    """Return the name of a checkpoint's manifest."""
    return f"{CHECKPOINTS_DIRECTORY}/{step}/{MANIFEST_FILE}"


@contextlib.contextmanager
def local_run(run_dir: str | Path) -> Iterator[tuple[Path, StoredRun | None]]:
    """Yield the directory that a run works in, with its only writer here, and its uploader where `run_dir` is a URL.

    When the block ends, also by an error, the rest of a run that was started is uploaded. Raises UserError for a URL
    that cannot be read and written, and for a URL where there are several processes.
    """
    if (local := as_local(run_dir)) is not None:
        with writing(local):
            yield local, None
        return
    with contextlib.ExitStack() as stack:
        stored = distributed.all_agree(lambda: _stored(run_dir, stack))
        yield stored.directory, stored


def _stored(run_dir: str | Path, stack: contextlib.ExitStack) -> StoredRun:
    if distributed.several():
        raise UserError(
            f"--run-dir '{run_dir}' is for one process: of several, give a directory on a file system that all share, "
            "such as a mounted bucket"
        )
    stack.enter_context(writing(Mirror(run_dir, kind="runs").path))  # of this host: a store has no locks
    return stack.enter_context(contextlib.closing(StoredRun(run_dir)))
