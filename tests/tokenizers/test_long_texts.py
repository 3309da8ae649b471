"""A long text has the ids that it has in one piece, wherever it is cut, and takes little more memory than itself."""

import functools
import io
import json
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models, normalizers, pre_tokenizers

from llama_jax.tokenizers import Tokenizer, base, load_tokenizer

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests/directories/goldens"
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
# Everything that the ways to split and normalize a text tell apart, and what the tokenizers add.
PARTS = (
    *"abcxyz ABC 0189 .,!?'\"()- \n\n\r\t  _#$<>/é中文ßﬁΩ☃🙂\u00a0\u3000\u200b\u00ad½Åﾊﾞ",
    *["the cat", " sat on", "a b", "Ab cD", "x y"] * 16,
    " sat", "'s", "'ll", "...", "``", "''", "e\u0301", " \u0308", "\u0301", "\u0600a", "<s>", "</s>", "[SEP]", "<mask>",
    "<|endoftext|>", "\u2581", "\u2581a", "\r\n", "a\nb", ".\nc", "a <x> b", "<x> ", " <x>", "<l>", "a <l> b", " <r> b",
    "<word>", "<plain>", "<|im_start|>", "<0x0A>", "--", "aaaa", *string.ascii_letters,
)  # fmt: skip
fragments = st.lists(st.sampled_from(PARTS), min_size=30, max_size=60).map("".join)
texts = st.tuples(fragments, st.text(max_size=5), fragments).map("".join)
ADDED = {
    "<x>": {}, "<l>": {"lstrip": True}, "<r>": {"rstrip": True}, "<word>": {"single_word": True}, "!?": {}, "  ": {},
}  # fmt: skip


def exact(model: bytes) -> bytes:
    """Return a model with scores that float32 adds without rounding, so that equal ones are equal everywhere."""
    found = ModelProto.FromString(model)
    for piece in found.pieces:
        piece.score = round(piece.score * 64) / 64
    return found.SerializeToString()


@functools.cache
def trained(kind: str, **options: Any) -> bytes:
    """Return a SentencePiece model of a file of this directory."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text(encoding="utf-8").splitlines()), model_writer=written,
        model_type=kind, vocab_size=400, hard_vocab_limit=False, minloglevel=2, **options,
    )  # fmt: skip
    return exact(written.getvalue())


def with_added(folder: Path, first: int, names: dict[str, Any], **config: Any) -> Path:
    """Write settings that add text tokens from an id on."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    decoder = {str(first + i): {"content": name} | flags | options for i, (name, options) in enumerate(names.items())}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder} | config))
    return folder


def of_model(model: bytes, folder: Path, added: dict[str, Any] = {}, **config: Any) -> Tokenizer:  # noqa: B006
    (folder / "tokenizer.model").write_bytes(model)
    if added:
        with_added(folder, len(ModelProto.FromString(model).pieces), added, **config)
    return load_tokenizer(folder)


def exported(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    (folder / "json").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "json" / name).write_bytes(tokenizer.export_files()[name])
    return load_tokenizer(folder / "json")


def of_golden(name: str, folder: Path, added: dict[str, Any] = {}) -> Tokenizer:  # noqa: B006
    for file in (GOLDENS / name).iterdir():
        if file.suffix != ".safetensors":
            content = file.read_bytes()
            (folder / file.name).write_bytes(exact(content) if file.suffix in (".spm", ".model") else content)
    if added:
        with_added(folder, load_tokenizer(folder).vocab_size, added)
    return load_tokenizer(folder)


def in_words(folder: Path, normalizer: Any, splitting: Any) -> Tokenizer:
    pieces = [(p.piece, p.score) for p in ModelProto.FromString(trained("unigram", **NFKC)).pieces]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    made.normalizer, made.pre_tokenizer = normalizer, splitting
    (folder / "tokenizer.json").write_text(made.to_str())
    return with_added(folder, len(pieces), ADDED) and load_tokenizer(folder)


NFKC = {"normalization_rule_name": "nmt_nfkc"}
FOLDED = {"normalization_rule_name": "nmt_nfkc_cf"}
PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
META: dict[str, Any] = {"replacement": "\u2581", "prepend_scheme": "first"}
KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    **{
        name: functools.partial(of_golden, name)
        for name in (
            "gpt2", "llama2", "llama3", "llama_yi", "llama_chatml", "llama_slow", "llama_smollm2", "bert", "glm",
            "roberta", "marian", "t5_v1_0", "t5_v1_1",
        )
    },
    **{
        f"{name} with tokens": functools.partial(of_golden, name, added=ADDED)
        for name in ("gpt2", "llama3", "t5_v1_0")
    },
    "unigram": lambda folder: of_model(trained("unigram", **NFKC), folder),
    "unigram's JSON": lambda folder: exported(of_model(trained("unigram", **NFKC), folder), folder),
    "unigram with tokens": lambda folder: of_model(trained("unigram", **FOLDED), folder, ADDED),
    "unigram with symbols": lambda folder: of_model(
        trained("unigram", user_defined_symbols="zz,\u2581the,<x>", byte_fallback=True, **NFKC), folder
    ),
    "BPE": lambda folder: of_model(trained("bpe", **NFKC), folder),
    "BPE with tokens": lambda folder: of_model(trained("bpe", **PLAIN), folder, ADDED, legacy=True, **LLAMA),
    "BPE with tokens inside": lambda folder: of_model(trained("bpe", **PLAIN), folder, ADDED, legacy=False, **LLAMA),
    "its JSON": lambda folder: exported(KINDS["BPE with tokens inside"](folder), folder),
    "BPE that begins without a space": lambda folder: of_model(trained("bpe", add_dummy_prefix=False, **PLAIN), folder),
    "words of a unigram": lambda folder: in_words(
        folder,
        normalizers.Sequence([
            normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase(),
            normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]),
        pre_tokenizers.Metaspace(**META),
    ),
    "pieces of a unigram": lambda folder: in_words(folder, None, pre_tokenizers.Metaspace(**META, split=False)),
}  # fmt: skip


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return KINDS[request.param](tmp_path_factory.mktemp("kind"))


def cut(tokenizer: Tokenizer, text: str, size: int) -> tuple[list[int], int]:
    """Return the ids of a text that is cut into pieces of `size` characters or more, and the number of pieces."""
    assert tokenizer.border is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PIECE_CHARS", size)
        patch.setattr(base, "PIECES", 2)
        return tokenizer.encode_batch([text, "a"])[0].tolist(), len([*base._pieces(text, tokenizer.border)])


def test_cut_anywhere(tokenizer: Tokenizer):
    num_pieces = []

    @given(texts, st.integers(1, 8))
    @settings(max_examples=40)
    def check(text: str, size: int) -> None:
        if text.startswith(">>"):  # Marian's language
            return
        ids, count = cut(tokenizer, text, size)
        assert ids == tokenizer._encode([text])[0]
        num_pieces.append(count)

    check()
    assert sum(count > 3 for count in num_pieces) > 20


def pieces_with(*pieces: str) -> bytes:
    model = ModelProto.FromString(trained("bpe", **PLAIN))
    for piece in pieces:
        model.pieces.add(piece=piece, score=0.0)
    return model.SerializeToString()


def changed(change: Callable[[Any], object]) -> bytes:
    model = ModelProto.FromString(trained("unigram", **NFKC))
    change(model)
    return model.SerializeToString()


def rule(key: bytes, text: bytes) -> bytes:
    """Return a map of characters, in darts-clone's units, with one rule."""
    units = np.zeros(1024, "<u4")
    place, free = 0, 1
    for letter in [*key, 0]:
        while free ^ letter in (place, 0) or units[free ^ letter]:
            free += 1
        units[place] |= (place ^ free) << 10 | (0 if letter else 1 << 8)
        place = free ^ letter
        units[place] = letter or 1 << 31
        free += 256
    return np.uint32(units.nbytes).tobytes() + units.tobytes() + text + b"\0"


WHOLE: dict[str, Callable[[Path], Tokenizer]] = {
    "a piece over a space": lambda folder: of_model(pieces_with("a\u2581b"), folder),
    "a piece that ends with a space": lambda folder: of_model(pieces_with("a\u2581"), folder),
    "a symbol over a space": lambda folder: of_model(
        changed(lambda model: model.pieces.add(piece="a b", score=0.0, type=4)), folder
    ),
    "a space that is unknown": lambda folder: of_model(
        changed(lambda model: [setattr(p, "type", 5) for p in model.pieces if p.piece == "\u2581"]), folder
    ),
    "spaces that end words": lambda folder: of_model(
        changed(lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True)), folder
    ),
    "a leading space that is dropped": lambda folder: of_model(trained("bpe", add_dummy_prefix=False, **NFKC), folder),
    "a rule over a space": lambda folder: of_model(
        changed(lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", rule(b"b d", b"x"))), folder
    ),
    "a letter that becomes a space": lambda folder: of_model(
        changed(lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", rule(b"b", b" "))), folder
    ),
    **{
        f"a token {name!r}": functools.partial(of_model, trained("bpe", **PLAIN), added={name: {}})
        for name in ("cat", "<cat", " b", "a ", " ", "a b")
    },
    "a token that strips a space": lambda folder: of_golden("gpt2", folder, {"cat": {"lstrip": True}}),
    "an expression that is not known": lambda folder: in_words(
        folder, None, pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex("b d"), "isolated"),
                                               pre_tokenizers.ByteLevel(use_regex=False)])
    ),
    "a replacement that is not known": lambda folder: in_words(
        folder, normalizers.Replace(tokenizers.Regex("b d"), "x"), pre_tokenizers.Metaspace(**META)
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_what_may_reach_over_a_border_is_not_cut(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tokenizer = WHOLE[kind](tmp_path)
    assert tokenizer.border is None
    monkeypatch.setattr(base, "WHOLE_CHARS", 1 << 17)
    tokenizer.encode("a b\n" * (1 << 15) + "c")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("a text of 131,073 characters is tokenized in one piece, as no place is known ")


def test_a_map_of_one_rule_is_read_as_the_library_reads_it(tmp_path: Path):
    model = changed(lambda model: setattr(model.normalizer_spec, "precompiled_charsmap", rule(b"b d", b"x")))
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    assert processor.normalize("ab de") == "\u2581axe"


@pytest.fixture(params=["llama2c/tokenizer.model", "llama2c/tok512.bin", "gpt2/gpt2_vocab.json", "bert/vocab.txt",
                        "sentencepiece/test_model.model"])  # fmt: skip
def real_tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / request.param)


@pytest.mark.parametrize("file", ["sentencepiece/botchan.txt", "tinyshakespeare/input.txt", "wikitext2/valid.txt"])
def test_real_texts(file: str, real_tokenizer: Tokenizer, shared_data: Path):
    text = (shared_data / file).read_text(encoding="utf-8")[:200_000]
    ids, count = cut(real_tokenizer, text, 1000)
    assert count > 100
    assert ids == real_tokenizer._encode([text])[0]


def test_nothing_is_lost_between_pieces(monkeypatch):
    tokenizer: Tokenizer = load_tokenizer(GOLDENS / "gpt2")
    monkeypatch.setattr(base, "PIECE_CHARS", 10)
    text = "one two three four five six seven\nand eight " * 50
    assert tokenizer.decode(tokenizer.encode_batch([text, "", "a"])[0].tolist()) == text
    assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist()


CHILD = """
import random, sys
from pathlib import Path
from llama_jax.tokenizers import load_tokenizer
def memory(kind):  # "HWM": the most since the last reset (getrusage's is that of the parent as well)
    return int(Path("/proc/self/status").read_text().split(f"Vm{kind}:")[1].split()[0]) * 1024
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.encode("the cat sat")
words = ["".join(random.choices("abcdefghij", k=random.randint(1, 9))) for _ in range(5000)]
text = (" ".join(words) + "\\n") * 800
Path("/proc/self/clear_refs").write_text("5")
before = memory("RSS")
ids = tokenizer.encode_batch([text])[0]
print(len(text), memory("HWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "llama_smollm2", "llama_slow", "t5_v1_0", "t5_v1_1", "marian"])
def test_memory_of_a_long_text(kind: str):
    done = subprocess.run([sys.executable, "-c", CHILD, GOLDENS / kind], capture_output=True, text=True, check=True)
    size, grown = map(int, done.stdout.split())
    print(f"{kind}: {grown / size:.1f} bytes of memory for each byte of {size / 1e6:.0f} MB")
    assert size > 20e6
    assert grown < 4 * size + (200 << 20)
