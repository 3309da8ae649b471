"""Documents to tokenized shards on disk, once."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, get_args

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.documents import DataConfig, Document, Split, find_files, read_documents, read_texts, split_of
from llama_jax.data.stream import Shard, TokenStream
from llama_jax.tokenizers import Tokenizer

FORMAT = 1  # of the files below; part of the cache key
SHARD_TOKENS = 1 << 28
BATCH_CHARS = 1 << 22  # text tokenized at once: bounds the memory


class Corpus:
    """A tokenized corpus, opened from its directory: `train` and `validation` streams with their counts by split.

    `num_bytes` is the size of the documents' text in UTF-8, `content_hash` of the files and the options that
    made it, `tokenizer` the fingerprint, `skipped` what was left out ("file: reason").
    """

    def __init__(self, directory: Path, config: DataConfig):
        index = json.loads((directory / "index.json").read_text())
        self.directory, self._config = directory, config
        self.content_hash: str = index["content_hash"]
        self.tokenizer: str = index["tokenizer"]
        self.skipped: list[str] = index["skipped"]
        splits = index["splits"]
        self.num_tokens: dict[Split, int] = {name: sum(split["shards"]) for name, split in splits.items()}
        self.num_documents: dict[Split, int] = {name: split["num_documents"] for name, split in splits.items()}
        self.num_bytes: dict[Split, int] = {name: split["num_bytes"] for name, split in splits.items()}
        self.train = self._stream("train", splits["train"]["shards"], index["dtype"])
        self.validation = self._stream("validation", splits["validation"]["shards"], index["dtype"])

    def texts(self, split: Split) -> Iterator[str]:
        """The documents' text again, read from the original files."""
        return read_texts(self._config, split)

    def _stream(self, split: Split, shards: Sequence[int], dtype: str) -> TokenStream:
        documents = _map(self.directory / f"{split}.documents", "<i8", self.num_documents[split])
        made, start = [], 0
        for i, size in enumerate(shards):
            first, last = np.searchsorted(documents, [start, start + size])
            tokens = _map(self.directory / _shard_name(split, i), dtype, size)
            made.append(Shard(tokens, documents[first:last] - start, np.zeros(0, np.int64)))
            start += size
        return TokenStream(made)


def prepare(config: DataConfig, tokenizer: Tokenizer, *, progress: Callable[[int, int], None] | None = None) -> Corpus:
    """The corpus of `config` tokenized by `tokenizer`: each document is BOS, its tokens, EOS.

    It is kept in the cache under a hash of the files' contents, the options and the tokenizer, and made only where it
    is not there yet; a folder appears under its final name when it is complete. `progress` is called with the bytes of
    the files read so far and altogether. Raises UserError for a corpus without text and an empty split.
    """
    root = cache_directory(config) / "corpora"
    content_hash = _content_hash(config, tokenizer)
    final = root / content_hash[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir='{root.parent}' cannot be made ({error.strerror}): set another") from None
    with _lock(final.with_suffix(".lock")):  # of several processes one tokenizes, the others wait for it
        corpus = _open(final, config)
        if corpus is None:
            partial = final.with_suffix(".partial")
            for leftover in (partial, final):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir()
            try:
                _write(partial, config, tokenizer, content_hash, progress)
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial)
                raise
            corpus = Corpus(final, config)
    return corpus


def cache_directory(config: DataConfig) -> Path:
    """Where tokenized corpora are kept."""
    default = os.environ.get("LLAMA_JAX_CACHE") or "~/.cache/llama_jax"
    return Path(config.cache_dir or default).expanduser()


def _content_hash(config: DataConfig, tokenizer: Tokenizer) -> str:
    options = [config.text_field, config.document_chars, config.validation_fraction]
    digest = hashlib.sha256(json.dumps([FORMAT, options, tokenizer.fingerprint]).encode())
    for file in find_files(config):
        with file.path.open("rb") as raw:
            content = hashlib.file_digest(raw, "sha256").hexdigest()
        digest.update(f"{content} {file.is_jsonl} {file.path.suffix == '.gz'}\n".encode())
    return digest.hexdigest()


def _open(directory: Path, config: DataConfig) -> Corpus | None:
    """The corpus in `directory`, or None where there is none or its files are not whole (a full or failing disk)."""
    try:
        return Corpus(directory, config)
    except (OSError, ValueError, KeyError):
        return None


def _write(
    directory: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    content_hash: str,
    progress: Callable[[int, int], None] | None,
) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    total = sum(file.path.stat().st_size for file in find_files(config))
    skipped: list[str] = []
    documents = read_documents(config, on_skip=lambda file, reason: skipped.append(f"{file}: {reason}"))
    with contextlib.ExitStack() as stack:
        writers = {split: _SplitWriter(directory, split, dtype, stack) for split in get_args(Split)}
        for batch in _batched(documents):
            for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                writers[split_of(document.text, config)].add(document, _with_specials(ids, tokenizer))
            if progress is not None:
                progress(batch[-1].position, total)
    counts = {split: writer.num_documents for split, writer in writers.items()}
    if not any(counts.values()):
        raise UserError(f"path={', '.join(config.path)} has no text: give files with text in them")
    for split, count in counts.items():
        if not count and (split == "train" or config.validation_fraction > 0):
            raise UserError(
                f"validation_fraction={config.validation_fraction} leaves no document for {split} among "
                f"{sum(counts.values())}: change it (0 holds out none), give more files, or cut with document_chars"
            )
    index = {
        "content_hash": content_hash,
        "tokenizer": tokenizer.fingerprint,
        "dtype": dtype.str,
        "skipped": skipped,
        "splits": {split: writer.summary() for split, writer in writers.items()},
    }
    (directory / "index.json").write_text(json.dumps(index, indent=1))


def _with_specials(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return np.concatenate([np.array(bos, np.int32), ids, np.array(tokenizer.eos_ids[:1], np.int32)])


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the files of one split: token shards that end with a document, and documents' starts."""

    def __init__(self, directory: Path, split: Split, dtype: np.dtype, stack: contextlib.ExitStack):
        self._directory, self._split, self._dtype, self._stack = directory, split, dtype, stack
        self._starts = stack.enter_context((directory / f"{split}.documents").open("wb"))
        self._tokens: BinaryIO | None = None
        self._shards: list[int] = []
        self.num_documents = self._num_bytes = self._num_tokens = 0

    def add(self, document: Document, ids: np.ndarray) -> None:
        if self._tokens is None or self._shards[-1] >= SHARD_TOKENS:
            if self._tokens is not None:
                self._tokens.close()
            name = _shard_name(self._split, len(self._shards))
            self._tokens = self._stack.enter_context((self._directory / name).open("wb"))
            self._shards.append(0)
        self._tokens.write(ids.astype(self._dtype).tobytes())
        self._starts.write(self._num_tokens.to_bytes(8, "little"))
        self._shards[-1] += len(ids)
        self._num_tokens += len(ids)
        self._num_bytes += len(document.text.encode())
        self.num_documents += 1

    def summary(self) -> dict:
        return {"num_documents": self.num_documents, "num_bytes": self._num_bytes, "shards": self._shards}


def _shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05}.bin"


def _map(file: Path, dtype: str, size: int) -> np.ndarray:
    """The array in `file`; raises ValueError where it has not `size` elements."""
    if file.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ValueError(f"{file} is not whole")
    # As a plain array: slicing a memmap object costs ten times as much.
    return np.asarray(np.memmap(file, dtype, mode="r")) if size else np.zeros(0, dtype)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
