"""Objectives of encoder-decoders: a target from a source."""

import dataclasses
from typing import ClassVar, override

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives import noise
from llama_jax.data.objectives.base import (
    Boundary,
    Document,
    Example,
    Numbers,
    Objective,
    Vocabulary,
    as_example,
    check_pairs,
)  # fmt: skip


class SequenceToSequence(Objective):
    """Base of objectives with a source for an encoder and a target for a decoder."""

    source_length: int = 512  # type: ignore[assignment]
    start_token: Boundary = "pad"

    def __post_init__(self) -> None:
        if self.source_length < 1:
            raise UserError(f"source_length={self.source_length} must be at least 1")

    @override
    def check(self, vocabulary: Vocabulary) -> None:
        super().check(vocabulary)
        vocabulary.boundary(self.start_token)
        vocabulary.boundary("eos")

    @override
    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "source_tokens", "source_positions"

    def pair(self, source: np.ndarray, target: np.ndarray, vocabulary: Vocabulary) -> Example:
        """Return the example of a source and a target.

        Both end with EOS, and the decoder's inputs are the start token and the target without its end.
        """
        eos = vocabulary.boundary("eos")
        source, targets = np.append(source, eos), np.append(target, eos)
        return as_example(
            tokens=np.append(vocabulary.boundary(self.start_token), target),
            targets=targets,
            weights=np.ones(len(targets)),
            positions=np.arange(len(targets)),
            source_tokens=source,
            source_positions=np.arange(len(source)),
        )


@dataclasses.dataclass(frozen=True)
class ParallelText(SequenceToSequence):
    """Documents of two parts, the second from the first (Sutskever et al. 2014); one that does not fit is left out.

    source_length: source positions in a row.
    start_token: first input of the decoder.
    """

    source_length: int = 512
    start_token: Boundary = "bos"
    divisible: ClassVar[bool] = False

    @override
    def check_parts(self, num_documents: int, num_parts: int) -> None:
        check_pairs("ParallelText", "a source and a target", "en,de", num_documents, num_parts)

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return num_tokens - target_start + 1, target_start + 1

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        self.check_parts(1, len(document.parts))
        start = int(document.parts[0])
        return self.pair(document.tokens[:start], document.tokens[start:], vocabulary)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(SequenceToSequence):
    """Span corruption (Raffel et al. 2020, section 3.1.4), spans cut as `random_spans_noise_mask` of their code does.

    Kept and noise spans alternate, the first kept and the last noise, both cut uniformly. A noise span becomes one
    sentinel in the source; in the target each comes behind its own. A single token is all noise.

    noise_density: share of the tokens that are noise.
    mean_span_length: tokens of a noise span, on average.
    num_sentinels: sentinels that the tokenizer has, <extra_id_0> and on; no text gets more spans.
    source_length: source positions in a row.
    start_token: first input of the decoder.
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

    @override
    def special_tokens(self) -> tuple[str, ...]:
        return tuple(f"<extra_id_{i}>" for i in range(self.num_sentinels))

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        num_noise, num_spans = self._counts(num_tokens)
        return num_noise + num_spans + 1, num_tokens - num_noise + num_spans + 1

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        text = document.tokens
        num_noise, num_spans = (int(x[0]) for x in self._counts(np.array([len(text)])))
        taken = noise.positive_parts(rng, num_noise, num_spans)
        num_kept = len(text) - num_noise
        kept = noise.positive_parts(rng, num_kept, num_spans) if num_kept else np.zeros(num_spans, np.int64)
        starts = np.cumsum(kept + taken) - taken
        sentinels = [vocabulary.id(name) for name in self.special_tokens()[:num_spans]]
        target = np.insert(text[noise.places(starts, taken)], np.cumsum(taken) - taken, sentinels)
        return self.pair(noise.replaced(text, starts, taken, sentinels), target, vocabulary)

    def _counts(self, length: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """Return (noise tokens, spans) of texts of these lengths."""
        num_noise, num_spans = noise.noise_counts(length, self.noise_density, self.mean_span_length)
        num_noise = np.where(length < 2, length, np.minimum(num_noise, length - 1))
        # Every noise span has a kept one before it.
        most = np.where(length < 2, length, np.minimum(num_noise, length - num_noise))
        return num_noise, np.minimum(num_spans, np.minimum(most, self.num_sentinels))


@dataclasses.dataclass(frozen=True)
class Denoising(SequenceToSequence):
    """The whole text, from one with holes and its sentences in another order (Lewis et al. 2020, section 2.2).

    One mask replaces each span, also one of no tokens. Spans have Poisson many tokens, conditioned on their sum:
    a multinomial distribution over a number of spans that follows from the text's length. A sentence ends after a full
    stop, a question mark or an exclamation mark that is one token.

    noise_density: share of the tokens that are masked.
    mean_span_length: tokens of a span, on average.
    permute_sentences: put the sentences of the source into random order.
    mask_token: in place of a span.
    source_length: source positions in a row.
    start_token: first input of the decoder.
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

    @override
    def special_tokens(self) -> tuple[str, ...]:
        return (self.mask_token,)

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        num_noise, num_spans = noise.noise_counts(num_tokens, self.noise_density, self.mean_span_length)
        return num_tokens + 1, num_tokens - num_noise + num_spans + 1

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        text = document.tokens
        counts = noise.noise_counts(np.array([len(text)]), self.noise_density, self.mean_span_length)
        num_noise, num_spans = (int(x[0]) for x in counts)
        source = permuted(rng, text, vocabulary.sentence_ends) if self.permute_sentences else text
        sizes = noise.poisson_parts(rng, num_noise, num_spans)
        starts = noise.scattered(rng, len(text), sizes)
        source = noise.replaced(source, starts, sizes, vocabulary.id(self.mask_token))
        return self.pair(source, text, vocabulary)


def permuted(rng: np.random.Generator, tokens: np.ndarray, ends: tuple[int, ...]) -> np.ndarray:
    """Return the sentences in random order; each goes to a token of `ends`, or to the text's end."""
    sentences = np.split(tokens, np.flatnonzero(np.isin(tokens, ends)) + 1)
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])
