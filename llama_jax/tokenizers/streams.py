"""Streams that give what a decoder of the `tokenizers` library gives, token by token and at linear cost.

The library's own `DecodeStream` raises on bytes that are no UTF-8. Here a token's text is held back exactly as long as
later tokens may still change it.
"""

import abc
import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

# Decoders whose text of a token depends on nothing but the token, and on whether it is the first.
LOCAL = {"Metaspace", "WordPiece", "Replace", "Strip"}
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


class Stage(abc.ABC):
    """Text of tokens that come one by one."""

    @abc.abstractmethod
    def feed(self, token: str) -> str:
        """Return the text that is certain once `token` is there."""

    def flush(self) -> str:
        """Return the text that was held back."""
        return ""


def byte_letters() -> list[str]:
    """GPT-2's letter for every byte: itself where it prints, else one from U+0100 on, in order."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printing}
    others = [byte for byte in range(256) if byte not in letters]
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


_BYTES = {letter: byte for byte, letter in enumerate(byte_letters())}


def stage_of(tokenizer: tokenizers.Tokenizer) -> Stage:
    """Return the stage that does what the decoder of `tokenizer` does."""
    decoder = tokenizer.decoder
    if decoder is None:
        return _Spaced()
    data = json.loads(decoder.__getstate__())
    parts = data["decoders"] if data["type"] == "Sequence" else [data]
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return _Bytes()
    if LOCAL.issuperset(kinds):
        return _Local(decoder)
    replaces = [part for part in parts if part["type"] == "Replace"]
    strips = [part for part in parts if part["type"] == "Strip"]
    order = re.fullmatch("(Replace )*(ByteFallback )?Fuse (Strip )?", "".join(f"{kind} " for kind in kinds))
    if order and all("String" in part["pattern"] for part in replaces):
        return _Fallback(replaces, "ByteFallback" in kinds, strips)
    return _Whole(decoder)


class _Spaced(Stage):
    """No decoder: tokens with spaces between."""

    _first = True

    def feed(self, token: str) -> str:
        space, self._first = "" if self._first else " ", False
        return space + token


class _Bytes(Stage):
    """Byte-level BPE: letters that stand for bytes; a token with another letter is its own text."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: str) -> str:
        known = [_BYTES.get(letter) for letter in token]
        content = token.encode() if None in known else bytes(byte for byte in known if byte is not None)
        return self._decoder.decode(content)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Local(Stage):
    """A decoder that treats all tokens but the first alike."""

    def __init__(self, decoder: Any):
        self._decoder, self._first, self._size = decoder, True, len(decoder.decode(["a"]))

    def feed(self, token: str) -> str:
        if self._first:
            self._first = False
            return self._decoder.decode([token])
        return self._decoder.decode(["a", token])[self._size :]


class _Fallback(Stage):
    """SentencePiece's pieces: replaced characters, runs of byte tokens, characters stripped from both ends.

    A run of bytes that is no UTF-8 as a whole is as many U+FFFD, so that a run is held back until it ends.
    """

    def __init__(self, replaces: Sequence[Mapping[str, Any]], has_bytes: bool, strips: Sequence[Mapping[str, Any]]):
        self._replaces = [(part["pattern"]["String"], part["content"]) for part in replaces]
        self._has_bytes, self._run, self._held = has_bytes, bytearray(), ""
        self._strip, self._start, self._stop = "", 0, 0
        for part in strips:
            self._strip, self._start, self._stop = part["content"], part["start"], part["stop"]

    def feed(self, token: str) -> str:
        for old, new in self._replaces:
            token = token.replace(old, new)
        if self._has_bytes and (byte := BYTE.fullmatch(token)):
            self._run.append(int(byte[1], 16))
            return ""
        return self._stripped(self._end_run() + token)

    def flush(self) -> str:
        text = self._stripped(self._end_run())
        self._held = ""
        return text

    def _end_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._start and text:
            if not text.startswith(self._strip):
                self._start = 0
                break
            text, self._start = text[1:], self._start - 1
        text = self._held + text
        tail = min(len(text) - len(text.rstrip(self._strip)), self._stop) if self._stop else 0
        text, self._held = text[: len(text) - tail], text[len(text) - tail :]
        return text


class _Whole(Stage):
    """Any other decoder: all the text at the end."""

    def __init__(self, decoder: Any):
        self._decoder = decoder
        self._tokens: list[str] = []

    def feed(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def flush(self) -> str:
        text = self._decoder.decode(self._tokens) if self._tokens else ""
        self._tokens = []
        return text
