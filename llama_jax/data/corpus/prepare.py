"""Corpora tokenized into shards on disk, each once."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import Json, UserError, to_json
from llama_jax.data.chat import DirectoryChat
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.corpus import INDEX, Corpus, check_bad_records, check_split, write_index
from llama_jax.data.corpus.files import digests, find_files
from llama_jax.data.corpus.shards import ShardMaker
from llama_jax.data.corpus.workers import make_shards
from llama_jax.data.readers import kind_of, units_by_shard
from llama_jax.data.readers.opening import packing_of
from llama_jax.data.readers.records import CorpusFile, Unit
from llama_jax.files import PARTIAL, lock
from llama_jax.remote import Mirror, as_local, check_destination, default_cache, working_copy
from llama_jax.tokenizers import Tokenizer

FORMAT = 2  # of a corpus's files; part of the cache key
_CORPUS_FILE = re.compile(rf"(?:train|validation|shard)-(\d+)\.\w+|{re.escape(INDEX)}")

type Progress = Callable[[int, int], None]


def prepare_corpus(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    directory: str | Path | None = None,
    num_workers: int | None = None,
    needs_validation: bool = True,
    progress: Progress | None = None,
) -> Corpus:
    """Return the corpus of `config` tokenized by `tokenizer`: each document is BOS, its tokens, EOS.

    It is kept in `directory`, by default in the cache under a hash of the files' contents, the options and the
    tokenizer. Shards that are there already are not made again; the others are made by `num_workers` processes
    (default: one for each core). `progress` is called with the bytes of the files that are done, and all bytes. Raises
    UserError for a corpus without text, an empty split (of validation only where it `needs_validation`), too many bad
    records, and a directory with other shards. Where `directory` or `config.cache_dir` is a URL, the corpus that is
    opened is a local copy.
    """
    _check_destination(config, directory)
    files = find_files(config)
    content_hash = _content_hash(files, config, tokenizer)

    def checked(corpus: Corpus) -> Corpus:
        if needs_validation and config.validation_fraction > 0:
            check_split("validation", corpus.num_documents, config)
        return corpus

    with _local_directory(config, directory, content_hash) as local:
        maker = _shard_maker(files, config, tokenizer, local, content_hash)
        # No lock where the corpus is there: it may be on a disk that cannot be written.
        corpus = _open(maker, content_hash)
        if corpus is None:
            with lock(_lock_file(maker)):
                corpus = _open(maker, content_hash)  # another process may have made it
                if corpus is None:
                    maker.directory.mkdir(exist_ok=True)  # the process before may have failed and removed it
                    summaries = _make(maker, dict(enumerate(units_by_shard(files, config))), num_workers, progress)
                    for leftover in maker.directory.glob(f".*{PARTIAL}*"):  # of processes that were killed
                        leftover.unlink(missing_ok=True)
                    try:
                        write_index(maker.directory, summaries, content_hash, config)
                        corpus = checked(Corpus(maker.directory, config))
                    except UserError:
                        if local is None:  # in the cache, where no one would look for it
                            shutil.rmtree(maker.directory)
                        raise
        check_bad_records([corpus.bad_records], config)
        return checked(corpus)


def prepare_shards(
    config: DataConfig,
    tokenizer: Tokenizer,
    numbers: Iterable[int],
    *,
    directory: str | Path | None = None,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Make only the shards `numbers` of the corpus; return its directory, which has no index yet.

    Each shard is a function of its number, the files and the options, so a cluster may run one process for each;
    `prepare_corpus` on the same directory then makes the index. Raises UserError as `prepare_corpus` does.
    """
    _check_destination(config, directory)
    files = find_files(config)
    shards = units_by_shard(files, config)
    wanted = list(numbers)
    for number in wanted:
        if not 0 <= number < len(shards):
            raise UserError(f"there is no shard {number}: this corpus has {len(shards)}, numbered from 0")
    content_hash = _content_hash(files, config, tokenizer) if directory is None else ""
    with _local_directory(config, directory, content_hash, wanted) as local:
        maker = _shard_maker(files, config, tokenizer, local, content_hash)
        with lock(_lock_file(maker), shared=True):
            _make(maker, {number: shards[number] for number in wanted}, num_workers, progress)
    return maker.directory


def _open(maker: ShardMaker, content_hash: str) -> Corpus | None:
    """Return the corpus that is there, or None where it is missing, another one, or not whole."""
    try:
        corpus = Corpus(maker.directory, maker.config)
    except (OSError, ValueError, KeyError):
        return None
    return corpus if corpus.content_hash == content_hash else None


def _make(
    maker: ShardMaker, shards: Mapping[int, list[Unit]], num_workers: int | None, progress: Progress | None
) -> list[Json]:
    """Return the summaries of `shards`, after making those that are missing."""
    missing = {number: units for number, units in shards.items() if maker.summary(number) is None}
    sizes = {number: sum(unit.size for unit in units) for number, units in shards.items()}
    finished, total = sum(sizes[number] for number in shards.keys() - missing), sum(sizes.values())

    def report(bytes_done: int) -> None:
        if progress is not None:
            progress(finished + bytes_done, total)

    num_workers = min(num_workers or os.cpu_count() or 1, len(missing))
    try:
        if num_workers > 1:
            make_shards(maker, missing, num_workers, report)
        else:
            for number, units in missing.items():
                maker.make(number, units, report)
                finished += sizes[number]
    finally:
        with contextlib.suppress(OSError):  # where the first shard has failed there is nothing in it
            maker.directory.rmdir()
    return [summary for number in shards if (summary := maker.summary(number)) is not None]


def _check_destination(config: DataConfig, directory: str | Path | None) -> None:
    check_destination(config.cache_dir or "" if directory is None else directory, new=False)


@contextlib.contextmanager
def _local_directory(
    config: DataConfig, directory: str | Path | None, content_hash: str, shards: Sequence[int] | None = None
) -> Iterator[str | Path | None]:
    """Yield `directory`, or the local copy of one in a store or in a cache there, which is uploaded at the end.

    Only the files of `shards` are copied; None copies all.
    """
    url, path = directory, None
    if directory is None and config.cache_dir is not None:
        url = f"{config.cache_dir.rstrip('/')}/corpora/{content_hash[:32]}"
        path = cache_directory(config) / "corpora" / content_hash[:32]
    if url is None or as_local(url) is not None:
        yield directory
        return

    def select(names: Iterable[str]) -> list[str]:
        found = ((name, _CORPUS_FILE.fullmatch(name)) for name in names)
        return [name for name, match in found if match and (shards is None or int(match[1] or -1) in shards)]

    with working_copy(url, select, path=path, last=("shard-*.json", INDEX)) as local:
        yield directory if directory is None else local


def _lock_file(maker: ShardMaker) -> Path:
    return maker.directory.with_name(maker.directory.name + ".lock")


def cache_directory(config: DataConfig) -> Path:
    """Return the directory of tokenized corpora; of a cache in a store, that of its local copies."""
    if config.cache_dir is None:
        return default_cache()
    local = as_local(config.cache_dir)
    return Mirror(config.cache_dir).path if local is None else local.expanduser()


def corpus_directory(config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Return the directory in the cache, or in its local copy, that `prepare_corpus` makes or has made."""
    return cache_directory(config) / "corpora" / _content_hash(find_files(config), config, tokenizer)[:32]


def _shard_maker(
    files: list[CorpusFile], config: DataConfig, tokenizer: Tokenizer, directory: str | Path | None, content_hash: str
) -> ShardMaker:
    """Return the maker of the corpus's shards, after making their directory."""
    if directory is None:
        path, key = cache_directory(config) / "corpora" / content_hash[:32], content_hash
    else:
        # A cluster's processes do not all read the whole corpus: sizes and times show whether it is the same.
        stamps = [[kind_of(file.path).name, file.size, file.stamp] for file in files]
        key = hashlib.sha256(json.dumps([FORMAT, _options(config, tokenizer), stamps]).encode()).hexdigest()
        path = (as_local(directory) or Path(directory)).absolute()
        names = [file.name for file in path.iterdir()] if path.is_dir() else []
        if names and not any(_CORPUS_FILE.match(name.lstrip(".")) for name in names):
            raise UserError(f"directory '{directory}' has other files than a corpus: give another")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        name = f"cache_dir='{cache_directory(config)}'" if directory is None else f"directory '{directory}'"
        raise UserError(f"{name} cannot be made ({error.strerror}): set another") from None
    return ShardMaker(path, key, config, tokenizer)


def _options(config: DataConfig, tokenizer: Tokenizer | None) -> list[Any]:
    options: list[Any] = [config.fields, config.document_chars, config.max_record_bytes, config.validation_fraction]
    if config.chat_template is None:
        return options
    options.append(to_json(config.chat_template))
    if tokenizer is not None and isinstance(config.chat_template, DirectoryChat):
        options.append(dict(tokenizer.chat_templates))
    return options


def _content_hash(files: list[CorpusFile], config: DataConfig, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, _options(config, tokenizer), tokenizer.fingerprint]).encode())
    return _with_contents(digest, files, config).hexdigest()


def texts_hash(config: DataConfig) -> str:
    """Return a hash of all that decides what `read_texts` gives: the files' contents and the options."""
    _check_destination(config, None)
    digest = hashlib.sha256(json.dumps([FORMAT, _options(config, None)]).encode())
    return _with_contents(digest, find_files(config), config).hexdigest()


def _with_contents(digest: "hashlib._Hash", files: list[CorpusFile], config: DataConfig) -> "hashlib._Hash":
    cache = cache_directory(config)
    with contextlib.suppress(OSError):  # reported where the corpus itself cannot be written
        cache.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, digests(files, cache / "digests.jsonl"), strict=True):
        packed = bool(packing_of(file.path))
        digest.update(f"{content} {kind_of(file.path).name} {packed}\n".encode())
    return digest
