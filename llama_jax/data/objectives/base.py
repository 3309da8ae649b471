"""Base of the objectives, and its types: documents, vocabularies, examples."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Integer

from llama_jax.config import Component, UserError
from llama_jax.tokenizers import Tokenizer

type Example = dict[str, np.ndarray]
"""Arrays with one entry for each position. Names that begin with `source_` are the encoder's stream, all others the
(target) stream; all arrays of a stream are equally long.

`tokens`, `targets` and `positions` (int32) and `weights` (float32, of the target's loss) are always there, but for
`class_targets` (int32, the number of a class) in place of `targets` where whole texts are classified. `prefix` is 1 at
tokens that all of their document see, `branch` 1 at the rejected answer of two, `block_positions` GLM's second
dimension, `token_types` the sentence of a pair; `pair_targets` (1: the second follows the first) and `pair_weights`
(float32, 1 at [CLS]) the next-sentence task.
`source_tokens` and `source_positions` (int32) are the input of an encoder.
"""

type Numbers = Integer[np.ndarray, " _"]
Boundary = Literal["pad", "bos", "eos"]

FLOATS = ("weights", "pair_weights")
SENTENCE_ENDS = (".", "!", "?")


@dataclasses.dataclass(frozen=True)
class Document:
    """A document as its shard holds it, or a piece of it.

    `parts` are the places in `tokens` where further parts begin: the target of a parallel text; in a chat parts
    alternate, question, answer, question... and part 0 may be empty. `other` has tokens of another document, for
    objectives with `wants_other`.
    """

    tokens: Integer[np.ndarray, " n"]
    parts: Integer[np.ndarray, " p"] | tuple[int, ...] = ()
    other: Integer[np.ndarray, " m"] | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer that objectives use.

    `special` are the ids of special tokens by name, `start_ids` the ids before every text, `sentence_ends` the ids of
    marks that end a sentence, `texts` the ids of the texts that the objective names.
    """

    size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    special: Mapping[str, int]
    start_ids: tuple[int, ...] = ()
    sentence_ends: tuple[int, ...] = ()
    texts: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(tokenizer: Tokenizer, texts: Sequence[str] = ()) -> "Vocabulary":
        """Return a tokenizer's. A mark ends sentences where the tokenizer writes it, after a word, as one token."""
        ends = [(tokenizer.encode("end" + mark)[-1:], mark) for mark in SENTENCE_ENDS]
        return Vocabulary(
            size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
            pad_id=tokenizer.pad_id,
            special=tokenizer.special_tokens,
            start_ids=tokenizer.start_ids,
            sentence_ends=tuple(ids[0] for ids, mark in ends if ids and tokenizer.decode(ids) == mark),
            texts={text: tuple(int(i) for i in tokenizer.encode(text)) for text in texts},
        )

    def id(self, name: str) -> int:
        """Return the id of a special token. Raises UserError for a name without a token."""
        return special_id(self.special, name)

    def boundary(self, which: Boundary) -> int:
        """Return the id of the padding token, or of the one that begins or ends a text. Raises UserError without it."""
        found = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}[which]
        if found is None:
            raise UserError(
                f"the tokenizer has no {which.upper()} token, which this objective needs: train it with the special "
                f"token <{which}>, use one that has it, or name another start_token if it is for that"
            )
        return found

    @functools.cached_property
    def special_ids(self) -> np.ndarray:
        """Ids that no text has, ascending."""
        ids = {*self.special.values(), self.bos_id, self.eos_id, self.pad_id}
        return np.array(sorted(i for i in ids if i is not None), np.int64)

    @functools.cached_property
    def num_special(self) -> tuple[int, int]:
        """Number of special tokens before and after every document of a corpus."""
        return len(self.start_ids), int(self.eos_id is not None)

    def random_ids(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return ids drawn uniformly from all but the special ones."""
        free = self.special_ids - np.arange(len(self.special_ids))  # number of ordinary ids before each special one
        drawn = rng.integers(self.size - len(free), size=count)
        return drawn + np.searchsorted(free, drawn, side="right")


def special_id(special: Mapping[str, int], name: str) -> int:
    """Return the id of a special token. Raises UserError for a name without a token."""
    if name not in special:
        raise UserError(
            f"the tokenizer has no special token {name!r}: train it with special_tokens that name it, or use a "
            "tokenizer that has it"
        )
    return special[name]


class Objective(Component):
    """Base of the objectives: each a pure function from a document to an example, and the length of that example.

    The length follows from the document's size alone, never from random numbers, so that rows can be packed before
    any example is made.
    """

    bare: ClassVar[bool] = True
    """Documents come without the BOS and EOS that shards hold."""
    overlap: ClassVar[int] = 0
    """Number of tokens that consecutive pieces of a document share where it is cut because it does not fit."""
    divisible: ClassVar[bool] = True
    """A document that does not fit is cut; else it is left out."""
    looks_ahead: ClassVar[bool] = False
    """A model may attend to tokens behind the one to predict: the objective is for encoders."""
    draws: ClassVar[bool] = True
    """Examples take random numbers: those of other objectives are not seeded, which costs more than an example."""
    source_length: int | None = None
    """Source positions in a row; None without a source."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What a class says of its `example` is not true of another one's.
        if "example" in vars(cls) and "draws" not in vars(cls):
            cls.draws = True

    @property
    def wants_other(self) -> bool:
        """True where documents must come with tokens of another one."""
        return False

    def special_tokens(self) -> tuple[str, ...]:
        """Return the names of the special tokens that the tokenizer must have."""
        return ()

    def texts(self) -> tuple[str, ...]:
        """Return the texts whose ids the vocabulary must have."""
        return ()

    def check(self, vocabulary: Vocabulary) -> None:
        """Raise UserError where the tokenizer lacks a token that examples need."""
        for name in self.special_tokens():
            vocabulary.id(name)

    def check_parts(self, num_documents: int, num_parts: int) -> None:
        """Raise UserError where a corpus's documents do not have the parts that examples need.

        `num_parts` counts all parts but the first of each document.
        """

    def fields(self) -> tuple[str, ...]:
        """Return the names of the example's fields."""
        return "tokens", "targets", "weights", "positions"

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        """Return the lengths of the (target,) or (target, source) streams of documents with that many tokens.

        `target_start` is the place where the target of a parallel text begins; other objectives ignore it. Exact for
        every draw, and never falling as `num_tokens` grows.
        """
        raise NotImplementedError

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """Return the example of a document; the same for the same state of `rng`."""
        raise NotImplementedError


def as_example(**fields: Any) -> Example:
    """Return the fields in the types that examples have."""
    return {name: np.asarray(x, np.float32 if name in FLOATS else np.int32) for name, x in fields.items()}


def check_fraction(name: str, value: float) -> None:
    """Raise UserError for a share of the tokens outside (0, 1)."""
    if not 0 < value < 1:
        raise UserError(f"{name}={value} must be between 0 and 1, without them")


def check_pairs(name: str, kinds: str, fields: str, num_documents: int, num_parts: int) -> None:
    """Raise UserError where not every document has two parts, which are `kinds`."""
    if num_parts != num_documents:
        raise UserError(
            f"{name} needs documents of {kinds}, and {num_documents:,} documents have "
            f"{num_parts + num_documents:,} parts: name two fields, as in fields={fields}"
        )
