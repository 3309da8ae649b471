"""T5: the missing spans of a text, each named by the sentinel that stands in its place."""

import dataclasses

import numpy as np

from llama_jax.config import UserError
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
class SpanCorruption(SequenceToSequence):
    """Span corruption (Raffel et al. 2020, section 3.1.4), spans cut as `random_spans_noise_mask` of their code does.

    Kept and noise spans alternate, the first kept and the last noise, both cut uniformly. A noise span becomes one
    sentinel in the source; in the target each comes behind its own. A single token is all noise.

    noise_density: share of the tokens that are noise.
    mean_span_length: tokens of a noise span, on average.
    num_sentinels: sentinels that the tokenizer has, <extra_id_0> and on; no text gets more spans.
    source_length: source positions in a row.
    start_token: what the decoder reads first.
    """

    noise_density: float = 0.15
    mean_span_length: float = 3.0
    num_sentinels: int = 100
    source_length: int = 512
    start_token: Boundary = "pad"

    def __post_init__(self) -> None:
        super().__post_init__()
        noise.check_noise(self.noise_density, self.mean_span_length)
        if self.num_sentinels < 1:
            raise UserError(f"num_sentinels={self.num_sentinels} must be at least 1")

    def special_tokens(self) -> tuple[str, ...]:
        return tuple(f"<extra_id_{i}>" for i in range(self.num_sentinels))

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        num_noise, num_spans = self._counts(num_tokens)
        return num_noise + num_spans + 1, num_tokens - num_noise + num_spans + 1

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        text = document.tokens
        num_noise, num_spans = (int(x[0]) for x in self._counts(np.array([len(text)])))
        taken = noise.positive_parts(rng, num_noise, num_spans)
        num_kept = len(text) - num_noise
        kept = noise.positive_parts(rng, num_kept, num_spans) if num_kept else np.zeros(num_spans, np.int64)
        ends = np.cumsum(kept + taken)
        spans = [slice(int(end - size), int(end)) for end, size in zip(ends, taken, strict=True)]
        sentinels = [vocabulary.id(name) for name in self.special_tokens()[:num_spans]]
        target = [piece for sentinel, span in zip(sentinels, spans, strict=True) for piece in ([sentinel], text[span])]
        return self.pair(noise.replaced(text, spans, sentinels), np.concatenate([*target, text[:0]]), vocabulary)

    def _counts(self, length: Numbers) -> tuple[np.ndarray, np.ndarray]:
        num_noise, num_spans = noise.noise_counts(length, self.noise_density, self.mean_span_length)
        num_noise = np.where(length < 2, length, np.minimum(num_noise, length - 1))
        # Every noise span has a kept one before it.
        most = np.where(length < 2, length, np.minimum(num_noise, length - num_noise))
        return num_noise, np.minimum(num_spans, np.minimum(most, self.num_sentinels))
