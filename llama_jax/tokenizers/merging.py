"""Byte-pair merges learned from counted words, in plain Python: the same words give the same merges.

The `tokenizers` library's own trainers settle ties by the order of a hash map (WordPiece) or of ids (BPE), and cannot
give the merges of references that settle them by the tokens' bytes.
"""

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

COMPLEMENT = bytes(range(255, -1, -1))


def merge_pairs(
    words: Mapping[tuple[bytes, ...], int], join: Callable[[bytes, bytes], bytes] = bytes.__add__
) -> Iterator[tuple[bytes, bytes]]:
    """The pairs of neighbours that byte-pair encoding merges, in order, until no word has two symbols left.

    `words` has the symbols of every distinct word and how often it occurs; `join` is the symbol of a merged pair. The
    most frequent pair is merged; of equally frequent ones the greatest, compared as bytes, its first symbol first.
    Every merge touches only the words that have the pair, and the heap is corrected only when a pair is drawn.
    """
    ids: dict[bytes, int] = {}
    symbols: list[bytes] = []
    order: list[str] = []

    def symbol_id(symbol: bytes) -> int:
        if symbol not in ids:
            ids[symbol] = len(symbols)
            symbols.append(symbol)
            # Least for the greatest bytes; the end comes after every byte, so that "ab" is less than "a".
            order.append(symbol.translate(COMPLEMENT).decode("latin-1") + "\u0100")
        return ids[symbol]

    spelled = [[symbol_id(symbol) for symbol in word] for word in words]
    counts = list(words.values())
    pair_counts: dict[tuple[int, int], int] = defaultdict(int)
    pair_words: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(spelled):
        for pair in itertools.pairwise(word):
            pair_counts[pair] += counts[index]
            pair_words[pair].add(index)
    heap = [(-count, order[pair[0]] + order[pair[1]], pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)
    while heap:
        negative, key, pair = heapq.heappop(heap)
        count = pair_counts.get(pair, 0)
        if count != -negative:  # it has changed since; a pair that grew is in the heap with its new count too
            if 0 < count < -negative:
                heapq.heappush(heap, (-count, key, pair))
            continue
        left, right = pair
        yield symbols[left], symbols[right]
        merged = symbol_id(join(symbols[left], symbols[right]))
        changes: dict[tuple[int, int], int] = defaultdict(int)
        for index in pair_words.pop(pair):
            _merge(spelled[index], left, right, merged, counts[index], changes, pair_words, index)
        del pair_counts[pair]
        changes.pop(pair, None)
        for changed, change in changes.items():
            if change:
                pair_counts[changed] += change
                if change > 0:
                    key = order[changed[0]] + order[changed[1]]
                    heapq.heappush(heap, (-pair_counts[changed], key, changed))


def _merge(
    word: list[int],
    left: int,
    right: int,
    merged: int,
    count: int,
    changes: dict[tuple[int, int], int],
    pair_words: dict[tuple[int, int], set[int]],
    index: int,
) -> None:
    """Replace every `left`, `right` in `word` from the left on; what that does to its pairs goes to `changes`."""
    for pair in itertools.pairwise(word):
        changes[pair] -= count
    position = 0
    while True:
        try:
            position = word.index(left, position)
        except ValueError:
            break
        if position + 1 < len(word) and word[position + 1] == right:
            word[position : position + 2] = [merged]
        position += 1
    for pair in itertools.pairwise(word):
        changes[pair] += count
        if merged in pair:
            pair_words[pair].add(index)
