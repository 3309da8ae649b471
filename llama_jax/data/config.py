"""Config of the data: corpora, their mixture, and the objective."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

from llama_jax.config import UserError
from llama_jax.data.chat import ChatTemplate
from llama_jax.data.objectives.base import Objective
from llama_jax.data.objectives.decoder import Causal

Split = Literal["train", "validation"]
Packing = Literal["cut", "best_fit"]
ONLY = "data"  # name of the source of a run without a mixture


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the corpora of a mixture. Fields that are None are as in the data's config.

    name: its name in logs.
    path: its files.
    share: share of the run's tokens, in proportion to the other sources' shares.
    epochs: instead of a share: number of times that the run takes all of it. Where all sources have epochs, they fill
        the run in that proportion.
    exclude: as in the data's config.
    fields: as in the data's config.
    document_chars: as in the data's config.
    """

    name: str
    path: tuple[str, ...]
    share: float | None = None
    epochs: float | None = None
    exclude: tuple[str, ...] | None = None
    fields: tuple[str, ...] | None = None
    document_chars: int | None = None

    def __post_init__(self) -> None:
        for name in ("path", "exclude", "fields"):
            _check_words(f"source '{self.name}': {name}", getattr(self, name) or ())
        if (self.share is None) == (self.epochs is None):
            raise UserError(f"source '{self.name}' must have one of share and epochs")
        amount = self.share if self.epochs is None else self.epochs
        least = "at least 0" if self.epochs is None else "more than 0"
        if not _is_amount(amount) or (self.epochs is not None and not amount):
            raise UserError(f"source '{self.name}' has share or epochs={amount!r}: it must be a number, {least}")


def _is_amount(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < math.inf


def _check_words(name: str, value: object) -> None:
    if not isinstance(value, tuple) or not all(isinstance(word, str) for word in value):
        raise UserError(f'{name}={value!r} must be a tuple of texts, as in ("corpus/",)')


@dataclasses.dataclass(frozen=True)
class Stage:
    """Shares of the sources, in their order, from a step on; 0 leaves a source out."""

    start_step: int
    shares: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Config of a run's data.

    path: files, directories (with all below them but hidden files and backups), globs, on disk or as gs:// and s3://,
      and hf://NAME[/CONFIG]:SPLIT.
    exclude: patterns as in the shell of files to leave out, matched with the path and with its part below `path`.
    fields: names of the fields of a record that have the text, the token ids or the messages; several are a document's
      parts, in order; a number in another part than the first (a class) is read as its digits.
    document_chars: longer documents are cut at line ends into documents of about so many characters; None cuts none.
    max_record_bytes: longer lines, records and whole files are bad records.
    max_bad_records: more bad records (not UTF-8, without a field...) than this are an error; none allows any number.
    validation_fraction: share of documents held out, chosen by a hash of their text.
    cache_dir: directory of tokenized shards, a path or a URL; None is $LLAMA_JAX_CACHE or ~/.cache/llama_jax.
    num_prefetch: batches prepared ahead of the step that takes them.
    chat_template: format of a chat's messages as tokens, where a field holds messages.
    objective: inputs and targets that are made of a document.
    packing: rule by which documents share rows: `cut` where a row ends, or `best_fit`, which cuts only those longer
      than a row.
    sources: several corpora in place of `path`, each with its share or its epochs.
    stages: shares of the sources that change at given steps.
    skip_batches: numbers of batches, from 0, that no step takes: the others follow in their order. Without any, step n
      takes batch n.
    """

    path: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    fields: tuple[str, ...] = ("text",)
    document_chars: int | None = None
    max_record_bytes: int = 1 << 28
    max_bad_records: int | None = 0
    validation_fraction: float = 0.01
    cache_dir: str | None = None
    num_prefetch: int = 4
    chat_template: ChatTemplate | None = None
    objective: Objective = Causal()
    packing: Packing = "cut"
    sources: tuple[Source, ...] = ()
    stages: tuple[Stage, ...] = ()
    skip_batches: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("path", "exclude", "fields"):
            _check_words(name, getattr(self, name))
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1")
        chars = self.document_chars
        if chars is not None and chars < 1:
            raise UserError(f"document_chars={chars} must be at least 1, or none to leave documents whole")
        if not self.fields or not all(self.fields) or len(set(self.fields)) < len(self.fields):
            raise UserError(f"fields={','.join(self.fields)} must name one field or several different ones")
        if chars is not None and len(self.fields) > 1:
            raise UserError(
                f"document_chars={chars} cannot cut documents of {len(self.fields)} parts: set it to "
                "none or name one field"
            )
        if self.max_record_bytes < 1:
            raise UserError(f"max_record_bytes={self.max_record_bytes} must be at least 1")
        if self.max_bad_records is not None and self.max_bad_records < 0:
            raise UserError(f"max_bad_records={self.max_bad_records} must be at least 0, or none for any number")
        if self.num_prefetch < 0:
            raise UserError(f"num_prefetch={self.num_prefetch} must be at least 0")
        if any(number < 0 for number in self.skip_batches):
            raise UserError(f"skip_batches={','.join(map(str, self.skip_batches))} must all be at least 0")
        self._check_sources()

    def _check_sources(self) -> None:
        if self.sources and self.path:
            raise UserError("path and sources are both given: make the path a source")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise UserError(f"sources are called {', '.join(names)}: give each another name")
        if self.sources and not any(source.share or source.epochs for source in self.sources):
            raise UserError("sources all have the share 0: give one of them more")
        if self.stages and not self.sources:
            raise UserError("stages change the shares of sources, and there are none: give sources")
        if not self.stages:
            return
        if any(source.epochs is not None for source in self.sources):
            raise UserError("stages change shares, and a source has epochs: give all sources shares")
        steps = [stage.start_step for stage in self.stages]
        if steps[0] < 1 or steps != sorted(set(steps)):
            raise UserError(
                f"stages begin at steps {', '.join(map(str, steps))}: they must be after 0, where the sources' own "
                "shares begin, and go up"
            )
        for stage in self.stages:
            if len(stage.shares) != len(self.sources) or not (all(map(_is_amount, stage.shares)) and any(stage.shares)):
                raise UserError(
                    f"the stage from step {stage.start_step} has shares {', '.join(map(str, stage.shares))}: give each "
                    f"of the {len(self.sources)} sources one, 0 or more, and one of them more than 0"
                )

    def corpora(self) -> Iterator[tuple[Source, "DataConfig"]]:
        """Yield every source with the config of its corpus alone."""
        for source in self.sources or (Source(ONLY, self.path, share=1.0),):
            own = {
                name: getattr(source, name)
                for name in ("exclude", "fields", "document_chars")
                if getattr(source, name) is not None
            }
            yield source, dataclasses.replace(self, path=source.path, sources=(), stages=(), **own)
