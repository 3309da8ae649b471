"""The `tokenizer` command: train, encode, decode, compare."""

import gzip
import io
import json
from pathlib import Path

import pytest

from llama_jax import text_commands
from llama_jax.__main__ import KINDS as PARSED_KINDS, main
from llama_jax.tokenizers import comparing, load_tokenizer, train_tokenizer
from llama_jax.tokenizers.comparing import CHINESE, ENGLISH, compare
from llama_jax.tokenizers.config import KINDS

LINES = [f"def name_{i}(value{i % 7}):\n    return value{i % 7} + {i * 37}  \n\n" for i in range(100)]
assert KINDS == PARSED_KINDS
SIZES = {"bpe": 295, "unigram": 293, "byte_bpe": 288, "wordpiece": 100, "whitespace": 100}


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "MIN_BYTES", 1000)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["tokenizer", *words]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_train_is_train_tokenizer_on_the_whole_text(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_commands, "BLOCK", 300)  # so that even this file is read in blocks
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("".join(LINES))
    second.write_text("no end of line \n \n  é")
    out = str(tmp_path / "out")
    options = ["--kind", kind, "--vocab-size", str(SIZES[kind]), "--special-token", "<pad>", "--special-token", "<x>"]
    told = run(capsys, "train", *options, "--output", out, str(first), str(second))
    whole = train_tokenizer(
        [first.read_text(), second.read_text()], kind=kind, vocab_size=SIZES[kind], special_tokens=("<pad>", "<x>")
    )
    assert told == f"{Path(out) / next(iter(whole.files))}: {kind}, {SIZES[kind]} tokens\n"
    assert load_tokenizer(out).files == whole.files


def test_files_of_all_kinds_are_read_as_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.JSONL.GZ").write_bytes(gzip.compress("\n".join(json.dumps({"body": t}) for t in LINES[:50]).encode()))
    (corpus / "b.json").write_text("\ufeff" + json.dumps([{"body": t} for t in LINES[50:]], indent=1))
    (corpus / "c.txt").write_bytes(b"GIF89a\0\0")
    (corpus / ".hidden.txt").write_text("hidden " * 500)
    train = ["train", "--kind", "byte_bpe", "--vocab-size", "288", "--output", str(tmp_path / "out")]
    assert main(["tokenizer", *train, "--fields", "body", str(corpus)]) == 0
    assert capsys.readouterr().err == f"left out: {corpus / 'c.txt'}: a GIF image\n"
    assert load_tokenizer(tmp_path / "out").files == train_tokenizer(LINES, kind="byte_bpe", vocab_size=288).files
    table = run(capsys, "compare", str(tmp_path / "out"), "--fields", "body", "--text", str(corpus / "b.json"))
    assert "exact" in table


def test_encode_and_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    tokenizer = train_tokenizer(LINES, kind="unigram", vocab_size=288)
    out = str(tokenizer.save(tmp_path))
    ids = run(capsys, "encode", out, " two\n lines", "--bos", "--eos")
    assert [int(i) for i in ids.split()] == tokenizer.encode(" two\n lines", bos=True, eos=True)
    assert run(capsys, "decode", out, *ids.split()) == " two\n lines\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(ids))
    assert run(capsys, "decode", out) == " two\n lines\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(" two\n lines"))
    assert run(capsys, "encode", out, "--bos", "--eos") == ids


def test_wrong_inputs_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train_tokenizer(LINES, vocab_size=288).save(tmp_path)
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    (tmp_path / "blank").write_bytes(b" \n")
    (tmp_path / "page.txt").write_bytes(b"SQLite format 3\0 a b c d e f\n" * 50)
    (tmp_path / "nuls.txt").write_bytes(b"a b c d e f\n" * 50 + b"\0")
    (tmp_path / "a.jsonl").write_text('{"content": "a"}\n')
    train = ["train", "--vocab-size", "288", "--output", "o"]
    for words, message in (
        (["decode", str(tmp_path), "12", "x1"], "'x1' is not a token id"),
        ([*train, str(tmp_path / "none")], "is no file"),
        ([*train, str(tmp_path / "page.txt")], "is an SQLite database, which is not read"),
        ([*train, str(tmp_path / "nuls.txt")], "is no text: it has NUL bytes"),
        ([*train, str(tmp_path / "a.jsonl")], "lacks a field .*set fields"),
        (["compare", str(tmp_path), "--text", str(tmp_path / "page.txt")], "is an SQLite database"),
        ([*train, str(tmp_path / "latin")], "not UTF-8"),
        ([*train, "--special-token", "pad", str(tmp_path / "blank")], "must be a name in brackets"),
        (["compare", str(tmp_path / "none")], "does not exist"),
        (["compare", str(tmp_path), "--text", str(tmp_path / "none")], "is no file"),
        (["compare", str(tmp_path), "--text", str(tmp_path / "blank")], "blank': there is nothing to compare"),
    ):
        assert main(["tokenizer", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(captured.err)


def test_compare_counts(monkeypatch: pytest.MonkeyPatch):
    words = train_tokenizer(["a b\nc a"], kind="whitespace", vocab_size=3)  # <unk>, a, b
    figures = compare(words, "a b c  zz")
    assert (figures.num_tokens, figures.tokens_per_word, figures.unknown_rate) == (4, 1.0, 0.5)
    assert (figures.tokens_per_character, figures.tokens_per_byte) == (4 / 9, 4 / 9)
    assert not figures.exact  # two spaces, and what was unknown
    assert compare(words, "a b").exact
    chinese = compare(train_tokenizer([CHINESE], kind="byte_bpe", vocab_size=300), CHINESE)
    assert chinese.exact
    assert chinese.tokens_per_word is None  # it is written without spaces
    assert chinese.tokens_per_character > 2 * chinese.tokens_per_byte
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 24.0, 30.0, 32.0, 40.0, 40.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timed = compare(words, "a b c d\n" * 500)
    assert (timed.megabytes_per_second, timed.tokens_per_second) == (0.002, 1000)  # the median took 2 seconds


def test_compare_prints_a_table_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = []
    for kind in ("byte_bpe", "whitespace"):
        tokenizer = train_tokenizer([ENGLISH], kind=kind, vocab_size={"byte_bpe": 300, "whitespace": 10}[kind])
        paths.append(str(tokenizer.save(tmp_path / kind).parent))
    english, chinese = run(capsys, "compare", *paths).split("Chinese sample")
    for table in (english, chinese):
        assert "unknown" in table
        rows = [line for line in table.splitlines() if "%" in line]
        assert len(rows) == 2
        assert "exact" in rows[0]
        assert "0.00%" in rows[0]
        assert "differs" in rows[1]
    assert "100.00%" in chinese
    text = tmp_path / "text"
    text.write_text("one two")
    assert run(capsys, "compare", paths[0], "--text", str(text)).startswith(str(text))
