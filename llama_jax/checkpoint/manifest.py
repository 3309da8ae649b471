"""Manifests: the size and checksum of every file below a directory, written when all of them are whole.

A directory without a manifest is not checked: an earlier version made it, or the process was killed before the end.
"""

import concurrent.futures
import fnmatch
import os
from pathlib import Path
from typing import Any

import xxhash

from llama_jax.files import sealed, unsealed, write_text

MANIFEST_FILE = "manifest.json"
FORMAT = 1
_THREADS = 4
_CHUNK = 1 << 22  # bytes read at a time


def write_manifest(directory: Path, step: int | None = None) -> None:
    """Write the manifest of a directory, which has the checkpoint of `step` or other files, and sync all to disk.

    Raises OSError where a file cannot be read or the manifest cannot be written.
    """
    names = _names(directory)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: [(directory / name).stat().st_size, _checksum(directory / name, True)], names)
        files = dict(zip(names, sums, strict=True))
    for folder in {folder for name in names for folder in Path(name).parents}:
        _sync(directory / folder)
    write_text(directory / MANIFEST_FILE, sealed({"format": FORMAT, "step": step, "files": files}, "manifest"))
    _sync(directory)
    _sync(directory.parent)


def check_manifest(directory: Path, step: int | None = None, *, only: str = "*") -> list[str] | None:
    """Return what is wrong with a directory, each damaged, missing or surplus file named; None without a manifest.

    A surplus file is wrong in the checkpoint of a `step` only. With `only`, a pattern as in the shell, other files are
    left out. Raises OSError where a file cannot be read.
    """
    try:
        text = (directory / MANIFEST_FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    if (content := _parsed(text)) is None:
        return [f"'{MANIFEST_FILE}' is damaged"]
    if content["format"] != FORMAT:
        return [f"'{MANIFEST_FILE}' is of another version"]
    if content["step"] != step:
        return [f"'{MANIFEST_FILE}' is of step {content['step']}"]
    names = fnmatch.filter(_names(directory), only)
    files = {name: content["files"][name] for name in fnmatch.filter(content["files"], only)}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        checks = [pool.submit(_problem, directory, name, *files[name]) for name in names if name in files]
        problems = [problem for check in checks if (problem := check.result()) is not None]
    problems += [f"{name!r} is missing" for name in sorted(files.keys() - set(names))]
    return problems + [f"{name!r} is surplus" for name in names if step is not None and name not in files]


def _problem(directory: Path, name: str, size: int, checksum: str) -> str | None:
    file = directory / name
    if (found := file.stat().st_size) != size:
        return f"{name!r} has {found:,} bytes, not {size:,}"
    return None if _checksum(file) == checksum else f"{name!r} has other content"


def _names(directory: Path) -> list[str]:
    """Return the files below a directory that a manifest lists, without hidden ones: some file systems make these."""

    def fail(error: OSError) -> None:
        raise error

    files = (folder / name for folder, _, names in directory.walk(on_error=fail) for name in names)
    names = (file.relative_to(directory).as_posix() for file in files if not file.name.startswith("."))
    return sorted(name for name in names if name != MANIFEST_FILE)


def _checksum(file: Path, sync: bool = False) -> str:
    """Return the XXH3-128 of a file's bytes; with `sync`, they are on disk afterwards."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as opened:
        if sync:
            os.fsync(opened.fileno())
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parsed(text: str) -> dict[str, Any] | None:
    """Return the content of a manifest, None where one byte of it is another than `write_manifest` wrote."""
    try:
        content = unsealed(text)
        whole = {"format", "step", "manifest"} <= content.keys()
        whole &= all(isinstance(size, int) and isinstance(sum_, str) for size, sum_ in content["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if whole else None
