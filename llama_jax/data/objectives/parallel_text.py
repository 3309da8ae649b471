"""Parallel text: a target from its source, as in translation."""

import dataclasses
from typing import ClassVar

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import (
    Boundary,
    Document,
    Example,
    Numbers,
    SequenceToSequence,
    Vocabulary,
)


@dataclasses.dataclass(frozen=True)
class ParallelText(SequenceToSequence):
    """Documents of two parts, the second from the first (Sutskever et al. 2014); one that does not fit is left out.

    source_length: source positions in a row.
    start_token: what the decoder reads first.
    """

    source_length: int = 512
    start_token: Boundary = "bos"
    divisible: ClassVar[bool] = False

    def check_parts(self, num_documents: int, num_parts: int) -> None:
        if num_parts != num_documents:
            raise UserError(
                f"ParallelText needs documents of a source and a target, and {num_documents:,} documents have "
                f"{num_parts + num_documents:,} parts: name two fields, as in fields=en,de"
            )

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return num_tokens - target_start + 1, target_start + 1

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        self.check_parts(1, len(document.parts))
        start = int(document.parts[0])
        return self.pair(document.tokens[:start], document.tokens[start:], vocabulary)
