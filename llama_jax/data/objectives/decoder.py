"""Objectives of decoders: text from left to right, and GLM's blanks."""

import dataclasses
from typing import ClassVar, override

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives import noise
from llama_jax.data.objectives.base import Document, Example, Numbers, Objective, Vocabulary, as_example


class LeftToRight(Objective):
    """Base of objectives whose inputs are all tokens but the last, and whose targets are all but the first."""

    bare: ClassVar[bool] = False
    overlap: ClassVar[int] = 1

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return (np.maximum(num_tokens - 1, 0),)

    def shifted(self, tokens: np.ndarray) -> Example:
        """Return the example in which every target counts."""
        size = max(len(tokens) - 1, 0)
        weights, positions = np.ones(size, np.float32), np.arange(size, dtype=np.int32)
        return as_example(tokens=tokens[:-1], targets=tokens[1:], weights=weights, positions=positions)


@dataclasses.dataclass(frozen=True)
class Causal(LeftToRight):
    """Every token from those before it (Radford et al. 2018)."""

    draws: ClassVar[bool] = False

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        return self.shifted(document.tokens)


@dataclasses.dataclass(frozen=True)
class Prefix(LeftToRight):
    """The rest of a text after a prefix whose tokens all see each other (Raffel et al. 2020, section 3.2.1).

    The prefix has at least one token and leaves at least one to predict; its length is drawn uniformly.
    """

    @override
    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "prefix"

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        example = self.shifted(document.tokens)
        index = np.arange(len(example["tokens"]))
        length = rng.integers(len(index)) + 1 if len(index) else 0
        # The target of a prefix's last token is the first token outside the prefix.
        return example | as_example(weights=index >= length - 1, prefix=index < length)


@dataclasses.dataclass(frozen=True)
class Chat(LeftToRight):
    """Supervised fine-tuning: like Causal, with a loss at the tokens of answers (odd parts) alone."""

    draws: ClassVar[bool] = False

    @override
    def check_parts(self, num_documents: int, num_parts: int) -> None:
        if num_parts < num_documents:
            raise UserError("Chat needs conversations, and there are texts: set fields and chat_template")

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        part = np.searchsorted(np.asarray(document.parts), np.arange(1, len(document.tokens)), side="right")
        return self.shifted(document.tokens) | as_example(weights=part % 2)


@dataclasses.dataclass(frozen=True)
class BlankFilling(Objective):
    """Autoregressive blank filling (Du et al. 2022, section 2.1).

    Part A is the text with a mask in place of each span, and all of it sees all of it; part B the spans in random
    order, each behind its start and predicted left to right. Spans have one token and Poisson many more, conditioned on
    their sum.

    noise_density: share of the tokens that are predicted.
    mean_span_length: tokens of a span, on average.
    two_dimensional: give a span the position of its mask, and block_positions that count within it; else positions
        count on.
    mask_token: in place of a span.
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

    @override
    def special_tokens(self) -> tuple[str, ...]:
        return self.mask_token, self.start_token, self.end_token

    @override
    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "prefix", *(("block_positions",) if self.two_dimensional else ())

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        _, num_spans = noise.noise_counts(num_tokens, self.noise_density, self.mean_span_length)
        return (num_tokens + 2 * num_spans,)

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        mask, start, end = map(vocabulary.id, self.special_tokens())
        text = document.tokens
        counts = noise.noise_counts(np.array([len(text)]), self.noise_density, self.mean_span_length)
        num_noise, num_spans = (int(x[0]) for x in counts)
        sizes = 1 + noise.poisson_parts(rng, num_noise - num_spans, num_spans)
        starts = noise.scattered(rng, len(text), sizes)
        part_a = noise.replaced(text, starts, sizes, mask)
        # A mask's place in part A: there, each span before it has become one token.
        masks = starts - (np.cumsum(sizes) - sizes) + np.arange(num_spans)
        order = rng.permutation(num_spans)
        sizes = sizes[order]
        spans, borders = text[noise.places(starts[order], sizes)], np.cumsum(sizes)
        index, none = np.arange(len(text) + 2 * num_spans), np.zeros(len(part_a), np.int32)
        in_a = index < len(part_a)
        example = as_example(
            tokens=np.concatenate([part_a, np.insert(spans, borders - sizes, start)]),
            targets=np.concatenate([none, np.insert(spans, borders, end)]),
            weights=~in_a,
            positions=index,
            prefix=in_a,
        )
        if self.two_dimensional:
            positions = np.concatenate([index[: len(part_a)], np.repeat(masks[order], sizes + 1)])
            within = noise.places(np.ones(num_spans, np.int64), sizes + 1)
            example |= as_example(positions=positions, block_positions=np.concatenate([none, within]))
        return example
