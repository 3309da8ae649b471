"""A tokenized corpus on disk: its directory's index, and the streams over its shards."""

import ctypes
import functools
import json
import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.documents import BadRecords, read_texts
from llama_jax.data.scored import OLD, sum_scored
from llama_jax.data.shards import ARRAYS, array_file, whole
from llama_jax.data.stream import Shard, TokenStream

INDEX = "index.json"


class Corpus:
    """A tokenized corpus, opened from its directory: `train` and `validation` streams with their counts by split.

    `num_bytes` is the size of the documents' text in UTF-8 (of token ids, none), `content_hash` of the files and the
    options that made it, `tokenizer` the fingerprint, `skipped` what was left out ("file: reason"), `bad_records` how
    many of each kind and the first of them. `scored_bytes` are the bytes of text that a left-to-right model is asked
    for in validation, None where that cannot be said, because `unscored`.
    """

    def __init__(self, directory: Path, config: DataConfig):
        index = json.loads((directory / INDEX).read_text())
        self.directory, self._config = directory, config
        self.content_hash: str = index["content_hash"]
        self.tokenizer: str = index["tokenizer"]
        self.skipped: list[str] = index["skipped"]
        self.bad_records: dict[str, Any] = index["bad_records"]
        splits = index["splits"]
        self.num_tokens: dict[Split, int] = {split: sum(shards["tokens"]) for split, shards in splits.items()}
        self.num_documents: dict[Split, int] = {split: sum(shards["documents"]) for split, shards in splits.items()}
        self.num_bytes: dict[Split, int] = {split: sum(shards["num_bytes"]) for split, shards in splits.items()}
        self.scored_bytes: int | None = index.get("scored_bytes")
        self.unscored: str = index.get("unscored", OLD)
        if self.unscored == OLD:
            self.unscored += f": remove '{directory}', and it is made again"
        # One listing of the directory is cheaper than thousands of files asked for one by one.
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(directory)}
        self.train = _stream(directory, "train", index, sizes)
        self.validation = _stream(directory, "validation", index, sizes)

    def texts(self, split: Split) -> Iterator[str]:
        """The documents' text again, read from the original files."""
        return read_texts(self._config, split)

    def left_out(self) -> list[str]:
        """What is to be said of files and records that are not in the corpus."""
        lines = []
        if self.skipped:
            lines.append(f"skipped: {len(self.skipped)}, the first being {'; '.join(self.skipped[:3])}")
        for reason, count in self.bad_records["reasons"].items():
            first = [name for name in self.bad_records["first"] if f" {reason}" in name][:3]
            lines.append(f"bad records ({reason}): {count}" + (f", first {'; '.join(first)}" if first else ""))
        return lines


def _stream(directory: Path, split: Split, index: dict[str, Any], sizes: dict[str, int]) -> TokenStream:
    shards = []
    for number, counts in enumerate(zip(*(index["splits"][split][array] for array in ARRAYS), strict=True)):
        if counts[0]:
            arrays = {}
            for (array, kind), count in zip(ARRAYS.items(), counts, strict=True):
                file = array_file(directory, split, number, array)
                arrays[array] = map_array(file, kind or index["dtype"], count, sizes.get(file.name))
            shards.append(Shard(**arrays))
    return TokenStream(shards)


def map_array(file: Path, dtype: str, count: int, size: int | None) -> np.ndarray:
    """The array in `file` of `size` bytes; raises ValueError where it has not `count` elements."""
    if not count:
        return np.zeros(0, dtype)
    if size is None or size != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} is not whole")
    return _mapped(file, size).view(dtype)


def _mapped(file: Path, size: int) -> np.ndarray:
    """The file's bytes as a read-only array.

    By the C library: Python's mmap, which numpy's is too, keeps a file open for each (up to 3.12), and a large corpus
    has more of them than a process may open.
    """
    libc = _libc()
    with file.open("rb") as content:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, content.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(file))
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, libc.munmap, address, size).atexit = False
    array = np.frombuffer(memory, np.uint8)
    array.flags.writeable = False
    return array


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def open_corpus(directory: Path, config: DataConfig) -> Corpus | None:
    """The corpus in `directory`, or None where there is none or its files are not whole (a full or failing disk)."""
    try:
        return Corpus(directory, config)
    except (OSError, ValueError, KeyError):
        return None


def check_bad_records(summaries: list[dict[str, Any]], config: DataConfig) -> BadRecords:
    """All the shards' bad records. Raises UserError where they are more than may be."""
    bad = BadRecords(config.max_bad_records)
    for summary in summaries:
        bad.extend(summary)
    return bad


def check_validation(num_documents: Mapping[Split, int], config: DataConfig) -> None:
    """Raises UserError where no document is held out."""
    if not num_documents["validation"]:
        raise _empty_split("validation", num_documents, config)


def _empty_split(split: Split, num_documents: Mapping[Split, int], config: DataConfig) -> UserError:
    return UserError(
        f"validation_fraction={config.validation_fraction} leaves no document for {split} among "
        f"{sum(num_documents.values())}: change it (0 holds out none), give more files, or cut with document_chars"
    )


def write_index(directory: Path, summaries: list[dict[str, Any]], content_hash: str, config: DataConfig) -> None:
    """Writes the index of shards that are all there. Raises UserError for a corpus without text and an empty split."""
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
    if not counts["train"]:
        raise _empty_split("train", counts, config)
    index = {
        "content_hash": content_hash,
        "tokenizer": summaries[0]["tokenizer"],
        "dtype": summaries[0]["dtype"],
        "skipped": skipped,
        "bad_records": bad.summary(),
        "splits": splits,
        **sum_scored(summary["splits"]["validation"] for summary in summaries),
    }
    with whole(directory / INDEX) as file:
        file.write_text(json.dumps(index))
