"""Loading a tokenizer, its kind found by the file's own content and by the settings beside it."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from llama_jax.config import UserError
from llama_jax.remote import local_copy
from llama_jax.tokenizers.base import RULE_FILE, Tokenizer
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.marian import marian_tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, llama2c_model, sentencepiece_tokenizer
from llama_jax.tokenizers.settings import Settings, read_settings
from llama_jax.tokenizers.vocabularies import (
    bert_tokenizer,
    byte_level_tokenizer,
    read_merges,
    read_pieces,
    read_ranks,
    read_vocabulary,
    tiktoken_tokenizer,
)

# In the order in which they decide, as in transformers. The last is known only to be refused.
FILE_NAMES = (
    "tokenizer.json", "tokenizer.model", "source.spm", "spiece.model", "vocab.json", "vocab.txt",
    "sentencepiece.bpe.model",
)  # fmt: skip
# What may belong to a tokenizer in a directory of a store, which may hold weights as well.
STORED = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in the file `path`, or in the directory `path`, where `FILE_NAMES` are tried in order.

    Reads any `tokenizer.json` of the `tokenizers` library, SentencePiece models (those of Llama, Gemma, T5 and
    ChatGLM2), tiktoken's ranks of Llama 3 and of OpenAI's encodings, Marian's `source.spm`, `target.spm` and
    `vocab.json`, pairs of `vocab.json` and `merges.txt` (`path` is either; both names may begin with the same prefix),
    BERT's `vocab.txt` and llama2.c's `.bin`, with the settings beside them: tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, chat templates. `path` may be a URL. Raises UserError for a missing,
    damaged or unknown file.
    """
    path = local_copy(path, _stored, beside=STORED)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"directory '{path}' has no tokenizer.model, tokenizer.json, vocab.json or vocab.txt, nor source.spm "
                "or spiece.model: give the tokenizer's own path"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer file '{path}' does not exist")
    try:
        settings = read_settings(path.parent)
        return _read(path, path.read_bytes(), settings)
    except ValueError as error:
        raise UserError(f"'{path}' is no tokenizer that can be used: {error}") from None
    except RuntimeError:
        raise UserError(
            f"'{path}' is damaged or no tokenizer: it is none of SentencePiece model, tiktoken ranks, tokenizer.json, "
            "vocab.json with merges.txt, vocab.txt and llama2.c .bin"
        ) from None


def load_saved_tokenizer(directory: str | Path, *, of_sources: bool = False) -> Tokenizer:
    """Return the tokenizer that a run or a native model keeps in `directory`.

    Without a rule of its own (directories of earlier versions) a prompt is as a document (`with_document_rule`).
    """
    tokenizer = load_tokenizer(directory)
    return tokenizer if RULE_FILE in tokenizer.files else with_document_rule(tokenizer, of_sources=of_sources)


def with_document_rule(tokenizer: Tokenizer, *, of_sources: bool = False) -> Tokenizer:
    """Return `tokenizer` with prompts that begin as training documents do, or, `of_sources`, end as the sources of an
    encoder-decoder do."""
    return (
        tokenizer.with_rule((), tokenizer.eos_ids[:1]) if of_sources else tokenizer.with_rule(tokenizer.start_ids, ())
    )


def _read(path: Path, content: bytes, settings: Settings) -> Tokenizer:
    """The tokenizer of a file. Raises ValueError or, for what is no SentencePiece model either, RuntimeError."""
    if path.name == "source.spm" or (path.name == "vocab.json" and path.with_name("source.spm").is_file()):
        return marian_tokenizer(path.parent, settings)
    if content.lstrip()[:1] == b"{":
        if read_vocabulary(content):
            return byte_level_tokenizer(content, _partner(path, "vocab.json", "merges.txt"), settings)
        return json_tokenizer(content, settings)
    if ranks := read_ranks(content):
        return tiktoken_tokenizer(content, ranks, settings)
    if path.name.endswith("merges.txt") and read_merges(content):
        return byte_level_tokenizer(_partner(path, "merges.txt", "vocab.json"), content, settings)
    if pieces := read_pieces(content):
        return bert_tokenizer(content, pieces, settings)
    if (model := llama2c_model(content)) is not None:
        return SentencePieceTokenizer(model, settings)
    return sentencepiece_tokenizer(content, settings, path.name)


def _stored(names: Iterable[str]) -> list[str]:
    of_folder = "additional_chat_templates/"
    names = [name for name in names if "/" not in name.removeprefix(of_folder)]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in STORED)]


def _partner(path: Path, own: str, other: str) -> bytes:
    """The content of the other file of GPT-2's pair, whose name begins as that of `path` does."""
    if not path.name.endswith(own):
        raise ValueError(f"a vocabulary of byte-level BPE has a name that ends with {own}, and {other} beside it")
    partner = path.with_name(path.name.removesuffix(own) + other)
    if not partner.is_file():
        raise ValueError(f"'{partner}' has to stand beside it")
    return partner.read_bytes()
