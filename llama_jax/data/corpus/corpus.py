"""A tokenized corpus on disk: the index of its directory, and its tokens as streams over the shards."""

import ctypes
import dataclasses
import functools
import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int, Int32

from llama_jax.config import Json, UserError
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.corpus.documents import OLD, BadRecords, read_texts, sum_scored
from llama_jax.data.corpus.shards import (
    ARRAYS,
    BlockHasher,
    Blocks,
    array_file,
    block_sums,
    summary_file,
)
from llama_jax.files import sealed, unsealed, write_text

INDEX = "index.json"
_MALFORMED = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)  # of damaged JSON


@dataclasses.dataclass(frozen=True)
class Shard:
    """Documents' tokens one after another, as memory maps: each document is BOS, its tokens, EOS.

    `documents` has the places in `tokens` where documents begin (increasing from 0), `parts` those where the second and
    later parts of a document begin (increasing; empty where documents have one part). They may have checksums.
    """

    tokens: np.ndarray
    documents: Int[np.ndarray, " d"]
    parts: Int[np.ndarray, " p"]
    blocks: Blocks | None = None
    files: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])  # that are mapped, with their sizes

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """Return tokens `start` to `stop`. Raises UserError where they are not those that were written."""
        if self.blocks is not None:
            self.blocks.check("tokens", self.tokens, start, stop)
        return self.tokens[start:stop].astype(np.int32)

    def check(self) -> None:
        """Raise UserError where the places of documents and parts are not those that were written.

        So it does where a mapped file has become shorter: to read what it lacks would kill the process.
        """
        for file, size in self.files.items():
            try:
                left = os.stat(file).st_size
            except FileNotFoundError:  # its map keeps all of it
                continue
            if left < size:
                raise UserError(f"'{file}' was cut to {left:,} of {size:,} bytes while it was read: bring it back")
        if self.blocks is not None:
            self.blocks.check("documents", self.documents)
            self.blocks.check("parts", self.parts)


class TokenStream:
    """The tokens of all shards, one after another."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = list(shards)
        # Where each shard begins in the stream, and at the end the stream's length.
        self.starts = np.cumsum([0, *(len(shard.tokens) for shard in self.shards)], dtype=np.int64)
        self._checked = set[int]()  # shards, since a batch began

    def begin_batch(self) -> None:
        """Check each shard once more where it is read next: a check asks the system for the sizes of its files."""
        self._checked.clear()

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return sum(len(shard.documents) for shard in self.shards)

    def read(self, start: int, stop: int) -> Int32[np.ndarray, " n"]:
        """Return tokens `start` to `stop` (or the stream's end)."""
        pieces = [shard.read(a, b) for shard, _, a, b in self._spans(start, stop)]
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int32), *pieces])

    def document_starts(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Return the places in [start, stop) where documents begin."""
        found = [np.zeros(0, np.int64)]
        for shard, offset, a, b in self._spans(start, stop):
            first, last = np.searchsorted(shard.documents, [a, b])
            found.append(shard.documents[first:last] + offset)
        return np.concatenate(found)

    def shard_at(self, place: int) -> tuple[Shard, int]:
        """Return the shard that has this place of the stream, and the place where the shard begins."""
        number = int(self.starts.searchsorted(place, side="right")) - 1
        if number not in self._checked:
            self.shards[number].check()
            self._checked.add(number)
        return self.shards[number], int(self.starts[number])

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Shard, int, int, int]]:
        """Yield (shard, its place in the stream, first, end) of the shards with places `start` to `stop`."""
        stop = min(stop, self.num_tokens)
        while start < stop:
            shard, offset = self.shard_at(start)  # never one without tokens
            end = min(stop, offset + len(shard.tokens))
            yield shard, offset, start - offset, end - offset
            start = end


class Corpus:
    """A tokenized corpus, opened from its directory: `train` and `validation` streams, and counts by split.

    `num_bytes` is the size of the documents' text in UTF-8 (0 for token ids), `content_hash` the hash of the files and
    options that it was made of, `tokenizer` the fingerprint, `skipped` the files that were left out ("file: reason"),
    `bad_records` the number of bad records of each kind and the first of them. `scored_bytes` are the bytes of text
    that a left-to-right model predicts in validation; None without such a number, for the reason `unscored`.
    """

    def __init__(self, directory: Path, config: DataConfig):
        index = json.loads((directory / INDEX).read_text())
        self.directory, self.config = directory, config
        self.content_hash: str = index["content_hash"]
        self.tokenizer: str = index["tokenizer"]
        self.skipped: list[str] = index["skipped"]
        self.bad_records: Json = index["bad_records"]

        def totals(name: str) -> dict[Split, int]:
            return {split: sum(shards[name]) for split, shards in index["splits"].items()}

        self.num_tokens, self.num_documents, self.num_bytes = map(totals, ("tokens", "documents", "num_bytes"))
        self.scored_bytes: int | None = index.get("scored_bytes")
        self.unscored: str = index.get("unscored", OLD)
        if self.unscored == OLD:
            self.unscored += f": remove '{directory}', and it is made again"
        # One listing of the directory is cheaper than asking for the sizes of thousands of files.
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
        self.train = _stream(directory, "train", index, sizes)
        self.validation = _stream(directory, "validation", index, sizes)

    def texts(self, split: Split) -> Iterator[str]:
        """Yield the documents' text again, read from the original files."""
        return read_texts(self.config, split)

    def left_out(self) -> list[str]:
        """Return lines that report the files and records that are not in the corpus."""
        lines = []
        if self.skipped:
            lines.append(f"skipped: {len(self.skipped)}, the first being {'; '.join(self.skipped[:3])}")
        for reason, count in self.bad_records["reasons"].items():
            first = [name for name in self.bad_records["first"] if f" {reason}" in name][:3]
            lines.append(f"bad records ({reason}): {count}" + (f", first {'; '.join(first)}" if first else ""))
        return lines


def damaged_files(directory: Path) -> list[str]:
    """Return what is wrong with a corpus, each damaged or missing file named, by the hashes of index and shards.

    Raises OSError where a file cannot be read.
    """
    try:
        index = unsealed((directory / INDEX).read_text())
        # An earlier version's index has no hashes of the summaries.
        hashes = index.get("summaries", [None] * len(index["splits"]["train"]["tokens"]))
        problems = [problem for number, own in enumerate(hashes) for problem in _damaged(directory, number, own)]
    except _MALFORMED:
        return [f"'{INDEX}' is damaged"]
    return problems + [problem for file in sorted(directory.glob("rows/*/*.json")) for problem in _damaged_rows(file)]


def _damaged_rows(file: Path) -> Iterator[str]:
    """Yield what is wrong with an index of packed rows (`rows/packing.py`), whose arrays are beside `file`."""
    try:
        blocks = unsealed(file.read_text()).get("blocks", {})
        for array, sums in blocks.items():
            hasher, content = BlockHasher(), file.with_suffix(f".{array}")
            if content.stat().st_size:
                hasher.update(np.memmap(content, np.uint8, "r"))
            if hasher.text() != sums:
                yield f"'{content.name}' has other content"
    except FileNotFoundError as error:
        yield f"'{Path(error.filename).name}' is missing"
    except _MALFORMED:
        yield f"'{file.name}' is damaged"


def _damaged(directory: Path, number: int, checksum: str | None) -> Iterator[str]:
    """Yield what is wrong with a shard, whose summary has this hash."""
    file = summary_file(directory, number)
    if checksum is not None and (problem := _problem(file, checksum)) is not None:
        yield problem
        return
    summary = json.loads(file.read_text())
    for split in get_args(Split):
        hashes = summary["splits"][split]["sha256"]
        for name in sorted(ARRAYS.keys() & hashes.keys()):
            if (problem := _problem(array_file(directory, split, number, name), hashes[name])) is not None:
                yield problem


def _problem(file: Path, checksum: str) -> str | None:
    try:
        with file.open("rb") as opened:
            same = hashlib.file_digest(opened, "sha256").hexdigest() == checksum
    except FileNotFoundError:
        return f"'{file.name}' is missing"
    return None if same else f"'{file.name}' has other content"


def _stream(directory: Path, split: Split, index: Json, sizes: dict[str, int]) -> TokenStream:
    shards = []
    for number, counts in enumerate(zip(*(index["splits"][split][array] for array in ARRAYS), strict=True)):
        if counts[0]:
            files = {array: array_file(directory, split, number, array) for array in ARRAYS}
            arrays = {
                array: map_array(file, ARRAYS[array] or index["dtype"], count, sizes.get(file.name))
                for (array, file), count in zip(files.items(), counts, strict=True)
            }
            mapped = {str(files[array]): values.nbytes for array, values in arrays.items() if len(values)}
            blocks = Blocks(functools.partial(block_sums, summary_file(directory, number), split), files)
            shards.append(Shard(**arrays, blocks=blocks, files=mapped))
    return TokenStream(shards)


def map_array(file: Path, dtype: str, count: int, size: int | None) -> np.ndarray:
    """Map the array in `file` of `size` bytes, read-only. Raises ValueError where it does not have `count` elements.

    By the C library: Python's own mmap, which numpy's is too, keeps a file open for each map (up to 3.12), and a large
    corpus has more arrays than a process may open files.
    """
    if not count:
        return np.zeros(0, dtype)
    if size is None or size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} is not whole")
    libc = _libc()
    with file.open("rb") as content:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, content.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:  # MAP_FAILED
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    memory = (ctypes.c_ubyte * size).from_address(address)
    # The array keeps `memory` alive, and with it the map. Not at exit: threads may read still.
    weakref.finalize(memory, libc.munmap, address, size).atexit = False
    array = np.frombuffer(memory, dtype)
    array.flags.writeable = False
    return array


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def check_bad_records(summaries: list[Json], config: DataConfig) -> BadRecords:
    """Return the sum of the shards' bad records. Raises UserError where they are more than `max_bad_records`."""
    bad = BadRecords(config.max_bad_records)
    for summary in summaries:
        bad.extend(summary)
    return bad


def check_split(split: Split, num_documents: Mapping[Split, int], config: DataConfig) -> None:
    """Raise UserError where no document is in the split."""
    if not num_documents[split]:
        raise UserError(
            f"validation_fraction={config.validation_fraction} leaves no document for {split} among "
            f"{sum(num_documents.values())}: change it (0 holds out none), give more files, or cut with document_chars"
        )


def write_index(directory: Path, summaries: list[Json], content_hash: str, config: DataConfig) -> None:
    """Write the index of shards that are all there. Raises UserError for a corpus without text or training text."""
    bad = check_bad_records([summary["bad_records"] for summary in summaries], config)
    splits = {
        split: {name: [summary["splits"][split][name] for summary in summaries] for name in (*ARRAYS, "num_bytes")}
        for split in get_args(Split)
    }
    counts = {split: sum(shards["documents"]) for split, shards in splits.items()}
    skipped = list(dict.fromkeys(name for summary in summaries for name in summary["skipped"]))
    if not any(counts.values()):
        first = f" (skipped: {'; '.join(skipped[:3])})" if skipped else ""
        raise UserError(f"path={', '.join(config.path)} has no text{first}: give files with text in them")
    check_split("train", counts, config)
    index = {
        "content_hash": content_hash,
        "tokenizer": summaries[0]["tokenizer"],
        "dtype": summaries[0]["dtype"],
        "skipped": skipped,
        "bad_records": bad.summary(),
        "splits": splits,
        **sum_scored([summary["splits"]["validation"] for summary in summaries]),
        "summaries": [
            hashlib.sha256(summary_file(directory, number).read_bytes()).hexdigest() for number in range(len(summaries))
        ],
    }
    write_text(directory / INDEX, sealed(index))
