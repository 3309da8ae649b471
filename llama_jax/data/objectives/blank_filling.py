"""GLM: the missing spans of a text that is seen whole, one after another."""

import dataclasses

import numpy as np

from llama_jax.data.objectives import noise
from llama_jax.data.objectives.base import Document, Example, Numbers, Objective, Vocabulary, as_example


@dataclasses.dataclass(frozen=True)
class BlankFilling(Objective):
    """Autoregressive blank filling (Du et al. 2022, section 2.1).

    Part A is the text with a mask in place of each span, and all of it sees all of it; part B the spans in random
    order, each behind its start and predicted left to right. Spans have one token and Poisson many more, conditioned on
    their sum.

    noise_density: share of the tokens that are predicted.
    mean_span_length: tokens of a span, on average.
    two_dimensional: whether a span has the position of its mask, and its own counting as block_positions; else
        positions count on.
    mask_token: stands where a span was.
    start_token: before a span.
    end_token: after a span, as a target.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    two_dimensional: bool = True
    mask_token: str = "[MASK]"
    start_token: str = "<sop>"
    end_token: str = "<eop>"

    def __post_init__(self) -> None:
        noise.check_noise(self.noise_density, self.mean_span_length)

    def special_tokens(self) -> tuple[str, ...]:
        return self.mask_token, self.start_token, self.end_token

    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "prefix", *(("block_positions",) if self.two_dimensional else ())

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        _, num_spans = noise.noise_counts(num_tokens, self.noise_density, self.mean_span_length)
        return (num_tokens + 2 * num_spans,)

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        mask, start, end = map(vocabulary.id, self.special_tokens())
        text = document.tokens
        num_noise, num_spans = (
            int(x[0]) for x in noise.noise_counts(np.array([len(text)]), self.noise_density, self.mean_span_length)
        )
        sizes = 1 + noise.poisson_parts(rng, num_noise - num_spans, num_spans)
        spans = noise.scattered(rng, len(text), sizes)
        part_a = noise.replaced(text, spans, [mask] * num_spans)
        # In part A, each span before has become one token.
        places = np.array([span.start for span in spans], np.int64) - (np.cumsum(sizes) - sizes) + np.arange(num_spans)
        tokens, targets, positions, blocks = [part_a], [np.zeros(len(part_a))], [np.arange(len(part_a))], []
        for i in rng.permutation(num_spans):
            span = text[spans[i]]
            tokens += [[start], span]
            targets += [span, [end]]
            positions += [np.full(len(span) + 1, places[i])]
            blocks += [np.arange(len(span) + 1) + 1]
        in_a = np.arange(len(text) + 2 * num_spans) < len(part_a)
        example = as_example(
            tokens=np.concatenate(tokens),
            targets=np.concatenate(targets),
            weights=~in_a,
            positions=np.concatenate(positions) if self.two_dimensional else np.arange(len(in_a)),
            prefix=in_a,
        )
        if self.two_dimensional:
            example |= as_example(block_positions=np.concatenate([np.zeros(len(part_a)), *blocks]))
        return example
