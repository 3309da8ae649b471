"""Loading a tokenizer, its kind found by the file's own content."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from llama_jax.config import UserError
from llama_jax.remote import local_copy
from llama_jax.tokenizers.base import Tokenizer
from llama_jax.tokenizers.chatglm import ChatGLMTokenizer, is_chatglm
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, llama2c_model
from llama_jax.tokenizers.tiktoken import read_ranks, tiktoken_tokenizer
from llama_jax.tokenizers.vocabularies import bert_tokenizer, gpt2_tokenizer, read_merges, read_pieces, read_vocabulary

FILE_NAMES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt")
# What may belong to a tokenizer in a directory of a store, which may hold weights as well.
STORED = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the file `path`, or in the directory `path`, where `FILE_NAMES` are tried in order.

    Reads SentencePiece models (ChatGLM2's where tokenizer_config.json or config.json beside it say so), tiktoken's
    ranks of Llama 3 and of OpenAI's encodings, any `tokenizer.json` of the `tokenizers` library, GPT-2's pair of
    `vocab.json` and `merges.txt` (`path` is either; both names may begin with the same prefix), BERT's `vocab.txt` and
    llama2.c's `.bin`. Raises UserError for a missing, damaged or unknown file. `path` may be a URL.
    """
    path = local_copy(path, _stored, beside=STORED)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            names = ", ".join(FILE_NAMES[:-1])
            raise UserError(f"directory '{path}' has no {names} or {FILE_NAMES[-1]}: give the tokenizer's own path")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer file '{path}' does not exist")
    content, settings = path.read_bytes(), _beside(path, "tokenizer_config.json")
    try:
        if content.lstrip()[:1] == b"{":
            if read_vocabulary(content):
                return gpt2_tokenizer(content, _partner(path, "vocab.json", "merges.txt"), settings)
            return json_tokenizer(content, settings)
        if ranks := read_ranks(content):
            return tiktoken_tokenizer(content, ranks)
        if path.name.endswith("merges.txt") and read_merges(content):
            return gpt2_tokenizer(_partner(path, "merges.txt", "vocab.json"), content, settings)
        if pieces := read_pieces(content):
            return bert_tokenizer(content, pieces, settings)
        chatglm = is_chatglm(settings, _beside(path, "config.json"))
    except ValueError as error:
        raise UserError(f"'{path}' is no tokenizer that can be used: {error}") from None
    try:
        if chatglm:
            return ChatGLMTokenizer(content, settings)
        return SentencePieceTokenizer(llama2c_model(content) or content)
    except RuntimeError:
        raise UserError(
            f"'{path}' is damaged or no tokenizer: it is none of SentencePiece model, tiktoken ranks, tokenizer.json, "
            "vocab.json with merges.txt, vocab.txt and llama2.c .bin"
        ) from None


def _stored(names: Iterable[str]) -> list[str]:
    of_folder = "additional_chat_templates/"
    names = [name for name in names if "/" not in name.removeprefix(of_folder)]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in STORED)]


def _beside(path: Path, name: str) -> bytes | None:
    beside = path.with_name(name)
    return beside.read_bytes() if beside.is_file() else None


def _partner(path: Path, own: str, other: str) -> bytes:
    """The content of the other file of GPT-2's pair, whose name begins as that of `path` does."""
    if not path.name.endswith(own):
        raise ValueError(f"a vocabulary of byte-level BPE has a name that ends with {own}, and {other} beside it")
    partner = path.with_name(path.name.removesuffix(own) + other)
    if not partner.is_file():
        raise ValueError(f"'{partner}' has to stand beside it")
    return partner.read_bytes()
