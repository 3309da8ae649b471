"""Files opened by their kind: decompressed, unpacked, and refused where the content is not text."""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import cast

import zstandard

from llama_jax.config import UserError
from llama_jax.data.readers.records import BUFFER, CorpusFile, SkippedFile
from llama_jax.remote import file_system, is_remote


def open_file(path: str) -> io.BufferedIOBase:
    """Open the file, buffered. Raises UserError for a file that cannot be read."""
    try:
        if not is_remote(path):
            return cast(io.BufferedReader, open(path, "rb", buffering=BUFFER))
        fs, name = file_system(path)
        return io.BufferedReader(cast(io.RawIOBase, fs.open(name, "rb")), BUFFER)
    except (FileNotFoundError, PermissionError) as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror or error}): check that it is still there") from None


BACKUPS = ("~", ".bak", ".swp", ".swo")
FOLDERS = ("__pycache__", "__MACOSX")


def is_left_out(name: str) -> bool:
    """Return True for names that a corpus leaves out of a directory: hidden, an editor's backup, a cache."""
    is_autosave = len(name) > 1 and name[0] == name[-1] == "#"
    is_hidden = name.startswith(".") and name not in (".", "..")
    return is_hidden or name.endswith(BACKUPS) or name in FOLDERS or is_autosave


HEAD = 512  # bytes at the beginning of a file that show its kind

# (place, the bytes there, kind of file, advice). Kinds that are read by other names get the advice to rename the file.
_UNPACK, _NAME = "unpack it and give its files", "give it a name that ends with"
MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, rb"PK(\x03\x04|\x05\x06|\x07\x08)", "a ZIP archive (or Word, Excel, PyTorch, NumPy)", _UNPACK),
    (0, rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, rb"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (257, rb"ustar(\x00|  \x00)", "a tar archive", f"{_NAME} .tar"),
    (0, rb"\x1f\x8b\x08", "compressed by gzip", f"{_NAME} .gz"),
    (0, rb"\x28\xb5\x2f\xfd", "compressed by zstd", f"{_NAME} .zst"),
    (0, rb"\xfd7zXZ\x00", "compressed by xz", f"{_NAME} .xz"),
    (0, rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed by bzip2", f"{_NAME} .bz2"),
    (0, rb"\x04\x22\x4d\x18", "compressed by lz4", _UNPACK),
    (0, rb"\x1f\x9d", "compressed by compress", _UNPACK),
    (0, rb"PAR1\x15", "a Parquet file", f"{_NAME} .parquet"),
    (0, rb"ARROW1\x00\x00", "an Arrow or Feather file", "write it as Parquet"),
    (0, rb"\xff\xff\xff\xff....\x10\x00\x00\x00", "a stream of Arrow", f"{_NAME} .arrow"),
    (0, rb"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "an ArrayRecord or Riegeli file", f"{_NAME} .array_record"),
    (0, rb"Obj\x01", "an Avro file", "write it as Parquet"),
    (0, rb"ORC[\x00-\x1f]", "an ORC file", "write it as Parquet"),
    (0, rb"SEQ[\x04-\x06]", "a Hadoop sequence file", "write it as Parquet"),
    (0, rb"SQLite format 3\x00", "an SQLite database", "write its table as Parquet"),
    (0, rb"\x89HDF\r\n\x1a\n", "an HDF5 file", ""),
    (0, rb"\x93NUMPY", "a NumPy array", ""),
    (0, rb"GGUF[\x01-\x09]\x00", "a model (GGUF)", ""),
    (0, rb".{4}\x00{4}\{\"", "a model (safetensors)", ""),
    (0, rb"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19", "a file of PyTorch", ""),
    (0, rb"\x80[\x02-\x05]", "a pickle of Python", ""),
    (0, rb"WARC/[01]\.\d+\r?\n", "a WARC archive", "write its texts as JSONL"),
    (0, rb"\x89PNG\r\n\x1a\n", "a PNG image", ""),
    (0, rb"\xff\xd8\xff", "a JPEG image", ""),
    (0, rb"GIF8[79]a(?![ -~\s]{4})", "a GIF image", ""),
    (0, rb"(II\*\x00|MM\x00\*)", "a TIFF image", ""),
    (0, rb"RIFF.{4}(WAVE|WEBP|AVI )", "a sound, an image or a film", ""),
    (0, rb"\x00.{3}ftyp", "a film", ""),
    (0, rb"(OggS\x00|fLaC\x00|ID3[\x02-\x04])", "a sound", ""),
    (0, rb"%PDF-\d", "a PDF", "extract its text"),
    (0, rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old file of Word, Excel or PowerPoint", "save it as text"),
    (0, rb"\{\\rtf\d", "a rich text file", "save it as text"),
    (0, rb"\x7fELF", "a program (ELF)", ""),
    (0, rb"(\xfe\xed\xfa[\xce\xcf]|[\xce\xcf]\xfa\xed\xfe|\xca\xfe\xba\xbe|\x00asm)", "a program", ""),
    (0, rb"(\xff\xfe\x00\x00|\x00\x00\xfe\xff)", "UTF-32", "convert it to UTF-8 (iconv)"),
    (0, rb"(\xff\xfe|\xfe\xff)..", "UTF-16", "convert it to UTF-8 (iconv)"),
)
_COMPILED = tuple((where, re.compile(magic, re.DOTALL), what, advice) for where, magic, what, advice in MAGIC)
_OF_FOUR_BYTES = re.compile(rb"(\x1f\x8b|\x1f\x9d|\x80|\xff|\xfe)")  # shorter magic bytes are token ids too


class OtherContentError(Exception):
    """A file of another kind than its name shows: its kind, and advice."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__(what)
        self.what, self.advice = what, advice or "leave it out"


def check_text(head: bytes) -> None:
    """Raise OtherContentError where the first HEAD bytes of a file are not those of a text."""
    _check(head)
    if b"\0" in head:
        raise OtherContentError("a binary file")


def check_ids(head: bytes) -> None:
    """Raise OtherContentError where the first bytes of a file are certainly not token ids."""
    if not _OF_FOUR_BYTES.match(head) or head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF"):
        _check(head)


def _check(head: bytes) -> None:
    for where, magic, what, advice in _COMPILED:
        if magic.match(head, where):
            raise OtherContentError(what, advice)


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


_PACKED = re.compile(r"\.(?:t?(gz|zst|bz2|xz)|t(bz))$", re.IGNORECASE)
_PACKINGS = {"gz": "gzip", "zst": "zstd", "bz2": "bzip2", "bz": "bzip2", "xz": "xz"}
_OPENERS = {"gzip": lambda raw: gzip.GzipFile(fileobj=raw), "zstd": _Zstd, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}


def packing_of(path: str) -> str:
    """Return the compression of a file, by its name, or ""."""
    found = _PACKED.search(path)
    return "" if found is None else _PACKINGS[(found[1] or found[2]).lower()]


@contextlib.contextmanager
def unpacked(file: CorpusFile) -> Iterator[io.BufferedIOBase]:
    """Open the file, decompressed by its name. Raises UserError for a damaged file."""
    packing = packing_of(file.path)
    try:
        with open_file(file.place) as raw:
            yield io.BufferedReader(_OPENERS[packing](raw), BUFFER) if packing else raw
    except (EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and (not packing or error.errno is not None):
            raise  # of the disk; gzip and bzip2 raise it for damaged content, without a number
        raise UserError(f"'{file.path}' is a damaged {packing} file: get it again or leave it out") from None


@contextlib.contextmanager
def opened(file: CorpusFile) -> Iterator[io.BufferedIOBase]:
    """Open the file, decompressed by its name. Raises OtherContentError where the content is not text."""
    with unpacked(file) as content:
        check_text(content.peek(HEAD)[:HEAD])  # type: ignore[attr-defined]  # a BufferedReader
        yield content


def members(archive: CorpusFile) -> Iterator[CorpusFile | SkippedFile]:
    """Yield the archive's files in their order, each on disk until the next is taken.

    Names that are left out of directories are left out here. Raises UserError for a damaged archive.
    """
    try:
        with unpacked(archive) as content, tarfile.open(fileobj=content, mode="r|") as tar:  # type: ignore[call-overload]
            for member in tar:
                path = f"{archive.path}/{member.name.removeprefix('./')}"
                if member.isdir() or any(map(is_left_out, member.name.split("/"))):
                    continue
                if (held := tar.extractfile(member) if member.isfile() else None) is None:
                    yield SkippedFile(path, "no ordinary file (a link, a pipe or a device)")
                    continue
                with tempfile.NamedTemporaryFile(prefix="llama_jax-member-") as copy:
                    shutil.copyfileobj(held, copy)
                    copy.flush()
                    yield CorpusFile(path, member.size, False, copy=copy.name)
    except tarfile.TarError as error:
        raise UserError(f"'{archive.path}' is a damaged tar archive ({error}): get it again or leave it out") from None
