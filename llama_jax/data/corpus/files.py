"""Files of a corpus, on disk and in object stores: found and hashed."""

import concurrent.futures
import dataclasses
import fnmatch
import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.listing import Pattern, split_glob, walk
from llama_jax.data.readers.opening import open_file
from llama_jax.data.readers.records import CorpusFile
from llama_jax.data.readers.tables import find_dataset, is_dataset
from llama_jax.files import lock
from llama_jax.remote import file_system, is_remote

SETTLED_NS = 2_000_000_000  # within this time a file may change again without a change of its time

type Found = tuple[dict[str, CorpusFile], bool]
"""Files of an entry by their paths below its directory or glob, and True where the entry is a directory."""


def find_files(config: DataConfig) -> list[CorpusFile]:
    """Return the corpus's files, each once, in the order of `path` and sorted within its entries.

    Raises UserError for an entry that is nothing and where no file is left.
    """
    if not config.path:
        raise UserError("path is empty: name the files or directories to train on, for example --data.path my_text/")
    files: dict[str, CorpusFile] = {}
    for entry in config.path:
        if is_dataset(entry):
            files.setdefault(entry, find_dataset(entry))
            continue
        find = _find_remote if is_remote(entry) else _find_local
        found, is_directory = find(os.path.expandvars(entry))
        if not found:
            raise UserError(
                f"path '{entry}' is no file, no directory with files and no glob that matches one (hidden files and "
                "backups have to be named one by one)"
            )
        for below, file in (_of_saved_dataset(entry, found) if is_directory else found).items():
            if not _matches(config.exclude, below, file.path):
                files.setdefault(file.path if is_remote(file.path) else os.path.abspath(file.path), file)
    if not files:
        raise UserError(f"exclude={', '.join(config.exclude)} leaves no file of path={', '.join(config.path)}")
    return list(files.values())


def _find_local(entry: str) -> Found:
    top = Path(os.path.expanduser(entry))
    if top.is_file():
        status = top.stat()
        return {str(top): CorpusFile(str(top), status.st_size, True, str(status.st_mtime_ns))}, False
    if top.is_symlink() and not top.exists():
        raise UserError(
            f"path '{entry}' is a link to '{os.readlink(top)}', which is not there: repair it or leave it out"
        )
    is_directory, pattern = top.is_dir(), Pattern()
    if not is_directory:
        base, parts = split_glob(top.parts)
        top, pattern = Path(*base), Pattern(parts)
        if not parts or not top.is_dir():
            return {}, False
    return {
        str(found.path.relative_to(top)): CorpusFile(
            str(found.path), found.size, False, str(found.time_ns), problem=found.problem
        )
        for found in walk(top, pattern)
    }, is_directory


def _find_remote(entry: str) -> Found:
    fs, name = file_system(entry)
    base, pattern = name, Pattern()
    try:
        is_file = fs.isfile(name)
        if is_file:
            listed = {name: fs.info(name)}
        elif glob.has_magic(name):
            parts = split_glob(name.split("/"))
            base, pattern = "/".join(parts[0]), Pattern(parts[1])
            listed = fs.find(base, detail=True) if "**" in parts[1] else _matching(fs, name)
        else:
            listed = fs.find(name, detail=True)
    except FileNotFoundError:
        return {}, False
    except Exception as error:  # of many stores' own packages: no credentials, no network, no permission
        reason = " ".join(str(error).split())
        raise UserError(f"path '{entry}' cannot be listed ({reason}): check its name and your credentials") from None
    files = {}
    for path in sorted(listed, key=lambda path: path.split("/")):  # as on disk, where a/b is before a.txt
        below = path.removeprefix(base).lstrip("/")
        if is_file or pattern.matches(below.split("/")):
            file = CorpusFile(fs.unstrip_protocol(path), listed[path]["size"], is_file, str(fs.ukey(path)))
            files[below or path] = file
    return files, not is_file and base == name


def _matching(fs: Any, name: str) -> dict[str, Json]:
    """Return the files that a glob without `**` matches, and all files below the directories that it matches."""
    listed = {}
    for path, info in fs.glob(name, detail=True).items():
        listed |= fs.find(path, detail=True) if info["type"] == "directory" else {path: info}
    return listed


def _of_saved_dataset(entry: str, by_name: dict[str, CorpusFile]) -> dict[str, CorpusFile]:
    """Return a directory's files, or where `save_to_disk` of Hugging Face has written it, only its data."""
    if "dataset_dict.json" in by_name:
        splits = _json_of(by_name["dataset_dict.json"])
        if isinstance(splits, dict) and isinstance(splits := splits.get("splits"), list):
            names = ", ".join(map(str, splits))
            raise UserError(f"path '{entry}' is a dataset with the splits {names}: name one, '{entry}/train'")
    if not {"state.json", "dataset_info.json"} <= by_name.keys():
        return by_name
    state = _json_of(by_name["state.json"])
    if not isinstance(state, dict) or "_data_files" not in state:
        return by_name
    names = [part["filename"] for part in state["_data_files"]]
    missing = [name for name in names if name not in by_name]
    if missing:
        raise UserError(f"dataset '{entry}' lacks its file '{missing[0]}': get it again")
    return {name: dataclasses.replace(by_name[name], named=True) for name in names}


def _json_of(file: CorpusFile) -> Any:
    with open_file(file.path) as content:
        return json.loads(content.read())


def _matches(patterns: Iterable[str], *paths: str) -> bool:
    posix = [path if is_remote(path) else PurePosixPath(path).as_posix() for path in paths]
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns for path in posix)


def digests(files: list[CorpusFile], cache: Path) -> Iterator[str]:
    """Yield a hash of each file's content; of a file in a store or on the Hub, its tag.

    Hashes are kept in the file `cache` by path, size and time, so that a start does not read everything again.
    """
    known: dict[str, str] = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        try:
            key, digest = json.loads(line)
        except ValueError:
            continue  # cut off by a full disk
        known[json.dumps(key)] = digest
    kept: list[str] = []

    def digest_of(file: CorpusFile) -> str:
        if is_remote(file.path) or file.problem:
            return file.problem or file.stamp
        key = [os.path.abspath(file.path), file.size, file.stamp]
        if (found := known.get(json.dumps(key))) is not None:
            return found
        with open_file(file.path) as content:
            made = hashlib.file_digest(content, "sha256").hexdigest()
        if time.time_ns() - int(file.stamp) > SETTLED_NS:
            kept.append(json.dumps([key, made]) + "\n")
        return made

    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield from pool.map(digest_of, files)
    if kept:
        with lock(cache.with_suffix(".lock")), cache.open("a") as lines:
            lines.writelines(kept)
