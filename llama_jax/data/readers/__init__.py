"""Files to records, one reader for each kind of file.

In: a `Unit`, a piece of a file that is known by its name, place and size. Out: `Record`s with a document's parts, and
`BadRecord`s and `SkippedFile`s in their places. A new kind is a module with a reader and a line in `READERS` and
`units.KINDS`. All opening goes through `files.open_file`, so that object stores are read like disks.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence

import zstandard

from llama_jax.config import UserError
from llama_jax.data.config import DataConfig
from llama_jax.data.readers.array_record import read_array_record
from llama_jax.data.readers.columns import read_arrow, read_parquet
from llama_jax.data.readers.hub import read_dataset
from llama_jax.data.readers.lines import cut, read_json, read_jsonl, read_text
from llama_jax.data.readers.record import EMPTY_PART, SURROGATE, BadRecord, Item, Part, Record, SkippedFile
from llama_jax.data.readers.token_file import read_tokens
from llama_jax.data.readers.units import Unit, kind_of, plan_shards

__all__ = [
    "EMPTY_PART",
    "SURROGATE",
    "BadRecord",
    "Item",
    "Part",
    "Record",
    "SkippedFile",
    "Unit",
    "kind_of",
    "plan_shards",
    "read_unit",
]

READERS = {
    "array_record": read_array_record,
    "arrow": read_arrow,
    "dataset": read_dataset,
    "json": read_json,
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "text": read_text,
}


def read_unit(unit: Unit, config: DataConfig, separators: Sequence[int] = ()) -> Iterator[Item]:
    """All records of a unit, in order, those left out that are empty.

    `separators` are the ids that stand between documents in files of tokens. Raises UserError for a damaged file.
    """
    path, limit = unit.file.path, config.document_chars
    kind = kind_of(path)
    try:
        items = read_tokens(unit, config, separators) if kind == "tokens" else READERS[kind](unit, config)
        for item in items:
            if not isinstance(item, Record):
                yield item
            elif isinstance(text := item.parts[0], str) and limit is not None and len(text) > limit:
                yield from (Record((part,), item.where) for part in cut(io.StringIO(text, newline="\n"), limit))
            elif all(map(len, item.parts)):
                yield item
            elif any(map(len, item.parts)):
                yield BadRecord(item.where, EMPTY_PART)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError):
        form = "gzip" if path.endswith(".gz") else "zstd"
        raise UserError(f"'{path}' is a damaged {form} file: get it again or leave it out") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror or error}): get it again or leave it out") from None
