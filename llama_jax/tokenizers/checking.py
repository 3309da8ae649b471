"""Checks of tokenizer files before a library gets them: what would end the process, or take all of its memory."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from llama_jax.config import UserError

SPACE = "\u2581"  # a space inside pieces of SentencePiece
MAX_IDS = 1 << 22  # of a vocabulary: its tables have an entry for each id, also for those without a token
MAX_GROWTH = 1024.0  # times that normalizers and decoders may lengthen a text
_LEAF, _HAS_LEAF = 1 << 31, 1 << 8  # bits of a unit of darts-clone


def check_model(content: bytes) -> None:
    """Raise RuntimeError for bytes that are no SentencePiece model, or one that its library would read beyond."""
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    except DecodeError:
        raise RuntimeError("no SentencePiece model") from None
    for spec in (model.normalizer_spec, model.denormalizer_spec):
        if spec.precompiled_charsmap:
            _check_map(spec.precompiled_charsmap)
    if any(not isinstance(piece.piece, str) or not math.isfinite(piece.score) for piece in model.pieces):
        raise RuntimeError("a piece that is no UTF-8, or a score that is no number")
    byte = [piece.piece for piece in model.pieces if piece.type == 6]  # BYTE
    if any(len(name) != 6 or name[:3] != "<0x" or name[5] != ">" for name in byte):
        raise RuntimeError("a byte that is none")


def _check_map(content: bytes) -> None:
    """Raise RuntimeError where a compiled map of characters leads out of its table.

    Its bytes are the table's size, a double array (darts-clone) and texts that end with NUL. From a unit that is no
    leaf the library goes to `place ^ offset ^ byte` without a look at the size.
    """
    size = int.from_bytes(content[:4], "little")
    if size % 1024 or not 0 < size <= len(content) - 4 or content[-1:] != b"\0":
        raise RuntimeError("a map of characters that is damaged")
    units, offsets = units_of(content)
    inner = np.flatnonzero(units & _LEAF == 0)
    reached = inner ^ offsets[inner]
    if np.any(reached | 255 >= len(units)):
        raise RuntimeError("a map of characters that leaves its table")
    values = units[reached[units[inner] & _HAS_LEAF != 0]] & ~np.uint32(_LEAF)
    if np.any(values >= len(content) - 4 - size):
        raise RuntimeError("a map of characters that leaves its texts")


def units_of(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return the units of a compiled map of characters and their offsets."""
    units = np.frombuffer(content, "<u4", int.from_bytes(content[:4], "little") // 4, 4)
    return units, (units >> 10) << ((units & 1 << 9) >> 6)


def check_ids(vocab_size: int) -> int:
    """Return the number of ids. Raises ValueError where there are none, or more than any tokenizer has."""
    if not 0 < vocab_size <= MAX_IDS:
        raise ValueError(f"its ids reach {vocab_size - 1}, and {MAX_IDS} are read")
    return vocab_size


def check_json(content: bytes) -> None:
    """Raise ValueError for a tokenizer.json whose normalizers or decoders can lengthen a text without bounds."""
    data = json.loads(content)
    for key in ("normalizer", "decoder"):
        if (growth := _growth(data.get(key))) > MAX_GROWTH:
            raise ValueError(f"its {key} can make a text {growth:.0e} times as long")


def _growth(part: Any) -> float:
    """Return how many times longer a text becomes at most, about, by a normalizer or decoder and those in it."""
    if not isinstance(part, dict):
        return 1.0
    growth, inner = 1.0, part.get("normalizers") or part.get("decoders")
    for each in inner if isinstance(inner, list) else ():
        growth = min(growth * _growth(each), 1e300)
    if part.get("type") == "Replace":
        pattern = part.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        added = len(str(part.get("content", "")))
        growth *= max(1.0, added / len(text)) if isinstance(text, str) and text else 1.0 + added
    return growth


@contextlib.contextmanager
def library() -> Iterator[None]:
    """Raise UserError for an error of the `tokenizers` library: an Exception, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"the tokenizer's file makes its library fail ({str(error)[:200]}): get it again") from None
