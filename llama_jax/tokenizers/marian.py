"""Marian's tokenizer: two SentencePiece models, and a vocabulary that gives their pieces ids."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import override

import sentencepiece

from llama_jax.tokenizers.base import PIECE_CHARS, SETTINGS_FILE, TextStream, Tokenizer
from llama_jax.tokenizers.borders import piece_border
from llama_jax.tokenizers.checking import check_model
from llama_jax.tokenizers.sentencepiece import SPACE, ModelProto
from llama_jax.tokenizers.settings import Settings

FILES = ("source.spm", "target.spm", "vocab.json")
TARGET_VOCABULARY = "target_vocab.json"  # of models with `separate_vocabs`


class MarianTokenizer(Tokenizer):
    """Source text to ids, ids to target text, as in transformers' MarianTokenizer.

    A text may begin with the name of its target language, as ">>fra<<". `files` are those of a Marian model, by name.
    Encoded text is source text; decoded text may be of either language. Raises ValueError for a damaged vocabulary,
    RuntimeError for a damaged SentencePiece model.
    """

    def __init__(self, files: Mapping[str, bytes], settings: Settings):
        self._settings = settings = settings.as_class("MarianTokenizer")
        self._processor = sentencepiece.SentencePieceProcessor()
        check_model(files["source.spm"])
        self._processor.LoadFromSerializedProto(files["source.spm"])
        ids = {str(piece): int(i) for piece, i in json.loads(files["vocab.json"]).items()}
        target = {str(piece): int(i) for piece, i in json.loads(files.get(TARGET_VOCABULARY, b"{}")).items()} or ids
        self._texts = {i: piece for piece, i in target.items()}
        self.vocab_size = max(*ids.values(), *self._texts) + 1
        self.bos_id = None
        eos_id, self.unk_id, self.pad_id = (
            ids.get(settings.name(key) or "") for key in ("eos_token", "unk_token", "pad_token")
        )
        if self.unk_id is None:
            raise ValueError("its vocab.json has no token for unknown pieces")
        self.eos_ids = () if eos_id is None else (eos_id,)
        names = (*settings.rules.names.values(), *settings.named())
        self.special_tokens = {name: ids[name] for name in names if name in ids}
        self._ids = {piece: i for piece, i in ids.items() if piece not in self.special_tokens}
        self.files = {**files, **settings.files}

    @functools.cached_property
    @override
    def border(self) -> re.Pattern[str] | None:
        return piece_border(ModelProto.FromString(self.files["source.spm"]), (), self._processor.normalize)

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), self.eos_ids

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        unknown = self.unk_id
        assert unknown is not None
        parts = [_language(text) for text in texts]
        pieces = self._processor.encode([rest for _, rest in parts], out_type=str)
        return [
            [self._ids.get(piece, unknown) for piece in ([code] if code else []) + found]
            for (code, _), found in zip(parts, pieces, strict=True)
        ]

    @override
    def stream(self) -> "_Stream":
        return _Stream(self)

    def text_of(self, token_id: int) -> str:
        """Return the text of a token, also spaces at both ends of a text; nothing for a special token."""
        piece = self._texts.get(self.check_id(token_id), "")
        return "" if piece in self.special_tokens else piece.replace(SPACE, " ")

    @functools.cached_property
    @override
    def token_bytes(self) -> list[bytes]:
        """Text of every id in UTF-8; nothing for special tokens."""
        return [self.text_of(i).encode() for i in range(self.vocab_size)]

    @override
    def export_files(self) -> dict[str, bytes]:
        config = {**self._settings.config, "tokenizer_class": "MarianTokenizer"}
        content = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        return {**super().export_files(), SETTINGS_FILE: content}


class _Stream(TextStream):
    """Spaces at both ends of a text are dropped, so that those at the end are held back."""

    def __init__(self, tokenizer: MarianTokenizer):
        self._tokenizer, self._held, self._started = tokenizer, "", False

    def feed(self, token_id: int) -> str:
        text = self._held + self._tokenizer.text_of(token_id)
        if not self._started:
            text = text.lstrip()
        kept = text.rstrip()
        self._started, self._held = self._started or bool(kept), text[len(kept) :]
        return kept

    def flush(self) -> str:
        return ""


def _language(text: str) -> tuple[str, str]:
    """Return the name of the target language that `text` begins with, or "", and the rest."""
    end = text.find("<<", 0, PIECE_CHARS) if text.startswith(">>") else -1
    return ("", text) if end < 0 else (text[: end + 2], text[end + 2 :])


def marian_tokenizer(path: Path, content: bytes, settings: Settings) -> MarianTokenizer | None:
    """Return the tokenizer of `path` and the files next to it; None for a file of another kind.

    Raises ValueError for a missing or damaged file.
    """
    if path.name not in ("source.spm", "vocab.json") or not path.with_name("source.spm").is_file():
        return None
    names = (*FILES, TARGET_VOCABULARY) if settings.config.get("separate_vocabs") else FILES
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        raise ValueError(f"Marian's tokenizer has {', '.join(names)}, and {missing[0]} is not there")
    try:
        return MarianTokenizer({name: path.with_name(name).read_bytes() for name in names}, settings)
    except RuntimeError:
        raise ValueError("source.spm is not a SentencePiece model") from None
    except (TypeError, AttributeError):
        raise ValueError("its vocab.json is not an object of pieces and their ids") from None
