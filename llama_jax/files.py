"""Local files that several processes use: written whole or not at all, and locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import xxhash

PARTIAL = ".partial"  # in the names of files that are not whole yet
# By the last key of a sealed text, which has the checksum of the rest: its kind, the indent and the end of the text.
_SEALS: dict[str, tuple[Callable[[bytes], str], int | None, str]] = {
    "sha256": (lambda content: hashlib.sha256(content).hexdigest(), None, ""),
    "manifest": (xxhash.xxh3_128_hexdigest, 1, "\n"),
}


# What can be wrong with a disk, its permissions or this process's files: (what it means, what to do).
_ROOM = ("cannot be written", "make room there and run the same command again")
_RIGHTS = ("cannot be used", "change its permissions or give another place")
_DISK = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EIO: ("cannot be read or written", "check the disk, then run the same command again"),
    errno.ESTALE: ("is gone", "mount it again, then run the same command again"),
    errno.EMFILE: ("cannot be opened", "raise the limit (ulimit -n) and run the same command again"),
    errno.ENFILE: ("cannot be opened", "end other programs and run the same command again"),
    errno.EROFS: ("cannot be written", "give a place that can be written"),
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.ENOENT: ("is not there", "bring it back, or give another place"),
}
_MISTAKES = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT)


def disk_failure(error: BaseException) -> tuple[str, bool] | None:
    """Return (sentence, whether the command can be run again as it is) for what the operating system refuses.

    That are a full or damaged disk, a read-only one, missing permissions and files, and too many open ones. They are
    known by the number of the system's error, and in other libraries' errors by its text, also where they are the cause
    of `error`. None for all other errors.
    """
    for depth, found in enumerate(causes(error)):
        for number, (done, way) in _DISK.items():
            if isinstance(found, OSError) and found.errno is not None:
                known, place = found.errno == number, f"'{found.filename or 'the output'}'"
            else:
                text = rf"{re.escape(os.strerror(number))}|\bos error {number}\b"
                known, place = re.search(text, str(found)) is not None, "the output"
            # A missing file is looked for on purpose: what follows from that is a mistake of ours.
            if known and (number != errno.ENOENT or (depth == 0 and isinstance(found, OSError))):
                return f"{place} {done} ({os.strerror(number)}): {way}", number not in _MISTAKES
    return None


def causes(error: BaseException) -> list[BaseException]:
    """Return an error and what it follows from, the nearest first."""
    found, cause = list[BaseException](), error
    while cause is not None and cause not in found:
        found.append(cause)
        cause = cause.__cause__ or cause.__context__
    return found


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
        with contextlib.suppress(OSError):  # it is gone, or what the block raised is what is wrong
            shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, also where the machine goes down."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def sealed(content: dict[str, Any], key: str = "sha256") -> str:
    """Return an object as JSON that ends with its own checksum, of the kind that `key` names."""
    checksum, indent, end = _SEALS[key]
    return json.dumps(content | {key: checksum(json.dumps(content).encode())}, indent=indent) + end


def unsealed(text: str) -> dict[str, Any]:
    """Return the object of a sealed text, with its checksum, which an earlier version's lacks.

    Raises ValueError where a byte of it is another.
    """
    if not isinstance(found := json.loads(text), dict):
        raise ValueError("no object")
    for key in _SEALS.keys() & found.keys():
        if text != sealed({name: value for name, value in found.items() if name != key}, key):
            raise ValueError("its checksum is another one")
    return found


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
