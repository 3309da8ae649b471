"""Records to documents: their texts, their split, the count of bad ones, and of the bytes that validation scores."""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llama_jax.config import Json, UserError
from llama_jax.data.chat import pair_of, problem_of
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit, units_by_shard
from llama_jax.data.readers.records import SURROGATE, BadRecord, Part, Record, SkippedFile, Unit
from llama_jax.tokenizers import Tokenizer

ENDS = ("assistant", "assistant", "user")  # of the conversations of a pair, and of what both begin with
NO_CONVERSATION = "messages that are no conversation"
MAX_NAMED = 100  # bad records that are kept by name
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character
OLD = "the corpus was prepared before the bytes were counted"


class BadRecords:
    """Count of the bad records of each kind, and the first of them by name.

    More than `limit` are an error, of which `advice` names the way out; None allows any number.
    """

    def __init__(self, limit: int | None, advice: str = ""):
        self._limit = limit
        self._advice = advice or f"raise max_bad_records={limit} to leave out such records"
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: list[str] = []

    def add(self, bad: BadRecord) -> None:
        """Count one. Raises UserError where it is one too many."""
        self.extend({"reasons": {bad.reason: 1}, "first": [str(bad)]})

    def extend(self, summary: Json) -> None:
        """Count all of another `summary`. Raises UserError where they are too many."""
        self.reasons.update(summary["reasons"])
        self.first += summary["first"][: MAX_NAMED - len(self.first)]
        if self._limit is not None and (count := self.reasons.total()) > self._limit:
            named = "; ".join(self.first[:3])
            problem = f"{named}: repair it" if count == 1 else f"{count} records are bad, first {named}: repair them"
            raise UserError(f"{problem}, or {self._advice}")

    def summary(self) -> Json:
        """Return the counts as JSON."""
        return {"reasons": dict(sorted(self.reasons.items())), "first": self.first}


def good_records(
    units: Iterable[Unit], config: DataConfig, separators: Sequence[int], bad: BadRecords, skipped: list[str]
) -> Iterator[tuple[Record, bytes]]:
    """Yield (record, `content_of` it) of the records that can be used; the rest is added to `bad` and `skipped`.

    `separators`: ids between documents in files of token ids.
    """
    for unit in units:
        for item in read_unit(unit, config, separators):
            if isinstance(item, SkippedFile):
                skipped.append(f"{item.path}: {item.reason}")
            elif isinstance(item, BadRecord):
                bad.add(item)
            elif isinstance(content := content_of(item), BadRecord):
                bad.add(content)
            else:
                yield item, content


def _all_records(config: DataConfig, bad: BadRecords, skipped: list[str]) -> Iterator[tuple[Record, bytes]]:
    """Yield the good records of the whole corpus in its order."""
    units = (unit for shard in units_by_shard(find_files(config), config) for unit in shard)
    return good_records(units, config, (0,), bad, skipped)


def read_texts(config: DataConfig, split: Split) -> Iterator[str]:
    """Yield the texts of the documents of one split, in the corpus's order, each part by itself.

    Raises UserError for documents that are token ids, and for more than `max_bad_records` bad records.
    """
    for record, content in _all_records(config, BadRecords(config.max_bad_records), []):
        if split_of(content, config) == split:
            for part in record.parts:
                yield from _texts_of(part, record.where)


def read_pieces(
    path: Sequence[str], *, fields: Sequence[str] = ("text",), piece_chars: int, skipped: list[str]
) -> Iterator[tuple[object, str]]:
    """Yield (key, text) of all documents, long ones in pieces of about `piece_chars` characters that end at line ends.

    Pieces of one text follow one another with the same key. Files that are left out are added to `skipped`. Raises
    UserError for the first bad record.
    """
    config = DataConfig(path=tuple(path), fields=tuple(fields), validation_fraction=0.0, document_chars=piece_chars)
    for record, _ in _all_records(config, BadRecords(0, "leave it out"), skipped):
        for i, part in enumerate(record.parts):
            for j, text in enumerate(_texts_of(part, record.where)):
                yield (record.where, i, j), text


def _texts_of(part: Part, where: str) -> list[str]:
    if isinstance(part, np.ndarray):
        raise UserError(f"{where} holds token ids, of which no text can be read: give the tokenizer's path")
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def content_of(record: Record) -> bytes | BadRecord:
    """Return the bytes that the record's split depends on: texts in UTF-8, ids as 32-bit integers."""
    if (pair := pair_of(record.parts)) is not None:
        conversations: Sequence[Any] = (*pair[:2], pair[0][: pair[2]])
        problems = [problem_of(c, ends_with=e) for c, e in zip(conversations, ENDS, strict=True)]
    else:
        problems = [problem_of(part) for part in record.parts if isinstance(part, list)]
    for problem in problems:
        if problem is not None:
            return BadRecord(record.where, NO_CONVERSATION, problem)
    try:
        return b"\0".join([_bytes_of(part) for part in record.parts])
    except UnicodeEncodeError:
        return BadRecord(record.where, SURROGATE)


def _bytes_of(part: Part) -> bytes:
    if isinstance(part, str):
        return part.encode()
    if isinstance(part, np.ndarray):
        return part.astype("<u4").tobytes()
    return b"\0".join(f"{message['role']}\0{message['content']}".encode() for message in part)


def text_bytes(record: Record, content: bytes) -> int:
    """Return the size of the record's text in UTF-8 bytes; token ids count as 0."""
    if all(isinstance(part, str) for part in record.parts):
        return len(content) - len(record.parts) + 1  # without the separators of parts
    return sum(len(message["content"].encode()) for part in record.parts if isinstance(part, list) for message in part)


def split_of(content: bytes, config: DataConfig) -> Split:
    """Return the split of a document. It depends on the document alone, so that more files move no document."""
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < config.validation_fraction * 2**64 else "train"


@dataclasses.dataclass
class ScoredBytes:
    """Count of the bytes of text behind the tokens that a left-to-right model predicts: all but a document's first.

    It has no value, for the reason `reason`, where documents are token ids or chats, and where the tokenizer loses some
    of the text, which the model then is not scored for.
    """

    tokenizer: Tokenizer
    num_bytes: int = 0
    reason: str = ""

    def add(self, record: Record, parts: Sequence[np.ndarray]) -> None:
        """Count a document of which `parts` are the tokens."""
        if self.reason:
            return
        for text, ids in zip(record.parts, parts, strict=False):  # a chat has more parts of tokens than records
            if not isinstance(text, str):
                self.reason = f"{record.where} is no text but {'a chat' if isinstance(text, list) else 'token ids'}"
                return
            if self.tokenizer.decode(ids.tolist()) != text:
                self.reason = f"the tokenizer loses text: {record.where} is not what its tokens decode to"
                return
            self.num_bytes += len(text.encode())
        if not self.tokenizer.start_ids:  # nothing predicts the first token
            text, first = record.parts[0], self.tokenizer.decode(parts[0][:1].tolist())
            if REPLACEMENT in first or not str(text).startswith(first):
                self.reason = f"the first token of {record.where} is part of a character, and no token is before it"
                return
            self.num_bytes -= len(first.encode())

    def summary(self) -> Json:
        """Return the count as JSON: `scored_bytes`, None without a number, and `unscored`, the reason."""
        return {"scored_bytes": None if self.reason else self.num_bytes, "unscored": self.reason}


def sum_scored(shards: Sequence[Json]) -> Json:
    """Return the sum of such summaries. Shards of before there were any have no number."""
    reasons = [shard.get("unscored", OLD) for shard in shards if shard.get("scored_bytes") is None]
    if reasons:
        return {"scored_bytes": None, "unscored": reasons[0]}
    return {"scored_bytes": sum(shard["scored_bytes"] for shard in shards), "unscored": ""}
