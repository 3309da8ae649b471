"""Preferences: pairs of answers to one prompt, of which one is better."""

import dataclasses
from typing import ClassVar, override

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import Document, Example, Numbers, Vocabulary, as_example
from llama_jax.data.objectives.decoder import LeftToRight


@dataclasses.dataclass(frozen=True)
class Preference(LeftToRight):
    """Direct preference optimization, the sigmoid loss (Rafailov et al. 2023, eq. 7), on the tokens of both answers.

    Documents have three parts, as of fields=prompt,chosen,rejected: texts, or messages that a chat template formats. A
    pair is one example, the prompt once before each answer; `branch` is 0 there and 1 at the rejected one. The
    reference is the model that training begins with: with adapters the base without them, else a frozen copy.

    beta: weight of the log-ratios to the reference.
    label_smoothing: share of pairs that are taken to be labelled the wrong way round (Mitchell 2023, conservative DPO).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    divisible: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 0.5")

    @override
    def check_parts(self, num_documents: int, num_parts: int) -> None:
        if num_parts < 2 * num_documents:
            raise UserError(
                "Preference needs a prompt and two answers, and there are documents without: set "
                "fields=prompt,chosen,rejected (or chosen,rejected, of whole conversations)"
            )

    @override
    def fields(self) -> tuple[str, ...]:
        return *super().fields(), "branch"

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        # Two streams without their last tokens, of a text that has its prompt and its end once.
        return (np.maximum(num_tokens + target_start - 1, 0),)

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        tokens, (start, middle, *end) = document.tokens, document.parts
        answers = [tokens[start:middle], tokens[middle : end[0] if end else None]]
        # A document ends with EOS; it belongs to both answers, unless a further part says that it is behind them.
        if not end and vocabulary.eos_id in tokens[-1:] and vocabulary.eos_id not in answers[0][-1:]:
            answers[0] = np.append(answers[0], tokens[-1])
        pair = [self.shifted(np.concatenate([tokens[:start], answer])) for answer in answers]
        joined = {name: np.concatenate([example[name] for example in pair]) for name in pair[0]}
        sizes = [len(example["tokens"]) for example in pair]
        places = np.concatenate([np.arange(size) for size in sizes])
        joined |= as_example(weights=places >= start - 1, branch=np.repeat([0, 1], sizes))
        # Chats whose ends are among their tokens are shorter by one or two.
        padding = int(self.lengths(np.array([len(tokens)]), np.array([start]))[0][0]) - len(places)
        return {name: np.pad(x, (0, padding), constant_values=int(name == "branch")) for name, x in joined.items()}
