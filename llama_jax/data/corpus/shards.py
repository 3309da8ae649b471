"""One shard: its units' documents tokenized and written, wholly or not at all."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.chat import chat_tokens
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.corpus.documents import BadRecords, ScoredBytes, good_records, separators_of, split_of, text_bytes
from llama_jax.data.readers.records import EMPTY_PART, BadRecord, Record, Unit
from llama_jax.tokenizers import Tokenizer

BATCH_CHARS = 1 << 20  # text tokenized at once: bounds the memory
ARRAYS = {"tokens": None, "documents": "<i8", "parts": "<i8"}  # a shard's files and what they hold; None: the ids' type
PARTIAL = ".partial-"  # in the names of files that are not whole yet


def array_file(directory: Path, split: str, number: int, array: str) -> Path:
    """Where a shard's array is."""
    return directory / f"{split}-{number:05}.{array}"


@dataclasses.dataclass(frozen=True)
class ShardSet:
    """What the shards of a corpus have in common: their directory, what they are made from, and by which tokenizer."""

    directory: Path
    key: str
    tokenizer: str

    def summary(self, number: int) -> dict[str, Any] | None:
        """What is said of a shard that is there wholly, or None.

        Raises UserError for a shard that is of another tokenizer or of other files and options.
        """
        try:
            summary = json.loads((self.directory / f"shard-{number:05}.json").read_text())
            fingerprint, key, splits = summary["tokenizer"], summary["key"], summary["splits"]
        except (OSError, ValueError, KeyError):
            return None
        if fingerprint != self.tokenizer:
            raise UserError(
                f"'{self.directory}' has shards of another tokenizer (fingerprint {fingerprint[:8]}, not "
                f"{self.tokenizer[:8]}): give that tokenizer or another directory"
            )
        if key != self.key:
            raise UserError(f"'{self.directory}' has shards of other files or options: give another directory")
        dtype = np.dtype(summary["dtype"])
        for split, arrays in splits.items():
            for array, kind in ARRAYS.items():
                file, size = (
                    array_file(self.directory, split, number, array),
                    arrays[array] * np.dtype(kind or dtype).itemsize,
                )
                if size and (not file.is_file() or file.stat().st_size != size):
                    return None
        return summary


def make_shard(
    shard_set: ShardSet,
    number: int,
    units: Sequence[Unit],
    config: DataConfig,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Makes the files of a shard; returns its summary.

    `progress` is called with the number of bytes of the units that are done. Raises UserError for what cannot be read,
    for ids outside the vocabulary and for too many bad records.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    reading = _Reading(units, config, separators_of(tokenizer.start_ids, tokenizer.eos_ids))
    scored = ScoredBytes(tokenizer)
    with contextlib.ExitStack() as stack:
        writers = {
            split: _SplitWriter(shard_set.directory, split, number, tokenizer, stack) for split in get_args(Split)
        }
        for batch in reading.batches():
            tokens = _tokens_of_batch([record for record, _ in batch], tokenizer, config)
            for (record, content), parts in zip(batch, tokens, strict=True):
                if len(record.parts) > 1 and not all(len(part) for part in parts):
                    reading.bad.add(BadRecord(record.where, EMPTY_PART))
                else:
                    split = split_of(content, config)
                    writers[split].add(parts, text_bytes(record, content))
                    if split == "validation":
                        scored.add(record, parts)
            for writer in writers.values():
                writer.flush(dtype)
            progress(reading.done)
        splits = {split: writer.summary() for split, writer in writers.items()}
        splits["validation"] |= scored.summary()
    summary = {
        "tokenizer": shard_set.tokenizer,
        "key": shard_set.key,
        "dtype": dtype.str,
        "splits": splits,
        "bad_records": reading.bad.summary(),
        "skipped": reading.skipped,
    }
    with whole(shard_set.directory / f"shard-{number:05}.json") as file:  # last: it says that all is there
        file.write_text(json.dumps(summary, indent=1))
    return summary


@contextlib.contextmanager
def whole(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` when all is written; no reader sees a part of it."""
    partial = file.with_name(f".{file.name}{PARTIAL}{uuid.uuid4().hex}")
    try:
        yield partial
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Of several processes, one at a time is inside, or all those that share."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


class _Reading:
    """The units' good records in batches, with what is known of the others."""

    def __init__(self, units: Sequence[Unit], config: DataConfig, separators: Sequence[int]):
        self._units, self._config, self._separators = units, config, separators
        self.done = 0  # bytes
        self.bad = BadRecords(config.max_bad_records)
        self.skipped: list[str] = []

    def batches(self) -> Iterator[list[tuple[Record, bytes]]]:
        """Records with their content, of about BATCH_CHARS characters."""
        batch: list[tuple[Record, bytes]] = []
        size = finished = 0
        for unit in self._units:
            read = 0
            for record, content in good_records(unit, self._config, self._separators, self.bad, self.skipped):
                batch.append((record, content))
                size += len(content)
                read += len(content)
                if size >= BATCH_CHARS:
                    self.done = finished + min(read, unit.size)  # text is not quite as long as what it is stored in
                    yield batch
                    batch, size = [], 0
            finished += unit.size
        self.done = finished
        if batch:
            yield batch


def _tokens_of_batch(records: Sequence[Record], tokenizer: Tokenizer, config: DataConfig) -> list[list[np.ndarray]]:
    """The ids of every record's parts, all texts encoded in one call."""
    texts = [part for record in records for part in record.parts if isinstance(part, str)]
    encoded = iter(tokenizer.encode_batch(texts))
    return [_tokens_of(record, encoded, tokenizer, config) for record in records]


def _tokens_of(
    record: Record, encoded: Iterator[np.ndarray], tokenizer: Tokenizer, config: DataConfig
) -> list[np.ndarray]:
    """The ids of each part; a text's are the next of `encoded`."""
    parts = []
    for part in record.parts:
        if isinstance(part, str):
            parts.append(next(encoded))
        elif isinstance(part, np.ndarray):
            parts.append(_checked(part, record, tokenizer))
        else:
            parts += _tokens_of_chat(part, record, tokenizer, config)
    start = tokenizer.start_ids
    if not isinstance(record.parts[0], str) and start and tuple(parts[0][: len(start)]) == start:
        parts[0] = parts[0][len(start) :]  # every document is put between them, once
    if not isinstance(record.parts[-1], str) and len(parts[-1]) and parts[-1][-1] in tokenizer.eos_ids[:1]:
        parts[-1] = parts[-1][:-1]
    return parts


def _tokens_of_chat(messages: list, record: Record, tokenizer: Tokenizer, config: DataConfig) -> list[np.ndarray]:
    if config.chat_template is None:
        raise UserError(f"{record.where} holds the messages of a chat: set chat_template")
    tokens, starts = chat_tokens(messages, config.chat_template, tokenizer)
    parts = np.split(tokens, starts)
    if len(parts) % 2 == 0 and tokenizer.eos_ids and tokens[-1] != tokenizer.eos_ids[0]:
        parts.append(tokens[:0])  # the EOS behind every document is not of the answer
    return parts


def _checked(ids: np.ndarray, record: Record, tokenizer: Tokenizer) -> np.ndarray:
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        outside = ids[(ids < 0) | (ids >= tokenizer.vocab_size)][0]
        raise UserError(
            f"{record.where} has the id {outside}, outside this tokenizer's vocabulary of {tokenizer.vocab_size}: use "
            "the tokenizer that the ids were made with, or leave the file out"
        )
    return ids.astype(np.int32)


class _SplitWriter:
    """A split's files of a shard, under their names once the stack is left; what would be empty is no file."""

    def __init__(self, directory: Path, split: Split, number: int, tokenizer: Tokenizer, stack: contextlib.ExitStack):
        self._directory, self._split, self._number, self._stack = directory, split, number, stack
        self._begin = np.array(tokenizer.start_ids, np.int32)
        self._end = np.array(tokenizer.eos_ids[:1], np.int32)
        self._files: dict[str, tuple[BinaryIO, Any]] = {}
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._num_bytes = 0
        self._pending: dict[str, list] = {array: [] for array in ARRAYS}
        self._place = 0

    def add(self, parts: list[np.ndarray], num_bytes: int) -> None:
        """A document: BOS, its parts' ids, EOS; one with none of these is left out."""
        if not any(map(len, (self._begin, *parts, self._end))):
            return
        self._pending["documents"].append(self._place)
        self._pending["tokens"] += [self._begin, *parts, self._end]
        self._place += len(self._begin) + len(parts[0])
        for part in parts[1:]:
            self._pending["parts"].append(self._place)
            self._place += len(part)
        self._place += len(self._end)
        self._num_bytes += num_bytes

    def flush(self, dtype: np.dtype) -> None:
        """Writes what was added."""
        for array, pending in self._pending.items():
            if pending:
                values = np.concatenate(pending).astype(dtype) if array == "tokens" else np.array(pending, "<i8")
                file, digest = self._files.get(array) or self._open(array)
                file.write(values)
                digest.update(values)
                self._sizes[array] += len(values)
                pending.clear()

    def _open(self, array: str) -> tuple[BinaryIO, Any]:
        path = self._stack.enter_context(whole(array_file(self._directory, self._split, self._number, array)))
        self._files[array] = self._stack.enter_context(path.open("wb")), hashlib.sha256()
        return self._files[array]

    def summary(self) -> dict[str, Any]:
        """Sizes of the arrays, bytes of text and the files' hashes."""
        hashes = {array: digest.hexdigest() for array, (_, digest) in self._files.items()}
        return self._sizes | {"num_bytes": self._num_bytes, "sha256": hashes}
