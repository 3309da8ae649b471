"""The interface of all tokenizers."""

import abc
import array
import copy
import functools
import hashlib
import itertools
import json
import operator
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.config import UserError
from llama_jax.files import write_files
from llama_jax.remote import as_local, uploaded, url_of

RULE_FILE = "prompt_rule.json"
PIECE_CHARS, PIECES = 1 << 16, 8  # of a long text that is encoded, and how many at a time
WHOLE_CHARS = 1 << 24  # of a text that is not cut without a word
COMPANION = "tokenizer.model"  # next to a tokenizer.json, for programs that read no other; it is passed on
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_DIRECTORY = "additional_chat_templates"


def deciding(names: Collection[str]) -> list[str]:
    """Return those of a tokenizer's files, by name, on which the ids of documents depend."""
    others = {RULE_FILE} | ({COMPANION} if "tokenizer.json" in names else set())
    return sorted(name for name in names if name not in others and not name.endswith(".jinja"))


def _pieces(text: str, border: re.Pattern[str]) -> Iterator[str]:
    """Yield the text in pieces of PIECE_CHARS or more that end where `border` matches."""
    start = 0
    while match := border.search(text, start + PIECE_CHARS):
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


class TextStream(abc.ABC):
    """Text of token ids that come one by one; the returned texts, joined, are `decode` of all the ids."""

    @abc.abstractmethod
    def feed(self, token_id: int) -> str:
        """Return the text that this token completes; empty while a character is incomplete."""

    @property
    def pending(self) -> str:
        """Complete characters that are held back because later tokens may still change them."""
        return ""

    @abc.abstractmethod
    def flush(self) -> str:
        """Return the rest of the text: replacement characters for a character that was never completed."""


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    `vocab_size` is one more than the largest id. `bos_id`, `pad_id` and `unk_id` are None where the tokenizer has none.
    The first of `eos_ids` ends a training document; any of them ends a generated text. `special_tokens` has the ids of
    all special tokens by name: those above, masks, sentinels, tokens added by hand. `files` are the contents, by file
    name, from which the same tokenizer can be loaded again. Special tokens written out in a text ("</s>") are ordinary
    text, and ids of special tokens decode to nothing; only tokens that were added as ordinary ones (`special: false`,
    SentencePiece's user-defined symbols) are text both ways.
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
        """Return the ids of every text, without special tokens, computed on all cores."""

    @abc.abstractmethod
    def stream(self) -> TextStream:
        """Return a decoder that takes the ids one by one and never emits half a character."""

    @functools.cached_property
    def border(self) -> re.Pattern[str] | None:
        """What is left out between two texts whose ids are, one after the other, those of the whole; None: unknown.

        A unigram model adds up the scores of a text in float32: its best segmentation is that of the whole, and of two
        equally good ones either may be taken.
        """
        return None

    @functools.cached_property
    def start_ids(self) -> tuple[int, ...]:
        """Ids that begin a document: BOS, where there is one; more in some families."""
        return () if self.bos_id is None else (self.bos_id,)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """Text of every id in UTF-8, with the leading space that decoding may drop; nothing for special tokens.

        A tokenizer with tokens that are parts of characters has its own: here these have nothing.
        """
        texts = [self.decode([i]) for i in range(self.vocab_size)]
        return [b"" if "\ufffd" in text else text.encode() for text in texts]

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; `bos` puts `start_ids` before it and `eos` EOS after it, where there are such ids.

        Raises UserError for text that is not valid Unicode (a lone surrogate).
        """
        start = list(self.start_ids) if bos else []
        end = [self.eos_ids[0]] if eos and self.eos_ids else []
        return start + self.encode_batch([text])[0].tolist() + end

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer's files put before a single prompt."""
        return self._rule[0]

    @property
    def suffix_ids(self) -> tuple[int, ...]:
        """Ids that the tokenizer's files put after a single prompt."""
        return self._rule[1]

    @functools.cached_property
    def _rule(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if RULE_FILE not in self.files:
            return self._affixes()
        try:
            rule = json.loads(self.files[RULE_FILE])
            return tuple(self.check_ids(rule["prefix_ids"])), tuple(self.check_ids(rule["suffix_ids"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{RULE_FILE} of the tokenizer is damaged: repair it, or take it away") from None

    def _affixes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return prefix and suffix of a prompt as the files have them, where no `with_rule` has set others."""
        return (), ()

    def with_rule(self, prefix_ids: Sequence[int], suffix_ids: Sequence[int]) -> "Tokenizer":
        """Return this tokenizer with other ids around a prompt; they are kept in its `files`."""
        changed = copy.copy(self)
        vars(changed).pop("_rule", None)  # cached
        rule = {"prefix_ids": [*map(int, prefix_ids)], "suffix_ids": [*map(int, suffix_ids)]}
        changed.files = {**self.files, RULE_FILE: (json.dumps(rule) + "\n").encode()}
        return changed

    def encode_prompt(self, text: str, *, special: bool = False, affixes: bool = True) -> list[int]:
        """Return the ids of a prompt: `prefix_ids`, those of `text`, `suffix_ids`.

        `special` reads names of special tokens in `text` as these tokens (for rendered chat templates); `affixes`
        False leaves out prefix and suffix. Raises UserError as `encode` does.
        """
        ids = self._encode_special(text) if special else self._encode_checked([text])[0]
        return [*self.prefix_ids, *ids, *self.suffix_ids] if affixes else ids

    def _encode_special(self, text: str) -> list[int]:
        """Return the ids of `text` with the special tokens written out in it; of several at one place the longest."""
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        parts = re.split(f"({names})", text) if names else [text]
        encoded = iter(self._encode_checked([part for part in parts[::2] if part]))
        ids: list[int] = []
        for i, part in enumerate(parts):
            if part:
                ids += [self.special_tokens[part]] if i % 2 else next(encoded)
        return ids

    @functools.cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """Jinja texts of the chat templates by name, "default" the usual one. Raises UserError for damaged ones."""
        try:
            found = json.loads(self.files.get(SETTINGS_FILE, b"{}")).get("chat_template") or {}
            if isinstance(found, str):
                found = {"default": found}
            listed = found.items() if isinstance(found, dict) else ((it["name"], it["template"]) for it in found)
            templates = dict(listed)
            for name, content in self.files.items():
                if name == TEMPLATE_FILE:
                    templates["default"] = content.decode()
                elif name.startswith(TEMPLATE_DIRECTORY + "/"):
                    templates[Path(name).stem] = content.decode()
            if not all(isinstance(template, str) for template in templates.values()):
                raise TypeError
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
            raise UserError(
                f"the tokenizer's chat templates are damaged: repair chat_template in {SETTINGS_FILE}, or the file "
                f"{TEMPLATE_FILE}"
            ) from None
        return templates

    def export_files(self) -> dict[str, bytes]:
        """Return the contents, by name, of a Hugging Face directory whose AutoTokenizer gives the same ids.

        The rule of prompts, special and added tokens, their names and the chat templates are included. Raises UserError
        where transformers has no such tokenizer.
        """
        return {name: content for name, content in self.files.items() if name != RULE_FILE}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of every text as int32 arrays, without special tokens, encoded on all cores.

        A long text is cut where `border` matches: the libraries take up to 200 bytes for each of its bytes. What that
        costs is printed where no border is known.
        """
        longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
        if longest <= PIECE_CHARS or self.border is None:
            if longest > WHOLE_CHARS:
                print(
                    f"a text of {longest:,} characters is tokenized in one piece, as no place is known where this "
                    f"tokenizer's ids let it be cut: that may take {longest / 5e6:,.0f} GB of memory, and "
                    "data.document_chars cuts it at line ends",
                    file=sys.stderr,
                )
            return [np.array(ids, np.int32) for ids in self._encode_checked(texts)]
        return [self._encode_pieces(text, self.border) for text in texts]

    def _encode_pieces(self, text: str, border: re.Pattern[str]) -> np.ndarray:
        ids = array.array("i")
        for pieces in itertools.batched(_pieces(text, border), PIECES):
            for found in self._encode_checked(pieces):
                ids.extend(found)
        return np.frombuffer(ids, np.int32) if ids else np.zeros(0, np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, with U+FFFD for bytes that are not UTF-8. Raises UserError for an unknown id."""
        stream = self.stream()
        return "".join([stream.feed(token_id) for token_id in self.check_ids(ids)]) + stream.flush()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' names and contents, equal only for tokenizers that give documents the same ids.

        The rule of prompts and .jinja files of chat templates are left out.
        """
        digest = hashlib.sha256()
        for name in deciding(self.files):
            content = self.files[name]
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def save(self, directory: str | Path) -> Path | str:
        """Write `files` into `directory` (made if needed, or a URL); return the path that `load_tokenizer` takes."""
        local, first = as_local(directory), next(iter(self.files))
        if local is None:
            with uploaded(directory, new=False, last=(first,)) as folder:
                self.save(folder)
            return f"{url_of(directory).rstrip('/')}/{first}"
        directory = local
        directory.mkdir(parents=True, exist_ok=True)
        write_files(directory, self.files)
        return directory / first

    def check_id(self, token_id: int) -> int:
        """Return `token_id`. Raises UserError where the vocabulary has no such id."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(
                f"token id {token_id} is outside this tokenizer's vocabulary of {self.vocab_size}: use the tokenizer "
                "that the ids were made with"
            )
        return token_id

    def check_ids(self, ids: Iterable[int]) -> list[int]:
        """Return `ids` as a list. Raises UserError where one is not a whole number or not in the vocabulary."""
        try:
            listed = [operator.index(token_id) for token_id in ids]
        except TypeError:
            raise UserError(f"ids={ids!r} must be token ids: a list or a 1-D array of whole numbers") from None
        return [self.check_id(token_id) for token_id in listed]

    @staticmethod
    def check_text(text: str) -> None:
        """Raise UserError where `text` is not a text, or not valid Unicode."""
        if not isinstance(text, str):
            raise UserError(f"text={text!r} must be a text; encode_batch takes several")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
                "give valid Unicode text"
            ) from None

    def _encode_checked(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise UserError(f"texts={texts!r} must be a list of texts; encode takes one")
        for text in texts:
            self.check_text(text)
        return self._encode(texts)
