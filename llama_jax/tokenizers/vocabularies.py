"""Tokenizers made from a vocabulary: GPT-2's byte-level BPE, BERT's WordPiece, and words between spaces.

Those read from files that say only the vocabulary (`vocab.json` with `merges.txt`, `vocab.txt`), and those that
`training.py` makes.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from llama_jax.tokenizers.huggingface import HuggingFaceTokenizer

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def byte_letters() -> list[str]:
    """GPT-2's letter for every byte: itself where it prints, else one from U+0100 on, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printing}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    special_tokens: Iterable[str],
    *,
    add_prefix_space: bool = False,
) -> tokenizers.Tokenizer:
    """BPE over bytes, written in GPT-2's letters, with GPT-2's pre-tokenization: every string survives it."""
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _with_special(tokenizer, special_tokens)


def wordpiece(
    vocabulary: Mapping[str, int],
    special_tokens: Iterable[str],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> tokenizers.Tokenizer:
    """WordPiece after BERT's normalization: a text comes back lower-cased, without accents, newly spaced.

    `strip_accents` None: as `lowercase`. `chinese_characters`: each of them is a word.
    """
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab=dict(vocabulary), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(  # type: ignore[assignment]
        clean_text=True,
        handle_chinese_chars=chinese_characters,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
    return _with_special(tokenizer, special_tokens)


def whitespace(vocabulary: Mapping[str, int], special_tokens: Iterable[str]) -> tokenizers.Tokenizer:
    """Every word between spaces is a token or `<unk>`; a text of known words comes back with single spaces.

    Special tokens that are not in `vocabulary` get the ids after it.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=dict(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return _with_special(tokenizer, special_tokens)


def _with_special(tokenizer: tokenizers.Tokenizer, names: Iterable[str]) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def read_vocabulary(content: bytes) -> dict[str, int] | None:
    """The ids of a `vocab.json`, or None if `content` is none."""
    try:
        data = json.loads(content)
    except ValueError:
        return None
    return data if isinstance(data, dict) and data and all(type(i) is int for i in data.values()) else None


def read_merges(content: bytes) -> list[tuple[str, str]] | None:
    """The pairs of a `merges.txt` (two tokens a line, after a line with its version), or None if `content` is none."""
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        return None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    return [(pair[0], pair[1]) for pair in pairs] if pairs and all(len(pair) == 2 for pair in pairs) else None


def gpt2_tokenizer(vocabulary: bytes, merges: bytes, settings: bytes | None) -> HuggingFaceTokenizer:
    """GPT-2's tokenizer from its two files, with the `tokenizer_config.json` beside them, if any.

    What is neither a byte nor made by a merge is a special token. Raises ValueError where a file cannot be used.
    """
    ids, pairs = read_vocabulary(vocabulary), read_merges(merges)
    if ids is None or pairs is None:
        raise ValueError("one of vocab.json and merges.txt is damaged")
    special = ids.keys() - set(byte_letters()) - {left + right for left, right in pairs}
    options: dict[str, Any] = json.loads(settings or b"{}")
    try:
        tokenizer = byte_level_bpe(
            ids,
            pairs,
            sorted(special, key=ids.__getitem__),
            add_prefix_space=options.get("add_prefix_space", False),
        )
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"vocab.json and merges.txt do not fit: {error}") from None
    files = {"vocab.json": vocabulary, "merges.txt": merges}
    return HuggingFaceTokenizer(tokenizer, files | _kept(settings), options)


def read_pieces(content: bytes) -> dict[str, int] | None:
    """The ids of a BERT `vocab.txt` (one token a line), or None if `content` is none."""
    try:
        lines = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        return None
    pieces = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    return pieces if {"[UNK]", "[CLS]", "[SEP]"} <= pieces.keys() else None


def bert_tokenizer(content: bytes, pieces: Mapping[str, int], settings: bytes | None) -> HuggingFaceTokenizer:
    """BERT's tokenizer from the `pieces` of its `vocab.txt`, with the `tokenizer_config.json` beside it, if any.

    Where that does not say whether text is lower-cased, it is unless a piece has an upper-case letter.
    Raises ValueError for damaged settings.
    """
    options: dict[str, Any] = json.loads(settings or b"{}")
    cased = any(piece != piece.lower() for piece in pieces if not (piece.startswith("[") and piece.endswith("]")))
    tokenizer = wordpiece(
        pieces,
        [name for name in BERT_SPECIAL if name in pieces],
        lowercase=options.get("do_lower_case", not cased),
        strip_accents=options.get("strip_accents"),
        chinese_characters=options.get("tokenize_chinese_chars", True),
    )
    return HuggingFaceTokenizer(tokenizer, {"vocab.txt": content} | _kept(settings), options)


def _kept(settings: bytes | None) -> dict[str, bytes]:
    return {} if settings is None else {"tokenizer_config.json": settings}
