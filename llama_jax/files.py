"""Local files that several processes use: written whole or not at all, and locks."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

PARTIAL = ".partial"  # in the names of files that are not whole yet


@contextlib.contextmanager
def replacing(path: Path, *, near: Path | None = None) -> Iterator[Path]:
    """Yield a path for a file or a directory that becomes `path` when the block ends, and is removed where it raises.

    No reader sees a part of it. It has a hidden name in the directory of `near`, by default of `path`; both have to be
    in one file system. A directory may replace an empty one only.
    """
    partial = (near or path).with_name(f".{path.name}{PARTIAL}-{uuid.uuid4().hex}")
    try:
        yield partial
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, also where the machine goes down."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their paths below `directory`, which exists; folders of one level are made."""
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path` within the block: one holder at a time, or all those that share it.

    `timeout`: seconds to wait for an exclusive lock before `TimeoutError` is raised; -1 waits for ever. The file stays
    when the lock is released.
    """
    if not shared:
        with filelock.FileLock(path, timeout=timeout):
            yield
        return
    with path.open("a") as held:
        # filelock has no shared lock of this kind; on Unix its exclusive ones are flock's, which these keep out.
        fcntl.flock(held, fcntl.LOCK_SH)
        yield
