"""Texts that end with their own checksum."""

import hashlib
import json

import pytest
import xxhash

from llama_jax.files import sealed, unsealed

CONTENT = {"a": [1, "\u00e9"], "b": {"sum": None}}


def test_a_seal_is_the_checksum_of_the_rest():
    """As the files of earlier versions have it."""
    rest = json.dumps(CONTENT)
    assert sealed(CONTENT) == f'{rest[:-1]}, "sha256": "{hashlib.sha256(rest.encode()).hexdigest()}"}}'
    checksum = xxhash.xxh3_128_hexdigest(rest.encode())
    assert sealed(CONTENT, "manifest") == json.dumps(CONTENT | {"manifest": checksum}, indent=1) + "\n"


@pytest.mark.parametrize("key", ["sha256", "manifest"])
def test_every_changed_byte_is_found(key: str):
    text = sealed(CONTENT, key)
    found = unsealed(text)
    assert (found.pop(key), found) == (json.loads(text)[key], CONTENT)
    name = range(text.index(f'"{key}"') + 1, text.index(f'"{key}"') + 1 + len(key))  # then it is as without a seal
    for place in range(len(text)):
        if place not in name:
            with pytest.raises(ValueError):
                unsealed(text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :])
            with pytest.raises(ValueError):
                unsealed(text[:place])
    assert unsealed(rest := json.dumps(CONTENT)) == json.loads(rest)
