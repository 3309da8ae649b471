"""Records to documents: their texts, their split, and the count of those that are bad."""

import collections
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.chat import problem_of
from llama_jax.data.config import DataConfig, Split
from llama_jax.data.corpus.files import find_files
from llama_jax.data.readers import read_unit
from llama_jax.data.readers.records import SURROGATE, BadRecord, Part, Record, SkippedFile, Unit, units_by_shard
from llama_jax.tokenizers import Tokenizer

NO_CONVERSATION = "messages that are no conversation"
NAMED = 100  # bad records that are told by name


class BadRecords:
    """How many bad records there were, of which kinds, and the first of them."""

    def __init__(self, limit: int | None):
        self._limit = limit
        self.reasons: collections.Counter[str] = collections.Counter()
        self.first: list[str] = []

    def add(self, bad: BadRecord) -> None:
        """Counts one. Raises UserError where that is one too many."""
        self.extend({"reasons": {bad.reason: 1}, "first": [str(bad)]})

    def extend(self, summary: dict[str, Any]) -> None:
        """Counts all that another `summary` has."""
        self.reasons.update(summary["reasons"])
        self.first += summary["first"][: NAMED - len(self.first)]
        if self._limit is not None and (count := self.reasons.total()) > self._limit:
            named = "; ".join(self.first[:3])
            begins = f"{named}: mend it, or" if count == 1 else f"{count} records are bad, first {named}: mend them, or"
            raise UserError(f"{begins} raise max_bad_records={self._limit} to leave out such records")

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {"reasons": dict(sorted(self.reasons.items())), "first": self.first}


def read_texts(config: DataConfig, split: Split) -> Iterator[str]:
    """The texts of the documents of one split, in the corpus' order, each part by itself.

    Raises UserError for documents that are token ids, and where more records are bad than may be.
    """
    bad = BadRecords(config.max_bad_records)
    for unit in (unit for shard in units_by_shard(find_files(config), config) for unit in shard):
        for record, content in good_records(unit, config, (0,), bad, []):
            if split_of(content, config) == split:
                for part in record.parts:
                    yield from _texts_of(part, record.where)


def read_pieces(
    path: Sequence[str], *, fields: Sequence[str] = ("text",), piece_chars: int, skipped: list[str]
) -> Iterator[tuple[object, str]]:
    """(key, text) of all documents, long ones in pieces of about `piece_chars` characters that end where a line does.

    Pieces of one text follow one another with the same key. `skipped` is told of the files that are left out. Raises
    UserError for the first record that is none.
    """
    config = DataConfig(path=tuple(path), fields=tuple(fields), validation_fraction=0.0, document_chars=piece_chars)
    for unit in (unit for shard in units_by_shard(find_files(config), config) for unit in shard):
        for item in read_unit(unit, config):
            if isinstance(item, SkippedFile):
                skipped.append(f"{item.path}: {item.reason}")
                continue
            if isinstance(item, BadRecord) or isinstance(bad := content_of(item), BadRecord):
                raise UserError(f"{item if isinstance(item, BadRecord) else bad}: mend it or leave it out")
            for i, part in enumerate(item.parts):
                for j, text in enumerate(_texts_of(part, item.where)):
                    yield (item.where, i, j), text


def good_records(
    unit: Unit, config: DataConfig, separators: Sequence[int], bad: BadRecords, skipped: list[str]
) -> Iterator[tuple[Record, bytes]]:
    """A unit's records with their `content_of`; `bad` and `skipped` are told of the rest."""
    for item in read_unit(unit, config, separators):
        if isinstance(item, SkippedFile):
            skipped.append(f"{item.path}: {item.reason}")
        elif isinstance(item, BadRecord):
            bad.add(item)
        elif isinstance(content := content_of(item), BadRecord):
            bad.add(content)
        else:
            yield item, content


def _texts_of(part: Part, where: str) -> list[str]:
    if isinstance(part, np.ndarray):
        raise UserError(f"{where} holds token ids, of which no text can be read: give the tokenizer's path")
    return [part] if isinstance(part, str) else [message["content"] for message in part]


def content_of(record: Record) -> bytes | BadRecord:
    """What the record's split depends on: its texts in UTF-8, its ids as 32-bit integers."""
    for part in record.parts:
        if isinstance(part, list) and (problem := problem_of(part)) is not None:
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
    """The size of the record's text in UTF-8; of token ids, none."""
    if all(isinstance(part, str) for part in record.parts):
        return len(content) - len(record.parts) + 1
    return sum(len(message["content"].encode()) for part in record.parts if isinstance(part, list) for message in part)


def split_of(content: str | bytes, config: DataConfig) -> Split:
    """The split of a document: by its content alone, so that adding files moves none."""
    if not config.validation_fraction:
        return "train"
    content = content.encode() if isinstance(content, str) else content
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < config.validation_fraction * 2**64 else "train"


def separators_of(start_ids: Sequence[int], eos_ids: Sequence[int]) -> tuple[int, ...]:
    """The ids that stand around documents in files of tokens (llm.c puts Llama-3's BOS there)."""
    return (*eos_ids[:1], *start_ids)


BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character
OLD = "the corpus was prepared before the bytes were counted"


class ScoredBytes:
    """Counter of the bytes of text behind the tokens that a left-to-right model predicts: all but a document's first.

    There is no such number where documents are token ids or chats, or where a tokenizer loses some of the text: the
    model is not asked for what is lost.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._num_bytes, self._reason = 0, ""

    def add(self, record: Record, parts: Sequence[np.ndarray]) -> None:
        """Count a document of which `parts` are the tokens."""
        if self._reason:
            return
        for text, ids in zip(record.parts, parts, strict=False):  # a chat has more parts
            if not isinstance(text, str):
                self._reason = f"{record.where} is no text but {'a chat' if isinstance(text, list) else 'token ids'}"
                return
            if self._tokenizer.decode(ids.tolist()) != text:
                self._reason = f"the tokenizer loses text: {record.where} is not what its tokens decode to"
                return
            self._num_bytes += len(text.encode())
        if not self._tokenizer.start_ids:  # nothing predicts the first token
            text, first = record.parts[0], self._tokenizer.decode(parts[0][:1].tolist())
            if BROKEN in first or not str(text).startswith(first):
                self._reason = f"the first token of {record.where} is part of a character, and no token is before it"
                return
            self._num_bytes -= len(first.encode())

    def summary(self) -> dict[str, Any]:
        """As JSON: `scored_bytes`, None where it cannot be said, and why."""
        return {"scored_bytes": None if self._reason else self._num_bytes, "unscored": self._reason}


def sum_scored(shards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of such summaries; of shards that were made before there were any, None."""
    total, reason = 0, ""
    for shard in shards:
        if (count := shard.get("scored_bytes")) is None:
            reason = reason or shard.get("unscored", OLD)
        else:
            total += count
    return {"scored_bytes": None if reason else total, "unscored": reason}
