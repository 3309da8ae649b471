"""BART: the whole text, from one with holes and its sentences in another order."""

import dataclasses

import numpy as np

from llama_jax.data.objectives import noise
from llama_jax.data.objectives.base import (
    Boundary,
    Document,
    Example,
    Numbers,
    SequenceToSequence,
    Vocabulary,
)


@dataclasses.dataclass(frozen=True)
class Denoising(SequenceToSequence):
    """Text infilling and sentence permutation (Lewis et al. 2020, section 2.2).

    One mask stands for each span, also for one of no tokens. Spans have Poisson many tokens, conditioned on their sum:
    a multinomial distribution over a number of spans that follows from the text's length. A sentence ends after a full
    stop, a question mark or an exclamation mark that is a token of its own.

    noise_density: share of the tokens that are masked.
    mean_span_length: tokens of a span, on average.
    permute_sentences: whether the source has its sentences in random order.
    mask_token: stands for a span.
    source_length: source positions in a row.
    start_token: what the decoder reads first.
    """

    noise_density: float = 0.3
    mean_span_length: float = 3.0
    permute_sentences: bool = True
    mask_token: str = "<mask>"
    source_length: int = 512
    start_token: Boundary = "eos"

    def __post_init__(self) -> None:
        super().__post_init__()
        noise.check_noise(self.noise_density, self.mean_span_length)

    def special_tokens(self) -> tuple[str, ...]:
        return (self.mask_token,)

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        num_noise, num_spans = noise.noise_counts(num_tokens, self.noise_density, self.mean_span_length)
        return num_tokens + 1, num_tokens - num_noise + num_spans + 1

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        text = document.tokens
        num_noise, num_spans = (
            int(x[0]) for x in noise.noise_counts(np.array([len(text)]), self.noise_density, self.mean_span_length)
        )
        source = permuted(rng, text, vocabulary.sentence_ends) if self.permute_sentences else text
        spans = noise.scattered(rng, len(text), noise.poisson_parts(rng, num_noise, num_spans))
        source = noise.replaced(source, spans, [vocabulary.id(self.mask_token)] * num_spans)
        return self.pair(source, text, vocabulary)


def permuted(rng: np.random.Generator, tokens: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """The sentences in random order; each goes to a token of `ends`, or to the text's end."""
    sentences = np.split(tokens, np.flatnonzero(np.isin(tokens, ends)) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
