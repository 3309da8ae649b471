"""Compressed files, opened as what they hold."""

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator

import zstandard

from llama_jax.config import UserError
from llama_jax.data.files import BUFFER, CorpusFile, open_file
from llama_jax.data.readers.content import HEAD, check_text
from llama_jax.data.readers.units import packing_of

WINDOW = 1 << 31  # the largest that zstd --long writes


class _Zstd(io.RawIOBase):
    """Decompressed frames of `raw`. Raises EOFError where one is cut off, which zstandard's own reader hides."""

    def __init__(self, raw: io.BufferedIOBase):
        self._raw, self._ready, self._rest = raw, b"", b""
        self._new_frame()

    def _new_frame(self) -> None:
        self._frame, self._begun = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj(), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        while not self._ready:
            data, self._rest = self._rest or self._raw.read(1 << 14), b""
            if not data:
                if self._begun:
                    raise EOFError
                return 0
            self._ready, self._begun = self._frame.decompress(data), True
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._new_frame()
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


_OPENERS = {
    "gzip": lambda raw: gzip.GzipFile(fileobj=raw),
    "zstd": _Zstd,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
}


@contextlib.contextmanager
def unpacked(file: CorpusFile) -> Iterator[io.BufferedIOBase]:
    """The file's content, decompressed by its name. Raises UserError for a damaged file."""
    packing = packing_of(file.path)
    try:
        with open_file(file.place) as raw:
            yield io.BufferedReader(_OPENERS[packing](raw), BUFFER) if packing else raw
    except (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError):
        raise UserError(f"'{file.path}' is a damaged {packing} file: get it again or leave it out") from None
    except OSError as error:
        if packing and error.errno is None:  # gzip and bzip2 say so of their content
            raise UserError(f"'{file.path}' is a damaged {packing} file: get it again or leave it out") from None
        raise


@contextlib.contextmanager
def opened(file: CorpusFile) -> Iterator[io.BufferedIOBase]:
    """The file's content, decompressed by its name. Raises OtherContentError where that is no text."""
    with unpacked(file) as content:
        check_text(content.peek(HEAD)[:HEAD])  # type: ignore[attr-defined]  # all of them are buffered readers
        yield content
