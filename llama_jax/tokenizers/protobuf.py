"""Protobuf messages without their schema: what SentencePiece models and `tf.train.Example` are written in."""

import struct
from collections.abc import Iterator
from typing import Any


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of every field of a protobuf message: an int, or bytes (32 and 64 bits as they are)."""
    position = 0
    while position < len(message):
        key, position = read_varint(message, position)
        if key & 7 == 0:
            value, position = read_varint(message, position)
            yield key >> 3, value
            continue
        length = {1: 8, 5: 4}.get(key & 7)
        if length is None:
            length, position = read_varint(message, position)
        yield key >> 3, message[position : position + length]
        position += length


def read_varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """(value, where it ends) of the varint at `position`: seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if message[position - 1] < 128:
            return value, position


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protobuf message: an int as varint, a float as 32 bits, bytes with their length."""
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
