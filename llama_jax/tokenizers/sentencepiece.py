"""SentencePiece models, and llama2.c's tokenizers, which are SentencePiece models in another file format."""

import codecs
import functools
import os
import struct
from collections.abc import Sequence

import sentencepiece

from llama_jax.tokenizers.base import TextStream, Tokenizer
from llama_jax.tokenizers.protobuf import field, fields

SPACE = "\u2581"  # stands for a space inside pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # ModelProto.SentencePiece.Type


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (BPE or unigram), given as the content of its file.

    With byte fallback and identity normalization (Llama's settings) every string survives encode and decode, except
    that U+2581 becomes a space. Raises RuntimeError where `model` is none.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = _optional(self._processor.bos_id())
        self.pad_id = _optional(self._processor.pad_id())
        eos_id = _optional(self._processor.eos_id())
        self.eos_ids = () if eos_id is None else (eos_id,)
        self.unk_id = _optional(self._processor.unk_id())
        self.special_tokens = _special_tokens(model)
        self.files = {"tokenizer.model": model}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        num_threads = int(os.environ.get("LLAMA_JAX_TOKENIZER_THREADS", "-1"))  # -1: all cores
        return self._processor.encode(list(texts), num_threads=num_threads)

    def stream(self) -> "_PieceStream":
        return _PieceStream(self)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """What every id writes, before the leading space is taken off; nothing for control tokens."""
        model = self._processor
        pieces = []
        for i in range(self.vocab_size):
            if model.is_control(i):
                pieces.append(b"")
            elif model.is_byte(i):
                pieces.append(bytes([int(model.id_to_piece(i)[3:5], 16)]))
            elif model.is_unknown(i):
                pieces.append(model.decode([i]).encode())
            else:
                pieces.append(model.id_to_piece(i).replace(SPACE, " ").encode())
        return pieces

    @functools.cached_property
    def leading_spaces(self) -> tuple[bool, bool]:
        """Whether decoding drops the first space (put there by the encoder), and whether it drops all leading ones."""
        model = self._processor
        spaced = next((i for i in range(self.vocab_size) if model.id_to_piece(i).startswith(SPACE)), None)
        if spaced is None:
            return False, False
        strips = model.decode([spaced]) != model.id_to_piece(spaced).replace(SPACE, " ")
        space = model.piece_to_id(SPACE)
        return strips, strips and model.id_to_piece(space) == SPACE and not model.decode([space, space])

    def starts_with_space(self, token_id: int) -> bool:
        return self._processor.id_to_piece(token_id).startswith(SPACE)


class _PieceStream(TextStream):
    def __init__(self, tokenizer: SentencePieceTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips, self._strips_all = tokenizer.leading_spaces

    def feed(self, token_id: int) -> str:
        piece = self._tokenizer.pieces[self._tokenizer.check_id(token_id)]
        if self._strips and piece:
            if self._tokenizer.starts_with_space(token_id):
                piece = piece[1:]
                self._strips = self._strips_all and not piece
            else:
                self._strips = False
        return self._decoder.decode(piece)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def llama2c_model(content: bytes) -> bytes | None:
    """The SentencePiece model that does what llama2.c's tokenizer file `content` says, or None if it is no such file.

    The format (karpathy/llama2.c, tokenizer.py): int32 longest length, then float32 score, int32 length and the bytes
    of every piece, with spaces for U+2581 and line ends around the names of BOS and EOS.
    """
    pieces: list[tuple[str, float]] = []
    position, longest = 4, 0
    while position < len(content):
        try:
            score, length = struct.unpack_from("<fi", content, position)
            (piece,) = struct.unpack_from(f"{length}s", content, position + 8)
            pieces.append((piece.decode(), score))
        except (struct.error, UnicodeDecodeError, OverflowError):
            return None
        position += 8 + length
        longest = max(longest, length)
    if len(pieces) < 259 or content[:4] != struct.pack("<i", longest):
        return None
    model = bytearray()
    for i, (piece, score) in enumerate(pieces):
        kind = UNKNOWN if i == 0 else CONTROL if i < 3 else BYTE if i < 259 else NORMAL
        text = piece.strip("\n") if kind == CONTROL else piece.replace(" ", SPACE)
        model += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    bpe = 2
    model += field(2, field(3, bpe) + field(4, len(pieces)) + field(35, 1))  # byte fallback
    model += field(3, field(1, b"identity") + field(3, 1) + field(4, 0))  # dummy prefix, keep extra whitespace
    return bytes(model)


def with_dummy_prefix(model: bytes) -> bytes:
    """`model` with a space put before every text, as Llama has it: protobuf merges what is appended."""
    return model + field(3, field(3, 1))


def _special_tokens(model: bytes) -> dict[str, int]:
    """Ids of the unknown, control and user-defined pieces; the library itself has no question for the last."""
    messages = [value for number, value in fields(model) if number == 1]
    typed = {i: dict(fields(message)) for i, message in enumerate(messages) if b"\x18" in message}  # key of the type
    special = (UNKNOWN, CONTROL, USER_DEFINED)
    return {piece[1].decode(): i for i, piece in typed.items() if piece.get(3, NORMAL) in special}


def _optional(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
