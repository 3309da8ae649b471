"""Local files that several processes use: written whole or not at all, and locks."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import filelock

PARTIAL = ".partial"  # in the names of files that are not whole yet


# What can be wrong with a disk or its permissions, and what to do.
_DISK = {
    errno.ENOSPC: "make room there and run the same command again",
    errno.EDQUOT: "make room there and run the same command again",
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "change its permissions or give another place",
    errno.EPERM: "change its permissions or give another place",
}


def disk_failure(error: BaseException) -> tuple[str, bool] | None:
    """Return (sentence, whether the disk is full) for a full disk, a read-only one and missing permissions.

    They are known by the number of the operating system's error, and in other libraries' errors by its text. None for
    all other errors.
    """
    for number, way in _DISK.items():
        if isinstance(error, OSError) and error.errno is not None:
            found, place = error.errno == number, f"'{error.filename or 'the output'}'"
        else:
            found = re.search(rf"{re.escape(os.strerror(number))}|\bos error {number}\b", str(error)) is not None
            place = "the output"
        if found:
            full = number in (errno.ENOSPC, errno.EDQUOT)
            done = "cannot be written" if full or number == errno.EROFS else "cannot be used"
            return f"{place} {done} ({os.strerror(number)}): {way}", full
    return None


@contextlib.contextmanager
def naming(path: Path, partial: Path | None = None) -> Iterator[None]:
    """Put `path` into the system's errors that name no file, as those of writing do, or one of `partial`."""
    try:
        yield
    except OSError as error:
        known = error.filename is not None and (partial is None or str(partial) not in str(error.filename))
        if error.errno is not None and not known:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, *, near: Path | None = None) -> Iterator[Path]:
    """Yield a path for a file or a directory that becomes `path` when the block ends, and is removed where it raises.

    No reader sees a part of it. It has a hidden name in the directory of `near`, by default of `path`; both have to be
    in one file system. A directory may replace an empty one only.
    """
    partial = (near or path).with_name(f".{path.name}{PARTIAL}-{uuid.uuid4().hex}")
    try:
        with naming(path, partial):
            yield partial
            partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial.exists():  # a disk that cannot be written refuses to remove what is not there, too
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
        with replacing(directory / name) as partial:
            partial.write_bytes(content)


@contextlib.contextmanager
def lock(path: Path, *, shared: bool = False, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file `path` within the block: one holder at a time, or all those that share it.

    `timeout`: seconds to wait for an exclusive lock before `TimeoutError` is raised; -1 waits for ever. The file stays
    when the lock is released.
    """
    if not shared:
        with filelock.FileLock(path, timeout=timeout, thread_local=False):  # any thread may release it
            yield
        return
    with path.open("a") as held:
        # filelock has no shared lock of this kind; on Unix its exclusive ones are flock's, which these keep out.
        fcntl.flock(held, fcntl.LOCK_SH)
        yield
