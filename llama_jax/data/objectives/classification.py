"""Fine-tuning: which of a few classes a text is of."""

import dataclasses
from typing import ClassVar

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.objectives.base import Document, Example, Numbers, Objective, Vocabulary, as_example


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """[CLS] text [SEP] and the number of its label as a target at [CLS] (Devlin et al. 2019, section 4.1).

    Documents have two parts, the text and its label; one that does not fit is left out.

    labels: what the label of each class is, as the documents write it.
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

    def special_tokens(self) -> tuple[str, ...]:
        return self.cls_token, self.sep_token

    def texts(self) -> tuple[str, ...]:
        return self.labels

    def check(self, vocabulary: Vocabulary) -> None:
        super().check(vocabulary)
        written: dict[tuple[int, ...], str] = {}
        for label in self.labels:
            ids = tuple(vocabulary.texts[label])
            if not ids or ids in written:
                like = f"as it does {written[ids]!r}" if ids else "with no token"
                raise UserError(f"the tokenizer writes the label {label!r} {like}: give labels that it tells apart")
            written[ids] = label

    def check_parts(self, num_documents: int, num_parts: int) -> None:
        if num_parts != num_documents:
            raise UserError(
                f"Classification needs documents of a text and a label, and {num_documents:,} documents have "
                f"{num_parts + num_documents:,} parts: name two fields, as in fields=text,label"
            )

    def fields(self) -> tuple[str, ...]:
        return "tokens", "class_targets", "weights", "positions"

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        return (target_start + 2,)

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        self.check_parts(1, len(document.parts))
        start = int(document.parts[0])
        cls, sep = map(vocabulary.id, self.special_tokens())
        tokens = np.concatenate([[cls], document.tokens[:start], [sep]])
        at_cls = np.arange(len(tokens)) == 0
        number = self._number(document.tokens[start:].tolist(), vocabulary)
        return as_example(
            tokens=tokens, class_targets=number * at_cls, weights=at_cls, positions=np.arange(len(tokens))
        )

    def _number(self, ids: list[int], vocabulary: Vocabulary) -> int:
        for number, label in enumerate(self.labels):
            if list(vocabulary.texts[label]) == ids:
                return number
        raise UserError(
            f"a document's label is written with the tokens {ids}, and none of labels={','.join(self.labels)} is: "
            "name every label that there is"
        )
