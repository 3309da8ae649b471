"""Directories as they are released: the ids, names and rules that transformers gives them, and exports for it."""

import functools
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import directories
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings, strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from llama_jax.config import UserError
from llama_jax.tokenizers import Tokenizer, load_saved_tokenizer, load_tokenizer, train_tokenizer, with_document_rule
from llama_jax.tokenizers.huggingface import json_tokenizer
from llama_jax.tokenizers.settings import Settings

GOLDEN = json.loads(Path(__file__).with_name("directory_cases.json").read_text())["cases"]
OWN = ("bpe", "unigram", "byte_bpe", "wordpiece", "whitespace")


def write_files(files: Mapping[str, bytes], directory: Path) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def words_of(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Texts with the names of special tokens in them, and with parts of these."""
    names = [*tokenizer.special_tokens][:12]
    parts = [
        *names,
        *(name[1:] for name in names),
        *(name[:-1] for name in names),
        *"ab <>/\u2581\n",
        "é",
        "漢",
        "<0x41>",
    ]
    return st.lists(st.sampled_from(parts), max_size=8).map("".join)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("released")
    return {name: directories.write_case(name, folder) for name in directories.CASES}


@pytest.fixture(scope="module")
def loaded(released: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: load_tokenizer(directory) for name, directory in released.items()}


@functools.cache
def own(kind: str) -> Tokenizer:
    size = {"bpe": 312, "unigram": 312, "byte_bpe": 330, "wordpiece": 60, "whitespace": 20}[kind]
    return train_tokenizer([directories.CORPUS], kind=kind, vocab_size=size, special_tokens=("<pad>", "<sep>"))  # type: ignore


@functools.cache
def normalizing(kind: str, pad_id: int) -> bytes:
    """A SentencePiece model with the library's usual normalization (NFKC, one space between words)."""
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if pad_id == 0 else {}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([directories.CORPUS]), model_writer=model, vocab_size=55, model_type=kind,
        minloglevel=3, **ids,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_are_transformers(loaded: dict[str, Tokenizer], name: str):
    tokenizer, golden = loaded[name], GOLDEN[name]
    for text, ids, plain, decoded in zip(
        directories.texts_of(name), golden["ids"], golden["plain"], golden["decoded"], strict=True
    ):
        special = text in directories.CHAT
        assert tokenizer.encode_prompt(text, special=special) == ids
        assert tokenizer.encode_prompt(text, special=special, affixes=False) == plain
        assert tokenizer.decode(plain) == decoded
    if name != "bert":  # its documents begin and end with other tokens than BOS and EOS
        assert (tokenizer.bos_id, next(iter(tokenizer.eos_ids), None)) == (golden["bos"], golden["eos"])
    assert tokenizer.pad_id == golden["pad"]
    assert sorted(tokenizer.chat_templates) == golden["templates"]


@pytest.mark.parametrize("name", [*GOLDEN, *OWN])
@settings(max_examples=25)
@given(data=st.data())
def test_no_special_token_comes_out_of_a_text(loaded: dict[str, Tokenizer], name: str, data: st.DataObject):
    tokenizer = own(name) if name in OWN else loaded[name]
    text = data.draw(words_of(tokenizer))
    written = {"  ", "\t\t", "zzz", "<plain>"} | ({"<|im_start|>"} if name == "llama_slow" else set())  # added as text
    special = {i for name, i in tokenizer.special_tokens.items() if name not in written} - {tokenizer.unk_id}
    assert not {*tokenizer.encode(text)} & special
    assert not {*tokenizer.encode_batch([text])[0].tolist()} & special


@pytest.mark.parametrize("name", [*GOLDEN, *OWN])
@settings(max_examples=40)
@given(data=st.data())
def test_streams_are_decode_for_any_ids(loaded: dict[str, Tokenizer], name: str, data: st.DataObject):
    tokenizer = own(name) if name in OWN else loaded[name]
    # Many bytes, also in order: most runs of them are no UTF-8.
    some = st.integers(0, tokenizer.vocab_size - 1) | st.integers(0, min(tokenizer.vocab_size - 1, 270))
    ids = data.draw(st.lists(some, max_size=20))
    if tokenizer.vocab_size > 200 and data.draw(st.booleans()):
        ids += tokenizer.encode("漢é🦙"[: data.draw(st.integers(0, 3))])[: data.draw(st.integers(0, 8))]
    stream = tokenizer.stream()
    assert "".join(map(stream.feed, ids)) + stream.flush() == tokenizer.decode(ids)


def test_streams_of_other_decoders_are_decode():
    words = ["a</w>", "b", "c</w>", "\u2581", " ", "<0xE6>", "<0xBC>", "<0xA2>", "<0xFF>", "##d", "."]
    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="b"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    for decoder in (
        None,
        decoders.BPEDecoder(),
        decoders.CTC(),
        decoders.Sequence([*steps, decoders.Strip(" ", 2, 0)]),
        decoders.Sequence([decoders.Replace("c", "  "), decoders.Strip(" ", 1, 0)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("a", "x"), decoders.Fuse()]),
        decoders.WordPiece(),
        decoders.Metaspace(),
    ):
        tokenizer.decoder = decoder
        loaded = json_tokenizer(Path("tokenizer.json"), tokenizer.to_str().encode(), Settings())
        for start in range(len(words)):
            for ids in ([*range(start, len(words))], [3, 4, start, 4, 3, 4], [start, 5, 6, 7, 3], [8, start, 5, 6]):
                stream = loaded.stream()
                assert "".join(map(stream.feed, ids)) + stream.flush() == loaded.decode(ids)


def exports(loaded: dict[str, Tokenizer], folder: Path) -> dict[str, Tokenizer]:
    """Tokenizers of all kinds, those of the library with the rule of their runs."""
    found = {**loaded, **{kind: with_document_rule(own(kind)) for kind in OWN}}
    for name, model, config in (
        ("nfkc", normalizing("unigram", -1), {}),
        ("nfkc_bpe", normalizing("bpe", -1), {}),
        ("t5_nfkc", normalizing("unigram", 0), {"tokenizer_class": "T5Tokenizer", "extra_ids": 3}),
        ("chatglm", own("bpe").files["tokenizer.model"], {"tokenizer_class": "ChatGLMTokenizer"}),
    ):
        files = {"tokenizer.model": model, "tokenizer_config.json": json.dumps(config).encode()}
        found[name] = load_tokenizer(write_files(files, folder / "sources" / name))
    found["changed"] = loaded["glm4"].with_rule((1, 2), (3,))
    return found


MORE_TEXTS = (" lead", "  two", "a ", "\u2581x", "<0x0A>", "x<0x41>y", "aaaaa    aaaa", "\r\n", "ﬁ Ａ\u00a0b", "12 345")


def test_exports_are_the_same_tokenizers(loaded: dict[str, Tokenizer], tmp_path: Path):
    for name, tokenizer in exports(loaded, tmp_path).items():
        again = load_tokenizer(write_files(tokenizer.export_files(), tmp_path / name))
        for text in (*directories.TEXTS, *MORE_TEXTS):
            assert again.encode_prompt(text) == tokenizer.encode_prompt(text), (name, text)
        for text in directories.CHAT:
            assert again.encode_prompt(text, special=True) == tokenizer.encode_prompt(text, special=True), (name, text)
        names = ("bos_id", "eos_ids", "pad_id", "unk_id", "prefix_ids", "suffix_ids", "chat_templates")
        for attribute in names:
            assert getattr(again, attribute) == getattr(tokenizer, attribute), (name, attribute)
        assert tokenizer.special_tokens.items() <= again.special_tokens.items()


def test_transformers_reads_the_exports(loaded: dict[str, Tokenizer], tmp_path: Path):
    """AutoTokenizer gives the same ids; LLAMA_JAX_REFERENCE_PYTHON names a python that has transformers."""
    python = os.environ.get("LLAMA_JAX_REFERENCE_PYTHON")
    if not python:
        pytest.skip("LLAMA_JAX_REFERENCE_PYTHON names no python that has transformers")
    found = exports(loaded, tmp_path)
    texts = [*directories.TEXTS, *MORE_TEXTS]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    folders = [str(write_files(tokenizer.export_files(), tmp_path / name)) for name, tokenizer in found.items()]
    script = Path(__file__).with_name("reference_ids.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "JAX", "XLA"))}
    command = [python, str(script), str(tmp_path / "texts.json"), *folders]
    output = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE, stderr=sys.stderr).stdout
    for name, golden in json.loads(output)["found"].items():
        tokenizer = found[name]
        assert [tokenizer.encode_prompt(text) for text in texts] == golden["ids"], name
        assert (tokenizer.bos_id, tokenizer.pad_id) == (golden["bos"], golden["pad"]) or name == "bert", name
        assert next(iter(tokenizer.eos_ids), None) == golden["eos"] or name == "bert", name
        assert sorted(tokenizer.chat_templates) == golden["templates"], name


def test_the_rule_travels_with_the_tokenizer(loaded: dict[str, Tokenizer], tmp_path: Path):
    for name, tokenizer in {**loaded, "byte_bpe": own("byte_bpe")}.items():
        changed = tokenizer.with_rule((5, 6), (7,))
        again = load_tokenizer(changed.save(tmp_path / name))
        assert again.encode_prompt("a") == [5, 6, *tokenizer.encode("a"), 7]
        assert load_tokenizer(tmp_path / name).with_rule((), ()).encode_prompt("a") == tokenizer.encode("a")
        # Documents are the same, and so are their shards.
        assert again.fingerprint == changed.fingerprint == tokenizer.fingerprint
        assert again.encode("a", bos=True) == tokenizer.encode("a", bos=True)
    plain = own("byte_bpe")
    assert plain.encode_prompt("a") == plain.encode("a")
    plain.save(tmp_path / "before")
    assert load_saved_tokenizer(tmp_path / "before").encode_prompt("a") == plain.encode("a", bos=True)
    sources = load_saved_tokenizer(tmp_path / "before", of_sources=True)
    assert sources.encode_prompt("a") == plain.encode("a", eos=True)
    assert load_saved_tokenizer(tmp_path / "byte_bpe").prefix_ids == (5, 6)


def test_released_directories_keep_what_they_are(loaded: dict[str, Tokenizer], tmp_path: Path):
    for name, tokenizer in loaded.items():
        again = load_tokenizer(tokenizer.save(tmp_path / name))
        for text in directories.TEXTS:
            assert again.encode_prompt(text) == tokenizer.encode_prompt(text)
        assert (again.eos_ids, again.chat_templates) == (tokenizer.eos_ids, tokenizer.chat_templates)
        assert again.fingerprint == tokenizer.fingerprint


def test_tokenizer_json_has_its_own_splitting(tmp_path: Path):
    """Digits one by one, whatever the class does that the settings name."""
    tokenizer = tokenizers.Tokenizer.from_str(directories.CASES["gpt2_json"]()["tokenizer.json"].to_str())
    vocabulary, merges = directories.byte_pairs()
    digits = {"12": len(vocabulary)}
    tokenizer.model = models.BPE({**vocabulary, **digits}, [*merges, ("1", "2")])
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # type: ignore[assignment]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str())
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": directories.END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_prompt("12") == [vocabulary["1"], vocabulary["2"]]
    assert loaded.encode("", bos=True) == [loaded.bos_id]


def test_which_file_names_the_special_tokens(tmp_path: Path):
    """special_tokens_map.json, as Vicuna and Alpaca have it, unless tokenizer_config.json lists the added tokens."""
    own("bpe").save(tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "", "eos_token": "<s>", "pad_token": None}
    named = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    for decoder, ids in ({}, (1, (2,), 0)), ({"added_tokens_decoder": {}}, (None, (1,), None)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | decoder))
        found = load_tokenizer(tmp_path)
        assert (found.bos_id, found.eos_ids, found.pad_id) == ids


def test_t5_has_its_sentinels(loaded: dict[str, Tokenizer], tmp_path: Path):
    tokenizer = loaded["t5"]
    first = tokenizer.vocab_size - 100
    assert [tokenizer.special_tokens[f"<extra_id_{i}>"] for i in (99, 0)] == [first, first + 99]
    (tmp_path / "spiece.model").write_bytes(tokenizer.files["spiece.model"])
    alone = load_tokenizer(tmp_path)
    assert alone.special_tokens == tokenizer.special_tokens
    assert load_tokenizer(alone.save(tmp_path / "again")).special_tokens == tokenizer.special_tokens
    text = "the <extra_id_0> fox"
    ids = [*tokenizer.encode("the"), first + 99, *tokenizer.encode("fox"), *tokenizer.eos_ids]
    assert alone.encode_prompt(text, special=True) == ids


def test_marian_reads_the_language_and_writes_the_target(loaded: dict[str, Tokenizer], tmp_path: Path):
    tokenizer = loaded["marian"]
    names = json.loads(tokenizer.files["vocab.json"])
    assert tokenizer.encode_prompt(">>fra<<the fox")[0] == names[">>fra<<"]
    assert tokenizer.decode([names["\u2581bonjour"], names["monde"], *tokenizer.eos_ids]) == "bonjourmonde"
    tokenizer.save(tmp_path)
    (tmp_path / "target.spm").unlink()
    with pytest.raises(UserError, match=r"target\.spm is not there"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config": {"tokenizer_class": "WhisperTokenizer"}, "name": "vocab.json"}, "its class WhisperTokenizer"),
        ({"config": {"tokenizer_class": "AlbertTokenizer"}, "name": "spiece.model"}, "its class AlbertTokenizer"),
        ({"model": {"model_type": "xlnet"}, "name": "spiece.model"}, "its class XLNetTokenizer"),
        ({"name": "sentencepiece.bpe.model"}, "read in another way by each"),
        ({"config": {"tokenizer_class": "RoFormerTokenizer"}, "name": "vocab.txt"}, "its class RoFormerTokenizer"),
        ({"config": {"added_tokens_decoder": {"x": 1}}, "name": "tokenizer.model"}, "form that is not known"),
        ({"config": [], "name": "tokenizer.model"}, "not a JSON object"),
    ],
)
def test_other_classes_are_refused_by_name(loaded: dict[str, Tokenizer], tmp_path: Path, files: dict, message: str):
    contents = {
        **loaded["gpt2"].files, **loaded["bert"].files, "tokenizer.model": own("bpe").files["tokenizer.model"],
        "spiece.model": normalizing("unigram", -1), "sentencepiece.bpe.model": normalizing("unigram", -1),
    }  # fmt: skip
    kept = (files["name"], "merges.txt") if files["name"] == "vocab.json" else (files["name"],)
    for name in kept:
        (tmp_path / name).write_bytes(contents[name])
    for name, key in (("tokenizer_config.json", "config"), ("config.json", "model")):
        if key in files:
            (tmp_path / name).write_text(json.dumps(files[key]))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_added_tokens_are_found_as_they_say(tmp_path: Path):
    own("bpe").save(tmp_path)
    size = own("bpe").vocab_size
    added = {
        size: {"content": "<l>", "lstrip": True},
        size + 1: {"content": "<r>", "rstrip": True},
        size + 2: {"content": "word", "single_word": True},
        size + 4: {"content": "<s2>", "special": True},
        size + 5: {"content": ""},
    }
    config = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": {str(i): t for i, t in added.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    plain = own("bpe")
    assert tokenizer.vocab_size == size + 5
    assert tokenizer.encode("the  <l>") == [*plain.encode("the"), size]
    assert tokenizer.encode("<r>  the")[0] == size + 1
    assert len(tokenizer.encode("<r>  the")) == len(tokenizer.encode("<r>the"))
    assert tokenizer.encode("word") == [size + 2]
    assert size + 2 not in tokenizer.encode("sword words")
    assert size + 4 not in tokenizer.encode("<s2>")
    assert tokenizer.encode_prompt("<s2>", special=True) == [1, size + 4]
    assert tokenizer.decode([size, size + 4, size + 2, size + 3]) == "<l>word"
