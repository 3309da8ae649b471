"""Places where a text can be cut: the ids of its parts, one after the other, are those of the whole.

A border is between two letters of ASCII with one space, where the tokenizer shows that no word, piece, added token or
rule of normalization reaches over it. A text that begins behind it gets the space from the tokenizer (`AT_SPACES`: it
is left out) or keeps it.
"""

import re
import string
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from llama_jax.config import Json
from llama_jax.tokenizers.checking import SPACE, units_of

Border = re.Pattern[str]
AT_SPACES = re.compile("(?<=[a-z]) (?=[A-Za-z])")
BEFORE_SPACES = re.compile("(?<=[a-z])(?= [A-Za-z])")
BEFORE_SPACES_AND_LINES = re.compile(BEFORE_SPACES.pattern + r"|(?<=\S\n)(?=\w)")
# Llama's spaces.
LLAMA = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
# Normalizers that leave a letter before or behind a single space to itself, and those that keep a space at an end.
_LOCAL = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Precompiled", "Strip")
_KEEPING = ("NFC", "BertNormalizer")
_SPACES = (" {2,}", r"\A ", rf"\A{SPACE}", r"\A +| +\z")  # what is replaced of spaces: several, or those at an end
_LETTERS = string.ascii_letters


def reaches(content: str, *, touching: bool) -> bool:
    """Return whether an added token may reach over a border; `touching`: or end or begin at one."""
    over = r"(\A|\w)\s(\w|\Z)|(\A|\S)\n\w" + (r"|\A\w|[A-Za-z\n]\Z" if touching else "")
    return re.search(over, content) is not None


def piece_border(model: Any, text_tokens: Collection[str], normalize: Callable[[str], str]) -> Border | None:
    """Return the border of a SentencePiece model, BPE or unigram, whose pieces begin words.

    text_tokens: contents of the added tokens that are found in a text.
    normalize: the model's normalization.
    """
    spec = model.normalizer_spec
    known = {piece.piece for piece in model.pieces if piece.type in (1, 4)}  # NORMAL, USER_DEFINED
    whole = not spec.escape_whitespaces or model.trainer_spec.treat_whitespace_as_suffix
    whole = whole or model.trainer_spec.model_type not in (1, 2) or not _begin_words(known)
    whole = whole or any(" " in piece for piece in known)  # found before spaces are replaced
    whole = whole or any(reaches(content, touching=True) for content in text_tokens)
    if whole or _joins_words(spec.precompiled_charsmap) or not _keeps_letters(normalize):
        return None
    return AT_SPACES if spec.add_dummy_prefix else None if spec.remove_extra_whitespaces else BEFORE_SPACES


def json_border(data: Json, splitting: Json | None, known: Collection[Json], normalize: Callable[[str], str]):
    """Return the border of a `tokenizer.json`, None where it is not known.

    splitting: how texts are split into words; `known` has the expressions that end words before a space and at line
      ends.
    normalize: the normalization of `data`.
    """
    parts = (splitting or {}).get("pretokenizers", [splitting])
    if len(parts) > 1 and (parts[0]["type"] == "Digits" or parts[0].get("pattern") == {"Regex": r"\p{N}"}):
        parts = parts[1:]
    kinds = [part and part["type"] for part in parts]
    steps = _steps(data["normalizer"])
    spaced = kinds[-1] == "Metaspace" and parts[-1]["prepend_scheme"] != "never" and len(kinds) <= 2
    in_words = spaced and parts[-1]["split"] and kinds[0] in ("Metaspace", "WhitespaceSplit")
    whole = (spaced and kinds == ["Metaspace"]) or (splitting is None and steps[-2:] == LLAMA)
    steps = steps[:-2] if splitting is None and whole else steps
    drops = in_words or (whole and _merges_within_words(data["model"]))
    tokens = [
        (form, drops or token["lstrip"] or token["rstrip"])
        for token in data["added_tokens"]
        for form in (token["content"], normalize(token["content"]))
        if not token["special"] or re.search(r"\s", form)
    ]
    if data["model"].get("dropout") or any(reaches(form, touching=touching) for form, touching in tokens):
        return None
    if drops:
        return AT_SPACES if all(map(_is_local, steps)) and _keeps_letters(normalize) else None
    first, last = parts[0] or {}, parts[-1] or {}
    by_expression = kinds == ["Split", "ByteLevel"] and first["pattern"] in known and not last["use_regex"]
    by_expression = by_expression and first["behavior"] == "Isolated" and not first["invert"]
    own = kinds in (["BertPreTokenizer"], ["WhitespaceSplit"]) or (kinds == ["ByteLevel"] and last["use_regex"])
    if not (own or by_expression) or any(step["type"] not in _KEEPING for step in steps):
        return None
    return BEFORE_SPACES if last.get("add_prefix_space") else BEFORE_SPACES_AND_LINES


def _steps(normalizer: Json | None) -> list[Json]:
    """Return the normalizers of a sequence, also of sequences in it."""
    if normalizer is None:
        return []
    inner = normalizer.get("normalizers", ())
    return [step for each in inner for step in _steps(each)] if normalizer["type"] == "Sequence" else [normalizer]


def _is_local(step: Json) -> bool:
    pattern = step.get("pattern", {})
    plain = "String" in pattern and not re.search(r"[\w ]", pattern["String"])
    replaces = step["type"] == "Replace" and (plain or pattern.get("Regex") in _SPACES)
    return replaces or step["type"] in _LOCAL or step == LLAMA[1]


def _merges_within_words(model: Json) -> bool:
    affixed = any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix"))
    if model["type"] == "Unigram":
        return _begin_words({piece for piece, _ in model["vocab"]})
    return model["type"] == "BPE" and not affixed and _begin_words(model["vocab"])


def _begin_words(pieces: Collection[str]) -> bool:
    """Return whether pieces have spaces at their beginning only; a space is one, or it could join an unknown letter."""
    return SPACE in pieces and not any(SPACE in piece.lstrip(SPACE) for piece in pieces)


def _keeps_letters(normalize: Callable[[str], str]) -> bool:
    words = normalize(" ".join(_LETTERS)).replace(SPACE, " ").split()
    return [word.lower() for word in words] == [*_LETTERS.lower()]


def _joins_words(charsmap: bytes) -> bool:
    """Return whether a rule of a compiled map of characters has a space next to a letter."""
    if not charsmap:
        return False
    units, offsets = units_of(charsmap)
    letters = np.frombuffer(_LETTERS.encode(), np.uint8).astype(np.uint32)
    space, labels = np.array([ord(" ")], np.uint32), units & np.uint32(1 << 31 | 255)
    for before, behind in ((letters, space), (space, letters)):
        places = np.flatnonzero(np.isin(labels, before))
        if np.any(labels[(places ^ offsets[places])[:, None] ^ behind] == behind):
            return True
    return False
