"""A run in an object store: a local copy to work in, of which every checkpoint is uploaded when it is complete.

A run is continued from the store, which always has a complete checkpoint once the first was uploaded.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from llama_jax.checkpoint import CHECKPOINTS_DIRECTORY, COMMIT_FILE, CONFIG_FILE, run_files, step_of, whole_steps
from llama_jax.config import UserError
from llama_jax.parallel import distributed
from llama_jax.remote import Mirror, as_local
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
        self._mirror.check_writable()
        names = self._mirror.stamps()
        if names and CONFIG_FILE not in names:
            raise UserError(f"'{self._mirror.url}' is not empty and not a run: give another --run-dir")
        self._mirror.fetch(run_files, prune=True)
        self.directory = self._mirror.path
        if names:  # a store has no empty directories
            (self.directory / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The run's URL."""
        return self._mirror.url

    def start(self) -> None:
        """Upload all files and begin to upload every checkpoint. Raises UserError where the store cannot be written."""
        steps = whole_steps(self._mirror.local_files())
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

        Return False where a checkpoint was removed meanwhile: it is not uploaded.
        """
        names = self._mirror.local_files()
        self._mirror.upload([name for name in names if not name.startswith(f"{CHECKPOINTS_DIRECTORY}/")])
        steps = whole_steps(names)
        for step in reversed(steps):
            if not self._upload_step(step):
                return False
        there = self._mirror.stamps()
        for step in {step_of(name) for name in there} - {None, *steps}:
            self._delete_step([name for name in there if step_of(name) == step])
        return True

    def _upload_step(self, step: int) -> bool:
        """Upload a checkpoint, the file that makes it complete last; return False where it was removed meanwhile."""
        names, there = self._files_of(step), self._mirror.stamps()
        if self._mirror.is_uploaded(names, there):
            return True
        commit = f"{CHECKPOINTS_DIRECTORY}/{step}/{COMMIT_FILE}"
        # From an interrupted upload, or from another checkpoint of this step.
        self._delete_step([name for name in there if step_of(name) == step and (name == commit or name not in names)])
        try:
            self._mirror.upload([name for name in names if name != commit])
        except (UserError, OSError):
            if self._files_of(step) == names:
                raise
        if self._files_of(step) != names:  # removed here while it was uploaded: a newer one is there
            return False
        self._mirror.upload([commit])
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
            steps = whole_steps(self._mirror.local_files())
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
