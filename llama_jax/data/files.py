"""A corpus' files, on disk and in object stores: found, opened, hashed."""

import concurrent.futures
import dataclasses
import fcntl
import fnmatch
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.remote import file_system, is_remote

BUFFER = 1 << 20
SETTLED_NS = 2_000_000_000  # a file may change again without its time changing while this is not over


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus; one that a directory or glob brought (not `named`) is skipped where it is not text.

    `path` is a local path or a URL; `stamp` changes when the content does (a file's time, a store's tag); `pieces` is
    how many pieces it comes in by itself (the files of a dataset), or None.
    """

    path: str
    size: int
    named: bool
    stamp: str = ""
    pieces: int | None = None


def is_dataset(path: str) -> bool:
    """Whether `path` names a Hugging Face dataset, not a file of the Hub's file system."""
    return path.startswith("hf://") and not path.startswith(("hf://datasets/", "hf://buckets/"))


def open_file(path: str) -> io.BufferedIOBase:
    """The file's content, buffered. Raises UserError for a file that cannot be read."""
    try:
        if not is_remote(path):
            return cast(io.BufferedReader, open(path, "rb", buffering=BUFFER))
        fs, name = file_system(path)
        return io.BufferedReader(cast(io.RawIOBase, fs.open(name, "rb")), BUFFER)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror or error}): check that it is still there") from None


def find_files(config: DataConfig) -> list[CorpusFile]:
    """The corpus' files, each once, in the order of `path` and sorted within its entries.

    Raises UserError for an entry that is nothing and where no file is left.
    """
    if not config.path:
        raise UserError("path is empty: name the files or directories to train on, for example --data.path my_text/")
    files: dict[str, CorpusFile] = {}
    for entry in config.path:
        if is_dataset(entry):
            from llama_jax.data.readers.hub import find_dataset

            files.setdefault(entry, find_dataset(entry))
            continue
        find = _find_remote if is_remote(entry) else _find_local
        top, found = find(os.path.expandvars(entry))
        if not found:
            raise UserError(f"path '{entry}' is no file, no directory with files and no glob that matches one")
        for file in _of_saved_dataset(entry, top, found):
            below = file.path.removeprefix(top).lstrip("/") or file.path
            if not _matches(config.exclude, below, file.path):
                key = file.path if is_remote(file.path) else os.path.abspath(file.path)
                files.setdefault(key, file)
    if not files:
        raise UserError(f"exclude={', '.join(config.exclude)} leaves no file of path={', '.join(config.path)}")
    return list(files.values())


def _find_local(entry: str) -> tuple[str, list[CorpusFile]]:
    """(the directory that `entry` is, or "", its files)."""
    top = Path(os.path.expanduser(entry))
    if top.is_file():
        found = [top]
    elif top.is_dir():
        found = sorted(directory / file for directory, _, names in top.walk() for file in names)
    else:
        name = str(top)
        found = sorted(map(Path, glob.glob(name, recursive=True))) if glob.has_magic(name) else []
    files = []
    for path in found:
        if path.is_file():
            status = path.stat()
            files.append(CorpusFile(str(path), status.st_size, path == top, str(status.st_mtime_ns)))
    return str(top) if top.is_dir() else "", files


def _find_remote(entry: str) -> tuple[str, list[CorpusFile]]:
    fs, name = file_system(entry)
    try:
        if fs.isfile(name):
            found = {name: fs.info(name)}
        elif glob.has_magic(name):
            found = {path: info for path, info in fs.glob(name, detail=True).items() if info["type"] == "file"}
        else:
            found = fs.find(name, detail=True)
    except FileNotFoundError:
        found = {}
    except Exception as error:  # of many stores' own packages: no credentials, no network, no permission
        reason = " ".join(str(error).split())
        raise UserError(f"path '{entry}' cannot be listed ({reason}): check its name and your credentials") from None
    files = [
        CorpusFile(fs.unstrip_protocol(path), info["size"], path == name, str(fs.ukey(path)))
        for path, info in sorted(found.items())
    ]
    return ("" if glob.has_magic(name) else fs.unstrip_protocol(name)), files


def _of_saved_dataset(entry: str, top: str, found: list[CorpusFile]) -> list[CorpusFile]:
    """`found`, or where the directory `top` was written by `save_to_disk` of Hugging Face, only its data."""
    by_name = {file.path.removeprefix(top).lstrip("/"): file for file in found} if top else {}
    if "dataset_dict.json" in by_name:
        splits = _json_of(by_name["dataset_dict.json"])
        if isinstance(splits, dict) and isinstance(splits := splits.get("splits"), list):
            names = ", ".join(map(str, splits))
            raise UserError(f"path '{entry}' is a dataset with the splits {names}: name one, '{entry}/train'")
    if not {"state.json", "dataset_info.json"} <= by_name.keys():
        return found
    state = _json_of(by_name["state.json"])
    if not isinstance(state, dict) or "_data_files" not in state:
        return found
    names = [part["filename"] for part in state["_data_files"]]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"dataset '{entry}' lacks its file '{missing[0]}': get it again")
    return [dataclasses.replace(by_name[name], named=True) for name in names]


def _json_of(file: CorpusFile) -> dict[str, Any]:
    with open_file(file.path) as content:
        return json.loads(content.read())


def _matches(patterns: Iterable[str], *paths: str) -> bool:
    posix = [path if is_remote(path) else PurePosixPath(path).as_posix() for path in paths]
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns for path in posix)


def digests(files: list[CorpusFile], cache: Path) -> Iterator[str]:
    """A hash of each file's content; of what a store or the Hub has, its tag.

    Hashes are kept in the file `cache` by path, size and time, so that a start does not read everything again.
    """
    known = _known(cache)
    kept: list[tuple[list, str]] = []

    def digest(file: CorpusFile) -> str:
        if is_remote(file.path):
            return file.stamp
        key = [os.path.abspath(file.path), file.size, file.stamp]
        if (found := known.get(json.dumps(key))) is not None:
            return found
        with open_file(file.path) as content:
            made = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time_ns() - int(file.stamp) > SETTLED_NS:
            kept.append((key, made))
        return made

    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield from pool.map(digest, files)
    if kept:
        with cache.open("a") as lines:
            fcntl.flock(lines, fcntl.LOCK_EX)
            lines.writelines(json.dumps([key, made]) + "\n" for key, made in kept)


def _known(cache: Path) -> dict[str, str]:
    known = {}
    if cache.exists():
        for line in cache.read_text().splitlines():
            try:
                key, digest = json.loads(line)
            except ValueError:
                continue  # cut off by a full disk
            known[json.dumps(key)] = digest
    return known
