"""Loading a tokenizer, its kind found by the file's own content."""

from pathlib import Path

from llama_jax.config import UserError
from llama_jax.tokenizers.base import RULE_FILE, TEMPLATE_DIRECTORY, TEMPLATE_FILE, Tokenizer
from llama_jax.tokenizers.chatglm import ChatGLMTokenizer, is_chatglm
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.sentencepiece import SentencePieceTokenizer, llama2c_model
from llama_jax.tokenizers.tiktoken import read_ranks, tiktoken_tokenizer
from llama_jax.tokenizers.vocabularies import bert_tokenizer, gpt2_tokenizer, read_merges, read_pieces, read_vocabulary

FILE_NAMES = ("tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in the file `path`, or in the directory `path`, where `FILE_NAMES` are tried in order.

    Reads SentencePiece models (ChatGLM2's where tokenizer_config.json or config.json beside it say so), tiktoken's
    ranks of Llama 3 and of OpenAI's encodings, any `tokenizer.json` of the `tokenizers` library, GPT-2's pair of
    `vocab.json` and `merges.txt` (`path` is either; both names may begin with the same prefix), BERT's `vocab.txt` and
    llama2.c's `.bin`. Raises UserError for a missing, damaged or unknown file.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not found:
            names = ", ".join(FILE_NAMES[:-1])
            raise UserError(f"directory '{path}' has no {names} or {FILE_NAMES[-1]}: give the tokenizer's own path")
        path = found[0]
    if not path.is_file():
        raise UserError(f"tokenizer file '{path}' does not exist")
    tokenizer = _load(path)
    beside = [path.with_name(name) for name in (RULE_FILE, TEMPLATE_FILE)]
    beside += sorted(path.with_name(TEMPLATE_DIRECTORY).glob("*.jinja"))
    more = {file.relative_to(path.parent).as_posix(): file.read_bytes() for file in beside if file.is_file()}
    tokenizer.files = {**tokenizer.files, **more}
    return tokenizer


def load_saved_tokenizer(directory: str | Path) -> Tokenizer:
    """Return the tokenizer that a run or a native model keeps in `directory`.

    Without a rule of its own (directories of earlier versions) a prompt begins as a document does.
    """
    tokenizer = load_tokenizer(directory)
    return tokenizer if RULE_FILE in tokenizer.files else tokenizer.with_rule(tokenizer.start_ids, ())


def _load(path: Path) -> Tokenizer:
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
