"""Documents to tokenized shards on disk, once."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import UserError, choices, to_json
from llama_jax.data.chat import ChatTemplate
from llama_jax.data.config import DataConfig
from llama_jax.data.corpus.corpus import INDEX, Corpus, check_bad_records, check_validation, open_corpus, write_index
from llama_jax.data.corpus.files import digests, find_files
from llama_jax.data.corpus.shards import PARTIAL, ShardSet, locked, make_shard
from llama_jax.data.corpus.workers import make_shards
from llama_jax.data.readers.records import CorpusFile, Unit, kind_of, packing_of, units_by_shard
from llama_jax.remote import Mirror, as_local, check_destination, default_cache, working_copy
from llama_jax.tokenizers import Tokenizer

FORMAT = 2  # of a corpus' files; part of the cache key
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
    """The corpus of `config` tokenized by `tokenizer`: each document is BOS, its tokens, EOS.

    It is kept in `directory`, by default in the cache under a hash of the files' contents, the options and the
    tokenizer. Shards that are there already are not made again; the others are made by `num_workers` processes
    (default: one for each core). `progress` is called with the bytes of the files done so far and altogether. Raises
    UserError for a corpus without text, an empty split (of validation only where it `needs_validation`), too many bad
    records, and a directory with other shards. Where `directory` or `config.cache_dir` is a URL, the corpus that is
    opened is a local copy.
    """
    _check_destination(config, directory)
    files = find_files(config)
    content_hash = _content_hash(files, config, tokenizer)
    with _local_directory(config, directory, content_hash) as local:
        return _prepare(files, content_hash, config, tokenizer, local, num_workers, needs_validation, progress)


def _prepare(
    files: list[CorpusFile],
    content_hash: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    directory: str | Path | None,
    num_workers: int | None,
    needs_validation: bool,
    progress: Progress | None,
) -> Corpus:
    place = _place(files, config, tokenizer, directory, content_hash)

    def checked(corpus: Corpus) -> Corpus:
        if needs_validation and config.validation_fraction > 0:
            check_validation(corpus.num_documents, config)
        return corpus

    def made() -> Corpus | None:
        corpus = open_corpus(place.directory, config)
        return corpus if corpus is not None and corpus.content_hash == content_hash else None

    # What is there is only read, perhaps from a disk that cannot be written. Else of several processes one tokenizes.
    with contextlib.nullcontext() if (corpus := made()) is not None else locked(_lock_of(place)):
        if (corpus := corpus or made()) is None:
            place.directory.mkdir(exist_ok=True)  # the process before may have failed and removed it
            shards = units_by_shard(files, config)
            summaries = _make(place, dict(enumerate(shards)), config, tokenizer, num_workers, progress)
            for leftover in place.directory.glob(f".*{PARTIAL}*"):  # of processes that were killed
                leftover.unlink(missing_ok=True)
            try:
                write_index(place.directory, summaries, content_hash, config)
                corpus = checked(Corpus(place.directory, config))
            except UserError:
                if directory is None:  # nobody asked for it under this name
                    shutil.rmtree(place.directory)
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
    """Only the shards `numbers` of the corpus; returns its directory, which has no index yet.

    Each shard is a function of its number, the files and the options, so a cluster may run one process for each;
    `prepare` on the same directory then makes the index. Raises UserError as `prepare` does.
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
        place = _place(files, config, tokenizer, local, content_hash)
        with locked(_lock_of(place), shared=True):
            _make(place, {number: shards[number] for number in wanted}, config, tokenizer, num_workers, progress)
    return place.directory


def _check_destination(config: DataConfig, directory: str | Path | None) -> None:
    check_destination(config.cache_dir or "" if directory is None else directory, new=False)


@contextlib.contextmanager
def _local_directory(
    config: DataConfig, directory: str | Path | None, content_hash: str, shards: Sequence[int] | None = None
) -> Iterator[str | Path | None]:
    """`directory`, or the local copy of one in a store, or of one in a cache there, that is uploaded at the end.

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


def _lock_of(place: ShardSet) -> Path:
    return place.directory.with_name(place.directory.name + ".lock")


def cache_directory(config: DataConfig) -> Path:
    """Where tokenized corpora are kept; of a cache in a store, where its local copies are."""
    if config.cache_dir is None:
        return default_cache()
    local = as_local(config.cache_dir)
    return Mirror(config.cache_dir).path if local is None else local.expanduser()


def _make(
    place: ShardSet,
    shards: dict[int, list[Unit]],
    config: DataConfig,
    tokenizer: Tokenizer,
    num_workers: int | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """The summaries of `shards`, by processes of their own where more than one has to be made."""
    done = {number: place.summary(number) for number in shards}
    missing = {number: units for number, units in shards.items() if done[number] is None}
    sizes = {number: sum(unit.size for unit in units) for number, units in shards.items()}
    finished, total = sum(sizes[number] for number in shards if number not in missing), sum(sizes.values())

    def report(bytes_done: int) -> None:
        if progress is not None:
            progress(finished + bytes_done, total)

    template = type(config.chat_template)
    if config.chat_template is not None and choices(ChatTemplate).get(template.__name__) is not template:
        num_workers = 1  # a class from a notebook: no other program can import it
    if num_workers is None:
        num_workers = os.cpu_count() or 1
    if num_workers > 1 and len(missing) > 1:
        make_shards(place, missing, config, tokenizer, num_workers, report)
        done |= {number: place.summary(number) for number in missing}
    else:
        for number, units in missing.items():
            done[number] = make_shard(place, number, units, config, tokenizer, report)
            finished += sizes[number]
    return [summary for summary in done.values() if summary is not None]


def _place(
    files: list[CorpusFile], config: DataConfig, tokenizer: Tokenizer, directory: str | Path | None, content_hash: str
) -> ShardSet:
    """Where the corpus is, made if needed, and what its shards have to have in common."""
    if directory is None:
        place = ShardSet(cache_directory(config) / "corpora" / content_hash[:32], content_hash, tokenizer.fingerprint)
    else:
        # A cluster's processes do not all read the whole corpus: sizes and times say whether it is the same.
        stamps = [[kind_of(file.path), file.size, file.stamp] for file in files]
        key = hashlib.sha256(json.dumps([FORMAT, _options(config), stamps]).encode()).hexdigest()
        place = ShardSet((as_local(directory) or Path(directory)).absolute(), key, tokenizer.fingerprint)
    try:
        place.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        name = f"cache_dir='{cache_directory(config)}'" if directory is None else f"directory '{directory}'"
        raise UserError(f"{name} cannot be made ({error.strerror}): set another") from None
    return place


def _options(config: DataConfig) -> list[Any]:
    options = [config.fields, config.document_chars, config.max_record_bytes, config.validation_fraction]
    return options if config.chat_template is None else [*options, to_json(config.chat_template)]


def _content_hash(files: list[CorpusFile], config: DataConfig, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, _options(config), tokenizer.fingerprint]).encode())
    cache = cache_directory(config)
    with contextlib.suppress(OSError):  # told where the corpus itself cannot be written
        cache.mkdir(parents=True, exist_ok=True)
    for file, content in zip(files, digests(files, cache / "digests.jsonl"), strict=True):
        packed = bool(packing_of(file.path))
        digest.update(f"{content} {kind_of(file.path)} {packed}\n".encode())
    return digest.hexdigest()
