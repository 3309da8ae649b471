"""SentencePiece models, and llama2.c's tokenizers, which are SentencePiece models in another file format."""

import codecs
import functools
import os
import struct
from collections.abc import Mapping, Sequence

import sentencepiece

from llama_jax.tokenizers.added import AddedTokens
from llama_jax.tokenizers.base import TextStream, Tokenizer
from llama_jax.tokenizers.exporting import exported, sentencepiece_json
from llama_jax.tokenizers.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    read_pieces,
    without_text,
)
from llama_jax.tokenizers.protobuf import field
from llama_jax.tokenizers.settings import GENERIC, Added, Settings

CHATGLM = "ChatGLMTokenizer"
CLASS_FILES = ("spiece.model", "sentencepiece.bpe.model")
# In the order of their ids, the first behind the model's last piece.
CHATGLM_SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (BPE or unigram), given as the content of its file, with the tokens added to it.

    With byte fallback and identity normalization (Llama's settings) every string survives encode and decode, except
    that U+2581 becomes a space. `settings` name special tokens and add tokens, and their class has its own: T5's
    sentinels, ChatGLM2's `CHATGLM_SPECIAL`, whose prompts and documents begin with [gMASK] and sop. `file_name` is the
    model's. Raises RuntimeError where `model` is no SentencePiece model.
    """

    def __init__(self, model: bytes, settings: Settings | None = None, file_name: str = "tokenizer.model"):
        self.settings = settings = settings or Settings()
        self.model = model
        self._processor = _processor(model)
        pieces = read_pieces(model)
        self.added = _added(pieces, settings)
        if changed := [i for i in self.added if i < len(pieces)]:
            self._processor = _processor(without_text(model, changed))
        self._finder = AddedTokens(self.added)
        self.vocab_size = max([len(pieces) - 1, *self.added]) + 1
        kinds = (UNKNOWN, CONTROL, USER_DEFINED)
        special = {i: piece.text for i, piece in enumerate(pieces) if piece.kind in kinds}
        special |= {i: token.content for i, token in self.added.items()}
        self.special_tokens = {name: i for i, name in sorted(special.items())}
        ids = {piece.text: i for i, piece in enumerate(pieces)} | {t.content: i for i, t in self.added.items()}
        model_ids = (self._processor.bos_id(), self._processor.eos_id(), self._processor.pad_id())
        self.bos_id, eos_id, self.pad_id = (
            _named(settings, key, ids, token_id)
            for key, token_id in zip(("bos_token", "eos_token", "pad_token"), model_ids, strict=True)
        )
        self.unk_id = _optional(self._processor.unk_id())
        self.eos_ids = () if eos_id is None else (eos_id,)
        if settings.class_name == CHATGLM:
            self.bos_id, self.pad_id = ids["sop"], self.unk_id
            self.start_ids = (ids["[gMASK]"], ids["sop"])
        self.files = {file_name: model, **settings.files}

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        config, suffix = self.settings.config, self.settings.rules.suffix
        add_bos, add_eos = config.get("add_bos_token", not suffix), config.get("add_eos_token", False) or suffix
        return (self.start_ids if add_bos else ()), (self.eos_ids if add_eos else ())

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not any(not token.special for token in self.added.values()):
            return self._encode_pieces(texts)
        return [self._join(self._finder.split(text, special=False)) for text in texts]

    def _encode_special(self, text: str) -> list[int]:
        self.check_text(text)
        special = {i: Added(name, special=True) for name, i in self.special_tokens.items() if i != self.unk_id}
        return self._join(AddedTokens(special | self.added).split(text, special=True))

    def _join(self, parts: Sequence[str | int]) -> list[int]:
        """Ids of texts and of the added tokens between them."""
        first = [part for part in parts[:1] if isinstance(part, str)]
        others = [part for part in parts[1:] if isinstance(part, str)]
        plain = self._inner if self.prefixes_first_only else self._processor
        encoded = iter([*self._processor.encode(first), *plain.encode(others)])
        ids: list[int] = []
        for part in parts:
            ids += next(encoded) if isinstance(part, str) else [part]
        return ids

    def _encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        num_threads = int(os.environ.get("LLAMA_JAX_TOKENIZER_THREADS", "-1"))  # -1: all cores
        return self._processor.encode(list(texts), num_threads=num_threads)

    @functools.cached_property
    def prefixes_first_only(self) -> bool:
        """Whether no space is put before the text behind an added token: transformers' Llama where `legacy` is off."""
        is_llama = self.settings.class_name in ("LlamaTokenizer", "CodeLlamaTokenizer")
        return is_llama and not self.settings.config.get("legacy", False)

    @functools.cached_property
    def _inner(self) -> sentencepiece.SentencePieceProcessor:
        """The model without the space that it puts before a text."""
        return _processor(without_text(self.model, self.added) + field(3, field(3, 0)))

    def stream(self) -> "_PieceStream":
        return _PieceStream(self)

    def export_files(self) -> dict[str, bytes]:
        data = sentencepiece_json(self.model, self.added, prefixes_first_only=self.prefixes_first_only)
        return exported(self, data, self.settings)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """What every id writes, before the leading space is taken off; nothing for special tokens."""
        model, pieces = self._processor, []
        for i in range(self.vocab_size):
            if i in self.added:
                pieces.append(b"" if self.added[i].special else self.added[i].content.encode())
            elif i >= model.vocab_size() or model.is_control(i):
                pieces.append(b"")
            elif model.is_byte(i):
                pieces.append(bytes([int(model.id_to_piece(i)[3:5], 16)]))
            elif model.is_unknown(i):
                # transformers' classes take it for a special token, SentencePiece writes " \u2047 ".
                alone = self.settings.class_name is None
                pieces.append(model.decode([i]).encode() if alone else b"")
            else:
                pieces.append(model.id_to_piece(i).replace(SPACE, " ").encode())
        return pieces

    @functools.cached_property
    def leading_spaces(self) -> tuple[bool, bool]:
        """Whether decoding drops the first space (put there by the encoder), and whether it drops all leading ones."""
        model = self._processor
        spaced = next((i for i in range(model.vocab_size()) if self.starts_with_space(i)), None)
        if spaced is None:
            return False, False
        strips = model.decode([spaced]) != model.id_to_piece(spaced).replace(SPACE, " ")
        space = model.piece_to_id(SPACE)
        return strips, strips and model.id_to_piece(space) == SPACE and not model.decode([space, space])

    def starts_with_space(self, token_id: int) -> bool:
        """Return whether the piece begins with a space."""
        known = token_id not in self.added and token_id < self._processor.vocab_size()
        return known and self._processor.id_to_piece(token_id).startswith(SPACE)


def _added(pieces: Sequence[Piece], settings: Settings) -> dict[int, Added]:
    """The tokens that are added to `pieces` or change one of them, by id."""
    added = dict(settings.added)
    names: list[str] = []
    if settings.class_name == CHATGLM:
        names += CHATGLM_SPECIAL
    elif settings.rules.suffix:  # T5
        number = settings.config.get("extra_ids", 100)
        names += [f"<extra_id_{i}>" for i in reversed(range(number))]
    known = {piece.text for piece in pieces} | {token.content for token in added.values()}
    more = [Added(name, special=True) for name in names if name not in known]
    more += [token for name, token in settings.named().items() if name not in known.union(names)]
    first = max([len(pieces) - 1, *added]) + 1
    added |= {first + i: token for i, token in enumerate(more)}
    # What the model itself takes for the token needs nothing.
    return {i: token for i, token in added.items() if i >= len(pieces) or not _is(pieces[i], token)}


def _is(piece: Piece, token: Added) -> bool:
    return piece.text == token.content and (piece.kind in (UNKNOWN, CONTROL) or not token.special)


def _named(settings: Settings, key: str, ids: Mapping[str, int], token_id: int) -> int | None:
    """The id of the token that `settings` name under `key`, the model's own `token_id` where they do not."""
    if key in settings.config or key in settings.special_map:
        name = settings.said(key)
        return None if name is None else ids.get(name)
    return _optional(token_id)


def _processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


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


def sentencepiece_tokenizer(model: bytes, settings: Settings, file_name: str) -> SentencePieceTokenizer:
    """Return the tokenizer of a SentencePiece model, read as the class that `settings` name has it.

    A lone spiece.model is T5's where pad, eos and unk have the ids 0, 1, 2. Raises RuntimeError where `model` is none,
    ValueError for a class that gives the pieces other ids, and for a file of such a class.
    """
    processor = _processor(model)
    if settings.class_name is None and file_name in CLASS_FILES:
        ids = (processor.pad_id(), processor.eos_id(), processor.unk_id(), processor.bos_id())
        if file_name != "spiece.model" or ids != (0, 1, 2, -1):
            raise ValueError(
                f"{file_name} is read in another way by each of its classes (T5, ALBERT, XLNet, XLM-RoBERTa, mBART and "
                "others), and no tokenizer_config.json or config.json names one: give the tokenizer.json of the model"
            )
        settings = settings.as_class("T5Tokenizer")
    if settings.class_name is not None and not settings.rules.sentencepiece and settings.class_name not in GENERIC:
        raise ValueError(
            f"its class {settings.class_name} reads SentencePiece models in a way that is not known: give the "
            "tokenizer.json of the model"
        )
    return SentencePieceTokenizer(model, settings, file_name if file_name in CLASS_FILES else "tokenizer.model")


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


def _optional(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
