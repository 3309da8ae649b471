"""Directories of tokenizers laid out as releases are, with tiny vocabularies that are the same everywhere.

Needs nothing but the `tokenizers` library, so that `make_goldens.py` can make them where transformers is installed.
"""

import collections
import functools
import itertools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and don't ask why. Hello, y'all! How are you? "
    "def f(x): return x + 1  # naïve café 漢字 we'll see the others there then "
) * 2
TEXTS = (
    "",
    "Hello",
    "Hello, y'all! How are you?",
    "the quick brown fox",
    "a  b   c",
    "tab\tnew\nline\n\nend ",
    "naïve cafe\u0301 漢字かな 🦙",
    "don't WE'LL x=f(y)+1",
    "a<b>c</b> [d] | <e",
)
# With names of special tokens, as rendered chat templates have them.
CHAT = (
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>the fox<|im_end|>x",
)
END = "<|endoftext|>"
CHATML = ("<|im_start|>", "<|im_end|>")


def _letters() -> list[str]:
    printing = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (b for b in range(256) if b not in printing)
    letters = {b: chr(b) for b in printing} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [letters[b] for b in range(256)]


def _learn(words: list[list[str]], number: int) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding, the most frequent first."""
    merges = []
    for _ in range(number):
        counts = collections.Counter(pair for word in words for pair in itertools.pairwise(word))
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            for i in range(len(word) - 2, -1, -1):
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = ["".join(best)]
    return merges


@functools.cache
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of byte-level BPE."""
    letters = _letters()
    words = [[letters[b] for b in word.encode()] for word in CORPUS.replace(" ", "\0 ").split("\0")]
    merges = _learn(words, 90)
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    for pair in merges:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    return vocabulary, merges


def _field(number: int, value: int | float | bytes) -> bytes:
    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces: list[tuple[str, float, int]], *, bpe: bool, ids: dict[str, int], strips: bool) -> bytes:
    """A SentencePiece model of pieces, their scores and types, without normalization; `ids` of unk, bos, eos, pad."""
    message = b"".join(
        _field(1, _field(1, text.encode()) + _field(2, score) + _field(3, kind)) for text, score, kind in pieces
    )
    places = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
    # Negative numbers are written as 64 bits.
    trainer = b"".join(_field(places[name], ids.get(name, -1) % (1 << 64)) for name in places)
    bytes_fall_back = any(kind == 6 for _, _, kind in pieces)
    trainer += _field(3, 2 if bpe else 1) + _field(35, int(bytes_fall_back))
    normalizer = _field(1, b"identity") + _field(3, 1) + _field(4, int(strips))
    return message + _field(2, trainer) + _field(3, normalizer)


@functools.cache
def llama_pieces() -> tuple[tuple[str, float, int], ...]:
    """Llama's: unknown, BOS, EOS, bytes, merged pieces, characters."""
    words = ["\u2581" + word for word in CORPUS.split()]
    merges = _learn([list(word) for word in words], 90)
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = list(dict.fromkeys("".join(pair) for pair in merges))
    characters = sorted({*"".join(words)})
    return (*pieces, *((text, -float(i), 1) for i, text in enumerate([*merged, *characters])))


@functools.cache
def unigram_pieces() -> tuple[tuple[str, float], ...]:
    """Characters and frequent parts of words, with their log-probabilities."""
    words = ["\u2581" + word for word in CORPUS.split()]
    parts = collections.Counter(
        word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, min(len(word), i + 5) + 1)
    )
    kept = {text: count for text, count in parts.items() if len(text) == 1 or count > 3}
    total = sum(kept.values())
    return tuple((text, round(math.log(count / total), 4)) for text, count in sorted(kept.items()))


def _t5_model() -> bytes:
    special = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)]
    pieces = [*special, *((text, score, 1) for text, score in unigram_pieces())]
    return sentencepiece_model(pieces, bpe=False, ids={"pad": 0, "eos": 1, "unk": 2}, strips=True)


def _special(name: str) -> AddedToken:
    return AddedToken(name, special=True, normalized=False)


def _byte_level_json(special: tuple[str, ...], processor: Any = None) -> tokenizers.Tokenizer:
    vocabulary, merges = byte_pairs()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([_special(name) for name in special])
    if processor is not None:
        tokenizer.post_processor = processor
    return tokenizer


def _template(tokenizer: tokenizers.Tokenizer, single: str) -> Any:
    names = [name for name in single.split() if name != "$A"]
    tokens = [(name, tokenizer.token_to_id(name)) for name in names]
    return processors.TemplateProcessing(single=single, pair=f"{single} $B", special_tokens=tokens)


def _llama_json(single: str | None, *, first: bool = True) -> tokenizers.Tokenizer:
    """Llama's fast tokenizer: of the newer kind, or (not `first`) of the older, which puts a space before any text."""
    pieces = llama_pieces()
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    merges = [
        (text[:i], text[i:])
        for text, _, kind in pieces[3:]
        if kind == 1
        for i in range(len(text) - 1, 0, -1)
        if text[:i] in ids and text[i:] in ids
    ]
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    if first:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore
    else:
        replaced = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(replaced)  # type: ignore[assignment]
    tokenizer.add_special_tokens([_special(name) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([_special(name) for name in CHATML])
    if single is not None:
        tokenizer.post_processor = _template(tokenizer, single)
    return tokenizer


def _write(directory: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        if isinstance(content, tokenizers.Tokenizer):
            content = content.to_str()
        elif not isinstance(content, str | bytes):
            content = json.dumps(content)
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _pair(config: dict[str, Any], special: tuple[str, ...], **files: Any) -> dict[str, Any]:
    vocabulary, merges = byte_pairs()
    vocabulary = vocabulary | {name: len(vocabulary) + i for i, name in enumerate(special)}
    lines = "\n".join(["#version: 0.2", *map(" ".join, merges), ""])
    found = {"vocab.json": vocabulary, "merges.txt": lines, "tokenizer_config.json": config}
    return found | {name.replace("__", "."): content for name, content in files.items()}


def _decoder(first: int, names: tuple[str, ...], **options: Any) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True} | options
    return {str(first + i): {"content": name} | flags for i, name in enumerate(names)}


def _qwen2() -> dict[str, Any]:
    size, special = len(byte_pairs()[0]), (END, *CHATML)
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>", "pad_token": END,
        "add_bos_token": False, "added_tokens_decoder": _decoder(size, special), "chat_template": "{{ messages }}",
        "additional_special_tokens": list(CHATML),
    }  # fmt: skip
    return _pair(config, (), config__json={"model_type": "qwen2"})


def _opt() -> dict[str, Any]:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": "<pad>"}
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
    return _pair(config, ("<s>", "<pad>", "</s>", "<unk>"))


def _phi2() -> dict[str, Any]:
    size = len(byte_pairs()[0])
    added = {"  ": size + 1, "\t\t": size + 2, "zzz": size + 3}
    config = {"tokenizer_class": "CodeGenTokenizer", "bos_token": END, "eos_token": END, "unk_token": END}
    return _pair(config, (END,), added_tokens__json=added)


def _roberta(config: dict[str, Any], **files: Any) -> dict[str, Any]:
    return _pair(config, ("<s>", "<pad>", "</s>", "<unk>", "<mask>"), **files)


def _llama3() -> dict[str, Any]:
    tokenizer = _byte_level_json(("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", *CHATML))
    steps = [processors.ByteLevel(trim_offsets=False), _template(tokenizer, "<|begin_of_text|> $A")]
    tokenizer.post_processor = processors.Sequence(steps)  # type: ignore[assignment]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    config |= {"eos_token": "<|eot_id|>", "chat_template": [
        {"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}
    ]}  # fmt: skip
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _glm4() -> dict[str, Any]:
    tokenizer = _byte_level_json((END, "[gMASK]", "<sop>", "<|user|>"))
    tokenizer.post_processor = _template(tokenizer, "[gMASK] <sop> $A")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _llama(single: str | None, config: dict[str, Any], *, first: bool = True) -> dict[str, Any]:
    """As a ChatML fine-tune is released, with the base model's tokenizer.model."""
    model = sentencepiece_model(list(llama_pieces()), bpe=True, ids={"unk": 0, "bos": 1, "eos": 2}, strips=False)
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    return {
        "tokenizer.model": model, "tokenizer.json": _llama_json(single, first=first),
        "tokenizer_config.json": names | config,
    }  # fmt: skip


def _llama_slow() -> dict[str, Any]:
    files = _llama(None, {"add_bos_token": True, "add_eos_token": False, "legacy": False})
    del files["tokenizer.json"]
    size = len(llama_pieces())
    return files | {"added_tokens.json": {name: size + i for i, name in enumerate((*CHATML, "<plain>"))}}


def _t5_json() -> dict[str, Any]:
    """T5's fast tokenizer, whose vocabulary has "</s>" as a piece like others."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in (2, 1, 0)]
    model = models.Unigram([*special, *unigram_pieces(), *sentinels], unk_id=2, byte_fallback=False)
    tokenizer = tokenizers.Tokenizer(model)
    space = {"replacement": "\u2581", "prepend_scheme": "always"}
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**space)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace(**space)  # type: ignore[assignment]
    tokenizer.add_special_tokens([_special(name) for name, _ in (*special, *sentinels)])
    tokenizer.post_processor = _template(tokenizer, "$A </s>")
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 3, "eos_token": "</s>", "pad_token": "<pad>"}
    config |= {"unk_token": "<unk>", "additional_special_tokens": [name for name, _ in sentinels]}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _bert(config: dict[str, Any]) -> dict[str, Any]:
    words = [word.lower() for word in CORPUS.split() if word.isalpha()]
    letters = sorted({letter for word in words for letter in word} | set("abcdefghijklmnopqrstuvwxyz"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [*dict.fromkeys(words), *",.!?'|<>[]()=+#"]
    pieces = list(dict.fromkeys(pieces))
    return {"vocab.txt": "\n".join(pieces) + "\n", "tokenizer_config.json": config}


def _marian() -> dict[str, Any]:
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces = [*special, *((text, score, 1) for text, score in unigram_pieces())]
    model = sentencepiece_model(pieces, bpe=False, ids={"unk": 0, "bos": 1, "eos": 2}, strips=True)
    # Not all of the pieces, and some of another language.
    names = ["</s>", "<unk>", *(text for text, _ in unigram_pieces()[::-1][3:]), "\u2581bonjour", "monde"]
    names += [">>fra<<", ">>deu<<", "<pad>"]
    vocabulary = {name: i for i, name in enumerate(names)}
    config = {"source_lang": "en", "target_lang": "fr"}
    return {
        "source.spm": model, "target.spm": model, "vocab.json": vocabulary, "tokenizer_config.json": config,
        "config.json": {"model_type": "marian"},
    }  # fmt: skip


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "gpt2": lambda: _pair({"tokenizer_class": "GPT2Tokenizer"}, (END,)),
    "gpt2_json": lambda: {
        "tokenizer.json": _byte_level_json((END,), processors.ByteLevel(trim_offsets=False)),
        "tokenizer_config.json": {"model_max_length": 1024},
        "config.json": {"model_type": "gpt2"},
    },
    "phi2": _phi2,
    "qwen2": _qwen2,
    "opt": _opt,
    "roberta": lambda: _roberta({"tokenizer_class": "RobertaTokenizer"}),
    "bart": lambda: _roberta({"model_max_length": 1024}, config__json={"model_type": "bart"}),
    "pythia": lambda: _pair({"tokenizer_class": "GPTNeoXTokenizer"}, (END, "<|padding|>")),
    "llama3": _llama3,
    "glm4": _glm4,
    "chatml": lambda: _llama("<s> $A", {"add_bos_token": True, "legacy": False}),
    "chatml_legacy": lambda: _llama("<s> $A", {"legacy": True}, first=False),
    "yi": lambda: _llama(None, {"add_bos_token": False, "legacy": False}),
    "yi_disagrees": lambda: _llama("<s> $A", {"add_bos_token": False, "legacy": False}),
    "llama_slow": _llama_slow,
    "t5": lambda: {
        "spiece.model": _t5_model(),
        "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "extra_ids": 100},
    },
    "t5_json": _t5_json,
    "bert": lambda: _bert({"do_lower_case": True, "tokenizer_class": "BertTokenizer"}),
    "marian": _marian,
}


def texts_of(name: str) -> list[str]:
    """The texts of a case. transformers splits at all white space before T5's unigram model, whose normalization (not
    that of the model here) makes spaces of it."""
    texts = [*TEXTS, *CHAT]
    return [text for text in texts if name != "t5" or not {*text} & {*"\t\n"}]


def write_case(name: str, directory: Path) -> Path:
    """The directory of a case, made inside `directory`."""
    folder = directory / name
    folder.mkdir()
    _write(folder, CASES[name]())
    return folder
