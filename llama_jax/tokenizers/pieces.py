"""SentencePiece's model file (sentencepiece_model.proto), read without the library."""

import dataclasses
import struct
from collections.abc import Iterable, Iterator

from llama_jax.tokenizers.protobuf import field, fields

SPACE = "\u2581"  # stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a vocabulary with its score (BPE: the greater, the earlier it is merged)."""

    text: str
    score: float
    kind: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What a model file says of encoding.

    algorithm: 1 unigram, 2 BPE, 3 words, 4 characters.
    charsmap: compiled normalization; empty for identity.
    add_dummy_prefix: a space is put before every text.
    remove_extra_whitespaces: spaces at both ends and repeated ones are dropped.
    plain: spaces become U+2581 and belong to the word behind them.
    """

    algorithm: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    plain: bool


def read_pieces(model: bytes) -> list[Piece]:
    """Return the pieces in the order of their ids. Raises RuntimeError where `model` is damaged."""
    try:
        return [_piece(value) for number, value in fields(model) if number == 1]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error):
        raise RuntimeError("not a SentencePiece model") from None


def _piece(message: bytes) -> Piece:
    data = dict(fields(message))
    (score,) = struct.unpack("<f", data.get(2, bytes(4)))
    return Piece(data.get(1, b"").decode(), score, data.get(3, NORMAL))


def read_options(model: bytes) -> Options:
    """Return the options of `model`; those of repeated messages are merged, the last wins."""
    trainer, normalizer = (
        {key: value for number, message in fields(model) if number == part for key, value in fields(message)}
        for part in (2, 3)
    )
    return Options(
        algorithm=trainer.get(3, 1),
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        plain=bool(normalizer.get(5, 1)) and not trainer.get(24, 0),
    )


def without_text(model: bytes, ids: Iterable[int]) -> bytes:
    """Return `model` with the pieces `ids` made control pieces, which are never found in a text."""
    return b"".join(_messages(model, set(ids)))


def _messages(model: bytes, ids: set[int]) -> Iterator[bytes]:
    position = 0
    for number, message in fields(model):
        if number == 1:
            message = message + field(3, CONTROL) if position in ids else message
            position += 1
        yield field(number, message)
