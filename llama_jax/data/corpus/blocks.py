"""Checksums of a shard's arrays by blocks, compared when a block is first read.

A corpus is far larger than what a start should read, so its bytes are compared as they are used: once each, while they
come from the disk anyway. XXH3 of 64 bits takes 25 microseconds for a block.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from llama_jax.config import UserError

BLOCK = 1 << 18  # bytes


class BlockHasher:
    """Checksums of the blocks of what is given, piece by piece."""

    def __init__(self) -> None:
        self._sums, self._hash, self._room = list[int](), xxhash.xxh3_64(), BLOCK

    def update(self, values: np.ndarray) -> None:
        """Add an array's bytes."""
        content = memoryview(np.ascontiguousarray(values)).cast("B")
        while len(content):
            part, content = content[: self._room], content[self._room :]
            self._hash.update(part)
            self._room -= len(part)
            if not self._room:
                self._sums.append(self._hash.intdigest())
                self._hash, self._room = xxhash.xxh3_64(), BLOCK

    def text(self) -> str:
        """Return all checksums as text, 16 hexadecimal digits for each block."""
        last = [self._hash.intdigest()] if self._room < BLOCK else []
        return "".join(f"{one:016x}" for one in [*self._sums, *last])


class Blocks:
    """The checksums of a shard, as its `summary` file has them, and which blocks have been compared.

    files: the file of each array, by its name.
    """

    def __init__(self, summary: Path, split: str, files: Mapping[str, Path]):
        self._summary, self._split, self._files = summary, split, files
        self._seen: dict[str, np.ndarray] = {}
        self._whole = set[str]()  # arrays of which all has been compared

    @functools.cached_property
    def _sums(self) -> dict[str, str]:
        """Checksums by array; none of an earlier version's shard."""
        try:
            return json.loads(self._summary.read_text())["splits"][self._split].get("blocks", {})
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(
                f"'{self._summary}' is damaged: remove '{self._summary.parent}', and it is made again"
            ) from None

    def check(self, array: str, values: np.ndarray, start: int = 0, stop: int | None = None) -> None:
        """Compare the blocks that have elements `start` to `stop` of an array's `values`, those not seen before.

        Raises UserError where one is not what was written.
        """
        if array in self._whole:
            return
        sums, size, stop = self._sums.get(array, ""), values.itemsize, len(values) if stop is None else stop
        if not sums:
            self._whole.add(array)
        if not sums or start >= stop:
            return
        seen = self._seen.setdefault(array, np.zeros(len(sums) // 16, bool))
        first, last = start * size // BLOCK, -(-stop * size // BLOCK)
        if seen[first:last].all():
            return
        file = self._files[array]
        # A map of a file that has become shorter ends the process where it is read.
        whole = not file.exists() or file.stat().st_size == values.nbytes
        content = memoryview(values).cast("B")
        for number in range(first, last) if whole else ():
            if not seen[number]:
                part = content[number * BLOCK : (number + 1) * BLOCK]
                seen[number] = f"{xxhash.xxh3_64_intdigest(part):016x}" == sums[16 * number : 16 * (number + 1)]
        if seen.all():
            self._whole.add(array)
        elif not seen[first:last].all():
            raise UserError(
                f"'{file}' is not what was written to it: remove '{file.parent}', and it is made again with the same "
                "tokens, then start again to continue"
            )
