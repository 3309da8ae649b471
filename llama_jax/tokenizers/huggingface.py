"""Tokenizers that the `tokenizers` library runs: any `tokenizer.json`, and Llama-3's tiktoken file."""

import base64
import binascii
import json
from collections.abc import Iterable, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from llama_jax.tokenizers.base import TextStream, Tokenizer

# Names that checkpoints give these tokens, tried where no tokenizer_config.json says it.
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]", "<|endoftext|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[SEP]", "<|endoftext|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|finetune_right_pad_id|>")
# Ends of a chat turn end a generated text too, whatever the config says.
TURN_END_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<end_of_turn>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library with the files it came from.

    `settings` is the content of the `tokenizer_config.json` beside it, which names the special tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, files: dict[str, bytes], settings: dict[str, Any]):
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # "</s>" in a text is text: data must not be able to inject them
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.bos_id = self._special(settings, "bos_token", BOS_NAMES)
        self.pad_id = self._special(settings, "pad_token", PAD_NAMES)
        eos_ids = [self._special(settings, "eos_token", EOS_NAMES), *map(tokenizer.token_to_id, TURN_END_NAMES)]
        self.eos_ids = tuple(dict.fromkeys(i for i in eos_ids if i is not None))
        self.files = files

    def _special(self, settings: dict[str, Any], key: str, names: Sequence[str]) -> int | None:
        if key in settings:
            token = settings[key]
            names = (token["content"] if isinstance(token, dict) else token,) if token else ()
        return next((i for name in names if (i := self._tokenizer.token_to_id(name)) is not None), None)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([self.check_id(int(i)) for i in ids], skip_special_tokens=True)

    def stream(self) -> "_DecodeStream":
        return _DecodeStream(self, self._tokenizer)


class _DecodeStream(TextStream):
    def __init__(self, owner: HuggingFaceTokenizer, tokenizer: tokenizers.Tokenizer):
        self._owner, self._tokenizer = owner, tokenizer
        self._stream = decoders.DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0

    def feed(self, token_id: int) -> str:
        self._ids.append(self._owner.check_id(token_id))
        text = self._stream.step(self._tokenizer, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self) -> str:
        rest = self._owner.decode(self._ids)[self._emitted :]
        self._emitted += len(rest)
        return rest


# Llama 3's pre-tokenization and special tokens (meta-llama/llama-models, llama3/tokenizer.py; the names of 3.1, which
# gave names to tokens that 3.0 had reserved).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)  # fmt: skip


def read_ranks(content: bytes) -> dict[bytes, int] | None:
    """The ranks of a tiktoken file (a base64 token and its rank a line), or None if `content` is no such file."""
    ranks = {}
    for line in content.splitlines():
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            return None
    complete = sorted(ranks.values()) == list(range(len(ranks))) and all(bytes([b]) in ranks for b in range(256))
    return ranks if complete else None


def llama3_tokenizer(content: bytes, ranks: dict[bytes, int]) -> HuggingFaceTokenizer:
    """Llama-3's tokenizer from the `ranks` of its tiktoken file `content`.

    tiktoken merges the neighbours whose union has the lowest rank, so every way to cut a token in two known ones is a
    merge, with the token's rank as its priority.
    """
    letters = _byte_letters()
    spelled = {token: "".join(letters[b] for b in token) for token in ranks}
    merges = [
        (spelled[token[:i]], spelled[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in sorted(
            (i for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks),
            key=lambda i: (ranks[token[:i]], ranks[token[i:]]),
        )
    ]
    vocabulary = {spelled[token]: rank for token, rank in ranks.items()}
    # ignore_merges: tiktoken takes a whole word that is a token as it is.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in LLAMA3_SPECIAL])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return HuggingFaceTokenizer(tokenizer, {"tokenizer.model": content}, names)


def json_tokenizer(content: bytes, settings: bytes | None) -> HuggingFaceTokenizer:
    """The tokenizer of a `tokenizer.json`, with the `tokenizer_config.json` beside it, if any.

    Raises ValueError where either cannot be read.
    """
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(str(error)) from None
    files = {"tokenizer.json": content}
    if settings is None:
        return HuggingFaceTokenizer(tokenizer, files, {})
    return HuggingFaceTokenizer(tokenizer, files | {"tokenizer_config.json": settings}, json.loads(settings))


def _byte_letters() -> list[str]:
    """GPT-2's letter for every byte: itself where it prints, else one from U+0100 on, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printing}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
