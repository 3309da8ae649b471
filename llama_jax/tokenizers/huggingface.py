"""Tokenizers that the `tokenizers` library runs, its own file `tokenizer.json`, and streams of decoded text."""

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import override

import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers

from llama_jax.config import Json
from llama_jax.tokenizers.base import COMPANION, TextStream, Tokenizer
from llama_jax.tokenizers.borders import json_border
from llama_jax.tokenizers.checking import check_ids, check_json, library
from llama_jax.tokenizers.settings import KEYS, Settings, exported, guess

# Usual names of these tokens, tried where no setting names one.
GUESSED = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]", "<|finetune_right_pad_id|>"),
    "unk_token": ("<unk>", "[UNK]"),
}
# Ends of a chat turn end a generated text too, in addition to EOS.
TURN_END_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")


# Expressions of the words that text is split into before byte-level BPE.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kimi's (moonshotai/Kimi-K2-Instruct, tokenization_kimi.py): Chinese characters apart.
KIMI_SPLIT = r"\p{Han}+|" + O200K_SPLIT.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace(r"[\r\n/]", r"[\r\n]")
# By the name in `settings.CLASSES`, and Mistral's; None is GPT-2's expression inside the library.
SPLITS = {
    "gpt2": None,
    "qwen2": CL100K_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
    "tekken": O200K_SPLIT.replace(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}"),
}


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library with the files it came from.

    `settings` name the special tokens and add tokens. `model` is the JSON of its model where that could make special
    tokens of ordinary text. `prefix` names the tokens before a prompt where the file can have no post-processor.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        files: Mapping[str, bytes],
        settings: Settings,
        *,
        model: Json | None = None,
        prefix: Sequence[str] = (),
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _add(tokenizer, settings)
        self._tokenizer, self._settings = tokenizer, settings
        self.vocab_size = check_ids(max(tokenizer.get_vocab().values(), default=-1) + 1)
        self.bos_id, self.pad_id = self._special("bos_token"), self._special("pad_token")
        ends = [self._special("eos_token"), *map(tokenizer.token_to_id, TURN_END_NAMES)]
        self.eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))
        self.unk_id = self._unknown()
        # The end of a turn that was added as text stays text.
        ends = [i for i in self.eos_ids[1:] if i not in tokenizer.get_added_tokens_decoder()]
        ordinary = (self.bos_id, self.pad_id, *self.eos_ids[:1], *ends)
        _make_special(tokenizer, {i for i in ordinary if i is not None and i != self.unk_id})
        named = {self.bos_id, self.pad_id, self.unk_id, *self.eos_ids, *tokenizer.get_added_tokens_decoder()}
        self.special_tokens = {str(tokenizer.id_to_token(i)): i for i in sorted(i for i in named if i is not None)}
        self.files = {**files, **settings.files}
        self._prefix = tuple(i for name in prefix if (i := tokenizer.token_to_id(name)) is not None)
        self._splitting = tokenizer.pre_tokenizer
        special = {token.content for i, token in self._added.items() if token.special and i != self.unk_id}
        if names := reachable_names(tokenizer, model or {}, special):
            _cut(tokenizer, names)
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text: data must not be able to inject them

    @functools.cached_property
    @override
    def border(self) -> re.Pattern[str] | None:
        splitting = None if self._splitting is None else json.loads(self._splitting.__getstate__())
        patterns = GPT2_SPLIT, CL100K_SPLIT, O200K_SPLIT, SPLITS["qwen2"], SPLITS["tekken"]
        known = [{"Regex": pattern} for pattern in patterns]
        normalizer = self._tokenizer.normalizer
        normalize = str if normalizer is None else normalizer.normalize_str
        return json_border(json.loads(self._tokenizer.to_str()), splitting, known, normalize)

    def _special(self, key: str) -> int | None:
        name, settings = self._settings.name(key), self._settings
        if name is None and settings.class_name is None and not settings.named():
            return guess(GUESSED[key], self._tokenizer.token_to_id)
        return None if name is None else self._tokenizer.token_to_id(name)

    def _unknown(self) -> int | None:
        if (name := self._settings.from_files("unk_token")) is not None:
            return self._tokenizer.token_to_id(name)
        # Unigram models do not name it; byte-level models have none.
        model = self._tokenizer.model
        unknown = (model.unk_token,) if hasattr(model, "unk_token") else GUESSED["unk_token"]
        return guess([name for name in unknown if name is not None], self._tokenizer.token_to_id)

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        settings, rules = self._settings, self._settings.rules
        if "tokenizer.json" not in self.files:
            if not self._prefix:
                return settings.affixes(self._tokenizer.token_to_id)
            return (self._prefix if settings.config.get("add_bos_token", True) else ()), ()
        found = ((), ()) if rules.keeps_rule else _around(self._tokenizer)
        # transformers reads add_bos_token and add_eos_token only without a tokenizer.json; some classes put their
        # tokens around every text.
        if found != ((), ()) or (rules.prefix in ((), ("bos_token",)) and not rules.suffix):
            return found
        return settings.affixes(self._tokenizer.token_to_id)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        with library():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [encoding.ids for encoding in encodings]

    def _encode_special(self, text: str) -> list[int]:
        self.check_text(text)
        with library():
            return self._reading_special.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _reading_special(self) -> tokenizers.Tokenizer:
        """A copy that reads special tokens in a text: the setting cannot change while other threads encode."""
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    @functools.cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self._tokenizer.get_added_tokens_decoder()

    def is_silent(self, token_id: int) -> bool:
        """Return whether the token is a special one, which decodes to nothing."""
        token = self._added.get(token_id)
        return token is not None and token.special

    @override
    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in self.check_ids(ids) if not self.is_silent(i)])

    @override
    def stream(self) -> TextStream:
        return _DecoderStream(self, self._tokenizer)

    @functools.cached_property
    @override
    def token_bytes(self) -> list[bytes]:
        """Text of every id in UTF-8; nothing for special tokens."""
        stream, names = _DecoderStream(self, self._tokenizer), map(self._tokenizer.id_to_token, range(self.vocab_size))
        return [b"" if name is None or self.is_silent(i) else stream.bytes_of(name) for i, name in enumerate(names)]

    @override
    def export_files(self) -> dict[str, bytes]:
        data = json.loads(self._tokenizer.to_str())
        data["pre_tokenizer"] = None if self._splitting is None else json.loads(self._splitting.__getstate__())
        rule = self.prefix_ids, self.suffix_ids
        return exported(self, data, self._settings, keeps_processor=rule == _around(self._tokenizer))


def json_tokenizer(path: Path, content: bytes, settings: Settings) -> HuggingFaceTokenizer | None:
    """Return the tokenizer of a `tokenizer.json`; None for another file. Raises ValueError where it cannot be read."""
    if content.lstrip()[:1] != b"{":
        return None
    check_json(content)
    files, companion = {"tokenizer.json": content}, path.with_name(COMPANION)
    if path.name == "tokenizer.json" and companion.is_file():
        files[COMPANION] = companion.read_bytes()
    with library():
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
        return HuggingFaceTokenizer(tokenizer, files, settings, model=json.loads(content)["model"])


def reachable_names(tokenizer: tokenizers.Tokenizer, model: Json, special: Collection[str]) -> set[str]:
    """Return those of `special` that `model` (its JSON) may make of ordinary text."""
    special = {name for name in special if len(name) > 1}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # unigram: pieces with their scores
        return special & {piece for piece, _ in vocabulary}
    found = special & vocabulary.keys()
    words = {name for name in found if _is_word(tokenizer, name)}
    if "merges" not in model:
        return words
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    merged = found & {"".join(pair) for pair in pairs}
    return merged | (words if model.get("ignore_merges") else set())


def _is_word(tokenizer: tokenizers.Tokenizer, name: str) -> bool:
    """Return whether `name` is a separate word in some text."""
    split = tokenizer.pre_tokenizer
    contexts = (name, f"a{name}a", f" {name} ", f"\n{name}\n", f".{name}.")
    return split is None or any(word == name for text in contexts for word, _ in split.pre_tokenize_str(text))


def _cut(tokenizer: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Split words after the first character of any of `names`, so that none of them is ever a token of a text."""
    heads: dict[str, list[str]] = {}
    for name in names:
        # As it is after the spaces are replaced.
        for form in {name, name.replace(" ", "\u2581")}:
            heads.setdefault(form[0], []).append(re.escape(form[1:]))
    pattern = "|".join(f"{re.escape(head)}(?={'|'.join(rest)})" for head, rest in heads.items())
    cut = pre_tokenizers.Split(Regex(pattern), "merged_with_previous")
    split = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, cut]) if split is not None else cut  # type: ignore


def _add(tokenizer: tokenizers.Tokenizer, settings: Settings) -> None:
    """Add the tokens of `settings` that the tokenizer lacks, those with an id first; the named ones become special."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    added = [token for _, token in sorted(settings.added.items())]
    for token in [*added, *settings.named().values()]:
        if token.content not in known:
            tokenizer.add_tokens([AddedToken(**vars(token))])
            known.add(token.content)
    named = {*settings.named(), *(name for key in KEYS if (name := settings.name(key)) is not None)}
    _make_special(tokenizer, {i for name in named if (i := tokenizer.token_to_id(name)) is not None})


def _make_special(tokenizer: tokenizers.Tokenizer, ids: Iterable[int]) -> None:
    """Make special tokens of those of `ids` that are not."""
    known = tokenizer.get_added_tokens_decoder()
    for i in ids:
        if (token := known.get(i)) is None:
            tokenizer.add_special_tokens([AddedToken(tokenizer.id_to_token(i), special=True, normalized=False)])
        elif not token.special:
            options = {key: getattr(token, key) for key in ("lstrip", "rstrip", "single_word", "normalized")}
            tokenizer.add_special_tokens([AddedToken(token.content, special=True, **options)])


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the post-processor puts before and after a text."""
    if tokenizer.post_processor is None:
        return (), ()
    encoding = tokenizer.encode("a", add_special_tokens=True)
    mask = encoding.special_tokens_mask
    ordinary = [i for i, special in enumerate(mask) if not special] or [len(mask)]
    return tuple(encoding.ids[: ordinary[0]]), tuple(encoding.ids[ordinary[-1] + 1 :])


def byte_letters() -> list[str]:
    """Return GPT-2's letter for every byte: itself where it prints, else one from U+0100 on, in order."""
    printing = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printing]
    return [chr(byte) if byte in printing else chr(256 + others.index(byte)) for byte in range(256)]


# Decoders whose text of a token depends on nothing but the token, and on whether it is the first.
LOCAL = {"Metaspace", "WordPiece", "Replace", "Strip"}
BYTE_NAME = re.compile("<0x[0-9A-Fa-f]{2}>")


class _DecoderStream(TextStream):
    """The library's decoder, token by token.

    Tokens are held back exactly as long as later ones may still change their text. (The library's own `DecodeStream`
    raises on bytes that are not UTF-8.)
    """

    def __init__(self, owner: HuggingFaceTokenizer, tokenizer: tokenizers.Tokenizer):
        self._owner, self._tokenizer = owner, tokenizer
        decoder = tokenizer.decoder
        self._decode: Callable[[list[str]], str] = " ".join if decoder is None else decoder.decode
        self._size = len(self._decode(["a"]))
        self._tokens: list[str] = []
        self._first = True  # nothing has been returned yet
        data: Json = {"type": "Metaspace"} if decoder is None else json.loads(decoder.__getstate__())
        parts = data["decoders"] if data["type"] == "Sequence" else [data]
        kinds = [part["type"] for part in parts]
        order = re.fullmatch("(Replace )*(ByteFallback )?Fuse (Strip )?", "".join(f"{kind} " for kind in kinds))
        fused = order and all("String" in part["pattern"] for part in parts if part["type"] == "Replace")
        # Any other decoder may change all the text until its end.
        self._waits_for_end = not (fused or kinds == ["ByteLevel"] or LOCAL.issuperset(kinds))
        self._has_bytes = "ByteFallback" in kinds
        letters = enumerate(byte_letters()) if "ByteLevel" in kinds else ()
        self._letters = {letter: bytes([byte]) for byte, letter in letters}
        # Ends of a text that is not certain: an incomplete character, and text that is stripped from the end of all.
        tails = (part["content"] for part in parts if fused and part["type"] == "Strip" and part["stop"])
        self._uncertain = ("\ufffd", *tails)

    def feed(self, token_id: int) -> str:
        token = self._tokenizer.id_to_token(self._owner.check_id(token_id))
        if self._owner.is_silent(token_id) or token is None:
            return ""
        self._tokens.append(token)
        # A run of bytes that is not UTF-8 as a whole becomes as many U+FFFD: it may become so until it ends.
        if self._waits_for_end or (self._has_bytes and BYTE_NAME.fullmatch(token)):
            return ""
        text = self._text()
        if text.endswith(self._uncertain) or (self._first and not text):
            return ""
        self._tokens, self._first = [], False
        return text

    @property
    def pending(self) -> str:
        text = self._text() if self._tokens else ""
        return "" if "\ufffd" in text else text

    def flush(self) -> str:
        text = self._text() if self._tokens else ""
        self._tokens = []
        return text

    def bytes_of(self, token: str) -> bytes:
        """Return what a token that is not the first adds to the text."""
        if self._has_bytes and BYTE_NAME.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self._letters.keys() >= {*token}:
            return b"".join([self._letters[letter] for letter in token])
        return self._decode(["a", token])[self._size :].encode()

    def _text(self) -> str:
        if self._first:
            return self._decode(self._tokens)
        # After a letter, which is taken off again, none of the tokens is the first.
        return self._decode(["a", *self._tokens])[self._size :]
