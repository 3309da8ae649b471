"""What a file is by its first bytes, where that is nothing that a corpus is read from as text."""

import re

HEAD = 512  # bytes that tell

# (where, the bytes there, what begins so, what to do); the names of kinds that are read say how to call the file.
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
_OF_FOUR_BYTES = re.compile(rb"(\x1f\x8b|\x1f\x9d|\x80|\xff|\xfe)")  # shorter ones are also token ids


class OtherContentError(Exception):
    """A file of another kind than its name says; `what` it is, and what to do with it."""

    def __init__(self, what: str, advice: str = ""):
        super().__init__(what)
        self.what, self.advice = what, advice or "leave it out"


def check_text(head: bytes) -> None:
    """Raise OtherContentError for the first bytes of a file (HEAD of them) that is no text."""
    _check(head)
    if b"\0" in head:
        raise OtherContentError("a binary file")


def check_ids(head: bytes) -> None:
    """Raise OtherContentError for the first bytes of a file that is no array of token ids for certain."""
    if not _OF_FOUR_BYTES.match(head) or head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF"):
        _check(head)


def _check(head: bytes) -> None:
    for where, magic, what, advice in _COMPILED:
        if magic.match(head, where):
            raise OtherContentError(what, advice)
