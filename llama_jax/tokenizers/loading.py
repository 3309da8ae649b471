"""Loading a tokenizer, its kind found by the file's own content."""

from pathlib import Path

from llama_jax.config import UserError
from llama_jax.tokenizers.base import Tokenizer
from llama_jax.tokenizers.huggingface import json_tokenizer, llama3_tokenizer, read_ranks
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, llama2c_model

FILE_NAMES = ("tokenizer.model", "tokenizer.json")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the file `path`, or in the directory `path` that has a tokenizer.model or tokenizer.json.

    Reads SentencePiece models, Llama-3's tiktoken file, any `tokenizer.json` of the `tokenizers` library, and
    llama2.c's `.bin`. Raises UserError for a missing, damaged or unknown file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            raise UserError(f"directory '{path}' has no {' or '.join(FILE_NAMES)}: give the tokenizer's own path")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer file '{path}' does not exist")
    content = path.read_bytes()
    if content.lstrip()[:1] == b"{":
        settings = path.with_name("tokenizer_config.json")
        try:
            return json_tokenizer(content, settings.read_bytes() if settings.is_file() else None)
        except ValueError as error:
            raise UserError(f"'{path}' is no tokenizer.json that can be used: {error}") from None
    if ranks := read_ranks(content):
        return llama3_tokenizer(content, ranks)
    try:
        return SentencePieceTokenizer(llama2c_model(content) or content)
    except RuntimeError:
        raise UserError(
            f"'{path}' is damaged or no tokenizer: it is none of SentencePiece model, tiktoken ranks, tokenizer.json "
            "and llama2.c .bin"
        ) from None
