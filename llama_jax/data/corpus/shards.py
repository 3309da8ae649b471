"""One shard: the documents of its units tokenized and written, wholly or not at all."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np
import xxhash

from llama_jax.config import Json, UserError
from llama_jax.data.chat import ChatTemplate, chat_tokens, pair_of, pair_tokens
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.corpus.documents import BadRecords, ScoredBytes, good_records, split_of, text_bytes
from llama_jax.data.readers.records import EMPTY_PART, BadRecord, Record, Unit
from llama_jax.files import replacing, write_text
from llama_jax.tokenizers import Tokenizer

BATCH_CHARS = 1 << 20  # text that is tokenized at once; bounds the memory
BLOCK = 1 << 18  # bytes of an array that have a checksum
ARRAYS = {"tokens": None, "documents": "<i8", "parts": "<i8"}  # a shard's arrays and their types; None: the ids' type


def array_file(directory: Path, split: str, number: int, array: str) -> Path:
    """Return the file of a shard's array."""
    return directory / f"{split}-{number:05}.{array}"


def summary_file(directory: Path, number: int) -> Path:
    """Return the file that has the sizes and hashes of a shard's arrays."""
    return directory / f"shard-{number:05}.json"


@dataclasses.dataclass(frozen=True)
class ShardMaker:
    """Makes the shards of one corpus in `directory`; `key` is a hash of the files and options that they are made of."""

    directory: Path
    key: str
    config: DataConfig
    tokenizer: Tokenizer

    def summary(self, number: int) -> Json | None:
        """Return the summary of a shard, or None where it is not there or not whole.

        Raises UserError for a shard of another tokenizer, or of other files or options.
        """
        try:
            summary = json.loads(summary_file(self.directory, number).read_text())
            fingerprint, key, splits = summary["tokenizer"], summary["key"], summary["splits"]
        except (OSError, ValueError, KeyError):
            return None
        if fingerprint != self.tokenizer.fingerprint:
            raise UserError(
                f"'{self.directory}' has shards of another tokenizer (fingerprint {fingerprint[:8]}, not "
                f"{self.tokenizer.fingerprint[:8]}): give that tokenizer or another directory"
            )
        if key != self.key:
            raise UserError(f"'{self.directory}' has shards of other files or options: give another directory")
        for split, sizes in splits.items():
            for array, dtype in ARRAYS.items():
                file = array_file(self.directory, split, number, array)
                size = sizes[array] * np.dtype(dtype or summary["dtype"]).itemsize
                if size and (not file.is_file() or file.stat().st_size != size):
                    return None
        return summary

    def make(self, number: int, units: Sequence[Unit], progress: Callable[[int], None] = lambda _: None) -> None:
        """Write the files of a shard.

        `progress` is called with the number of bytes of the units that are done. Raises UserError for files that
        cannot be read, for ids outside the vocabulary and for too many bad records.
        """
        tokenizer, config = self.tokenizer, self.config
        dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
        bad, skipped, scored = BadRecords(config.max_bad_records), [], ScoredBytes(tokenizer)
        with contextlib.ExitStack() as stack:
            writers = {
                split: _SplitWriter(self.directory, split, number, tokenizer, dtype, stack) for split in get_args(Split)
            }
            for batch, done in self._batches(units, bad, skipped):
                tokens = self._tokens_of_batch([record for record, _, _ in batch])
                for (record, split, num_bytes), parts in zip(batch, tokens, strict=True):
                    if len(record.parts) > 1 and not all(len(part) for part in parts[: len(record.parts)]):
                        bad.add(BadRecord(record.where, EMPTY_PART))
                        continue
                    writers[split].add(parts, num_bytes)
                    if split == "validation":
                        scored.add(record, parts)
                for writer in writers.values():
                    writer.flush()
                progress(done)
            splits = {split: writer.summary() for split, writer in writers.items()}
        summary = {
            "tokenizer": tokenizer.fingerprint,
            "key": self.key,
            "dtype": dtype.str,
            "splits": splits | {"validation": splits["validation"] | scored.summary()},
            "bad_records": bad.summary(),
            "skipped": skipped,
        }
        write_text(
            summary_file(self.directory, number), json.dumps(summary, indent=1)
        )  # last: it marks the shard as complete

    def _batches(
        self, units: Sequence[Unit], bad: BadRecords, skipped: list[str]
    ) -> Iterator[tuple[list[tuple[Record, Split, int]], int]]:
        """Yield (records with split and bytes of text, of about BATCH_CHARS characters, bytes of the units done)."""
        separators = (*self.tokenizer.eos_ids[:1], *self.tokenizer.start_ids)  # llm.c puts Llama-3's BOS there
        batch: list[tuple[Record, Split, int]] = []
        size = finished = 0
        for unit in units:
            read = 0
            for record, content in good_records([unit], self.config, separators, bad, skipped):
                batch.append((record, split_of(content, self.config), text_bytes(record, content)))
                size += len(content)
                read += len(content)
                if size >= BATCH_CHARS:
                    yield batch, finished + min(read, unit.size)  # text is shorter than its file, as a rule
                    batch, size = [], 0
            finished += unit.size
        if batch:
            yield batch, finished

    def _tokens_of_batch(self, records: Sequence[Record]) -> list[list[np.ndarray]]:
        """Return the ids of every record's parts, all texts encoded in one call."""
        texts = [part for record in records for part in record.parts if isinstance(part, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        return [self._tokens_of(record, encoded) for record in records]

    def _tokens_of(self, record: Record, encoded: Iterator[np.ndarray]) -> list[np.ndarray]:
        """Return the ids of each part; those of a text are the next of `encoded`."""
        parts = []
        pair = pair_of(record.parts)
        for part in record.parts if pair is None else ():
            if isinstance(part, str):
                parts.append(next(encoded))
            elif isinstance(part, np.ndarray):
                parts.append(self._checked(part, record))
            else:
                parts += self._tokens_of_chat(part, record)
        if pair is not None:
            parts = self._tokens_of_pair(pair, record)
        # Every document is put between BOS and EOS once: ids that come with them lose them first.
        start, end = self.tokenizer.start_ids, self.tokenizer.eos_ids[:1]
        if not isinstance(record.parts[0], str) and start and tuple(parts[0][: len(start)]) == start:
            parts[0] = parts[0][len(start) :]
        if not isinstance(record.parts[-1], str) and len(parts[-1]) and parts[-1][-1] in end:
            parts[-1] = parts[-1][:-1]
        return parts

    def _template(self, record: Record) -> ChatTemplate:
        if self.config.chat_template is None:
            raise UserError(f"{record.where} holds the messages of a chat: set chat_template")
        return self.config.chat_template

    def _tokens_of_pair(self, pair: tuple[Any, Any, int], record: Record) -> list[np.ndarray]:
        parts = pair_tokens(pair, self._template(record), self.tokenizer)
        eos = self.tokenizer.eos_ids[:1]
        if eos and parts[-1][-1:] != eos[0]:
            parts.append(parts[-1][:0])  # as for chats
        return parts

    def _tokens_of_chat(self, messages: list[Json], record: Record) -> list[np.ndarray]:
        tokens, starts = chat_tokens(messages, self._template(record), self.tokenizer)
        parts = np.split(tokens, starts)
        eos = self.tokenizer.eos_ids[:1]
        if len(parts) % 2 == 0 and eos and tokens[-1] != eos[0]:
            parts.append(tokens[:0])  # the EOS behind every document does not belong to the answer
        return parts

    def _checked(self, ids: np.ndarray, record: Record) -> np.ndarray:
        outside = ids[(ids < 0) | (ids >= self.tokenizer.vocab_size)]
        if len(outside):
            raise UserError(
                f"{record.where} has the id {outside[0]}, outside this tokenizer's vocabulary of "
                f"{self.tokenizer.vocab_size}: use the tokenizer that the ids were made with, or leave the file out"
            )
        return ids.astype(np.int32)


class _SplitWriter:
    """Files of one split of a shard, which get their names when `stack` is left; an empty array has no file."""

    def __init__(
        self,
        directory: Path,
        split: Split,
        number: int,
        tokenizer: Tokenizer,
        dtype: np.dtype,
        stack: contextlib.ExitStack,
    ):
        self._paths = {array: array_file(directory, split, number, array) for array in ARRAYS}
        self._dtypes = {array: np.dtype(kind or dtype) for array, kind in ARRAYS.items()}
        self._stack = stack
        self._begin, self._end = np.array(tokenizer.start_ids, np.int32), np.array(tokenizer.eos_ids[:1], np.int32)
        self._files: dict[str, tuple[BinaryIO, Any, BlockHasher]] = {}  # with the hashes of each
        self._sizes = dict.fromkeys(ARRAYS, 0)
        self._num_bytes = self._place = 0
        self._pending: dict[str, list[Any]] = {array: [] for array in ARRAYS}

    def add(self, parts: list[np.ndarray], num_bytes: int) -> None:
        """Add a document: BOS, the ids of its parts, EOS. One without any of these is left out."""
        pieces = [self._begin, *parts, self._end]
        if not any(map(len, pieces)):
            return
        # Where each piece begins, and the document's end; the file of parts has those of the second part and on.
        places = list(itertools.accumulate(map(len, pieces), initial=self._place))
        self._pending["documents"].append(self._place)
        self._pending["parts"] += places[2:-2]
        self._pending["tokens"] += pieces
        self._place = places[-1]
        self._num_bytes += num_bytes

    def flush(self) -> None:
        """Write what was added since the last call."""
        for array, pending in self._pending.items():
            if pending:
                if array not in self._files:
                    path = self._stack.enter_context(replacing(self._paths[array]))
                    file = self._stack.enter_context(path.open("wb"))
                    self._files[array] = file, hashlib.sha256(), BlockHasher()
                file, digest, blocks = self._files[array]
                for values in pending if array == "tokens" else [np.array(pending)]:
                    for begin in range(0, len(values), BATCH_CHARS):
                        part = values[begin : begin + BATCH_CHARS].astype(self._dtypes[array])
                        file.write(part)
                        digest.update(part)
                        blocks.update(part)
                    self._sizes[array] += len(values)
            pending.clear()

    def summary(self) -> Json:
        """Return the sizes of the arrays, the bytes of text and the files' hashes, as JSON."""
        hashes = {array: digest.hexdigest() for array, (_, digest, _) in self._files.items()}
        blocks = {array: hasher.text() for array, (*_, hasher) in self._files.items()}
        return self._sizes | {"num_bytes": self._num_bytes, "sha256": hashes, "blocks": blocks}


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
    """The checksums of arrays by blocks, compared when a block is first read.

    A corpus is far larger than what a start should read, so its bytes are compared as they are used: once each.

    sums: returns the checksums by the arrays' names, as `BlockHasher.text` has them.
    files: the file of each array.
    """

    def __init__(self, sums: Callable[[], Mapping[str, str]], files: Mapping[str, Path]):
        self._read, self._files = sums, files
        self._seen: dict[str, np.ndarray] = {}
        self._whole = set[str]()  # arrays of which all has been compared

    @functools.cached_property
    def _sums(self) -> Mapping[str, str]:
        return self._read()

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
        file, content = self._files[array], memoryview(values).cast("B")
        for number in range(first, last):
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


def block_sums(summary: Path, split: str) -> dict[str, str]:
    """Return the checksums of a shard's arrays, as its `summary` file has them; none of an earlier version's shard."""
    try:
        return json.loads(summary.read_text())["splits"][split].get("blocks", {})
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"'{summary}' is damaged: remove '{summary.parent}', and it is made again") from None
