"""How many bytes of text a left-to-right model is asked for, where its tokens say all of the text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llama_jax.data.readers import Record
from llama_jax.tokenizers import Tokenizer

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
