"""Training with Llama's settings, and the `tokenizer` command."""

import argparse
import io
from pathlib import Path

import pytest

from llama_jax.config import UserError
from llama_jax.tokenizers import TokenizerConfig, cli, load_tokenizer, train_tokenizer

LINES = [f"def name_{i}(value{i % 7}):\n    return value{i % 7} + {i * 37}\n" for i in range(300)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("max_lines", [10_000_000, 150])
def test_same_texts_same_model(kind: str, max_lines: int):
    first, second = (train_tokenizer(LINES, kind=kind, vocab_size=288, max_lines=max_lines) for _ in range(2))
    assert first.files == second.files


def test_sampling_takes_part_of_the_lines_only():
    whole, sampled = (train_tokenizer(LINES, vocab_size=288, max_lines=n).files for n in (10_000_000, 101))
    assert whole != sampled


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_llamas_settings(kind: str):
    tokenizer = train_tokenizer(LINES, kind=kind, vocab_size=288)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (288, 1, (2,), None)
    pieces = tokenizer.pieces
    assert pieces[3:259] == [bytes([b]) for b in range(256)]
    learned = pieces[259:]
    assert not [p for p in learned if b"\n" in p]
    assert not [p for p in learned if len(p) > 1 and any(chr(b).isdigit() for b in p)]
    if kind == "bpe":  # unigram keeps none of them at this size
        assert b"  " in learned
    # A space is put before the text, and only there: "def" begins as " def" does, but not after a line end.
    word, second = tokenizer.encode("def"), tokenizer.encode("\ndef")
    assert tokenizer.pieces[word[0]].startswith(b" ")
    assert b"".join(tokenizer.pieces[i] for i in second) == b" \ndef"


def test_texts_that_one_skips_are_still_encoded():
    tokenizer = train_tokenizer(["a\0b\t c\u2585d" + "x" * 5000, "word word word\r\n"], vocab_size=264)
    for text in ("a\0b", "\t", "x" * 5000, "\r\n", "\u2585"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_are_learned_from():
    assert b"ab" in train_tokenizer(["ab cd " * 2000], vocab_size=267).pieces


def test_impossible_sizes_name_the_possible_one():
    for kind in ("bpe", "unigram"):
        with pytest.raises(UserError, match=r"vocab_size=5000 .* \d+ is the largest possible size") as error:
            train_tokenizer(["hello world, hello"], kind=kind, vocab_size=5000)
        largest = int(str(error.value).split(": ")[1].split()[0])
        assert train_tokenizer(["hello world, hello"], kind=kind, vocab_size=largest).vocab_size == largest
    with pytest.raises(UserError, match=r"vocab_size=261 is too small .* use at least 268"):
        train_tokenizer(["hello world, hello"], vocab_size=261)
    assert train_tokenizer(["hello world, hello"], vocab_size=268).vocab_size == 268
    with pytest.raises(UserError, match="no text to train"):
        train_tokenizer(["", "\n"], vocab_size=288)
    with pytest.raises(UserError, match="vocab_size=100"):
        TokenizerConfig(path=None, kind="bpe", vocab_size=100)


def test_training_is_quiet_and_tells_its_progress(capfd: pytest.CaptureFixture[str]):
    read = []
    train_tokenizer(LINES, vocab_size=288, progress=read.append)
    assert sum(read) == sum(map(len, LINES))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers())
    assert cli.main(parser.parse_args(["tokenizer", *words])) == 0
    return capsys.readouterr().out


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    text = tmp_path / "corpus.txt"
    text.write_text("".join(LINES))
    out = str(tmp_path / "out")
    run(capsys, "train", "--kind", "unigram", "--vocab-size", "288", "--output", out, str(text))
    tokenizer = load_tokenizer(out)
    assert tokenizer.files == train_tokenizer(LINES, kind="unigram", vocab_size=288).files
    ids = run(capsys, "encode", out, " two\n lines", "--bos", "--eos")
    assert [int(i) for i in ids.split()] == tokenizer.encode(" two\n lines", bos=True, eos=True)
    assert run(capsys, "decode", out, *ids.split()) == " two\n lines\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(ids))
    assert run(capsys, "decode", out) == " two\n lines\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(" two\n lines"))
    assert run(capsys, "encode", out, "--bos", "--eos") == ids


def test_wrong_command_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train_tokenizer(LINES, vocab_size=288).save(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    for words, message in (
        (["decode", str(tmp_path), "12", "x1"], "'x1' is not a token id"),
        (["train", "--vocab-size", "288", "--output", "o", str(tmp_path / "none")], "does not exist"),
        (["train", "--vocab-size", "288", "--output", "o", str(tmp_path / "latin")], "not UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            run(capsys, *words)
