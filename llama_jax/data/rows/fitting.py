"""Documents fitted into rows: the pieces that share each row."""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llama_jax.config import UserError
from llama_jax.data.config import Packing
from llama_jax.data.corpus.corpus import Shard
from llama_jax.data.corpus.shards import Blocks
from llama_jax.data.objectives.base import Objective

MIN_PIECE = 16  # tokens; where less of a document would fit, the rest of a row stays empty
MAX_TRIES = 16  # amounts of room, and rows with that room, that best fit tries


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Rows of one shard or of a stream: row r has the pieces `rows[r]` to `rows[r + 1]`.

    A piece is (its first token, its number of tokens). `num_tokens` are the positions that the examples fill,
    `num_dropped` the documents that are in no row. The arrays may have checksums.
    """

    pieces: Int[np.ndarray, "p 2"]
    rows: Int[np.ndarray, " r"]
    num_tokens: int
    num_dropped: int
    blocks: Blocks | None = None

    def pieces_of(self, row: int) -> list[list[int]]:
        """Return the pieces of a row. Raises UserError where they are not those that were written."""
        if self.blocks is not None:
            self.blocks.check("rows", self.rows, row, row + 2)
        first, end = self.rows[row : row + 2].tolist()
        if self.blocks is not None:
            self.blocks.check("pieces", self.pieces.reshape(-1), 2 * first, 2 * end)
        return self.pieces[first:end].tolist()


def fit_rows(
    shard: Shard,
    objective: Objective,
    packing: Packing,
    capacity: tuple[int, ...],
    *,
    num_before: int,
    num_after: int,
) -> RowIndex:
    """Return the rows of a shard whose examples' streams have `capacity` tokens: (target,) or (target, source).

    `cut` fills row after row in the documents' order and cuts a document where a row ends. `best_fit` cuts only
    documents longer than a row, into as few pieces as possible, and puts each piece, the longest first, into the
    fullest row that still takes it (Ding et al. 2024, "Fewer truncations improve language modeling"). Documents of an
    objective that is not divisible are dropped where no row takes them. Documents begin with `num_before` special
    tokens and end with `num_after`; a `bare` objective does without them.
    """
    shard.check()
    starts = shard.documents.astype(np.int64)
    ends = np.append(starts[1:], len(shard.tokens))
    if objective.bare:
        starts, ends = starts + num_before, ends - num_after
    if objective.divisible:
        fits = _Fits(objective, capacity)
        useful = ends - starts > objective.overlap
        if packing == "cut":
            pieces, row_of = _cut(starts[useful], ends[useful], objective.overlap, fits)
            lengths = fits.lengths(pieces[:, 1])
        else:
            pieces = _divided(starts[useful], ends[useful], objective.overlap, fits.whole)
            lengths = fits.lengths(pieces[:, 1])
            row_of = _best_fit(lengths, capacity)
    else:
        second = np.append(shard.parts, len(shard.tokens))[np.searchsorted(shard.parts, starts)]
        lengths = np.stack(objective.lengths(ends - starts, np.minimum(second, ends) - starts))
        useful = (lengths <= np.array(capacity)[:, None]).all(0) & (lengths > 0).all(0)
        pieces, lengths = np.stack([starts, ends - starts], axis=1)[useful], lengths[:, useful]
        row_of = _next_fit(lengths, capacity) if packing == "cut" else _best_fit(lengths, capacity)
    rows = np.append(0, np.cumsum(np.bincount(row_of)))
    order = np.argsort(row_of.astype(np.min_scalar_type(len(rows))), kind="stable")  # of 16 bits, it is a radix sort
    return RowIndex(pieces[order], rows, num_tokens=int(lengths.sum()), num_dropped=int((~useful).sum()))


class _Fits:
    """Lengths of the examples of pieces by the pieces' size, and the largest pieces that fit into what a row has left.

    Raises UserError for an objective of which no row takes a token, or that shortens texts too much for the table.
    """

    def __init__(self, objective: Objective, capacity: tuple[int, ...]):
        name = type(objective).__name__
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
            raise UserError(f"{name} makes half of a text or less of it: rows cannot be planned")
        if self.whole <= objective.overlap:
            raise UserError(f"{name} cannot fit a token into sequence_length={capacity[0]}: take a longer one")

    def lengths(self, sizes: np.ndarray) -> np.ndarray:
        """Return the lengths [streams, pieces] of the examples of pieces of these sizes."""
        return self._lengths[:, sizes]

    def longest(self, left: Sequence[int]) -> int:
        """Return the tokens of the longest piece whose example fits into what is left of a row's streams."""
        return min(longest[size] for longest, size in zip(self._longest, left, strict=True))


def _divided(starts: np.ndarray, ends: np.ndarray, overlap: int, whole: int) -> np.ndarray:
    """Cut documents into pieces of at most `whole` tokens, as few as possible."""
    counts = -(-(ends - starts - overlap) // (whole - overlap))
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a piece in its document
    first = np.repeat(starts, counts) + number * (whole - overlap)
    return np.stack([first, np.minimum(whole, np.repeat(ends, counts) - first)], axis=1)


def _left(room: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """Return the room of each stream without `sizes`; negative where it does not suffice."""
    return [a - b for a, b in zip(room, sizes, strict=True)]


def _cut(starts: np.ndarray, ends: np.ndarray, overlap: int, fits: _Fits) -> tuple[np.ndarray, np.ndarray]:
    """Return (pieces, the row of each): every row is filled with what comes next."""
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
            left = _left(left, lengths[size])
            start += size - overlap
    return np.array(pieces, np.int64).reshape(-1, 2), np.array(row_of, np.int64)


def _next_fit(lengths: np.ndarray, capacity: tuple[int, ...]) -> np.ndarray:
    """Return the row of each example: that of the example before while it fits."""
    row_of: list[int] = []
    row, left = 0, list(capacity)
    for sizes in lengths.T.tolist():
        if min(_left(left, sizes)) < 0:
            row, left = row + 1, list(capacity)
        left = _left(left, sizes)
        row_of.append(row)
    return np.array(row_of, np.int64)


def _best_fit(lengths: np.ndarray, capacity: tuple[int, ...]) -> np.ndarray:
    """Return the row of each example: the longest first, each into the row that it leaves the least room in."""
    if len(capacity) == 1:
        return _best_fit_by_length(lengths[0], capacity[0])
    shares = lengths / np.array(capacity)[:, None]
    order = np.argsort(-shares.max(0), kind="stable")
    # Rows are looked up by the room in the stream that will be full first.
    streams = np.argsort(-shares.sum(1), kind="stable")
    first, second = (capacity[i] for i in streams)
    row_of = np.zeros(lengths.shape[1], np.int64)
    by_room: list[list[int]] = [[] for _ in range(first + 1)]
    rooms = 0  # bit r is set where `by_room[r]` has rows: the least room that suffices is the lowest bit of a shift
    others: list[int] = []  # room in the other stream, by row
    for piece, size, other in zip(order.tolist(), *lengths[np.ix_(streams, order)].tolist(), strict=True):
        row, room = len(others), first
        enough = rooms >> size << size
        for _ in range(MAX_TRIES):
            if not enough:
                break
            lowest = enough & -enough
            candidates = by_room[lowest.bit_length() - 1]
            last = len(candidates) - 1
            tried = range(last, max(last - MAX_TRIES, -1), -1)
            place = next((place for place in tried if others[candidates[place]] >= other), None)
            if place is not None:
                row, room = candidates.pop(place), lowest.bit_length() - 1
                if not candidates:
                    rooms ^= lowest
                break
            enough ^= lowest
        if row == len(others):
            others.append(second)
        others[row] -= other
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
        row_of[piece] = row
    return row_of


def _best_fit_by_length(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each example as `_best_fit` does, where rows have one stream: all of a length at once.

    A row that takes an example is the fullest with room for the next one of this length, while it has that room. Of
    rows with equal room, the last that came to have it is taken first.
    """
    counts = np.bincount(lengths)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms: list[int] = []  # ascending, those that `by_room` has rows of
    row_of: list[int] = []  # of the examples from the longest on
    num_rows = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        count = int(counts[size])
        while count:
            place = bisect.bisect_left(rooms, size)
            room = rooms[place] if place < len(rooms) else capacity
            each = min(room // size, count) if size else count  # examples that a row takes
            wanted = -(-count // each)
            if place < len(rooms):
                taken = by_room[room][: -wanted - 1 : -1]
                del by_room[room][-wanted:]
                if not by_room[room]:
                    del rooms[place]
            else:
                taken = list(range(num_rows, num_rows + wanted))
                num_rows += wanted
            placed = min(count, each * len(taken))
            full, last = divmod(placed, each)
            row_of += taken if each == 1 else [row for row in taken for _ in range(each)][:placed]
            for rows, left in ((taken[:full], room - each * size), (taken[full:], room - last * size)):
                if rows:
                    if not by_room[left]:
                        bisect.insort(rooms, left)
                    by_room[left] += rows
            count -= placed
    result = np.empty(len(lengths), np.int64)
    result[np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")] = row_of
    return result
