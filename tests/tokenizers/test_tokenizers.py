"""Every kind of tokenizer file: the original's ids, exact round trips, streams that join to the whole text."""

import base64
import dataclasses
import functools
import io
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers

from llama_jax.config import UserError
from llama_jax.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from llama_jax.tokenizers.vocabularies import ENCODINGS, Encoding

TEXT = (
    "The quick brown fox\n\tjumps over   the lazy dog, 12345 times; don't ask.\n    def f(x):\n        return x + 1\n"
    "naïve café 漢字かな 🦙🦙 Ωmega\n"
) * 8

anything = st.text(st.characters(codec="utf-8", exclude_characters="\u2581")) | st.text(
    "a \n\t\0é漢🦙'1<s>|", max_size=30
)


@functools.cache
def toy_ranks(num_merges: int = 60) -> dict[bytes, int]:
    """Byte-level BPE trained on TEXT's words, as tiktoken keeps it: token -> rank."""
    ranks = {bytes([b]): b for b in range(256)}
    words = [[bytes([b]) for b in word.encode()] for word in TEXT.replace(" ", "\x00 ").split("\x00")]
    for _ in range(num_merges):
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = max((token for token in counts if token not in ranks), key=lambda t: (counts[t], t))
        ranks[best] = len(ranks)
        words = [tiktoken_merge(b"".join(word), ranks) for word in words]
    for token in (b" Zebra", b"12", b"123", b"1234", b"45", b"yz", b"xy"):  # " Zebra" is reached by no merge
        ranks[token] = len(ranks)
    return ranks


def tiktoken_merge(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """tiktoken's algorithm: a known word as it is, else join the leftmost pair of lowest rank until none is known."""
    if word in ranks:
        return [word]
    parts = [bytes([b]) for b in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def tiktoken_file(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def byte_level_json() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str().encode()


def llama2c_file(model: bytes) -> bytes:
    """llama2.c's export of a SentencePiece model (tokenizer.py)."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = []
    for i in range(processor.vocab_size()):
        text = processor.id_to_piece(i).replace("\u2581", " ")
        pieces.append((f"\n{text}\n" if i in (1, 2) else text, processor.get_score(i)))
    encoded = [(text.encode(), score) for text, score in pieces]
    content = struct.pack("<I", max(len(text) for text, _ in encoded))
    return content + b"".join(struct.pack("<fI", score, len(text)) + text for text, score in encoded)


# Every string survives these; the other two kinds promise less.
EXACT = ("bpe", "unigram", "llama2c", "llama3", "json", "byte_bpe", "gpt2")
KINDS = (*EXACT, "wordpiece", "whitespace")
SPECIAL = ("<pad>", "<extra_id_0>")


def toy_encoding() -> Encoding:
    """Llama 3's code for the ranks of `toy_ranks`."""
    llama3 = ENCODINGS[128000]
    ids = {name: i - 128000 + len(toy_ranks()) for name, i in llama3.special_tokens.items()}
    return dataclasses.replace(llama3, special_tokens=ids)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    trained = {
        kind: next(iter(train_tokenizer([TEXT], kind=kind, vocab_size=size, special_tokens=special).files.values()))
        for kind, size, special in (
            ("bpe", 312, ()),
            ("unigram", 312, SPECIAL),
            ("byte_bpe", 330, SPECIAL),
            ("wordpiece", 100, SPECIAL),
            ("whitespace", 20, SPECIAL),
        )
    }
    contents = trained | {
        "llama2c": llama2c_file(trained["bpe"]),
        "llama3": tiktoken_file(toy_ranks()),
        "json": byte_level_json(),
    }
    model = json.loads(contents["json"])["model"]
    contents["gpt2_vocab.json"] = json.dumps(model["vocab"]).encode()
    contents["gpt2_merges.txt"] = "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]).encode()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENCODINGS, len(toy_ranks()), toy_encoding())
        yield {kind: directory / kind for kind in KINDS} | {"gpt2": directory / "gpt2_merges.txt"}


@pytest.fixture(scope="module")
def loaded(files) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(file) for name, file in files.items()}


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=60)
@given(text=anything)
def test_every_string_survives(loaded, kind: str, text: str):
    tokenizer = loaded[kind]
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_ids[0]
    assert not set(ids[1:-1]) & set(tokenizer.special_tokens.values())


@functools.cache
def lettered_wordpiece() -> Tokenizer:
    """Knows every letter of the test below at the start of a word and within."""
    alphabet = "thedogcafn漢'.,"
    return train_tokenizer(["".join((a, *alphabet, a)) for a in alphabet], kind="wordpiece", vocab_size=45)


@functools.cache
def all_words() -> Tokenizer:
    return train_tokenizer([TEXT], kind="whitespace", vocab_size=1 + len(set(TEXT.split())))


@given(words=st.lists(st.text("Tthedogcaféñ漢'.,", min_size=1, max_size=5)), space=st.sampled_from(" \n\t\u3000"))
def test_wordpiece_gives_back_normalized_text(words: list[str], space: str):
    tokenizer = lettered_wordpiece()
    decoded = tokenizer.decode(tokenizer.encode(space.join(words)))
    plain = "".join(words).lower().replace("é", "e").replace("ñ", "n")
    assert decoded.replace(" ", "") == plain
    assert tokenizer.encode(decoded) == tokenizer.encode(space.join(words))


@given(
    words=st.lists(st.sampled_from(["the", "lazy", "naïve", "漢字かな"])), space=st.sampled_from([" ", "\n\t", "  "])
)
def test_whitespace_gives_back_known_words(words: list[str], space: str):
    tokenizer = all_words()
    assert tokenizer.decode(tokenizer.encode(space.join(words))) == " ".join(words)
    assert tokenizer.encode("the Zebra") == [tokenizer.encode("the")[0], tokenizer.unk_id]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(texts=st.lists(anything, max_size=3))
def test_a_batch_is_its_texts(loaded, kind: str, texts: list[str]):
    batch = loaded[kind].encode_batch(texts)
    assert [ids.dtype for ids in batch] == [np.int32] * len(texts)
    assert [ids.tolist() for ids in batch] == [loaded[kind].encode(text) for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens(loaded, kind: str):
    tokenizer = loaded[kind]
    special = tokenizer.special_tokens
    assert {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id, *tokenizer.eos_ids} - {None} <= {*special.values()}
    for name, token_id in special.items():
        assert token_id < tokenizer.vocab_size
        written = tokenizer.encode(f"the {name} the")
        assert {*written} & {*special.values()} <= {tokenizer.unk_id}  # "</s>" in a text is text
        if token_id != tokenizer.unk_id:
            the = tokenizer.encode("the")
            assert tokenizer.decode([*the, token_id]) == tokenizer.decode(the)
    if kind in ("unigram", "byte_bpe", "wordpiece", "whitespace"):
        assert {*SPECIAL} <= special.keys()
        assert tokenizer.pad_id == special["<pad>"]
    byte_level = kind in ("llama3", "json", "byte_bpe", "gpt2")
    assert (tokenizer.unk_id is None) == byte_level


def test_special_tokens_of_other_makes(tmp_path: Path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT]), model_writer=model, vocab_size=60, pad_id=3, minloglevel=3,
        control_symbols=["<cls>"], user_defined_symbols=["<mask>"],
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    expected = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<cls>": 4, "<mask>": 5}
    assert (tokenizer.special_tokens, tokenizer.pad_id, tokenizer.unk_id) == (expected, 3, 0)
    assert 5 in tokenizer.encode("<mask>")  # user-defined symbols are text
    (tmp_path / "tokenizer.model").unlink()
    unigram = tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("<unk>", -2.0), ("b", -1.0)], 1, False))
    unigram.add_special_tokens(["<sentinel>"])
    (tmp_path / "tokenizer.json").write_text(unigram.to_str())
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.special_tokens, tokenizer.unk_id) == ({"<unk>": 1, "<sentinel>": 3}, 1)
    assert tokenizer.encode("axb") == [0, 1, 2]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=60)
@given(text=anything)
def test_stream_emits_whole_characters_only(loaded, kind: str, text: str):
    assume("\ufffd" not in text)
    tokenizer = loaded[kind]
    stream = tokenizer.stream()
    chunks = [stream.feed(i) for i in tokenizer.encode(text, bos=True)]
    assert "\ufffd" not in "".join(chunks)
    assert "".join(chunks) + stream.flush() == text


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_stream_of_any_ids_joins_to_decode(loaded, kind: str, data: st.DataObject):
    tokenizer = loaded[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    assert "".join(stream.feed(i) for i in ids) + stream.flush() == tokenizer.decode(ids)


@functools.cache
def processor(file: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 311), max_size=30), kind=st.sampled_from(["bpe", "unigram"]))
def test_decoding_is_sentencepieces(files, loaded, ids: list[int], kind: str):
    expected = processor(files[kind]).decode(ids)
    assume("\ufffd" not in expected)  # it shows one for every stray byte, Python one for a stray prefix
    assert loaded[kind].decode(ids) == expected


@given(word=st.text("bcdefghijklmnoprsuvwxyz漢🦙", max_size=12) | st.text("Thebrowntime", max_size=12))
def test_llama3_merges_as_tiktoken_does(loaded, word: str):
    ranks = toy_ranks()
    word = "".join(c for c in word if c.isalpha())  # one word of Llama-3's split
    assert loaded["llama3"].encode(word) == [ranks[part] for part in tiktoken_merge(word.encode(), ranks) if part]


def test_llama3_splits_and_specials(loaded):
    tokenizer = loaded["llama3"]
    words = ["The", " quick", "  ", " Zebra", "123", "45", "'ll", ".\n\n", "\t", "x", " ==", "\n"]
    ranks = toy_ranks()
    expected = [ranks[part] for word in words for part in tiktoken_merge(word.encode(), ranks)]
    assert tokenizer.encode("".join(words)) == expected
    assert tokenizer.encode("xyz") == [ranks[b"x"], ranks[b"yz"]]  # the lower rank is merged, not the first
    first = len(ranks)
    assert tokenizer.vocab_size == first + 256
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (first, (first + 1, first + 8, first + 9))  # 128000, 128001, -8, -9
    assert len(tokenizer.encode("<|begin_of_text|>")) > 1


def test_llama2c_file_is_its_sentencepiece_model(loaded):
    assert loaded["llama2c"].encode(TEXT) == loaded["bpe"].encode(TEXT)
    assert loaded["llama2c"].vocab_size == loaded["bpe"].vocab_size


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizer_is_the_same(loaded, kind: str, tmp_path: Path):
    tokenizer = loaded[kind]
    path = tokenizer.save(tmp_path / "run")
    for again in (load_tokenizer(path), load_tokenizer(tmp_path / "run")):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert again.special_tokens == tokenizer.special_tokens
    others = {t.fingerprint for name, t in loaded.items() if name != kind}
    assert tokenizer.fingerprint not in others


def test_tokenizer_config_names_the_special_tokens(files, tmp_path: Path):
    tokenizer = tokenizers.Tokenizer.from_file(str(files["json"]))
    tokenizer.add_special_tokens(["<start>", "<stop>", "<|eot_id|>", "<hole>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"bos_token": None, "eos_token": {"content": "<stop>"}, "pad_token": "<hole>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id is None
    assert loaded.eos_ids == (tokenizer.token_to_id("<stop>"), tokenizer.token_to_id("<|eot_id|>"))
    assert loaded.pad_id == tokenizer.token_to_id("<hole>")
    assert loaded.encode("x", bos=True) == loaded.encode("x")
    assert load_tokenizer(loaded.save(tmp_path / "again")).eos_ids == loaded.eos_ids


def test_wrong_files_are_one_sentence(files, tmp_path: Path):
    damaged = {name: files[name].read_bytes()[:-3] for name in EXACT if name != "gpt2"}
    damaged |= {"random": bytes(range(256)), "empty": b"", "text": b"hello world 12\n", "config": b'{"bos": 1}'}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name) as error:
            load_tokenizer(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"has no tokenizer\.model, tokenizer\.json, vocab\.json or vocab\.txt"):
        load_tokenizer(tmp_path / "bare")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_ids_and_text_are_refused(loaded, kind: str):
    tokenizer = loaded[kind]
    for wrong in (tokenizer.vocab_size, -1):
        with pytest.raises(UserError, match="outside this tokenizer's vocabulary"):
            tokenizer.decode([wrong])
    for wrong in (iter([1.5]), iter("12"), iter([[1]])):
        with pytest.raises(UserError, match="must be token ids: a list or a 1-D array of whole numbers"):
            tokenizer.decode(wrong)
    with pytest.raises(UserError, match="texts='one' must be a list of texts; encode takes one"):
        tokenizer.encode_batch("one")
    with pytest.raises(UserError, match=r"U\+D800 at character 1"):
        tokenizer.encode("a\ud800")
