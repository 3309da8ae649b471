"""Which text a run learns from."""

import dataclasses
from typing import Literal

from llama_jax.config import UserError

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which text a run learns from.

    path: files, directories (with all below them), globs, on disk or as gs:// and s3://, and hf://NAME[/CONFIG]:SPLIT.
    exclude: patterns as in the shell of files to leave out, matched with the path and with its part below `path`.
    fields: what holds the text, the token ids or the messages in a record; several are a document's parts, in order.
    document_chars: cut longer documents at line ends into documents of about so many characters; None leaves them.
    max_record_bytes: longer lines, records and whole files are bad records.
    max_bad_records: more than so many bad records (not UTF-8, without a field...) are an error; none: any number.
    validation_fraction: share of documents held out, chosen by a hash of their text.
    cache_dir: where tokenized shards are kept; None is $LLAMA_JAX_CACHE or ~/.cache/llama_jax.
    num_prefetch: batches prepared ahead of the step that takes them.
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

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction={self.validation_fraction} must be at least 0 and less than 1")
        if self.document_chars is not None and self.document_chars < 1:
            raise UserError(
                f"document_chars={self.document_chars} must be at least 1, or none to leave documents whole"
            )
        if not self.fields or len(set(self.fields)) < len(self.fields):
            raise UserError(f"fields={','.join(self.fields)} must name one field or several different ones")
        if self.document_chars is not None and len(self.fields) > 1:
            raise UserError(
                f"document_chars={self.document_chars} cannot cut documents of {len(self.fields)} parts: set it to "
                "none or name one field"
            )
        if self.max_record_bytes < 1:
            raise UserError(f"max_record_bytes={self.max_record_bytes} must be at least 1")
        if self.max_bad_records is not None and self.max_bad_records < 0:
            raise UserError(f"max_bad_records={self.max_bad_records} must be at least 0, or none for any number")
        if self.num_prefetch < 0:
            raise UserError(f"num_prefetch={self.num_prefetch} must be at least 0")
