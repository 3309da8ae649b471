"""Rows of packed examples: documents through an objective, side by side in one row."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args, override

import numpy as np
import xxhash

from llama_jax.config import Json, UserError
from llama_jax.data.config import DataConfig, Packing, Split
from llama_jax.data.corpus.corpus import Corpus, Shard, TokenStream, map_array
from llama_jax.data.corpus.shards import BlockHasher, Blocks
from llama_jax.data.corpus.workers import Work, make_in_processes
from llama_jax.data.objectives.base import FLOATS, Document, Example, Objective, Vocabulary
from llama_jax.data.objectives.decoder import Causal
from llama_jax.data.rows.fitting import RowIndex, fit_rows
from llama_jax.data.rows.windows import HostBatch, Rows
from llama_jax.files import PARTIAL, lock, replacing, sealed, unsealed, write_text

KINDS = ("pieces", "rows")  # of an index's arrays
FORMAT = 1  # of an index's files; part of their directory's name
PART = ".part"  # ends the names of files of one shard's rows, which are there until the index is
WORTH_A_PROCESS = 1 << 21  # documents whose planning takes about as long as a process needs to start
UNUSED = np.random.default_rng(0)
SOURCE = "source_"  # begins the names of fields of the source


@dataclasses.dataclass(frozen=True)
class Packer:
    """Options by which documents become rows. The index of a corpus's rows is kept in files below its directory."""

    objective: Objective
    packing: Packing
    vocabulary: Vocabulary
    sequence_length: int

    @property
    def needs_index(self) -> bool:
        """True unless rows are windows of the stream."""
        return type(self.objective) is not Causal or self.packing != "cut"

    @property
    def capacity(self) -> tuple[int, ...]:
        """Positions of a row's streams: (target,) or (target, source)."""
        source = self.objective.source_length
        return (self.sequence_length,) if source is None else (self.sequence_length, source)

    def directory(self, corpus: Corpus) -> Path:
        """Return the directory of the index, named after all that it depends on: of lengths, their values."""
        objective = self.objective
        kind = [FORMAT, self.packing, self.capacity, objective.bare, objective.overlap, objective.divisible]
        digest = hashlib.sha256(json.dumps([*kind, self.vocabulary.num_special]).encode())
        sizes = np.arange(2 * sum(self.capacity) + 2)
        for starts in (sizes, sizes // 2):
            for lengths in objective.lengths(sizes, starts):
                digest.update(np.asarray(lengths, np.int64).tobytes())
        return corpus.directory / "rows" / digest.hexdigest()[:32]

    def write(
        self,
        corpus: Corpus,
        *,
        num_workers: int | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Write the index of a corpus's rows, unless it is there: the same one, however often it was interrupted.

        `num_workers` processes fit the shards (default: as many as cores, few for few documents). `progress` is called
        with the documents that are done, and all documents. Raises UserError where no row takes a token.
        """
        for stream in (corpus.train, corpus.validation):
            self.objective.check_parts(stream.num_documents, sum(len(shard.parts) for shard in stream.shards))
        directory = self.directory(corpus)
        files = {split: directory / f"{split}.json" for split in get_args(Split)}
        if all(self._is_whole(corpus, split) for split in files):
            return  # without a lock: the disk may be one that cannot be written
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{directory}' cannot be made ({error.strerror}): set another data.cache_dir") from None
        with lock(corpus.directory / "rows.lock"):
            missing = {split: file for split, file in files.items() if not self._is_whole(corpus, split)}
            for file in missing.values():
                if file.exists():
                    print(f"'{file}' is damaged: it is made again", file=sys.stderr)
            self._write_parts(corpus, directory, list(missing), num_workers, progress)
            for split, file in missing.items():
                write_text(file, sealed(self._write(corpus, directory, split)))
            for leftover in (*directory.glob(f"*{PART}"), *directory.glob(f".*{PARTIAL}*")):
                leftover.unlink(missing_ok=True)

    def _write_parts(
        self,
        corpus: Corpus,
        directory: Path,
        splits: Sequence[Split],
        num_workers: int | None,
        progress: Callable[[int, int], None],
    ) -> None:
        """Write the parts of these splits' indexes that are not there, each that of a shard."""
        sizes: dict[tuple[Split, int], int] = {
            (split, n): len(s.documents) for split in splits for n, s in enumerate(getattr(corpus, split).shards)
        }
        missing = [part for part in sizes if not _part_file(directory, *part).exists()]
        jobs = {number: (part, sizes[part]) for number, part in enumerate(missing)}
        total, left = sum(sizes.values()), sum(size for _, size in jobs.values())
        num_workers = min(num_workers or min(os.cpu_count() or 1, left // WORTH_A_PROCESS), len(jobs))
        progress(total - left, total)  # the first part may take long
        if num_workers > 1:
            start = functools.partial(_part_work, self, directory, corpus.directory, corpus.config)
            make_in_processes("rows", jobs, start, num_workers, lambda done: progress(total - left + done, total))
            return
        for part, size in jobs.values():
            self.write_part(directory, corpus, *part)
            left -= size
            progress(total - left, total)

    def write_part(self, directory: Path, corpus: Corpus, split: Split, number: int) -> None:
        """Fit the documents of a split's shard `number` into rows and write these to a file in `directory`."""
        index = self._fit(getattr(corpus, split).shards[number])
        content = index.pieces.astype("<i8").tobytes() + index.rows.astype("<i8").tobytes()
        header = {
            "corpus": corpus.content_hash,
            "checksum": xxhash.xxh3_128_hexdigest(content),
            "num_pieces": len(index.pieces),
            "num_tokens": index.num_tokens,
            "num_dropped": index.num_dropped,
        }
        with replacing(_part_file(directory, split, number)) as partial:
            partial.write_bytes(sealed(header).encode() + b"\n" + content)

    def _fit(self, shard: Shard) -> RowIndex:
        before, after = self.vocabulary.num_special
        return fit_rows(shard, self.objective, self.packing, self.capacity, num_before=before, num_after=after)

    def _is_whole(self, corpus: Corpus, split: Split) -> bool:
        try:
            return self.open(corpus, split).num_tokens >= 0
        except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
            return False

    def _write(self, corpus: Corpus, directory: Path, split: Split) -> Json:
        """Write the arrays of a split's index, shard by shard; return its counts and their checksums."""
        stream: TokenStream = getattr(corpus, split)
        counts: dict[str, int] = dict.fromkeys(("num_rows", "num_pieces", "num_tokens", "num_dropped"), 0)
        with contextlib.ExitStack() as stack:
            files = {
                kind: stack.enter_context(stack.enter_context(replacing(directory / f"{split}.{kind}")).open("wb"))
                for kind in KINDS
            }
            hashers = {kind: BlockHasher() for kind in KINDS}

            def write(kind: str, values: np.ndarray) -> None:
                values = values.astype("<i8")
                files[kind].write(values.tobytes())
                hashers[kind].update(values)

            write("rows", np.zeros(1))
            for number, (shard, start) in enumerate(zip(stream.shards, stream.starts, strict=False)):
                index = _read_part(_part_file(directory, split, number), corpus) or self._fit(shard)
                write("pieces", index.pieces + np.array([start, 0]))
                write("rows", index.rows[1:] + counts["num_pieces"])
                counts["num_rows"] += len(index.rows) - 1
                counts["num_pieces"] += len(index.pieces)
                counts["num_tokens"] += index.num_tokens
                counts["num_dropped"] += index.num_dropped
        return counts | {"blocks": {kind: hasher.text() for kind, hasher in hashers.items()}}

    def open(self, corpus: Corpus, split: Split) -> RowIndex:
        """Return the index of a split's rows; its pieces are places in the stream."""
        directory = self.directory(corpus)
        counts = unsealed((directory / f"{split}.json").read_text())
        files = {kind: directory / f"{split}.{kind}" for kind in KINDS}
        pieces = _map(files["pieces"], 2 * counts["num_pieces"]).reshape(-1, 2)
        rows = _map(files["rows"], counts["num_rows"] + 1)
        blocks = Blocks(lambda: counts.get("blocks", {}), files)
        return RowIndex(pieces, rows, counts["num_tokens"], counts["num_dropped"], blocks)


def _part_work(packer: Packer, directory: Path, corpus: Path, config: DataConfig) -> Work[tuple[Split, int]]:
    opened = Corpus(corpus, config)
    return lambda _, part, __: packer.write_part(directory, opened, *part)


def _part_file(directory: Path, split: Split, number: int) -> Path:
    """Return the file of the rows of a split's shard `number`, until the whole index is written."""
    return directory / f"{split}-{number:05}{PART}"


def _read_part(file: Path, corpus: Corpus) -> RowIndex | None:
    """Return what `write_part` has written; None where it is missing, damaged or of another corpus."""
    try:
        header, content = file.read_bytes().split(b"\n", 1)
        counts = unsealed(header.decode())
        if (counts["corpus"], counts["checksum"]) != (corpus.content_hash, xxhash.xxh3_128_hexdigest(content)):
            return None
        pieces, rows = np.split(np.frombuffer(content, "<i8"), [2 * counts["num_pieces"]])
        return RowIndex(pieces.reshape(-1, 2), rows, counts["num_tokens"], counts["num_dropped"])
    except (OSError, ValueError, KeyError, RecursionError):
        return None


def _map(file: Path, count: int) -> np.ndarray:
    try:
        return map_array(file, "<i8", count, file.stat().st_size)
    except ValueError:
        raise UserError(f"'{file}' is not whole: remove its directory, and it is made again") from None


class PackedRows(Rows):
    """Examples packed as an index of the stream's rows has it.

    The noise of a piece is a function of (seed, epoch, piece): not of the row or the batch that it is in.
    """

    def __init__(self, stream: TokenStream, packer: Packer, index: RowIndex, *, seed: tuple[int, ...]):
        self._stream, self._packer, self._index, self._seed = stream, packer, index, seed
        self.num_rows, self.num_tokens, self.num_dropped = len(index.rows) - 1, index.num_tokens, index.num_dropped
        self.num_positions = self.num_rows * sum(packer.capacity)

    @override
    def read(self, places: Sequence[tuple[int, int]]) -> HostBatch:
        self._stream.begin_batch()
        objective, length = self._packer.objective, self._packer.sequence_length
        batch = empty_batch(objective, len(places), length)
        for number, (epoch, row) in enumerate(places):
            if row < self.num_rows:
                examples = [self._example(epoch, place, size) for place, size in self._index.pieces_of(row)]
                for name, values in pack(examples, length, objective.source_length).items():
                    batch[name][number] = values
        return batch

    def _example(self, epoch: int, place: int, size: int) -> Example:
        """Return the example of the piece of `size` tokens at `place` in the stream."""
        objective, vocabulary = self._packer.objective, self._packer.vocabulary
        rng = np.random.default_rng([*self._seed, epoch, place]) if objective.draws else UNUSED
        shard, offset = self._stream.shard_at(place)
        local = place - offset
        document = int(shard.documents.searchsorted(local, side="right")) - 1
        # Parts that began before the piece begin with it.
        first, last = shard.parts.searchsorted([shard.documents[document], local + size])
        parts = np.maximum(shard.parts[first:last] - local, 0)
        num_documents = len(shard.documents)
        other = None
        if objective.wants_other and num_documents > 1:  # a random document of the same shard
            number = (document + int(rng.integers(1, num_documents))) % num_documents
            start, end = [*shard.documents[number : number + 2], len(shard.tokens)][:2]
            before, after = vocabulary.num_special if objective.bare else (0, 0)
            other = shard.read(int(start) + before, int(end) - after)
        return objective.example(Document(shard.read(local, local + size), parts, other), rng, vocabulary)


def pack(examples: Sequence[Example], length: int, source_length: int | None) -> Example:
    """Return one row: the examples' fields one after another, then zeros up to `length` (`source_length`).

    `segment_ids` and, with a source, `source_segment_ids` number the examples from 1, equally in both; 0 is padding.
    Raises ValueError where the examples do not fit, or are not of one objective.
    """
    names = list(examples[0]) if examples else []
    if not names or any(list(example) != names for example in examples):
        raise ValueError("a row needs examples, all with the same fields")
    row: Example = {}
    for prefix, capacity in (("", length), (SOURCE, source_length)):
        stream = [name for name in names if name.startswith(SOURCE) == bool(prefix)]
        if bool(stream) != (capacity is not None):
            raise ValueError("source_length is for examples with a source, and they need it")
        if capacity is None:
            continue
        sizes = [len(example[stream[0]]) for example in examples]
        if any(len(example[name]) != size for example, size in zip(examples, sizes, strict=True) for name in stream):
            raise ValueError("the fields of an example's stream must be equally long")
        if sum(sizes) > capacity:
            raise ValueError(f"examples of {sum(sizes)} {prefix}positions do not fit into a row of {capacity}")
        padding = capacity - sum(sizes)
        for name in stream:
            parts = [example[name] for example in examples]
            row[name] = np.concatenate([*parts, np.zeros(padding, parts[0].dtype)])
        numbers = np.append(np.arange(1, len(examples) + 1, dtype=np.int32), np.int32(0))
        row[f"{prefix}segment_ids"] = np.repeat(numbers, [*sizes, padding])
    return row


def empty_batch(objective: Objective, num_rows: int, sequence_length: int) -> HostBatch:
    """Return the objective's batch of nothing but padding."""
    names = (*objective.fields(), "segment_ids")
    if objective.source_length is not None:
        names += ("source_segment_ids",)
    return {
        name: np.zeros(
            (num_rows, (objective.source_length or 0) if name.startswith(SOURCE) else sequence_length),
            np.float32 if name in FLOATS else np.int32,
        )
        for name in names
    }
