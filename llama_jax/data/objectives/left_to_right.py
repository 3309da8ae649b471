"""Every token from those before it: of any text, of what follows a prefix, of a chat's answers."""

import dataclasses
from typing import ClassVar

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import Document, Example, Numbers, Objective, Vocabulary, as_example


class LeftToRight(Objective):
    """Base of those whose inputs are all tokens but the last, and whose targets are all but the first."""

    bare: ClassVar[bool] = False
    overlap: ClassVar[int] = 1

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return (np.maximum(num_tokens - 1, 0),)

    def shifted(self, tokens: np.ndarray) -> Example:
        """The example in which every target counts."""
        targets = tokens[1:]
        return as_example(
            tokens=tokens[:-1], targets=targets, weights=np.ones(len(targets)), positions=np.arange(len(targets))
        )


@dataclasses.dataclass(frozen=True)
class Causal(LeftToRight):
    """Every token from those before it (Radford et al. 2018)."""

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        return self.shifted(document.tokens)


@dataclasses.dataclass(frozen=True)
class Prefix(LeftToRight):
    """The rest of a text after a prefix whose tokens all see each other (Raffel et al. 2020, section 3.2.1).

    The prefix has at least one token and leaves at least one to predict; its length is drawn uniformly.
    """

    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "prefix"

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        example = self.shifted(document.tokens)
        index = np.arange(len(example["tokens"]))
        length = rng.integers(len(index)) + 1 if len(index) else 0
        # The target of a prefix's last token is the first that the prefix does not show.
        return example | as_example(weights=index >= length - 1, prefix=index < length)


@dataclasses.dataclass(frozen=True)
class Chat(LeftToRight):
    """Supervised fine-tuning: like Causal, and only what lies in an answer (an odd part) has a loss."""

    def check_parts(self, num_documents: int, num_parts: int) -> None:
        if num_parts < num_documents:
            raise UserError("Chat needs conversations, and there are texts: set fields and chat_template")

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        example = self.shifted(document.tokens)
        part = np.searchsorted(np.asarray(document.parts), np.arange(1, len(document.tokens)), side="right")
        return example | as_example(weights=part % 2)
