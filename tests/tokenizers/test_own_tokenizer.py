"""A tokenizer from outside the package: its reader, its files, a round trip."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from llama_jax.tokenizers import READERS, Settings, TextStream, Tokenizer, load_saved_tokenizer, load_tokenizer


class Letters(Tokenizer):
    """One token a letter of the alphabet in the file, after `<eos>`."""

    def __init__(self, content: bytes, settings: Settings):
        self.letters = content.decode().split()[1]
        self.vocab_size, self.eos_ids = 1 + len(self.letters), (0,)
        self.bos_id = self.pad_id = self.unk_id = None
        self.special_tokens = {"<eos>": 0}
        self.files = {"tokenizer.model": content, **settings.files}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[1 + self.letters.index(letter) for letter in text] for text in texts]

    def stream(self) -> TextStream:
        return LetterStream(self)


class LetterStream(TextStream):
    def __init__(self, tokenizer: Letters):
        self.tokenizer = tokenizer

    def feed(self, token_id: int) -> str:
        return "" if token_id == 0 else self.tokenizer.letters[self.tokenizer.check_id(token_id) - 1]

    def flush(self) -> str:
        return ""


def read_letters(path: Path, content: bytes, settings: Settings) -> Letters | None:
    return Letters(content, settings) if content.startswith(b"letters ") else None


def test_a_reader_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llama_jax.tokenizers.loading.READERS", [read_letters, *READERS])
    (tmp_path / "mine.txt").write_text("letters abc")
    tokenizer = load_tokenizer(tmp_path / "mine.txt")
    assert tokenizer.encode("cab", eos=True) == [3, 1, 2, 0]
    assert tokenizer.decode([3, 1, 2, 0]) == "cab"
    tokenizer.with_rule((), (0,)).save(tmp_path / "saved")
    saved = load_saved_tokenizer(tmp_path / "saved")
    assert saved.encode_prompt("ab") == [1, 2, 0]
    assert saved.fingerprint == tokenizer.fingerprint
