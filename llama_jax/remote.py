"""Files in object stores: URLs of fsspec (`s3://`, `gs://`, `hf://`...) as places to read from and to write to.

All other code works on local files. The files of a URL are mirrored into the user's cache directory, and only what has
changed there is fetched again. Files to write are made in a local directory and uploaded, the files that make it
complete last, so that no reader takes the half of an upload for the whole.
"""

import concurrent.futures
import contextlib
import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from llama_jax.config import UserError
from llama_jax.files import lock, replacing, write_text
from llama_jax.values import printable

_URL = re.compile(r"((?:[a-zA-Z][\w+.-]+::)*[a-zA-Z][\w+.-]+):(/+|$)")  # at least two letters: `c:/` is a drive
_LOCAL = re.compile(r"(file|local):/*")
_READ_ONLY = ("hf", "http", "https")
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "datasets"}  # protocol to the extra that has it
_TRANSFERS = 8  # files at a time
_mirrors: dict[str, str] = {}  # local path to the URL that it is a copy of, in this process

type Stamps = dict[str, str]  # a file's name relative to a URL ("": the URL is a file) to what changes with its content
type Select = Callable[[Iterable[str]], Iterable[str]]


def is_remote(path: str | Path) -> bool:
    """Return whether `path` is a URL, also one whose slashes `pathlib` has joined (`s3:/bucket`)."""
    return _URL.match(os.fspath(path)) is not None


def url_of(path: str | Path) -> str:
    """Return the URL that `path` is, its slashes restored."""
    text = os.fspath(path)
    if local := _LOCAL.match(text):
        return f"file:///{text[local.end() :]}"
    return _URL.sub(lambda match: f"{match[1]}://", text, count=1)


def file_system(path: str) -> tuple[Any, str]:
    """Return (file system of a URL, name in it). Raises UserError where it is unknown or a package is missing."""
    try:
        return fsspec.core.url_to_fs(url_of(path) if is_remote(path) else path)
    except ImportError as error:
        extra = EXTRAS.get(_protocol(path))
        way = f"pip install 'llama_jax[{extra}]'" if extra else "install it with pip"
        raise UserError(f"path '{path}' needs a package that is not installed ({error}): {way}") from None
    except ValueError as error:
        raise UserError(f"path '{path}' is of no file system that fsspec knows: {error}") from None


def default_cache() -> Path:
    """Return the directory of tokenized text and of mirrors of stores: $LLAMA_JAX_CACHE or ~/.cache/llama_jax.

    Raises UserError where the variable is a URL.
    """
    directory = os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax"
    if is_remote(directory):
        raise UserError(f"LLAMA_JAX_CACHE='{directory}' must be a local directory: data.cache_dir may be a URL")
    return Path(directory).expanduser()


def with_urls(sentence: str) -> str:
    """Return `sentence` as it is printed: URLs in place of the local paths of their mirrors, no control characters."""
    for path, url in _mirrors.items():
        sentence = sentence.replace(path, url)
    return printable(sentence, keep="\n\t")


class Mirror:
    """A URL and the local path that is its copy, a file or a directory.

    A list next to the path has the version of every file that is the same in both places.
    """

    def __init__(self, url: str | Path, *, path: Path | None = None, kind: str = "remote"):
        """`path` is by default one in the cache, under `kind`. Raises UserError for a URL of an unknown kind."""
        self.url = url_of(url).rstrip("/")
        parent, _, name = self.url.rpartition("/")
        if _URL.fullmatch(f"{self.url}/") or name in (".", ".."):
            raise UserError(f"'{url}' names no file or directory: give the whole URL")
        self._fs, self._root = file_system(self.url)
        self._root = self._root.rstrip("/")
        digest = hashlib.sha256((parent if len(name) < 100 else self.url).encode()).hexdigest()[:16]
        self.path = path or default_cache() / kind / digest / name[-100:]
        self._list = self.path.with_name(f".{self.path.name}.json")
        _mirrors[str(self.path)] = self.url

    def stamps(self) -> Stamps:
        """Return the files that the store has there, if any. Raises UserError where it cannot be asked."""
        with _telling(self.url, "read"):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._root)
                if info["type"] == "file" or _protocol(self.url) in ("http", "https"):
                    return {"": _stamp(info)}
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        own = info["name"].rstrip("/")  # as the store writes it: the Hub resolves revisions
        root = own if all(path.startswith(f"{own}/") for path in found) else self._root
        stamps = {path.removeprefix(f"{root}/"): _stamp(info) for path, info in found.items()}
        # Some stores list a directory's own marker.
        stamps = {name: stamp for name, stamp in stamps.items() if name and not name.endswith("/")}
        for name in stamps:
            if name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise UserError(f"'{self.url}' has a file '{name}', which is no path below it: rename or remove it")
        return stamps

    def fetch(self, select: Select | None = None, *, prune: bool = False) -> Stamps:
        """Make the local files those of the store; return what the store has.

        `select` takes the names of all files and returns those to fetch. Local files that the store once had and has
        no longer are removed; with `prune`, all that are not fetched.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            there, known = self.stamps(), self._known()
            if self.path.is_file() != ("" in there) and self.path.exists():  # a file became a directory, or the reverse
                shutil.rmtree(self.path) if self.path.is_dir() else self.path.unlink()
            wanted = there if select is None or "" in there else list(select(there))
            for name in set(self.local_files()) - set(wanted) if prune else known.keys() - there.keys():
                self._local(name).unlink(missing_ok=True)
                known.pop(name, None)
            self._remove_empty_directories()
            missing = [name for name in wanted if not self._same(name, there, known)]
            try:
                for name, signature in _in_parallel(self._get, missing):
                    known[name] = [there[name], *signature]
            finally:
                self._remember(known)
        return there

    def upload(self, names: Iterable[str], *, last: Sequence[str] = (), source: Path | None = None) -> None:
        """Put the local files `names` into the store, except those that it has.

        Files that match the patterns `last` come after all others, in the patterns' order. `source` has them in place
        of the local path.
        """
        names = list(names)
        with self._locked():
            there, known = self.stamps(), self._known()
            changed = [name for name in names if not self._same(name, there, known)]
            rank = {name: next((i for i, p in enumerate(last, 1) if fnmatch.fnmatchcase(name, p)), 0) for name in names}
            sent: dict[str, list[int]] = {}
            put = functools.partial(self._put, source)
            try:
                for group in sorted({rank[name] for name in changed}):
                    sent |= dict(_in_parallel(put, [name for name in changed if rank[name] == group]))
            finally:
                if sent:
                    there = self.stamps()
                    known |= {name: [there[name], *sent[name]] for name in sent if name in there}
                    self._remember(known)

    def delete(self, names: Iterable[str]) -> None:
        """Remove files from the store, one after the other."""
        for name in names:
            with _telling(self._name(name), "removed"):
                self._fs.rm_file(f"{self._root}/{name}")

    def is_uploaded(self, names: Iterable[str], there: Stamps) -> bool:
        """Return whether these local files are the same as those that the store has."""
        known = self._known()
        return all(self._same(name, there, known) for name in names)

    def check_writable(self) -> None:
        """Raise UserError where nothing can be written: a test file is, and removed."""
        protocol = _protocol(self.url)
        if protocol in _READ_ONLY:
            raise UserError(f"'{self.url}' can only be read, not written: give a local path or a store such as s3://")
        name = f"{self._root}/.llama_jax-{uuid.uuid4().hex}"
        with _telling(self.url, "written"):
            self._fs.pipe_file(name, b"test")
            self._fs.rm_file(name)

    def local_files(self) -> list[str]:
        """Names of the local files, without hidden ones."""
        files = (directory / name for directory, _, names in self.path.walk() for name in names)
        found = sorted(file.relative_to(self.path) for file in files if file.is_file())
        return [name.as_posix() for name in found if not any(part.startswith(".") for part in name.parts)]

    def _name(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _local(self, name: str) -> Path:
        return self.path / name if name else self.path

    def _get(self, name: str) -> tuple[str, list[int]]:
        target = self._local(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Made outside of the mirrored directory, so that a process that is killed leaves nothing in it.
        with replacing(target, near=self.path) as partial, _telling(self._name(name), "read"):
            self._fs.get_file(f"{self._root}/{name}" if name else self._root, str(partial))
        return name, _signature(target)

    def _put(self, source: Path | None, name: str) -> tuple[str, list[int]]:
        file = self._local(name) if source is None else source / name
        signature = _signature(file)  # before: a file that grows meanwhile is another
        with _telling(self._name(name), "written"):
            self._fs.put_file(str(file), f"{self._root}/{name}")
        return name, signature

    def _same(self, name: str, there: Stamps, known: dict[str, list]) -> bool:
        file = self._local(name)
        return name in there and file.is_file() and known.get(name) == [there[name], *_signature(file)]

    def _known(self) -> dict[str, list]:
        """Return the stamp, local size and time of each file that was fetched or uploaded."""
        try:
            return json.loads(self._list.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none yet, or cut off by a full disk: all is fetched again
            return {}

    def _remember(self, known: dict[str, list]) -> None:
        write_text(self._list, json.dumps(known))

    def _remove_empty_directories(self) -> None:
        for directory, _, _ in self.path.walk(top_down=False):
            if not any(directory.iterdir()):
                directory.rmdir()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path.with_name(f".{self.path.name}.lock")):
            yield


def local_copy(path: str | Path, select: Select | None = None, *, beside: Sequence[str] = ()) -> Path:
    """Return `path` itself where it is local, else a local copy of the file or directory that the URL names.

    `select` as in `Mirror.fetch`; with a file, those of its directory are fetched too whose names match the patterns
    `beside`. Raises UserError where nothing is there and where it cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    if (local := _file_url(path)) is not None:
        return local
    mirror = Mirror(path)
    there = mirror.fetch(select)
    if not there:
        raise UserError(f"'{mirror.url}' does not exist: check its name, and that you may read it")
    if "" in there and beside:
        fetch_beside(mirror.url, beside)
    return mirror.path


def fetch_beside(url: str | Path, patterns: Sequence[str]) -> None:
    """Fetch the files in the same directory of the store whose names match; they are next to the local copy."""
    parent, _, own = url_of(url).rstrip("/").rpartition("/")
    fs, name = file_system(parent)
    try:
        with _telling(parent, "read"):
            found = [info["name"].rpartition("/")[2] for info in fs.ls(name, detail=True) if info["type"] == "file"]
    except UserError:
        if _protocol(parent) in ("http", "https"):  # which has no listing, as a rule
            return
        raise
    for other in found:
        if other != own and any(fnmatch.fnmatchcase(other, pattern) for pattern in patterns):
            Mirror(f"{parent}/{other}").fetch()


@contextlib.contextmanager
def uploaded(directory: str | Path, *, new: bool = True, last: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a local folder to write into, which is uploaded to the URL `directory` when the block ends without error.

    `last` as in `Mirror.upload`. Raises UserError where the URL cannot be written, or has files and must be `new`.
    """
    check_destination(directory, new=new)
    default_cache().mkdir(parents=True, exist_ok=True)  # a system's own temporary directory may be in its memory
    with tempfile.TemporaryDirectory(prefix="upload-", dir=default_cache()) as temporary:
        mirror = Mirror(directory, path=Path(temporary) / "files")
        mirror.path.mkdir()
        yield mirror.path
        mirror.upload(mirror.local_files(), last=last)


def check_destination(directory: str | Path, *, new: bool = True) -> None:
    """Raise UserError for a URL that cannot be written, a path in a file, or files that are there and must not be."""
    if (local := as_local(directory)) is None:
        mirror = Mirror(directory)
        mirror.check_writable()
        place, taken = mirror.url, new and bool(mirror.stamps())
    else:
        place, taken = local, new and local.exists() and (not local.is_dir() or any(local.iterdir()))
        path = local.expanduser().absolute()
        there = next(part for part in (path, *path.parents) if part.exists())
        if not taken and not there.is_dir():
            raise UserError(f"'{place}' cannot be a directory, because '{there}' is a file: give another path")
    if taken:
        raise UserError(f"'{place}' exists already: give a new path, or remove it first")


@contextlib.contextmanager
def working_copy(
    url: str | Path, select: Select, *, path: Path | None = None, last: Sequence[str] = ()
) -> Iterator[Path]:
    """Yield a local directory with the files that the URL has, which is uploaded when the block ends without error.

    It is at `path`, by default in the cache; `select` and `last` as in `Mirror.fetch` and `Mirror.upload`.
    """
    mirror = Mirror(url, path=path)
    mirror.fetch(select)
    yield mirror.path
    mirror.upload(list(select(mirror.local_files())), last=last)


def as_local(path: str | Path) -> Path | None:
    """Return the local path that `path` is, as a path or as a `file://` URL; None for other URLs."""
    return _file_url(path) if is_remote(path) else Path(path)


def local_path(path: str | Path, name: str) -> Path:
    """Return the local path that `path` is. Raises UserError for another URL, with the name of the argument."""
    if (local := as_local(path)) is None:
        raise UserError(f"{name}={path} must be a local file or directory")
    return local.expanduser()


def _file_url(path: str | Path) -> Path | None:
    return Path(fsspec.core.url_to_fs(url_of(path))[1]) if _LOCAL.match(os.fspath(path)) else None


def _protocol(url: str) -> str:
    return re.split("::|:", url, maxsplit=1)[0]


def _stamp(info: dict[str, Any]) -> str:
    """Return a text that changes with a file's content: the store's tag, or all that it reports, such as a time."""
    tags = ("ETag", "etag", "md5Hash", "checksum", "blob_id", "oid")
    if tag := next((info[tag] for tag in tags if info.get(tag)), None):
        return str(tag)
    said = {key: value for key, value in info.items() if value is not None}
    if said.keys() <= {"name", "size", "type", "mimetype", "url", "partial"}:
        return uuid.uuid4().hex  # a change cannot be seen: it is fetched each time
    return str(sorted(said.items(), key=str))


def _signature(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _in_parallel[T](function: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """Yield the results for all names in any order; one that raises ends it."""
    with concurrent.futures.ThreadPoolExecutor(_TRANSFERS) as pool:
        futures = [pool.submit(function, name) for name in names]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


@contextlib.contextmanager
def _telling(url: str, done: str) -> Iterator[None]:
    """Raise whatever a store's package raises (no network, no credentials, no right) as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"'{url}' cannot be {done} ({reason}): check its name, your credentials and the connection"
        ) from error
