"""Files below a directory or glob: names that a corpus leaves out, and links."""

import dataclasses
import fnmatch
import glob
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from llama_jax.data.readers.opening import is_left_out


class Pattern:
    """A glob's parts below a directory; without parts, the directory with all below it.

    As in the shell, `*` stays within a part, `**` is any number of directories, and a directory that matches takes
    all below it. A name that is left out matches only a part that is itself such a name (`.*`, `*.bak`).
    """

    def __init__(self, parts: Sequence[str] = ()):
        self._parts = parts
        self.start = self._closed({0})

    def step(self, places: frozenset[int], name: str) -> frozenset[int]:
        """Return the numbers of parts matched once entry `name` follows, of paths that have matched `places` parts."""
        found = set()
        for i in places:
            if i == len(self._parts) or self._parts[i] == "**":
                if not is_left_out(name):
                    found.add(i)
            elif fnmatch.fnmatchcase(name, self._parts[i]) and (is_left_out(self._parts[i]) or not is_left_out(name)):
                found.add(i + 1)
        return self._closed(found)

    def is_end(self, places: frozenset[int]) -> bool:
        """Return True where the whole pattern has matched."""
        return len(self._parts) in places

    def matches(self, names: Sequence[str]) -> bool:
        """Return True where the pattern takes the file at this path, given by its parts."""
        places = self.start
        for name in names:
            places = self.step(places, name)
        return self.is_end(places)

    def _closed(self, places: set[int]) -> frozenset[int]:
        for i in sorted(places):
            while i < len(self._parts) and self._parts[i] == "**":  # which matches no directory too
                i += 1
                places.add(i)
        return frozenset(places)


def split_glob(parts: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Return (the parts before the first with a wildcard, the others)."""
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    return parts[:first], parts[first:]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file that was found, with its size in bytes and its time; `problem` is the reason why it cannot be read.

    Problems are hashed with the corpus's files: their words must not change.
    """

    path: Path
    size: int = 0
    time_ns: int = 0
    problem: str = ""


def walk(top: Path, pattern: Pattern) -> list[Entry]:
    """Return the files below a directory that the pattern takes, sorted by their paths' parts.

    Linked directories are followed, and none is read twice: one that is below `top` without a link is read there.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Entry] = []
    pending, links = [(top, pattern.start)], []
    while pending or links:
        if not pending:  # links come last, so that a directory is read at its own path
            pending, links = sorted(links, key=lambda link: link[0], reverse=True), []
        directory, places = pending.pop()
        try:
            status = directory.stat()
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            names = sorted(os.listdir(directory))
        except OSError as error:
            found.append(Entry(directory, problem=f"a directory that cannot be listed ({error.strerror})"))
            continue
        for name in names:
            if not (after := pattern.step(places, name)):
                continue
            path = directory / name
            try:
                status = path.stat()
            except OSError as error:
                if pattern.is_end(after):
                    found.append(Entry(path, problem=_why_not(path, error)))
                continue
            if stat.S_ISDIR(status.st_mode):
                (links if path.is_symlink() else pending).append((path, after))
            elif pattern.is_end(after):
                problem = "" if stat.S_ISREG(status.st_mode) else "no ordinary file (a pipe, a socket or a device)"
                found.append(Entry(path, status.st_size, status.st_mtime_ns, problem))
    return sorted(found, key=lambda entry: entry.path)


def _why_not(path: Path, error: OSError) -> str:
    if path.is_symlink() and isinstance(error, FileNotFoundError):
        return f"a link to '{os.readlink(path)}', which is not there"
    return f"a file that cannot be read ({error.strerror})"
