"""Files of real tokenizers: the ids that their authors' code gives."""

import base64
import json
from pathlib import Path

import pytest

from llama_jax.config import UserError
from llama_jax.tokenizers import load_tokenizer
from llama_jax.tokenizers.vocabularies import ENCODINGS, GPT2_SPLIT, SPLITS, byte_letters

GOLDEN = json.loads(Path(__file__).with_name("bert_cases.json").read_text())


def cases(directory: Path, name: str) -> list[tuple[str, list[int]]]:
    with (directory / f"ggml-vocab-{name}.gguf.inp").open(newline="", encoding="utf-8") as file:
        inputs = file.read().split("\n__ggml_vocab_test__\n")
    lines = (directory / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")
    return list(zip(inputs, ([int(i) for i in line.split()] for line in lines), strict=True))


def test_llama_cases(shared_data: Path):
    tokenizer = load_tokenizer(shared_data / "llama2c" / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (32000, 1, (2,), None)
    for text, ids in cases(shared_data / "tokenizer_cases", "llama-spm"):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text


def test_llama2c_tok512_is_its_rebuilt_model(shared_data: Path):
    binary, rebuilt = (
        load_tokenizer(shared_data / "llama2c" / name) for name in ("tok512.bin", "tok512_rebuilt.model")
    )
    text = (shared_data / "tinyshakespeare" / "input.txt").read_text()[:20_000]
    story = (shared_data / "llama2c" / "stories260K_expected_greedy200.txt").read_text()
    for sample in (text, story):
        assert binary.encode(sample) == rebuilt.encode(sample)
        assert binary.decode(binary.encode(sample, bos=True)) == sample


def test_gpt2_cases(shared_data: Path):
    for name in ("gpt2_vocab.json", "gpt2_merges.txt"):
        tokenizer = load_tokenizer(shared_data / "gpt2" / name)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (50257, 50256, (50256,))
        assert tokenizer.special_tokens == {"<|endoftext|>": 50256}
        for text, ids in cases(shared_data / "tokenizer_cases", "gpt-2"):
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == text


def gpt2_ranks(shared_data: Path) -> dict[bytes, int]:
    """GPT-2's vocabulary as tiktoken writes it (r50k_base): its ids are the ranks."""
    byte = {letter: i for i, letter in enumerate(byte_letters())}
    vocabulary = json.loads((shared_data / "gpt2" / "gpt2_vocab.json").read_text())
    return {bytes(byte[c] for c in token): i for token, i in vocabulary.items() if i < 50256}


def write_ranks(file: Path, ranks: dict[bytes, int]) -> Path:
    file.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return file


def test_openai_ranks(shared_data: Path, tmp_path: Path):
    ranks = gpt2_ranks(shared_data)
    r50k = load_tokenizer(write_ranks(tmp_path / "r50k_base.tiktoken", ranks))
    # p50k_base has besides them the runs of 2 to 25 spaces, after the id of the special token.
    ranks |= {b" " * n: 50255 + n for n in range(2, 26) if b" " * n not in ranks}
    ranks |= {bytes([255, 254, i]): 50300 + i for i in range(50280 - len(ranks))}
    p50k = load_tokenizer(write_ranks(tmp_path / "p50k_base.tiktoken", ranks))
    for text, ids in cases(shared_data / "tokenizer_cases", "gpt-2"):
        assert r50k.encode(text) == ids
        assert p50k.decode(p50k.encode(text)) == text
    for tokenizer in (r50k, p50k):
        assert tokenizer.special_tokens == {"<|endoftext|>": 50256}
        assert (tokenizer.bos_id, tokenizer.eos_ids) == (50256, (50256,))
        assert tokenizer.encode("<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29]


def tekken(ranks: dict[bytes, int], pattern: str, **changes: object) -> dict:
    """A file as Mistral writes it: with more ranks than are used."""
    tokens = [*sorted(ranks, key=ranks.__getitem__), b"never"]
    entries = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)
    ]
    sizes = {"num_vocab_tokens": len(tokens), "default_vocab_size": 1000 + len(ranks), "version": "v3"}
    return {"config": {"pattern": pattern, "default_num_special_tokens": 1000} | sizes, "vocab": entries} | changes


def test_tekken_of_gpt2_s_ranks(shared_data: Path, tmp_path: Path):
    """GPT-2's ids, behind the special tokens."""
    ranks = gpt2_ranks(shared_data)
    (tmp_path / "tekken.json").write_text(json.dumps(tekken(ranks, GPT2_SPLIT)), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 1000 + len(ranks)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id, tokenizer.unk_id) == (1, (2,), 11, 0)
    for text, ids in cases(shared_data / "tokenizer_cases", "gpt-2"):
        assert tokenizer.encode(text) == [1000 + i for i in ids]
        assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == text
    asked = tokenizer.encode_prompt("[INST]a[/INST]", special=True)
    assert asked == [1, 3, 1000 + ranks[b"a"], 4]
    assert tokenizer.encode("[INST]")[0] != 3
    again = load_tokenizer(tokenizer.save(tmp_path / "again"))
    assert again.encode_prompt("[SPECIAL]é") == tokenizer.encode_prompt("[SPECIAL]é")


def test_tekken_with_special_tokens_of_its_own(tmp_path: Path):
    """Capitals begin a word of their own, digits stand alone, and contractions are two words: Mistral's expression."""
    words = ["Hello", "WORLDly", "'s", " ", "1", "2", "3", "4", "5", " foo", "//\n\n", " ", " xé\u0301", " WE", "'LL"]
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *(word.encode() for word in words)])
    ranks = {token: i for i, token in enumerate(tokens)}
    special = [{"rank": i, "token_str": name} for i, name in enumerate(("<unk>", "<s>", "</s>", "[THINK]"))]
    data = tekken(ranks, str(SPLITS["tekken"]), special_tokens=special)
    (tmp_path / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == [1000 + ranks[word.encode()] for word in words]
    assert [tokenizer.special_tokens[name] for name in ("[THINK]", "<SPECIAL_4>", "<SPECIAL_999>")] == [3, 4, 999]
    assert tokenizer.border is not None
    data["vocab"][3]["rank"] = 4
    (tmp_path / "tekken.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be used as a tokenizer.*do not follow one another"):
        load_tokenizer(tmp_path)


TEXT = "HelloWORLDly's 12345 foo//\n\n  x\u00e9\u0301 WE'LL"


@pytest.mark.parametrize(
    ("number", "words", "special"),
    [
        (
            100256,
            ["HelloWORLDly", "'s", " ", "123", "45", " foo", "//\n\n", " ", " xé", "\u0301", " WE", "'LL"],
            {
                "<|endoftext|>": 100257,
                "<|fim_prefix|>": 100258,
                "<|fim_middle|>": 100259,
                "<|fim_suffix|>": 100260,
                "<|endofprompt|>": 100276,
            },
        ),
        (
            199998,
            ["Hello", "WORLDly's", " ", "123", "45", " foo", "//\n\n", " ", " xé\u0301", " WE'LL"],
            {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
        ),
    ],
)
def test_later_encodings(tmp_path: Path, number: int, words: list[str], special: dict[str, int]):
    tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *(word.encode() for word in words)])
    fill = (bytes([255, i >> 16, i >> 8 & 255, i & 255]) for i in range(number - len(tokens)))  # is in no text
    ranks = {token: i for i, token in enumerate([*tokens, *fill])}
    tokenizer = load_tokenizer(write_ranks(tmp_path / "ranks", ranks))
    assert "".join(words) == TEXT
    assert tokenizer.encode(TEXT) == [ranks[word.encode()] for word in words]
    assert tokenizer.special_tokens == special
    assert tokenizer.vocab_size == max(special.values()) + 1
    assert tokenizer.eos_ids == (special["<|endoftext|>"],)
    assert tokenizer.decode([special["<|endoftext|>"], number, ranks[b"x"]]) == "x"  # an id between is no text


def test_llama3_ids():
    special = ENCODINGS[128000].special_tokens
    assert len(special) == 256
    assert [special[f"<|{name}|>"] for name in ("begin_of_text", "end_of_text", "eot_id")] == [128000, 128001, 128009]
    assert special["<|reserved_special_token_247|>"] == 128255


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: json.dumps(case["settings"]))
def test_bert_is_transformers(shared_data: Path, tmp_path: Path, case: dict):
    vocabulary = (shared_data / "bert" / "vocab.txt").read_bytes()
    (tmp_path / "vocab.txt").write_bytes(vocabulary)
    if case["settings"]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(case["settings"]))
    tokenizer = load_tokenizer(tmp_path)
    names = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    assert (tokenizer.special_tokens, tokenizer.vocab_size, tokenizer.unk_id) == (names, 30522, 100)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (101, (102,), 0)
    assert len(GOLDEN["texts"]) > 60
    for text, ids, decoded in zip(GOLDEN["texts"], case["ids"], case["decoded"], strict=True):
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == decoded
        stream = tokenizer.stream()
        assert "".join(map(stream.feed, ids)) + stream.flush() == decoded
    assert load_tokenizer(tokenizer.save(tmp_path / "again")).encode("Ünder") == tokenizer.encode("Ünder")


PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "und", "##er", "ünd")


def test_case_is_kept_where_the_vocabulary_has_it(tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    assert load_tokenizer(tmp_path).encode("AB Under") == [5, 6, 7, 8]
    (tmp_path / "vocab.txt").write_text("\r\n".join((*PIECES, "A", "Ünd")) + "\r\n")
    assert load_tokenizer(tmp_path).encode("AB ab Ünder ünder") == [1, 5, 6, 11, 8, 9, 8]


def test_pairs_that_do_not_fit_are_one_sentence(tmp_path: Path):
    vocabulary, merges = tmp_path / "x-vocab.json", tmp_path / "x-merges.txt"
    vocabulary.write_text(json.dumps({"a": 0, "b": 1, "ab": 2}))
    with pytest.raises(UserError, match=r"x-vocab.json' cannot .*x-merges\.txt' must be in the same directory"):
        load_tokenizer(vocabulary)
    merges.write_text("#version: 0.2\na b\n")
    assert load_tokenizer(merges).encode("abb") == [2, 1]
    assert load_tokenizer(load_tokenizer(vocabulary).save(tmp_path / "saved")).encode("abb") == [2, 1]
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["merges.txt", "vocab.json"]
    for wrong, message in (("a c\n", "do not fit"), ("a b c\n", "damaged")):
        merges.write_text(wrong)
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(vocabulary)
        assert "\n" not in str(error.value)
    vocabulary.unlink()
    merges.write_text("a b\n")
    with pytest.raises(UserError, match=r"x-vocab\.json' must be in the same directory"):
        load_tokenizer(merges)
    other = tmp_path / "words.json"
    other.write_text(json.dumps({"a": 0}))
    with pytest.raises(UserError, match=r"is named \*vocab\.json"):
        load_tokenizer(other)


def test_glm4_ranks_have_their_special_tokens_beside_them(tmp_path: Path):
    """zai-org/glm-4-9b-chat's tokenization_chatglm.py: a prompt begins with [gMASK] and <sop>."""
    write_ranks(tmp_path / "tokenizer.model", {bytes([b]): b for b in range(256)} | {b"12": 256})
    names = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
    added = {str(260 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    config = {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": added, "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for folder in (tmp_path, load_tokenizer(tmp_path).save(tmp_path / "again").parent):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode_prompt("12 <sop>") == [262, 264, 256, *b" <sop>"]
        assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.vocab_size) == ((260,), None, 266)
        assert tokenizer.decode([262, 264, 256, 260]) == "12"


KIMI = {
    "HelloWORLDly's 12345//\n\n  xé WE'LL": [
        259, 87, 79, 82, 76, 68, 108, 121, 39, 115, 32, 281, 282, 271, 10, 10, 32, 32, 120, 195, 169, 32, 87, 69, 39,
        76, 76,
    ],
    "你好world世界 café\n": [262, 266, 228, 184, 150, 231, 149, 140, 32, 99, 97, 102, 195, 169, 10],
    "Kimi-K2 是什么？": [275, 45, 75, 50, 32, 230, 152, 175, 228, 187, 128, 228, 185, 136, 239, 188, 159],
    "A漢字b": [65, 280, 98],
}  # fmt: skip


def test_kimi_s_ranks_split_chinese_from_the_rest(tmp_path: Path):
    """The ids are those of tiktoken 0.14 with the expression of moonshotai/Kimi-K2-Instruct's tokenization_kimi.py."""
    words = (
        "He ll Hell Hello", "你 好 你好 wo rl worl world 世 你好w 是 好w", "// ac Ki mi Kimi A漢 字b 漢 字 漢字 123 45"
    )  # fmt: skip
    tokens = [bytes([b]) for b in range(256)] + [word.encode() for line in words for word in line.split()]
    write_ranks(tmp_path / "tiktoken.model", {token: i for i, token in enumerate(tokens)})
    names = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>")
    added = {str(300 + i): {"content": name, "special": True} for i, name in enumerate(names)}
    config = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added, "bos_token": "[BOS]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "[EOS]"}))
    for folder in (tmp_path, load_tokenizer(tmp_path).save(tmp_path / "again").parent):
        tokenizer = load_tokenizer(folder)
        for text, ids in KIMI.items():
            assert tokenizer.encode(text) == tokenizer.encode_prompt(text) == ids
            assert tokenizer.decode(ids) == text
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (300, (301, 302), 305)
        assert tokenizer.encode_prompt("<|im_user|>A漢字b<|im_end|>", special=True) == [303, *KIMI["A漢字b"], 302]


def test_unknown_ranks_are_refused(tmp_path: Path):
    file = write_ranks(tmp_path / "ranks", {bytes([b]): b for b in range(256)})
    with pytest.raises(UserError, match=r"ranks' .* 256 ranks are those of no known encoding \(r50k_base \(50256\)"):
        load_tokenizer(file)
