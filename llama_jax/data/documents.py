"""Files to documents."""

import contextlib
import dataclasses
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from llama_jax.config import UserError

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text a run learns from.

    path: files, directories (with all below them) and globs; `.jsonl` files hold a document a line, others are one.
    exclude: patterns as in the shell of files to leave out, matched with the path and with its part below `path`.
    text_field: the field of a JSONL line that holds the text.
    document_chars: cut longer documents at line ends into documents of about so many characters; None leaves them.
    validation_fraction: share of documents held out, chosen by a hash of their text.
    cache_dir: where tokenized shards are kept; None is $LLAMA_JAX_CACHE or ~/.cache/llama_jax.
    num_prefetch: batches prepared ahead of the step that takes them.
    """

    path: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    document_chars: int | None = None
    validation_fraction: float = 0.01
    cache_dir: str | None = None
    num_prefetch: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1")
        if self.document_chars is not None and self.document_chars < 1:
            raise UserError(
                f"document_chars={self.document_chars} must be at least 1, or none to leave documents whole"
            )
        if self.num_prefetch < 0:
            raise UserError(f"num_prefetch={self.num_prefetch} must be at least 0")


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, never empty, the file it came from, and how many bytes of the corpus' files were read up to it."""

    text: str
    file: Path
    position: int


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """A file of the corpus; one that a directory or glob brought (not `named`) is skipped where it is not text."""

    path: Path
    named: bool

    @property
    def is_jsonl(self) -> bool:
        return self.path.name.removesuffix(".gz").endswith(".jsonl")


def find_files(config: DataConfig) -> list[CorpusFile]:
    """The corpus' files, each once, in the order of `path` and sorted within its entries.

    Raises UserError for an entry that is nothing and where no file is left.
    """
    if not config.path:
        raise UserError("path is empty: name the files or directories to train on, for example --data.path my_text/")
    files: dict[Path, CorpusFile] = {}
    for entry in config.path:
        name = os.path.expandvars(os.path.expanduser(entry))
        top = Path(name)
        if top.is_file():
            found = [top]
        elif top.is_dir():
            found = sorted(directory / file for directory, _, names in top.walk() for file in names)
        elif glob.has_magic(name):
            found = sorted(map(Path, glob.glob(name, recursive=True)))
        else:
            found = []
        if not found:
            raise UserError(f"path '{entry}' is no file, no directory with files and no glob that matches one")
        for file in found:
            below = file.relative_to(top) if top.is_dir() else file
            if file.is_file() and not _matches(config.exclude, below, file):
                files.setdefault(file.absolute(), CorpusFile(file, named=file == top))
    if not files:
        raise UserError(f"exclude={', '.join(config.exclude)} leaves no file of path={', '.join(config.path)}")
    return list(files.values())


def _matches(patterns: Iterable[str], *paths: Path) -> bool:
    return any(fnmatch.fnmatchcase(path.as_posix(), pattern) for pattern in patterns for path in paths)


def read_documents(config: DataConfig, *, on_skip: Callable[[Path, str], None] | None = None) -> Iterator[Document]:
    """All documents of the corpus, in a fixed order, empty ones left out.

    A file found in a directory or by a glob that is not UTF-8 text is skipped, as is a JSONL text with half a
    surrogate pair; `on_skip` is called with the file and the reason. Raises UserError for a named file that is not
    text, a damaged file, and a JSONL line without the text field.
    """
    before = 0
    for file in find_files(config):
        with file.path.open("rb") as raw:
            try:
                for text in _read_file(file, raw, config, on_skip):
                    if text:
                        yield Document(text, file.path, before + raw.tell())
            except UnicodeDecodeError:
                if file.named:
                    raise UserError(f"'{file.path}' is not UTF-8 text: convert it or leave it out") from None
                if on_skip is not None:
                    on_skip(file.path, "not UTF-8")
            except (EOFError, gzip.BadGzipFile, zlib.error):
                raise UserError(f"'{file.path}' is a damaged gzip file: get it again or leave it out") from None
            before += os.fstat(raw.fileno()).st_size


def read_texts(config: DataConfig, split: Split) -> Iterator[str]:
    """The texts of the documents of one split, in the corpus' order."""
    for document in read_documents(config):
        if split_of(document.text, config) == split:
            yield document.text


def split_of(text: str, config: DataConfig) -> Split:
    """The split of a document: by its text alone, so that adding files moves none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return "validation" if int.from_bytes(digest) < config.validation_fraction * 2**64 else "train"


def _read_file(
    file: CorpusFile, raw: BinaryIO, config: DataConfig, on_skip: Callable[[Path, str], None] | None
) -> Iterator[str]:
    if file.is_jsonl:
        with _lines(file.path, raw) as lines:
            for text in _read_jsonl(lines, file.path, config.text_field, on_skip):
                yield from _cut(io.StringIO(text, newline="\n"), config.document_chars)
    elif config.document_chars is None:
        with _lines(file.path, raw) as lines:
            yield lines.read()
    else:
        with _lines(file.path, raw) as lines:
            for _ in lines:  # all of it is text before any of it is a document
                pass
        with _lines(file.path, raw) as lines:
            yield from _cut(lines, config.document_chars)


@contextlib.contextmanager
def _lines(file: Path, raw: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """The text of the open file `raw`, from its beginning, unzipped by `file`'s name, line ends as they are."""
    raw.seek(0)
    content = gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
    lines = io.TextIOWrapper(content, encoding="utf-8", newline="\n")  # type: ignore[arg-type]
    try:
        yield lines
    finally:
        lines.detach()  # or it would close `raw`


def _cut(lines: Iterable[str], document_chars: int | None) -> Iterator[str]:
    part, size = [], 0
    for line in lines:
        if document_chars is not None and part and size + len(line) > document_chars:
            yield "".join(part)
            part, size = [], 0
        part.append(line)
        size += len(line)
    yield "".join(part)


def _read_jsonl(
    lines: Iterable[str], file: Path, field: str, on_skip: Callable[[Path, str], None] | None
) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"line {number} of '{file}' is not JSON: {error}") from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(record) if isinstance(record, dict) else "no fields at all"
            raise UserError(f"line {number} of '{file}' has no text in '{field}' (it has {fields}): set text_field")
        try:
            text.encode()
        except UnicodeEncodeError:
            if on_skip is not None:
                on_skip(file, f"line {number} has half a surrogate pair")
            continue
        yield text
