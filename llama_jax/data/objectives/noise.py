"""Noise: the numbers of tokens and spans that are taken away follow from the text's length, all else is drawn."""

from collections.abc import Sequence

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import Numbers, check_fraction


def check_noise(noise_density: float, mean_span_length: float) -> None:
    """Raise UserError where no noise can be so dense, or no spans so short."""
    check_fraction("noise_density", noise_density)
    if mean_span_length < 1:
        raise UserError(f"mean_span_length={mean_span_length} must be at least 1")


def noise_counts(length: Numbers, noise_density: float, mean_span_length: float) -> tuple[Numbers, Numbers]:
    """Return (noise tokens, spans) of texts of these lengths: at least one of each where there is text at all."""
    noise = np.clip(rounded(length * noise_density), np.minimum(length, 1), length)
    spans = np.maximum(rounded(noise / mean_span_length), np.minimum(length, 1))
    return noise, spans


def rounded(x: np.ndarray) -> Numbers:
    """Round to the nearest integer, halves to the even one."""
    return np.rint(x).astype(np.int64)


def positive_parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draw `count` sizes, none 0, whose sum is `total`; every way to cut is equally likely."""
    if not count:
        return np.zeros(0, np.int64)
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draw `count` sizes, 0 among them, whose sum is `total`; every way to cut is equally likely."""
    return positive_parts(rng, total + count, count) - 1


def poisson_parts(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draw `count` sizes, 0 among them: Poisson variables of one mean, given that their sum is `total`.

    That is a multinomial distribution, whatever the mean.
    """
    return rng.multinomial(total, np.full(count, 1 / count)) if count else np.zeros(0, np.int64)


def scattered(rng: np.random.Generator, length: int, sizes: np.ndarray) -> np.ndarray:
    """Draw where spans of these sizes begin in a text of that length: in order and apart, though they may touch."""
    gaps = parts(rng, length - int(sizes.sum()), len(sizes) + 1)
    return np.cumsum(gaps[:-1]) + np.cumsum(sizes) - sizes


def places(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return the places of all tokens of spans, one span after another."""
    return np.arange(sizes.sum()) + np.repeat(starts - np.cumsum(sizes) + sizes, sizes)


def replaced(tokens: np.ndarray, starts: np.ndarray, sizes: np.ndarray, by: Sequence[int] | int) -> np.ndarray:
    """Return `tokens` with one token of `by`, or that one, in place of each span."""
    kept = np.delete(tokens, places(starts, sizes))
    return np.insert(kept.astype(np.int64), starts - np.cumsum(sizes) + sizes, by)
