"""Subword algorithms as in their papers, short and slow, for `tokenization.ipynb`.

Byte-pair encoding (Sennrich et al. 2016) and the unigram language model (Kudo 2018). A run's tokenizers are trained by
`llama_jax.tokenizers.train_tokenizer`; the tests compare the unigram model here with SentencePiece's.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

MAX_PIECE = 16  # characters of a seed piece, as in SentencePiece
RARE = 0.5  # expected occurrences below which a piece is dropped, as in SentencePiece


@dataclasses.dataclass(frozen=True)
class Merge:
    """One merge of byte-pair encoding: the pair, how often it stood there, and the words as they are afterwards."""

    pair: tuple[str, str]
    count: int
    words: tuple[tuple[str, ...], ...]


def bpe_merges(texts: Iterable[str]) -> Iterator[Merge]:
    """The merges of byte-pair encoding over characters, one by one, until every word is one symbol.

    Words end at spaces, and nothing is merged across them. Each time the most frequent pair of neighbours is merged, of
    equally frequent ones the one seen first in the text. `words` has each distinct word once, in the order of the text.
    """
    counts = Counter(word for text in texts for word in text.split())
    words = {word: tuple(word) for word in counts}
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            return
        best = max(pairs, key=pairs.__getitem__)  # max and Counter keep the order in which pairs were seen
        words = {word: _merge(symbols, best) for word, symbols in words.items()}
        yield Merge(best, pairs[best], tuple(words.values()))


def bpe_encode(word: str, merges: Iterable[Merge]) -> tuple[str, ...]:
    """The pieces of a word: its characters, and the merges repeated in the order in which they were learned."""
    symbols = tuple(word)
    for merge in merges:
        symbols = _merge(symbols, merge.pair)
    return symbols


def _merge(symbols: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        joined = tuple(symbols[position : position + 2]) == pair
        merged.append("".join(pair) if joined else symbols[position])
        position += 2 if joined else 1
    return tuple(merged)


def likelihood(pieces: Iterable[str], probabilities: Mapping[str, float]) -> float:
    """Probability of a segmentation under the unigram model: the product of its pieces' probabilities.

    `ab|ab|c` with p(ab) = 2/3 and p(c) = 1/3 has 2/3 x 2/3 x 1/3 = 4/27. A piece that is not known has probability 0.
    """
    return math.prod(probabilities.get(piece, 0.0) for piece in pieces)


def segmentations(text: str, probabilities: Mapping[str, float]) -> Iterator[tuple[str, ...]]:
    """Every way to cut `text` into known pieces; there are exponentially many."""
    if not text:
        yield ()
    for end in range(1, len(text) + 1):
        if probabilities.get(text[:end], 0) > 0:
            yield from ((text[:end], *rest) for rest in segmentations(text[end:], probabilities))


def best_segmentation(text: str, probabilities: Mapping[str, float]) -> tuple[str, ...] | None:
    """The most likely segmentation, by Viterbi's algorithm; None where the pieces cannot make `text`."""
    found = _viterbi(text, _logarithms(probabilities))
    return None if found is None else found[0]


def loss(words: Mapping[str, int], probabilities: Mapping[str, float]) -> float:
    """Negative logarithm of the words' likelihood, each summed over all its segmentations, times its count.

    Infinite where the pieces cannot make a word. `unigram_step` never makes it larger.
    """
    logs = _logarithms(probabilities)
    return -sum(count * _forward(word, logs)[-1] for word, count in words.items())


def expected_counts(words: Mapping[str, int], probabilities: Mapping[str, float]) -> dict[str, float]:
    """E step: how often each piece occurs in `words`, averaged over all segmentations by their probability.

    Forward-backward: a piece from `start` to `end` has the probability of all ways to get to `start`, times its own,
    times that of all ways to get on from `end`, over that of the whole word. Raises ValueError for a word that the
    pieces cannot make.
    """
    logs = _logarithms(probabilities)
    expected = dict.fromkeys(probabilities, 0.0)
    for word, count in words.items():
        forward, backward = _forward(word, logs), _backward(word, logs)
        if forward[-1] == -math.inf:
            raise ValueError(f"the pieces cannot make the word {word!r}")
        for end in range(1, len(word) + 1):
            for start in range(end):
                if (piece := word[start:end]) in logs:
                    expected[piece] += count * math.exp(forward[start] + logs[piece] + backward[end] - forward[-1])
    return expected


def unigram_step(words: Mapping[str, int], probabilities: Mapping[str, float]) -> dict[str, float]:
    """One step of expectation-maximization: probabilities in proportion to the expected counts."""
    return _normalized(expected_counts(words, probabilities))


def seed_pieces(words: Mapping[str, int], size: int) -> dict[str, float]:
    """Every character, and the `size` substrings of words that cover most text (count times length, at least twice)."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(len(word), start + MAX_PIECE) + 1):
                counts[word[start:end]] += count
    longer = [piece for piece, count in counts.items() if len(piece) > 1 and count > 1]
    longer.sort(key=lambda piece: (-counts[piece] * len(piece), piece))
    characters = sorted(piece for piece in counts if len(piece) == 1)
    return _normalized({piece: float(counts[piece] * len(piece)) for piece in [*characters, *longer[:size]]})


def removal_losses(words: Mapping[str, int], probabilities: Mapping[str, float]) -> dict[str, float]:
    """How much larger the loss becomes without each piece of several characters.

    As Kudo estimates it: every occurrence in the best segmentations is written with the piece's own best segmentation
    into others.
    """
    logs = _logarithms(probabilities)
    used: Counter[str] = Counter()
    for word, count in words.items():
        found = _viterbi(word, logs)
        for piece in found[0] if found else ():
            used[piece] += count
    losses = {}
    for piece in [piece for piece in logs if len(piece) > 1]:
        found = _viterbi(piece, logs, without=piece)
        losses[piece] = used[piece] * (logs[piece] - (found[1] if found else -math.inf)) if used[piece] else 0.0
    return losses


def train_unigram(
    words: Mapping[str, int], num_pieces: int, *, seed_size: int = 10_000, num_steps: int = 2, keep: float = 0.8
) -> Iterator[dict[str, float]]:
    """Unigram training (Kudo 2018, section 3.2): the probabilities after every round, the last of `num_pieces` pieces.

    A round is `num_steps` steps of expectation-maximization, then the pieces whose loss matters least are dropped: the
    share `keep` stays. Single characters always stay, so that every word can be made. Ends with more pieces where there
    are more characters, and with fewer where so many pieces are not to be found.
    """
    probabilities = seed_pieces(words, seed_size)
    characters = [piece for piece in probabilities if len(piece) == 1]
    while True:
        for _ in range(num_steps):
            counts = expected_counts(words, probabilities)
            # A character that no likely segmentation needs keeps a small probability.
            kept = {p: max(count, RARE) for p, count in counts.items() if count >= RARE or len(p) == 1}
            probabilities = _normalized(kept)
        if len(probabilities) <= max(num_pieces, len(characters)):
            yield probabilities
            return
        losses = removal_losses(words, probabilities)
        size = max(num_pieces, int(keep * len(probabilities))) - len(characters)
        best = sorted(losses, key=lambda piece: (-losses[piece], piece))[: max(size, 0)]
        probabilities = _normalized({piece: probabilities[piece] for piece in [*characters, *best]})
        yield probabilities


def _normalized(counts: Mapping[str, float]) -> dict[str, float]:
    total = sum(counts.values())
    return {piece: count / total for piece, count in counts.items()}


def _logarithms(probabilities: Mapping[str, float]) -> dict[str, float]:
    return {piece: math.log(p) for piece, p in probabilities.items() if p > 0}


def _viterbi(text: str, logs: Mapping[str, float], without: str | None = None) -> tuple[tuple[str, ...], float] | None:
    """The most likely segmentation, which does not use the piece `without`, and its log probability."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(text) + 1):
        options = [
            (best[start][0] + logs[piece], start)
            for start in range(end)
            if (piece := text[start:end]) in logs and piece != without
        ]
        best.append(max(options, key=lambda option: option[0], default=(-math.inf, 0)))
    if best[-1][0] == -math.inf:
        return None
    pieces, end = [], len(text)
    while end:
        pieces.append(text[best[end][1] : end])
        end = best[end][1]
    return tuple(reversed(pieces)), best[-1][0]


def _forward(word: str, logs: Mapping[str, float]) -> list[float]:
    """Log probability of all ways to make the first 0, 1, 2... characters."""
    sums = [0.0]
    for end in range(1, len(word) + 1):
        sums.append(np.logaddexp.reduce([sums[s] + logs[word[s:end]] for s in range(end) if word[s:end] in logs]))
    return sums


def _backward(word: str, logs: Mapping[str, float]) -> list[float]:
    """Log probability of all ways to make what comes after the first 0, 1, 2... characters."""
    sums = [0.0] * (len(word) + 1)
    for start in reversed(range(len(word))):
        ends = range(start + 1, len(word) + 1)
        sums[start] = np.logaddexp.reduce([logs[word[start:e]] + sums[e] for e in ends if word[start:e] in logs])
    return sums
