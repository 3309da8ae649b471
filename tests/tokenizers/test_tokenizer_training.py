"""Training a tokenizer of every kind."""

import hashlib
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import pre_tokenizers

import llama_jax
from llama_jax.config import UserError
from llama_jax.tokenizers import TokenizerConfig, train_tokenizer
from llama_jax.tokenizers.config import KINDS
from llama_jax.tokenizers.training import gpt2_words, merge_pairs

LINES = [f"def name_{i}(value{i % 7}):\n    return value{i % 7} + {i * 37}\n" for i in range(300)]
SIZES = {"bpe": 288, "unigram": 288, "byte_bpe": 288, "wordpiece": 120, "whitespace": 100}
LLAMA = ("bpe", "unigram")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_lines", [10_000_000, 150])
def test_same_texts_same_file(kind: str, max_lines: int):
    first, second = (train_tokenizer(LINES, kind=kind, vocab_size=SIZES[kind], max_lines=max_lines) for _ in range(2))
    assert first.files == second.files
    assert first.vocab_size == SIZES[kind]


def test_same_file_in_another_process():
    """Python and the library order sets and hash maps anew in every process."""
    code = (
        "import hashlib, sys, types; package = types.ModuleType('llama_jax'); package.__path__ = [sys.argv.pop(1)]\n"
        "sys.modules['llama_jax'] = package  # without all of its rooms, which take seconds\n"
        "from llama_jax.tokenizers import train_tokenizer\n"
        "for kind, size in (('byte_bpe', 288), ('wordpiece', 120), ('whitespace', 100)):\n"
        "    files = train_tokenizer(sys.argv[1:], kind=kind, vocab_size=size).files\n"
        "    print(hashlib.sha256(*files.values()).hexdigest())\n"
    )
    package = str(Path(llama_jax.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, package, *LINES], capture_output=True, text=True, check=True)
    here = [train_tokenizer(LINES, kind=kind, vocab_size=SIZES[kind]).files for kind in KINDS[2:]]
    assert done.stdout.split() == [hashlib.sha256(*files.values()).hexdigest() for files in here]


def test_sampling_takes_part_of_the_lines_only():
    whole, sampled = (train_tokenizer(LINES, vocab_size=288, max_lines=n).files for n in (10_000_000, 101))
    assert whole != sampled


@pytest.mark.parametrize("kind", LLAMA)
def test_llamas_settings(kind: str):
    tokenizer = train_tokenizer(LINES, kind=kind, vocab_size=288)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (288, 1, (2,), None)
    assert (tokenizer.unk_id, tokenizer.special_tokens) == (0, {"<unk>": 0, "<s>": 1, "</s>": 2})
    pieces = tokenizer.token_bytes
    assert pieces[3:259] == [bytes([b]) for b in range(256)]
    learned = pieces[259:]
    assert not [p for p in learned if b"\n" in p]
    assert not [p for p in learned if len(p) > 1 and any(chr(b).isdigit() for b in p)]
    if kind == "bpe":  # unigram keeps none of them at this size
        assert b"  " in learned
    # A space is put before the text, and only there: "def" begins as " def" does, but not after a line end.
    word, second = tokenizer.encode("def"), tokenizer.encode("\ndef")
    assert tokenizer.token_bytes[word[0]].startswith(b" ")
    assert b"".join(tokenizer.token_bytes[i] for i in second) == b" \ndef"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_kept_and_not_learned(kind: str):
    names = ("<pad>", "<extra_id_0>", "[SEP2]")
    texts = ["".join(LINES).replace(" return", "<extra_id_0> return"), "x[SEP2]y"]
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=SIZES[kind] + 3, special_tokens=names)
    plain = ["".join(LINES).replace(" return", "\0 return"), "x\0y"]
    without = train_tokenizer([part for text in plain for part in text.split("\0")], kind=kind, vocab_size=SIZES[kind])
    assert tokenizer.special_tokens.keys() == {*without.special_tokens, *names}
    assert tokenizer.vocab_size == without.vocab_size + 3
    if kind != "whitespace":  # which has them last
        assert [tokenizer.special_tokens[name] for name in names] == [len(without.special_tokens) + i for i in range(3)]
    else:
        assert tokenizer.encode("<pad>") == [tokenizer.unk_id]
    text = "def name_1(value3):\n    return value4 + 37\n"
    assert len(tokenizer.encode(text)) == len(without.encode(text))


def test_reference_merges_and_vocabulary(shared_data: Path):
    folder = shared_data / "bpe_training"
    with (folder / "corpus.en").open(newline="") as file:
        text = file.read()
    tokenizer = train_tokenizer([text], kind="byte_bpe", vocab_size=500, special_tokens=("<|endoftext|>",))
    model = json.loads(tokenizer.files["tokenizer.json"])["model"]
    reference = (folder / "train-bpe-reference-merges.txt").read_text().splitlines()
    assert [" ".join(merge) for merge in model["merges"]] == reference
    vocabulary = json.loads((folder / "train-bpe-reference-vocab.json").read_text())
    assert list(model["vocab"].items()) == list(vocabulary.items())
    assert (tokenizer.eos_ids, tokenizer.special_tokens) == ((0,), {"<|endoftext|>": 0})


@given(words=st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 4), min_size=1, max_size=6))
def test_merges_are_those_of_counting_anew(words: dict[str, int]):
    """The plain algorithm: count all pairs, merge the most frequent, of equal ones the greatest, begin again."""
    spelled = {tuple(bytes([c]) for c in word.encode()): count for word, count in words.items()}
    expected, state = [], [(list(word), count) for word, count in spelled.items()]
    while True:
        pairs = Counter()
        for word, count in state:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        expected.append(best)
        for word, _ in state:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    assert list(merge_pairs(spelled)) == expected


@settings(max_examples=300)
@given(text=st.text(st.characters(codec="utf-8")) | st.text(" \t\n\r\x1c\x85\u3000\xa0a1.'s漢", max_size=20))
def test_gpt2_words_are_the_librarys(text: str):
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert gpt2_words([text]) == Counter(word for word, _ in split.pre_tokenize_str(text))


def test_wordpiece_is_berts():
    tokenizer = train_tokenizer(["Café, the CAFÉS! don't", "cafe " * 9], kind="wordpiece", vocab_size=26)
    specials = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert tokenizer.special_tokens == specials
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.unk_id) == (2, (3,), 0, 1)
    assert tokenizer.encode("CAFÉ") == tokenizer.encode("cafe")
    assert len(tokenizer.encode("cafe")) == 1
    assert tokenizer.encode("zebra") == [tokenizer.unk_id]
    assert tokenizer.decode(tokenizer.encode("the Cafés, [SEP]", bos=True)) == "the cafes,"


def test_whitespace_has_the_most_frequent_words():
    tokenizer = train_tokenizer(["b a\nc  a\u3000b d", "e"], kind="whitespace", vocab_size=5, special_tokens=("</s>",))
    assert tokenizer.special_tokens == {"<unk>": 0, "</s>": 4}
    assert tokenizer.encode("a b c d", eos=True) == [1, 2, 3, 0, 4]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.unk_id) == (None, (4,), 0)


def test_texts_that_one_skips_are_still_encoded():
    tokenizer = train_tokenizer(["a\0b\t c\u2585d" + "x" * 5000, "word word word\r\n"], vocab_size=264)
    for text in ("a\0b", "\t", "x" * 5000, "\r\n", "\u2585"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_long_lines_are_learned_from():
    assert b"ab" in train_tokenizer(["ab cd " * 2000], vocab_size=267).token_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_sizes_name_the_possible_one(kind: str):
    texts = ["hello world, hello"]
    with pytest.raises(UserError, match=r"vocab_size=5000 .* \d+ is the largest possible size") as error:
        train_tokenizer(texts, kind=kind, vocab_size=5000)
    largest = int(str(error.value).split(": ")[1].split()[0])
    assert train_tokenizer(texts, kind=kind, vocab_size=largest).vocab_size == largest
    for empty in ([], ["", ""]):
        with pytest.raises(UserError, match="no text to train"):
            train_tokenizer(empty, kind=kind, vocab_size=300)


@pytest.mark.parametrize(("kind", "size", "smallest"), [("bpe", 261, 268), ("wordpiece", 8, 13)])
def test_too_small_sizes_name_the_possible_one(kind: str, size: int, smallest: int):
    with pytest.raises(UserError, match=rf"vocab_size={size} is too small .* use at least {smallest}"):
        train_tokenizer(["hello world, hello"], kind=kind, vocab_size=size)
    assert train_tokenizer(["hello world, hello"], kind=kind, vocab_size=smallest).vocab_size == smallest


@pytest.mark.parametrize(
    ("kind", "smallest"), [("bpe", 260), ("unigram", 260), ("byte_bpe", 258), ("wordpiece", 6), ("whitespace", 2)]
)
def test_config_knows_its_kinds_smallest_size(kind: str, smallest: int):
    TokenizerConfig(path=None, kind=kind, vocab_size=smallest)
    TokenizerConfig(path="somewhere", kind=kind, vocab_size=1)  # nothing is trained
    with pytest.raises(UserError, match=f"vocab_size={smallest - 1} must be at least {smallest}: "):
        TokenizerConfig(path=None, kind=kind, vocab_size=smallest - 1)
    with pytest.raises(UserError, match=f"must be at least {smallest + 1}: "):
        TokenizerConfig(path=None, kind=kind, vocab_size=smallest, special_tokens=("<x>",))


@pytest.mark.parametrize("names", [("",), ("<a b>",), ("mask",), ("<x>", "<x>")])
def test_special_tokens_that_could_be_text_are_refused(names: tuple[str, ...]):
    with pytest.raises(UserError, match="must be a name in brackets"):
        train_tokenizer(LINES, vocab_size=288, special_tokens=names)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_quiet_and_tells_its_progress(kind: str, capfd: pytest.CaptureFixture[str]):
    told: list[tuple[int, int]] = []
    train_tokenizer(LINES, kind=kind, vocab_size=SIZES[kind], progress=lambda *step: told.append(step))
    if kind in ("byte_bpe", "wordpiece"):
        total = told[0][1]
        assert told == [(done, total) for done in range(total + 1)]
        assert 0 < total < SIZES[kind]
    else:
        assert told == []
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_mistake_in_the_texts_stays_what_it_is(kind: str):
    def texts():
        yield from LINES
        raise UserError("line 7 is bad")

    with pytest.raises(UserError, match="line 7 is bad"):
        train_tokenizer(texts(), kind=kind, vocab_size=SIZES[kind])
