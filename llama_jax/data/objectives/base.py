"""What an objective is given, what it makes of it, and what it says beforehand."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Integer

from llama_jax.config import Component, UserError
from llama_jax.tokenizers import Tokenizer

type Example = dict[str, np.ndarray]
"""Arrays, one entry a position. Names that begin with `source_` are the encoder's stream, all others the (target)
stream; all of one stream are equally long.

`tokens`, `targets` and `positions` (int32) and `weights` (float32, of the target's loss) are always there, but for
`class_targets` (int32, the number of a class) in place of `targets` where whole texts are classified. `prefix` is 1 at
tokens that all of their document see, `block_positions` GLM's second dimension, `token_types` the sentence of a pair;
`pair_targets` (1: the second follows the first) and `pair_weights` (float32, 1 at [CLS]) the next-sentence task.
`source_tokens` and `source_positions` (int32) are what an encoder reads.
"""

type Numbers = Integer[np.ndarray, " _"]
Boundary = Literal["pad", "bos", "eos"]

FLOATS = ("weights", "pair_weights")
SENTENCE_ENDS = (".", "!", "?")


@dataclasses.dataclass(frozen=True)
class Document:
    """A document as its shard holds it, or a piece of it.

    `parts` is where in `tokens` a further part begins: the target of a parallel text; in a chat parts alternate,
    question, answer, question... and part 0 may be empty. `other` has tokens of another document, for objectives that
    want one.
    """

    tokens: Integer[np.ndarray, " n"]
    parts: Integer[np.ndarray, " p"] | tuple[int, ...] = ()
    other: Integer[np.ndarray, " m"] | None = None


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What an objective needs of a tokenizer: special tokens by name, what stands before every text, the ids of marks
    that end a sentence and of the `texts` that it names."""

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
        """That of a tokenizer. A mark ends sentences where the tokenizer writes it, after a word, as one token."""
        ends = [tokenizer.encode("end" + mark)[-1:] for mark in SENTENCE_ENDS]
        marks = zip(ends, SENTENCE_ENDS, strict=True)
        return Vocabulary(
            size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
            pad_id=tokenizer.pad_id,
            special=tokenizer.special_tokens,
            start_ids=tokenizer.start_ids,
            sentence_ends=tuple(ids[0] for ids, mark in marks if ids and tokenizer.decode(ids) == mark),
            texts={text: tuple(int(i) for i in tokenizer.encode(text)) for text in texts},
        )

    def id(self, name: str) -> int:
        """The id of a special token. Raises UserError where there is none of that name."""
        return special_id(self.special, name)

    def boundary(self, which: Boundary) -> int:
        """The id of the padding token, or of the one that begins or ends a text. Raises UserError where it has none."""
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
        ids = {*self.special.values(), self.bos_id, self.eos_id, self.pad_id} - {None}
        return np.array(sorted(ids), np.int64)  # type: ignore[arg-type]

    def random_ids(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Ids drawn uniformly from all but the special ones."""
        free = self.special_ids - np.arange(len(self.special_ids))  # how many ordinary ids come before each
        drawn = rng.integers(self.size - len(free), size=count)
        return drawn + np.searchsorted(free, drawn, side="right")


def special_id(special: Mapping[str, int], name: str) -> int:
    """The id of a special token. Raises UserError where there is none of that name."""
    if name not in special:
        raise UserError(
            f"the tokenizer has no special token {name!r}: train it with special_tokens that name it, or use a "
            "tokenizer that has it"
        )
    return special[name]


class Objective(Component):
    """Base of the objectives: each a pure function from a document to an example, and how long that will be.

    How long an example gets depends on the document's size alone, never on what is drawn, so that rows can be packed
    before anything is drawn.
    """

    bare: ClassVar[bool] = True
    """Whether documents come without the BOS and EOS that shards hold."""
    overlap: ClassVar[int] = 0
    """Tokens that consecutive pieces of a document share where it is cut because it does not fit."""
    divisible: ClassVar[bool] = True
    """Whether it may be cut; what may not and does not fit is left out."""
    looks_ahead: ClassVar[bool] = False
    """Whether a model may see what stands behind a token that it is asked for: what encoders are trained on."""
    source_length: int | None = None
    """Source positions in a row; None without a source."""

    @property
    def wants_other(self) -> bool:
        """Whether documents must come with tokens of another one."""
        return False

    def special_tokens(self) -> tuple[str, ...]:
        """Names of the special tokens that the tokenizer must have."""
        return ()

    def texts(self) -> tuple[str, ...]:
        """Texts of which it must know how the tokenizer writes them."""
        return ()

    def check(self, vocabulary: Vocabulary) -> None:
        """Raises UserError where the tokenizer lacks a token that examples need."""
        for name in self.special_tokens():
            vocabulary.id(name)

    def check_parts(self, num_documents: int, num_parts: int) -> None:
        """Raises UserError where a corpus's documents do not have the parts that examples need; `num_parts` counts all
        but the first of each."""

    def fields(self) -> tuple[str, ...]:
        """Names of the example's fields."""
        return "tokens", "targets", "weights", "positions"

    def lengths(self, num_tokens: Numbers, target_start: Numbers) -> tuple[np.ndarray, ...]:
        """Lengths of the (target,) or (target, source) streams of the examples of documents with that many tokens.

        `target_start` is where the target of a parallel text begins; other objectives do not look at it. Exact for
        every draw, and never falling as `num_tokens` grows.
        """
        raise NotImplementedError

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        """The example of a document; the same for the same state of `rng`."""
        raise NotImplementedError


def as_example(**fields: Any) -> Example:
    """The fields in the types that examples have."""
    return {name: np.asarray(x, np.float32 if name in FLOATS else np.int32) for name, x in fields.items()}


def check_fraction(name: str, value: float) -> None:
    """Raises UserError where a share of the tokens is none."""
    if not 0 < value < 1:
        raise UserError(f"{name}={value} must be between 0 and 1, without them")
