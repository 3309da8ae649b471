"""Tokenizers made from a vocabulary: byte-level BPE, BERT's WordPiece, and words between spaces.

The readers are for files that hold only the vocabulary: GPT-2's pair `vocab.json` and `merges.txt`, BERT's `vocab.txt`,
tiktoken's ranks, Mistral's `tekken.json`. `training.py` makes the same kinds.
"""

import base64
import binascii
import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from llama_jax.config import UserError
from llama_jax.tokenizers.checking import check_ids
from llama_jax.tokenizers.config import BERT_SPECIAL
from llama_jax.tokenizers.huggingface import (
    CL100K_SPLIT as CL100K_SPLIT,
    GPT2_SPLIT as GPT2_SPLIT,
    KIMI_SPLIT,
    O200K_SPLIT,
    SPLITS as SPLITS,
    HuggingFaceTokenizer,
    byte_letters,
)
from llama_jax.tokenizers.settings import CLASSES, END, Settings


def byte_level_bpe(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, str]],
    special_tokens: Iterable[str],
    *,
    add_prefix_space: bool = False,
    split: str | None = None,
    nfc: bool = False,
    ignore_merges: bool = False,
) -> tokenizers.Tokenizer:
    """Return BPE over bytes, written in GPT-2's letters: every string survives it.

    `split` is the expression of the words; None for GPT-2's. `nfc` normalizes text first. With `ignore_merges` a whole
    word that is a token stays whole.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(vocabulary), merges=merges, ignore_merges=ignore_merges))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    words = [letters] if split is None else [pre_tokenizers.Split(Regex(split), "isolated"), letters]
    tokenizer.pre_tokenizer = words[0] if split is None else pre_tokenizers.Sequence(words)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    return _with_special(tokenizer, special_tokens)


def wordpiece(
    vocabulary: Mapping[str, int],
    special_tokens: Iterable[str],
    *,
    lowercase: bool = True,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
) -> tokenizers.Tokenizer:
    """Return WordPiece after BERT's normalization: a text comes back lower-cased, without accents, newly spaced.

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
    """Return a tokenizer whose tokens are words between spaces; a text of known words comes back with single spaces.

    Other words are `<unk>`. Special tokens that are not in `vocabulary` get the ids after it.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab=dict(vocabulary), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return _with_special(tokenizer, special_tokens)


def _with_special(tokenizer: tokenizers.Tokenizer, names: Iterable[str]) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _read_vocabulary(content: bytes) -> dict[str, int] | None:
    """Return the ids of a `vocab.json`, or None if `content` is another file."""
    try:
        data = json.loads(content)
    except ValueError:
        return None
    return data if isinstance(data, dict) and data and all(type(i) is int for i in data.values()) else None


def _read_merges(content: bytes) -> list[tuple[str, str]] | None:
    """Return the pairs of a `merges.txt` (two tokens a line, after a line with its version), or None."""
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError:
        return None
    if lines[0].startswith("#version"):
        lines = lines[1:]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    return [(pair[0], pair[1]) for pair in pairs] if pairs and all(len(pair) == 2 for pair in pairs) else None


def _partner(path: Path, own: str, other: str) -> bytes:
    """Return the content of the other file of GPT-2's pair, whose name has the same beginning as that of `path`."""
    if not path.name.endswith(own):
        raise ValueError(f"a vocabulary of byte-level BPE is named *{own}, with *{other} in the same directory")
    partner = path.with_name(path.name.removesuffix(own) + other)
    if not partner.is_file():
        raise ValueError(f"'{partner}' must be in the same directory")
    return partner.read_bytes()


def byte_level_tokenizer(path: Path, content: bytes, settings: Settings) -> HuggingFaceTokenizer | None:
    """Return the tokenizer of a `vocab.json` and a `merges.txt`, of which `path` is either; None for another file.

    It is GPT-2's, or that of the class that `settings` name. A token that is neither a byte nor made by a merge is a
    special one. Raises ValueError where a file cannot be used, and for a class that reads them in another or an unknown
    way.
    """
    if path.name.endswith("merges.txt") and _read_merges(content):
        vocabulary, merges = _partner(path, "merges.txt", "vocab.json"), content
    elif _read_vocabulary(content):
        vocabulary, merges = content, _partner(path, "vocab.json", "merges.txt")
    else:
        return None
    ids, pairs = _read_vocabulary(vocabulary), _read_merges(merges)
    if ids is None or pairs is None:
        raise ValueError("one of vocab.json and merges.txt is damaged")
    settings = settings.as_class("GPT2Tokenizer")
    rules = settings.rules
    if rules.splitting is None:
        raise ValueError(
            f"its class {settings.class_name} reads vocab.json and merges.txt in a way that is not known: give the "
            "tokenizer.json of the model"
        )
    added = {token.content: i for i, token in settings.added.items()}
    texts = {token.content for token in settings.added.values() if not token.special}
    special = ids.keys() - set(byte_letters()) - {left + right for left, right in pairs} - texts
    try:
        tokenizer = byte_level_bpe(
            ids | added,
            pairs,
            # Those with options are added later, with the others of the settings.
            sorted(special - added.keys() - settings.named().keys(), key=ids.__getitem__),
            add_prefix_space=settings.config.get("add_prefix_space") or False,
            split=SPLITS[rules.splitting],
            nfc=rules.nfc,
        )
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"vocab.json and merges.txt do not fit: {error}") from None
    files = {"vocab.json": vocabulary, "merges.txt": merges}
    return HuggingFaceTokenizer(tokenizer, files, settings, model={"vocab": ids | added, "merges": pairs})


def bert_tokenizer(path: Path, content: bytes, settings: Settings) -> HuggingFaceTokenizer | None:
    """Return BERT's tokenizer of a `vocab.txt` (one token a line); None for another file.

    Where `settings` do not decide whether text is lower-cased, it is unless a piece has an upper-case letter.
    Raises ValueError for a class that reads the file in another way.
    """
    try:
        lines = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        return None
    pieces = {line.rstrip("\r"): i for i, line in enumerate(lines)}
    if not {"[UNK]", "[CLS]", "[SEP]"} <= pieces.keys():
        return None
    settings = settings.as_class("BertTokenizer")
    if settings.rules != CLASSES["BertTokenizer"]:
        raise ValueError(
            f"its class {settings.class_name} reads vocab.txt in a way that is not known: give the tokenizer.json of "
            "the model"
        )
    options = settings.config
    cased = any(piece != piece.lower() for piece in pieces if not (piece.startswith("[") and piece.endswith("]")))
    pieces |= {token.content: i for i, token in settings.added.items()}
    tokenizer = wordpiece(
        pieces,
        [name for name in BERT_SPECIAL if name in pieces],
        lowercase=options.get("do_lower_case", not cased),
        strip_accents=options.get("strip_accents"),
        chinese_characters=options.get("tokenize_chinese_chars", True),
    )
    return HuggingFaceTokenizer(tokenizer, {"vocab.txt": content}, settings, model={"vocab": pieces})


@dataclasses.dataclass(frozen=True)
class Encoding:
    """The part of an encoding that a file of ranks lacks: how text is split first, and the special tokens."""

    name: str
    pattern: str
    special_tokens: dict[str, int]
    bos: str | None = END
    eos: str = END
    prefix: tuple[str, ...] = ()


# Patterns and ids as OpenAI and Meta publish them (openai/tiktoken, tiktoken_ext/openai_public.py;
# meta-llama/llama-models, llama3/tokenizer.py, with the names of 3.1 for tokens that 3.0 had reserved).
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip
CL100K_SPECIAL = {
    END: 100257, "<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276
}  # fmt: skip
LLAMA3 = Encoding(
    "Llama 3",
    CL100K_SPLIT,
    {name: 128000 + i for i, name in enumerate(LLAMA3_SPECIAL)},
    "<|begin_of_text|>",
    "<|end_of_text|>",
    ("<|begin_of_text|>",),
)
# By the number of ranks in the file.
ENCODINGS = {
    50256: Encoding("r50k_base", GPT2_SPLIT, {END: 50256}),
    50280: Encoding("p50k_base", GPT2_SPLIT, {END: 50256}),  # its ranks leave 50256 out
    100256: Encoding("cl100k_base", CL100K_SPLIT, CL100K_SPECIAL),
    128000: LLAMA3,
    199998: Encoding("o200k_base", O200K_SPLIT, {END: 199999, "<|endofprompt|>": 200018}),
}


def _read_ranks(content: bytes) -> dict[bytes, int] | None:
    """Return the ranks of a tiktoken file (a base64 token and its rank a line), or None for another file."""
    ranks = {}
    lines = content.splitlines()
    for line in lines:
        try:
            token, rank = line.split(b" ", 2)
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            return None
    complete = len(ranks) == len(lines) == len(set(ranks.values())) and all(bytes([b]) in ranks for b in range(256))
    return ranks if complete else None


def _merges(ranks: Mapping[bytes, int]) -> tuple[dict[int, str], list[tuple[str, str]]]:
    """Return the tokens of tiktoken's ranks in GPT-2's letters, and the merges that make them.

    tiktoken merges the neighbours whose union has the lowest rank, so every way to cut a token in two known ones is a
    merge, with the token's rank as its priority.
    """
    letters = byte_letters()
    spelled = {rank: "".join(letters[b] for b in token) for token, rank in ranks.items()}
    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = sorted((ranks[left], ranks[right]) for left, right in cuts if left in ranks and right in ranks)
        merges += [(spelled[left], spelled[right]) for left, right in pairs]
    return spelled, merges


def tiktoken_tokenizer(path: Path, content: bytes, settings: Settings) -> HuggingFaceTokenizer | None:
    """Return the tokenizer of a tiktoken file of ranks; None for another file.

    The encoding is GLM-4's or Kimi's where `settings` name the class (and the special tokens), else it follows from the
    number of ranks. Raises UserError where no known encoding has that many ranks.
    """
    if (ranks := _read_ranks(content)) is None:
        return None
    encoding = ENCODINGS.get(len(ranks))
    special = {token.content: i for i, token in settings.added.items()}
    if settings.class_name == "TikTokenTokenizer":
        encoding = Encoding("Kimi", KIMI_SPLIT, special, "[BOS]", "[EOS]")
    elif settings.class_name == "ChatGLM4Tokenizer":
        encoding = Encoding("GLM-4", CL100K_SPLIT, special, None, END, ("[gMASK]", "<sop>"))
    if encoding is None or set(encoding.special_tokens.values()) & set(ranks.values()):
        known = ", ".join(f"{encoding.name} ({number})" for number, encoding in ENCODINGS.items())
        raise UserError(
            f"its {len(ranks)} ranks are those of no known encoding ({known}), and a file of ranks has neither the way "
            "to split text nor the special tokens: use the model's tokenizer.json"
        )
    spelled, merges = _merges(ranks)
    # Special tokens are in the vocabulary so that each gets its own id, also where ids between are free.
    vocabulary = {text: rank for rank, text in spelled.items()} | encoding.special_tokens
    special = list(encoding.special_tokens)
    tokenizer = byte_level_bpe(vocabulary, merges, special, split=encoding.pattern, ignore_merges=True)
    names = {"bos_token": encoding.bos, "eos_token": encoding.eos}
    settings = dataclasses.replace(settings, config=names | dict(settings.config))
    return HuggingFaceTokenizer(tokenizer, {"tokenizer.model": content}, settings, prefix=encoding.prefix)


# Special tokens of Mistral's files up to version 7, which leave them out (mistralai/mistral-common, tekken.py).
TEKKEN_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def tekken_tokenizer(path: Path, content: bytes, settings: Settings) -> HuggingFaceTokenizer | None:
    """Return the tokenizer of Mistral's `tekken.json`; None for another file.

    The special tokens come first, padded with `<SPECIAL_20>` and so on, then tiktoken's ranks, of which the file may
    have more than are used. A prompt begins with BOS. Raises ValueError for a file that does not fit together.
    """
    data = json.loads(content) if content.lstrip()[:1] == b"{" else {}
    config = data.get("config")
    if not isinstance(config, dict) or not {"pattern", "default_vocab_size"} <= config.keys():
        return None
    listed = data.get("special_tokens")
    named = dict(enumerate(TEKKEN_SPECIAL)) if listed is None else {it["rank"]: it["token_str"] for it in listed}
    first = config["default_num_special_tokens"]
    special = [named.get(i, f"<SPECIAL_{i}>") for i in range(check_ids(first))]
    entries = data["vocab"][: config["default_vocab_size"] - first]
    ranks = {base64.b64decode(entry["token_bytes"], validate=True): entry["rank"] for entry in entries}
    if len(set(special)) < first or max(named) >= first or set(ranks.values()) != set(range(len(entries))):
        raise ValueError("its special tokens or its ranks do not follow one another")
    spelled, merges = _merges(ranks)
    vocabulary = {text: first + rank for rank, text in spelled.items()} | {name: i for i, name in enumerate(special)}
    tokenizer = byte_level_bpe(vocabulary, merges, special, split=config["pattern"], ignore_merges=True)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = dataclasses.replace(settings, config=names | dict(settings.config))
    return HuggingFaceTokenizer(tokenizer, {"tekken.json": content}, settings, prefix=("<s>",))
