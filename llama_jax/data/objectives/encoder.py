"""Objectives of encoders: masked tokens, and classes of texts."""

import dataclasses
from typing import ClassVar, override

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import (
    Document,
    Example,
    Numbers,
    Objective,
    Vocabulary,
    as_example,
    check_fraction,
    check_pairs,
)  # fmt: skip

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stay as they are (Devlin et al. 2019, section 3.1)


@dataclasses.dataclass(frozen=True)
class MaskedLM(Objective):
    """Masked language model (Devlin et al. 2019): [CLS] A [SEP] B [SEP], or [CLS] A [SEP] alone (RoBERTa).

    Of the chosen tokens 80 % become the mask, 10 % a random token and 10 % stay. B is the end of the document, half of
    it at most, or with probability 1/2 as many tokens of another one. Where the other is shorter than half, A is longer
    in both cases: the place where B begins does not show if it follows A.

    next_sentence: pairs with token_types, and a target at [CLS]: 1 where B follows A.
    masked_fraction: share of the text's tokens that are chosen; at least one is.
    mask_token: in place of a chosen token.
    cls_token: the first token.
    sep_token: after each text.
    """

    next_sentence: bool = True
    masked_fraction: float = 0.15
    mask_token: str = "[MASK]"
    cls_token: str = "[CLS]"
    sep_token: str = "[SEP]"
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fraction("masked_fraction", self.masked_fraction)

    @property
    @override
    def wants_other(self) -> bool:
        return self.next_sentence

    @override
    def special_tokens(self) -> tuple[str, ...]:
        return self.mask_token, self.cls_token, self.sep_token

    @override
    def fields(self) -> tuple[str, ...]:
        pair = ("token_types", "pair_targets", "pair_weights") if self.next_sentence else ()
        return *super().fields(), "prefix", *pair

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return (num_tokens + (3 if self.next_sentence else 2),)

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        mask, cls, sep = map(vocabulary.id, self.special_tokens())
        a, b, follows = document.tokens, np.zeros(0, np.int64), True
        if self.next_sentence:
            a, b, follows = self._pair(document, rng)
        text = np.concatenate([[cls], a, [sep], *((b, [sep]) if self.next_sentence else ())]).astype(np.int64)
        tokens, chosen = self._masked(text, len(a) + len(b), rng, vocabulary, mask)
        index = np.arange(len(text))
        example = as_example(tokens=tokens, targets=text, weights=chosen, positions=index, prefix=np.ones(len(text)))
        if self.next_sentence:
            asked = (index == 0) & (len(b) > 0)
            example |= as_example(token_types=index >= len(a) + 2, pair_targets=asked & follows, pair_weights=asked)
        return example

    def _pair(self, document: Document, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return (A, B, True where B follows A)."""
        tokens, other = document.tokens, document.other
        size = len(tokens) // 2
        if other is not None and len(other):
            size = min(size, len(other))
        a, b = tokens[: len(tokens) - size], tokens[len(tokens) - size :]
        if other is None or not len(other) or rng.random() < 0.5:
            return a, b, True
        start = rng.integers(len(other) - size + 1)
        return a, other[start : start + size], False

    def _masked(
        self, text: np.ndarray, num_tokens: int, rng: np.random.Generator, vocabulary: Vocabulary, mask: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the text with its chosen tokens replaced, and True at these."""
        ordinary = np.flatnonzero(~np.isin(text, vocabulary.special_ids))
        count = min(max(1, round(self.masked_fraction * num_tokens)), len(ordinary))
        places = rng.choice(ordinary, count, replace=False)
        fate = rng.random(count)
        new = np.where(fate < MASKED, mask, vocabulary.random_ids(rng, count))
        tokens, chosen = text.copy(), np.zeros(len(text), bool)
        tokens[places] = np.where(fate < MASKED + RANDOM, new, text[places])
        chosen[places] = True
        return tokens, chosen


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """[CLS] text [SEP] and the number of its label as a target at [CLS] (Devlin et al. 2019, section 4.1).

    Documents have two parts, the text and its label; one that does not fit is left out.

    labels: the label of each class, as the documents write it.
    cls_token: the first token.
    sep_token: after the text.
    """

    labels: tuple[str, ...]
    cls_token: str = "[CLS]"
    sep_token: str = "[SEP]"
    divisible: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"labels={','.join(self.labels)} must be two different ones or more")

    @override
    def special_tokens(self) -> tuple[str, ...]:
        return self.cls_token, self.sep_token

    @override
    def texts(self) -> tuple[str, ...]:
        return self.labels

    @override
    def check(self, vocabulary: Vocabulary) -> None:
        super().check(vocabulary)
        written: dict[tuple[int, ...], str] = {}
        for label in self.labels:
            ids = tuple(vocabulary.texts[label])
            if not ids or ids in written:
                like = f"as it does {written[ids]!r}" if ids else "with no token"
                raise UserError(f"the tokenizer writes the label {label!r} {like}: give labels that it tells apart")
            written[ids] = label

    @override
    def check_parts(self, num_documents: int, num_parts: int) -> None:
        check_pairs("Classification", "a text and a label", "text,label", num_documents, num_parts)

    @override
    def fields(self) -> tuple[str, ...]:
        return "tokens", "class_targets", "weights", "positions"

    @override
    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return (target_start + 2,)

    @override
    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        self.check_parts(1, len(document.parts))
        start = int(document.parts[0])
        cls, sep = map(vocabulary.id, self.special_tokens())
        tokens = np.concatenate([[cls], document.tokens[:start], [sep]])
        label = tuple(document.tokens[start:].tolist())
        classes = {tuple(vocabulary.texts[label]): number for number, label in enumerate(self.labels)}
        if label not in classes:
            raise UserError(
                f"a document's label is written with the tokens {list(label)}, and none of "
                f"labels={','.join(self.labels)} is: name every label that there is"
            )
        index = np.arange(len(tokens))
        return as_example(
            tokens=tokens, class_targets=classes[label] * (index == 0), weights=index == 0, positions=index
        )
