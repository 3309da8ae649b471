"""The units of work that a corpus is cut into, by the names and sizes of its files alone."""

import dataclasses
import re

from llama_jax.data.config import DataConfig
from llama_jax.data.files import CorpusFile, is_dataset
from llama_jax.remote import is_remote

SHARD_BYTES = 1 << 26  # of input; also the size of a unit
MAX_SHARDS = 4096  # above, shards grow: every shard is some memory maps, of which Linux gives a process 65530

_PACKED = r"(\.(gz|zst|bz2|xz))?$"
KINDS = tuple(
    (re.compile(pattern, re.IGNORECASE), kind)
    for pattern, kind in (
        (r"\.(jsonl|jsonlines|ndjson)" + _PACKED, "jsonl"),
        (r"\.json" + _PACKED, "json_file"),
        (r"\.csv" + _PACKED, "csv"),
        (r"\.(tsv|tab)" + _PACKED, "tsv"),
        (r"\.(tar" + _PACKED + r"|t(gz|zst|bz2?|xz)$)", "tar"),
        (r"\.parquet$", "parquet"),
        (r"\.arrow$", "arrow"),
        (r"\.array_?record(-\d+-of-\d+)?$", "array_record"),
        (r"\.bin$", "tokens"),
    )
)
SPLIT_KINDS = ("jsonl", "json_file", "parquet", "array_record", "tokens")
_PACKING = re.compile(r"\.t?(?:(gz)|(zst)|(bz2|(?<=\.t)bz)|(xz))$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Unit:
    """Piece `index` of `count` of a file: bytes, row groups or records, as its kind has them."""

    file: CorpusFile
    index: int
    count: int

    def range_of(self, total: int) -> tuple[int, int]:
        """(first, end) of this unit's share of `total` things."""
        return self.index * total // self.count, (self.index + 1) * total // self.count

    @property
    def size(self) -> int:
        """Bytes of the file that are this unit's."""
        first, end = self.range_of(self.file.size)
        return end - first


def kind_of(path: str) -> str:
    """The kind of file, by its name."""
    if is_dataset(path):
        return "dataset"
    return next((kind for pattern, kind in KINDS if pattern.search(path)), "text")


def packing_of(path: str) -> str:
    """What the file is compressed by, by its name, or ""."""
    found = _PACKING.search(path)
    return "" if found is None else ("gzip", "zstd", "bzip2", "xz")[found.lastindex - 1]  # type: ignore[operator]


def _splits(path: str, config: DataConfig) -> bool:
    """Whether parts of the file can be read without what is before them."""
    if packing_of(path):
        return False
    kind = kind_of(path)
    if kind == "array_record" and is_remote(path):
        return False  # its reader takes a local file: each piece would be copied with all of it
    return kind in SPLIT_KINDS or (kind == "text" and config.document_chars is not None)


def plan_shards(files: list[CorpusFile], config: DataConfig) -> list[list[Unit]]:
    """The units of every shard: consecutive ones, together about SHARD_BYTES."""
    shard_bytes = max(SHARD_BYTES, sum(file.size for file in files) // MAX_SHARDS)
    shards: list[list[Unit]] = [[]]
    size = 0
    for file in files:
        count = file.pieces or (max(1, round(file.size / shard_bytes)) if _splits(file.path, config) else 1)
        for index in range(count):
            if size >= shard_bytes:
                shards.append([])
                size = 0
            unit = Unit(file, index, count)
            shards[-1].append(unit)
            size += unit.size
    return shards
