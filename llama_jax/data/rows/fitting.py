"""Which pieces of which documents stand together in a row: planned once, kept on disk."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Int

from llama_jax.config import UserError
from llama_jax.data.config import Packing, Split
from llama_jax.data.corpus.corpus import Corpus, Shard, TokenStream, map_array
from llama_jax.data.objectives.base import Objective, Vocabulary
from llama_jax.data.objectives.decoder import Causal
from llama_jax.files import lock, replacing, write_text

FORMAT = 1  # of a plan's files; part of their directory's name

MIN_PIECE = 16  # tokens; the rest of a row stays empty where less of a document would fit
MAX_TRIES = 16  # sizes of room, and rows with that room, that are looked at for a place


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Rows of one shard: row r has the pieces `rows[r]` to `rows[r + 1]`.

    A piece is (where it begins in the shard's tokens, how many it has). `num_tokens` are the positions that the
    examples fill, `num_dropped` the documents that are in no row.
    """

    pieces: Int[np.ndarray, "p 2"]
    rows: Int[np.ndarray, " r"]
    num_tokens: int
    num_dropped: int


@dataclasses.dataclass(frozen=True)
class Packer:
    """How documents become rows, and where the plans of a corpus are kept: beside its shards."""

    objective: Objective
    packing: Packing
    vocabulary: Vocabulary
    sequence_length: int

    @property
    def plans(self) -> bool:
        """Whether a plan is needed: to cut the stream into windows takes none."""
        return type(self.objective) is not Causal or self.packing != "cut"

    @property
    def capacity(self) -> tuple[int, ...]:
        """Positions of a row's streams: (target,) or (target, source)."""
        source = self.objective.source_length
        return (self.sequence_length,) if source is None else (self.sequence_length, source)

    def directory(self, corpus: Corpus) -> Path:
        """Named after all that a plan depends on, lengths of examples by their figures."""
        objective, ends = self.objective, special_ends(self.vocabulary)
        kind = [FORMAT, self.packing, self.capacity, objective.bare, objective.overlap, objective.divisible, ends]
        digest = hashlib.sha256(json.dumps(kind).encode())
        sizes = np.arange(2 * sum(self.capacity) + 2)
        for starts in (sizes, sizes // 2):
            for lengths in objective.lengths(sizes, starts):
                digest.update(np.asarray(lengths, np.int64).tobytes())
        return corpus.directory / "rows" / digest.hexdigest()[:32]

    def write(self, corpus: Corpus) -> None:
        """Plans the rows of a corpus, shard by shard, unless it is done.

        Raises UserError where no row takes a token.
        """
        for stream in (corpus.train, corpus.validation):
            self.objective.check_parts(stream.num_documents, sum(len(shard.parts) for shard in stream.shards))
        directory = self.directory(corpus)
        missing = [split for split in get_args(Split) if not (directory / f"{split}.json").exists()]
        if not missing:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{directory}' cannot be made ({error.strerror}): set another data.cache_dir") from None
        with lock(corpus.directory / "rows.lock"):
            for split in missing:
                if not (directory / f"{split}.json").exists():
                    self._write(directory, split, getattr(corpus, split))

    def _write(self, directory: Path, split: Split, stream: TokenStream) -> None:
        before, after = special_ends(self.vocabulary)
        counts = dict.fromkeys(("num_rows", "num_pieces", "num_tokens", "num_dropped"), 0)
        with contextlib.ExitStack() as stack:
            pieces, rows = (
                stack.enter_context(stack.enter_context(replacing(directory / f"{split}.{kind}")).open("wb"))
                for kind in ("pieces", "rows")
            )
            rows.write(np.zeros(1, "<i8").tobytes())
            for shard, start in zip(stream.shards, stream.starts, strict=False):
                plan = fit_rows(shard, self.objective, self.packing, self.capacity, num_before=before, num_after=after)
                pieces.write((plan.pieces + np.array([start, 0])).astype("<i8").tobytes())
                rows.write((plan.rows[1:] + counts["num_pieces"]).astype("<i8").tobytes())
                counts["num_rows"] += len(plan.rows) - 1
                counts["num_pieces"] += len(plan.pieces)
                counts["num_tokens"] += plan.num_tokens
                counts["num_dropped"] += plan.num_dropped
        write_text(directory / f"{split}.json", json.dumps(counts))  # last: it marks the index as complete

    def open(self, corpus: Corpus, split: Split) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """(pieces [P, 2] of the stream, where each row's begin and the last one's end, counts) of a split."""
        directory = self.directory(corpus)
        counts = json.loads((directory / f"{split}.json").read_text())
        pieces = _map(directory / f"{split}.pieces", 2 * counts["num_pieces"]).reshape(-1, 2)
        return pieces, _map(directory / f"{split}.rows", counts["num_rows"] + 1), counts


def _map(file: Path, count: int) -> np.ndarray:
    try:
        return map_array(file, "<i8", count, file.stat().st_size)
    except ValueError:
        raise UserError(f"'{file}' is not whole: remove its directory, and it is made again") from None


def special_ends(vocabulary: Vocabulary) -> tuple[int, int]:
    """How many special tokens stand before and after every document of a corpus."""
    return len(vocabulary.start_ids), int(vocabulary.eos_id is not None)


def fit_rows(
    shard: Shard,
    objective: Objective,
    packing: Packing,
    capacity: tuple[int, ...],
    *,
    num_before: int,
    num_after: int,
) -> RowIndex:
    """The rows of a shard whose examples' streams have `capacity` tokens: (target,) or (target, source).

    `cut` fills row after row in the documents' order and cuts a document where a row ends. `best_fit` cuts only
    documents longer than a row, into as few pieces as possible, and puts each piece, the longest first, into the
    fullest row that still takes it (Ding et al. 2024, "Fewer truncations improve language modeling"). Documents of an
    objective that is not divisible are dropped where no row takes them. Documents begin with `num_before` special
    tokens and end with `num_after`; a `bare` objective does without them.
    """
    starts = shard.documents.astype(np.int64)
    ends = np.append(starts[1:], len(shard.tokens))
    if objective.bare:
        starts, ends = starts + num_before, ends - num_after
    if objective.divisible:
        fits = _Fits(objective, capacity)
        if fits.whole <= objective.overlap:
            raise UserError(
                f"{type(objective).__name__} cannot fit a token into sequence_length={capacity[0]}: take a longer one"
            )
        useful = ends - starts > objective.overlap
        if packing == "cut":
            pieces, row_of = _cut(starts[useful], ends[useful], objective.overlap, fits)
        else:
            pieces = _divided(starts[useful], ends[useful], objective.overlap, fits.whole)
            row_of = _best_fit(fits.lengths(pieces[:, 1]), capacity)
        lengths = fits.lengths(pieces[:, 1])
    else:
        lengths = np.stack(objective.lengths(ends - starts, _first_parts(shard, starts, ends)))
        useful = (lengths <= np.array(capacity)[:, None]).all(0) & (lengths > 0).all(0)
        pieces, lengths = np.stack([starts, ends - starts], axis=1)[useful], lengths[:, useful]
        row_of = _next_fit(lengths, capacity) if packing == "cut" else _best_fit(lengths, capacity)
    order = np.argsort(row_of, kind="stable")
    num_rows = int(row_of.max(initial=-1)) + 1
    rows = np.searchsorted(row_of[order], np.arange(num_rows + 1))
    return RowIndex(pieces[order], rows, num_tokens=int(lengths.sum()), num_dropped=int((~useful).sum()))


def _first_parts(shard: Shard, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How many of a document's tokens are in its first part."""
    second = np.append(shard.parts, len(shard.tokens))[np.searchsorted(shard.parts, starts)]
    return np.minimum(second, ends) - starts


class _Fits:
    """How long examples of pieces become, and how long a piece may be for what is left of a row."""

    def __init__(self, objective: Objective, capacity: tuple[int, ...]):
        # No objective shortens much: of T5's two streams, together as long as the text, one is nearly all of it.
        sizes = np.arange(2 * sum(capacity) + 2)
        self._lengths = np.stack(objective.lengths(sizes, sizes))
        self._longest = [
            (np.searchsorted(lengths, np.arange(size + 1), side="right") - 1).tolist()
            for lengths, size in zip(self._lengths, capacity, strict=True)
        ]
        self.capacity = capacity
        self.whole = self.longest(capacity)
        if self.whole == sizes[-1]:
            raise UserError(f"{type(objective).__name__} makes half of a text or less of it: rows cannot be planned")

    def lengths(self, sizes: np.ndarray) -> np.ndarray:
        """[streams, pieces]: of the examples of pieces of these sizes."""
        return self._lengths[:, sizes]

    def longest(self, left: Sequence[int]) -> int:
        """Tokens of the longest piece whose example fits into what is left of a row's streams."""
        return min(longest[size] for longest, size in zip(self._longest, left, strict=True))


def _divided(starts: np.ndarray, ends: np.ndarray, overlap: int, whole: int) -> np.ndarray:
    """Pieces of at most `whole` tokens, as few as possible."""
    counts = -(-(ends - starts - overlap) // (whole - overlap))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + number * (whole - overlap)
    return np.stack([first, np.minimum(whole, np.repeat(ends, counts) - first)], axis=1)


def _cut(starts: np.ndarray, ends: np.ndarray, overlap: int, fits: _Fits) -> tuple[np.ndarray, np.ndarray]:
    """(pieces, the row of each): every row is filled with what comes next."""
    pieces: list[tuple[int, int]] = []
    row_of: list[int] = []
    row, left = 0, list(fits.capacity)
    lengths = fits.lengths(np.arange(fits.whole + 1)).T.tolist()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        while end - start > overlap:
            size = min(end - start, fits.longest(left))
            if size < min(end - start, MIN_PIECE + overlap) and row_of and row_of[-1] == row:
                row, left = row + 1, list(fits.capacity)
                continue
            pieces.append((start, size))
            row_of.append(row)
            left = [a - b for a, b in zip(left, lengths[size], strict=True)]
            start += size - overlap
    return np.array(pieces, np.int64).reshape(-1, 2), np.array(row_of, np.int64)


def _next_fit(lengths: np.ndarray, capacity: tuple[int, ...]) -> np.ndarray:
    """The row of each example: the same as the one's before while it fits."""
    row_of: list[int] = []
    row, left = 0, list(capacity)
    for sizes in lengths.T.tolist():
        if any(a < b for a, b in zip(left, sizes, strict=True)):
            row, left = row + 1, list(capacity)
        left = [a - b for a, b in zip(left, sizes, strict=True)]
        row_of.append(row)
    return np.array(row_of, np.int64)


def _best_fit(lengths: np.ndarray, capacity: tuple[int, ...]) -> np.ndarray:
    """The row of each example: the longest first, each into the row that it leaves the least room in."""
    shares = lengths / np.array(capacity)[:, None]
    order = np.argsort(-shares.max(0), kind="stable")
    # Rows are looked up by the stream that will be full first.
    streams = np.argsort(-shares.sum(1), kind="stable")
    lengths, capacity = lengths[streams], tuple(capacity[i] for i in streams)
    row_of = np.zeros(lengths.shape[1], np.int64)
    # Rows by what is left of that stream; a bit of `rooms` is set where there are any.
    by_room: list[list[int]] = [[] for _ in range(capacity[0] + 1)]
    rooms = 0
    others: list[list[int]] = []  # what is left of a row's other streams
    for piece, (size, *sizes) in zip(order.tolist(), lengths.T[order].tolist(), strict=True):
        row, room = len(others), capacity[0]
        enough = rooms >> size << size
        for _ in range(MAX_TRIES):
            if not enough:
                break
            lowest = enough & -enough
            candidates = by_room[lowest.bit_length() - 1]
            place = _takes(candidates, others, sizes)
            if place is not None:
                row, room = candidates.pop(place), lowest.bit_length() - 1
                if not candidates:
                    rooms ^= lowest
                break
            enough ^= lowest
        if row == len(others):
            others.append(list(capacity[1:]))
        others[row] = [a - b for a, b in zip(others[row], sizes, strict=True)]
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
        row_of[piece] = row
    return row_of


def _takes(rows: list[int], others: list[list[int]], sizes: list[int]) -> int | None:
    """Where in `rows` one of the last few takes these sizes in its other streams."""
    for place in range(len(rows) - 1, max(len(rows) - 1 - MAX_TRIES, -1), -1):
        if all(a >= b for a, b in zip(others[rows[place]], sizes, strict=True)):
            return place
    return None
