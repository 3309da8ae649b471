"""Load a tokenizer; its kind follows from the file's content and the settings files next to it (`READERS`)."""

import fnmatch
from collections.abc import Callable, Iterable
from pathlib import Path

from llama_jax.config import UserError
from llama_jax.gguf_header import gguf_file, is_gguf
from llama_jax.remote import local_copy
from llama_jax.tokenizers.base import RULE_FILE, TEMPLATE_DIRECTORY, Tokenizer
from llama_jax.tokenizers.checking import check_ids
from llama_jax.tokenizers.gguf import gguf_tokenizer
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.marian import marian_tokenizer
from llama_jax.tokenizers.sentencepiece import llama2c_tokenizer, sentencepiece_tokenizer
from llama_jax.tokenizers.settings import Settings, read_settings
from llama_jax.tokenizers.vocabularies import (
    bert_tokenizer,
    byte_level_tokenizer,
    tekken_tokenizer,
    tiktoken_tokenizer,
)

# In the order in which they decide, as in transformers.
FILE_NAMES = (
    "tokenizer.json", "tekken.json", "tokenizer.model", "source.spm", "spiece.model", "vocab.json", "vocab.txt",
    "sentencepiece.bpe.model", "tiktoken.model",
)  # fmt: skip
# Names of files that may belong to a tokenizer in a directory of a store, which may hold weights as well.
STORED = ("*.json", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.jinja")

Reader = Callable[[Path, bytes, Settings], Tokenizer | None]
"""Returns the tokenizer of a file (its path, its content, the settings next to it), None for a file of another kind.

Raises ValueError for a file of its kind that cannot be used, RuntimeError for one that is damaged.
"""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Return the tokenizer in the file `path`, or in the directory `path`, where `FILE_NAMES` are tried in order.

    Reads any `tokenizer.json` of the `tokenizers` library, SentencePiece models (those of Llama, Gemma, T5, XLM-RoBERTa
    and ChatGLM2), tiktoken's ranks of Llama 3, Kimi and OpenAI's encodings, Mistral's `tekken.json`, Marian's
    `source.spm`, `target.spm` and `vocab.json`, pairs of `vocab.json` and `merges.txt` (`path` is either; both names
    may begin with the same prefix), BERT's `vocab.txt`, llama2.c's `.bin` and the metadata of GGUF files, with the
    settings next to them: tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat templates. `path` may
    be a URL. Raises
    UserError for a missing, damaged or unknown file.
    """
    path = local_copy(path, _stored, beside=STORED)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found and (model := gguf_file(path)) is not None:
            found = [model]
        if not found:
            raise UserError(
                f"directory '{path}' has no tokenizer.model, tokenizer.json, vocab.json or vocab.txt, nor source.spm "
                "or spiece.model: give the tokenizer's own path"
            )
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer file '{path}' does not exist")
    if is_gguf(path):  # its weights are not read
        return gguf_tokenizer(path)
    _check_links(path.parent)
    try:
        settings, content = read_settings(path.parent), path.read_bytes()
        found = next(found for read in READERS if (found := read(path, content, settings)) is not None)
        check_ids(found.vocab_size)
        return found
    except RuntimeError:
        raise UserError(
            f"'{path}' is damaged or of an unknown kind: it must be a SentencePiece model, tiktoken ranks, "
            "tokenizer.json, vocab.json with merges.txt, vocab.txt or llama2.c's .bin"
        ) from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, OSError) as error:
        raise UserError(f"'{path}' cannot be used as a tokenizer: {error}") from None  # of whatever the files hold


def _check_links(directory: Path) -> None:
    """Raise UserError for a link out of the directory, to a file whose text would go into prompts and exports.

    Those of Hugging Face's cache lead to `blobs`, beside the directory's parent.
    """
    root = directory.resolve()
    for file in (file for pattern in (*STORED, f"{TEMPLATE_DIRECTORY}/*") for file in directory.glob(pattern)):
        target = file.resolve()
        if file.is_symlink() and not target.is_relative_to(root) and target.parent != root.parent.parent / "blobs":
            raise UserError(f"'{file}' is a link to a file outside of its directory: put a copy of that file there")


def load_saved_tokenizer(directory: str | Path, *, of_sources: bool = False) -> Tokenizer:
    """Return the tokenizer that a run or a native model keeps in `directory`.

    Without a saved rule (directories of earlier versions) a prompt is as a document (`with_document_rule`).
    """
    tokenizer = load_tokenizer(directory)
    return tokenizer if RULE_FILE in tokenizer.files else with_document_rule(tokenizer, of_sources=of_sources)


def with_document_rule(tokenizer: Tokenizer, *, of_sources: bool = False) -> Tokenizer:
    """Return `tokenizer` with prompts that begin as training documents do.

    With `of_sources` they end as the sources of an encoder-decoder do.
    """
    prefix, suffix = ((), tokenizer.eos_ids[:1]) if of_sources else (tokenizer.start_ids, ())
    return tokenizer.with_rule(prefix, suffix)


# The first that does not return None decides. A tokenizer from outside the package is an entry at the front.
READERS: list[Reader] = [
    marian_tokenizer, tiktoken_tokenizer, byte_level_tokenizer, tekken_tokenizer, json_tokenizer, bert_tokenizer,
    llama2c_tokenizer, sentencepiece_tokenizer,
]  # fmt: skip


def _stored(names: Iterable[str]) -> list[str]:
    of_folder = "additional_chat_templates/"
    names = [name for name in names if "/" not in name.removeprefix(of_folder)]
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in STORED)]
