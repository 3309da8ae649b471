"""Protobuf's integers."""


def read_varint(message: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the varint at `position` (seven bits a byte, the lowest first) and the position after it."""
    value = shift = 0
    while True:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if message[position - 1] < 128:
            return value, position
