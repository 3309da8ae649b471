"""Datasets of the Hugging Face Hub, streamed by the package `datasets`."""

import hashlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.files import CorpusFile
from llama_jax.data.readers.record import NO_FIELD, BadRecord, Item, as_record
from llama_jax.data.readers.units import SHARD_BYTES, Unit


def find_dataset(entry: str) -> CorpusFile:
    """The dataset `hf://NAME[/CONFIG]:SPLIT`, where NAME is `user/name`, or the path of a folder with data files.

    It comes in as many pieces as it has files. Raises UserError where it cannot be found.
    """
    datasets, (name, config, split) = _datasets(entry), _parse(entry)
    try:
        builder = datasets.load_dataset_builder(name, config)
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # of the package, of the network and of many file formats
        raise _cannot(entry, error) from None
    files = (builder.config.data_files or {}).get(split)
    stamp = hashlib.sha256(repr([builder.hash, split, getattr(files, "origin_metadata", None)]).encode()).hexdigest()
    size = getattr((builder.info.splits or {}).get(split), "num_bytes", 0) or SHARD_BYTES * stream.num_shards
    return CorpusFile(entry, size, named=True, stamp=stamp, pieces=stream.num_shards)


def read_dataset(unit: Unit, config: DataConfig) -> Iterator[Item]:
    """A record a row, of one of the dataset's files."""
    entry = unit.file.path
    datasets, (name, subset, split) = _datasets(entry), _parse(entry)
    try:
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        rows = enumerate(stream.shard(unit.count, unit.index), 1)
        while (found := next(rows, None)) is not None:
            number, row = found
            item = as_record(row, f"row {number} of file {unit.index + 1} of '{entry}'", config)
            if isinstance(item, BadRecord) and item.reason == NO_FIELD and not row.keys() >= set(config.fields):
                raise UserError(f"'{entry}' has no column '{config.fields[0]}' (it has {', '.join(row)}): set fields")
            yield item
    except UserError:
        raise
    except Exception as error:
        raise _cannot(entry, error) from None


def _cannot(entry: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"dataset '{entry}' cannot be read ({reason}): write it hf://NAME[/CONFIG]:SPLIT")


def _datasets(entry: str) -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(f"'{entry}' needs the package datasets: pip install 'llama_jax[datasets]'") from None
    return datasets


def _parse(entry: str) -> tuple[str, Any, str]:
    """(name, config or None, split) of an entry."""
    name, colon, split = entry.removeprefix("hf://").rpartition(":")
    if not colon or not name or not split:
        raise UserError(f"path '{entry}' must say its split: hf://NAME[/CONFIG]:SPLIT")
    user, *rest = name.split("/")
    if not user or name.startswith("."):  # a folder on disk
        return name, None, split
    return "/".join([user, *rest[:1]]), rest[1] if len(rest) > 1 else None, split
