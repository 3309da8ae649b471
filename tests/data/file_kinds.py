"""Files of the kinds that no installed library writes."""

import struct
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter


def as_example(features: dict[str, list[int] | bytes | float], *, packed: bool = True) -> bytes:
    """A serialized tf.train.Example, written after its .proto."""

    def varint(value: int) -> bytes:
        value &= (1 << 64) - 1
        encoded = bytearray()
        while value > 127:
            encoded.append(value & 127 | 128)
            value >>= 7
        return bytes([*encoded, value])

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = field(1, field(1, value))
        elif isinstance(value, float):
            feature = field(2, field(1, struct.pack("<f", value)))
        elif packed:
            feature = field(3, field(1, b"".join(map(varint, value))))
        else:
            feature = field(3, b"".join(varint(1 << 3) + varint(v) for v in value))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def write_array_record(file: Path, records: list[bytes]) -> Path:
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return file
