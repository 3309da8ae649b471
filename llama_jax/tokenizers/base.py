"""What every tokenizer can do."""

import abc
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.config import UserError
from llama_jax.remote import as_local, uploaded, url_of


class TextStream(abc.ABC):
    """Text of token ids that come one by one; what it returns, joined, is `decode` of all the ids."""

    @abc.abstractmethod
    def feed(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is still in pieces."""

    @abc.abstractmethod
    def flush(self) -> str:
        """What is left at the end: replacement characters for a character that never was completed."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    `vocab_size` is one more than the largest id. `bos_id`, `pad_id` and `unk_id` are None where the tokenizer has none.
    The first of `eos_ids` ends a training document; any of them ends a generated text. `special_tokens` has the ids of
    all tokens that stand for something else than the text they were learned from, by name: those above, masks,
    sentinels, what was added by hand. `files` is what has to be kept to load the same tokenizer again, by file name.
    Special tokens written out in a text ("</s>") are ordinary text, and ids of special tokens decode to nothing; only
    tokens that were added as ordinary ones (`special: false`, SentencePiece's user-defined symbols) are text both ways.
    """

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None
    unk_id: int | None
    special_tokens: Mapping[str, int]
    files: Mapping[str, bytes]

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text, without special tokens, on all cores."""

    @abc.abstractmethod
    def stream(self) -> TextStream:
        """A decoder that takes the ids one by one and never emits half a character."""

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        """What stands before a text: BOS, where there is one; more in some families."""
        return () if self.bos_id is None else (self.bos_id,)

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of `text`; `bos` puts `start_ids` before it and `eos` EOS behind it, where the tokenizer has these.

        Raises UserError for text that is not valid Unicode (a lone surrogate).
        """
        start = list(self.start_ids) if bos else []
        end = [self.eos_ids[0]] if eos and self.eos_ids else []
        return start + self._encode_checked([text])[0] + end

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text as int32 arrays, without special tokens, encoded on all cores."""
        return [np.array(ids, np.int32) for ids in self._encode_checked(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, bytes that are no UTF-8 shown as U+FFFD. Raises UserError for an id that is no token."""
        stream = self.stream()
        return "".join([stream.feed(int(token_id)) for token_id in ids]) + stream.flush()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' names and contents: equal only for tokenizers that do the same."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> Path | str:
        """Write `files` into `directory` (made if needed, or a URL); returns the path that `load_tokenizer` takes."""
        local, first = as_local(directory), next(iter(self.files))
        if local is None:
            with uploaded(directory, new=False, last=(first,)) as folder:
                self.save(folder)
            return f"{url_of(directory).rstrip('/')}/{first}"
        directory = local
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (directory / name).write_bytes(content)
        return directory / first

    def check_id(self, token_id: int) -> int:
        """`token_id`, or UserError where the vocabulary has no such id."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(
                f"token id {token_id} is outside this tokenizer's vocabulary of {self.vocab_size}: use the tokenizer "
                "that the ids were made with"
            )
        return token_id

    def _encode_checked(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                    "give valid Unicode text"
                ) from None
        return self._encode(texts)
