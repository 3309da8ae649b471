# ruff: noqa: E501
"""More of them: GGUF, tokenizers, templates, corpora; and `cases`, all in a fixed order."""

import base64
import gzip
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hostile_cases import DEEP, GOLDENS, HUGE, Hostile, alone, safetensors_cases, torch_cases, with_file
from hostile_configs import config_cases, meta_cases
from sentencepiece import sentencepiece_model_pb2

from llama_jax.config import UserError
from llama_jax.data import DataConfig
from llama_jax.data.readers import Unit, read_unit
from llama_jax.data.readers.records import BadRecord, CorpusFile, SkippedFile
from llama_jax.tokenizers import load_tokenizer, render

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]


# GGUF.
def gguf_cases() -> Iterator[Hostile]:
    def string(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    def key(name: str, kind: int, value: bytes) -> bytes:
        return string(name.encode()) + struct.pack("<I", kind) + value

    def file(keys: list[bytes], tensors: list[bytes] | None = None, counts: tuple[int, int] | None = None) -> bytes:
        tensors = tensors or []
        n, k = counts or (len(tensors), len(keys))
        return b"GGUF" + struct.pack("<IQQ", 3, n, k) + b"".join(keys) + b"".join(tensors)

    def tensor(name: str, shape: list[int], offset: int = 0, kind: int = 0) -> bytes:
        return string(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)

    architecture = key("general.architecture", 8, string(b"llama"))
    array = key("a", 9, struct.pack("<IQ", 4, 1 << 60))
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(100_000))
    for name, content in {
        "2^60 tensors": file([], counts=(1 << 60, 0)), "2^60 keys": file([], counts=(0, 1 << 60)),
        "a text of 2^60 letters": file([struct.pack("<Q", 1 << 60)], counts=(0, 1)), "an array of 2^60 numbers": file([array]),
        "arrays in arrays": file([string(b"a") + struct.pack("<I", 9) + nested], counts=(0, 1)),
        "an unknown type": file([key("a", 77, b"")]), "no UTF-8": file([key("a", 8, string(b"\xff"))]),
        "an alignment of 0": file([architecture, key("general.alignment", 4, struct.pack("<I", 0))], [tensor("a", [4])]),
        "an offset beyond the end": file([architecture], [tensor("token_embd.weight", [4, 4], 1 << 60)]),
        "sizes whose product is 2^128": file([architecture], [tensor("token_embd.weight", [1 << 32] * 4)]),
        "five dimensions": file([architecture], [tensor("a", [1] * 5)]), "four billion dimensions": file([architecture], [string(b"a") + struct.pack("<I", 0xFFFFFFFF)]),
        "an unknown kind of tensor": file([architecture], [tensor("token_embd.weight", [32, 1], 0, 9999)]) + bytes(64),
        "a tensor twice": file([architecture], [tensor("a", [1]), tensor("a", [1])]) + bytes(64),
        "an architecture that is a number": file([key("general.architecture", 4, bytes(4))]),
        "four billion shards": file([architecture, key("split.count", 4, b"\xff" * 4)]), "only the magic": b"GGUF", "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
        "a billion layers": file([architecture, key("llama.block_count", 4, struct.pack("<I", 10**9)), key("llama.embedding_length", 4, struct.pack("<I", 4)),
            key("llama.attention.head_count", 4, struct.pack("<I", 1))], [tensor("token_embd.weight", [4, 4])]) + bytes(128),
        "eps of NaN": file([architecture, key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", float("nan")))]),
    }.items():  # fmt: skip
        yield Hostile("GGUF", name, alone("model.gguf", content))


# Tokenizers.
def json_tokenizer(change: Callable[[dict[str, Any]], Any]) -> bytes:
    data = json.loads((GOLDENS / "gpt2" / "tokenizer.json").read_text(encoding="utf-8"))
    change(data)
    return json.dumps(data).encode()


def tries(path: Path) -> object:
    """Load a tokenizer and use it."""
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("a" * 40 + " hello world!")
    return (
        tokenizer.decode(ids),
        tokenizer.encode_prompt("a " * 20 + "<s>", special=True),
        len(tokenizer.token_bytes),
        tokenizer.chat_templates,
    )


def with_merges(vocab: bytes) -> Callable[[Path], Path]:
    """A vocab.json with its merges.txt beside it."""

    def make(folder: Path) -> Path:
        alone("merges.txt", b"a b\n")(folder)
        return alone("vocab.json", vocab)(folder)

    return make


def tokenizer_cases() -> Iterator[Hostile]:
    def case(name: str, change: Callable[[dict[str, Any]], Any], *, refused: bool = True) -> Hostile:
        return Hostile(
            "tokenizer.json",
            name,
            lambda folder: alone("tokenizer.json", json_tokenizer(change))(folder),
            tries,
            refused,
        )

    def growing(kind: str, steps: int, factor: int = 10) -> dict[str, Any]:
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * factor}
        return {"type": "Sequence", kind: [step] * steps}

    bomb = {"type": "Split", "pattern": {"Regex": "((a+)+)+$|((a*)*)*b"}, "behavior": "Isolated", "invert": False}

    def nest(data: dict[str, Any]) -> None:
        inner: dict[str, Any] = growing("normalizers", 3)
        for _ in range(7):
            inner = {"type": "Sequence", "normalizers": [inner, inner]}
        data["normalizer"] = inner

    def spell(data: dict[str, Any]) -> None:
        data["normalizer"] = {
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaa"}] * 20,
        }

    yield case("normalizers that multiply", lambda data: data.update(normalizer=growing("normalizers", 12)))
    yield case("normalizers in normalizers", nest)
    yield case("an empty expression that is replaced", spell)
    yield case("decoders that multiply", lambda data: data.update(decoder=growing("decoders", 12)))
    yield case("an expression that takes for ever", lambda data: data.update(pre_tokenizer=bomb))
    yield case(
        "an expression that is none", lambda data: data.update(pre_tokenizer=bomb | {"pattern": {"Regex": "((("}})
    )
    yield case(
        "a long expression", lambda data: data.update(pre_tokenizer=bomb | {"pattern": {"Regex": "(" * 100_000}})
    )
    yield case("an id beyond 32 bits", lambda data: data["model"]["vocab"].update(x=1 << 40))
    yield case("an id of two billion", lambda data: data["model"]["vocab"].update(x=(1 << 31) - 1))
    yield case("a negative id", lambda data: data["model"]["vocab"].update(x=-1))
    yield case(
        "an added id of four billion",
        lambda data: data.update(
            added_tokens=[
                {
                    "id": (1 << 32) - 1,
                    "content": "x",
                    "special": True,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                }
            ]
        ),
        refused=False,
    )
    yield case("an id as text", lambda data: data["model"]["vocab"].update(x="1"))
    yield case("a vocabulary that is a list", lambda data: data["model"].update(vocab=[["a", 0.0]]))
    yield case("merges of numbers", lambda data: data["model"].update(merges=[1]))
    yield case("merges of unknown pieces", lambda data: data["model"].update(merges=[["\x1b[2J", "b"]]))
    yield case("no model", lambda data: data.pop("model"))
    yield case("a model that is null", lambda data: data.update(model=None))
    yield case(
        "a unigram model of NaN",
        lambda data: data.update(model={"type": "Unigram", "unk_id": 0, "vocab": [["a", float("nan")]]}),
    )
    yield case(
        "a unigram model without pieces", lambda data: data.update(model={"type": "Unigram", "unk_id": 9, "vocab": []})
    )
    yield case(
        "a padding of exabytes",
        lambda data: data.update(
            padding={
                "strategy": {"Fixed": 1 << 60},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        ),
        refused=False,
    )
    whole = {
        "deep JSON": b'{"a": ' + DEEP + b"}",
        "a long number": f'{{"version": {HUGE}}}'.encode(),
        "empty": b"",
        "a list": b"[]",
        "no UTF-8": b'{"\xff": 1}',
        "NUL bytes": bytes(1000),
    }
    for name, content in whole.items():
        yield Hostile("tokenizer.json", name, alone("tokenizer.json", content), tries)

    def settings(
        name: str,
        value: Any,
        source: Path = GOLDENS / "llama_slow",
        file: str = "tokenizer_config.json",
        *,
        refused: bool = True,
    ) -> Hostile:
        content = value if isinstance(value, bytes) else json.dumps(value)
        return Hostile("settings of tokenizers", name, with_file(file, content, source), tries, refused)

    yield settings("deep JSON", DEEP)
    yield settings("a long number", f'{{"x": {HUGE}}}'.encode())
    yield settings("an added id of a billion", {"added_tokens_decoder": {"1000000000": {"content": "x"}}})
    yield settings("an added id with 100 digits", {"added_tokens_decoder": {"9" * 100: {"content": "x"}}})
    yield settings("a negative added id", {"added_tokens_decoder": {"-5": {"content": "x"}}})
    yield settings("an added token that is a number", {"added_tokens_decoder": {"5": {"content": 5}}})
    yield settings("an added list", {"added_tokens_decoder": [1]})
    yield settings("a class that is a list", {"tokenizer_class": [1]})
    yield settings("a token that is a list", {"bos_token": [1]})
    yield settings("a token that is a number", {"bos_token": 1})
    yield settings("added_tokens.json of texts", {"x": "y"}, file="added_tokens.json")
    yield settings("special tokens that are a number", {"additional_special_tokens": 3})
    yield settings("special tokens of null", {"additional_special_tokens": [None]}, refused=False)
    yield settings("a billion sentinels", {"extra_ids": 10**9}, GOLDENS / "t5_v1_1")
    yield settings("minus one sentinel", {"extra_ids": -1}, GOLDENS / "t5_v1_1")
    yield settings("sentinels as text", {"extra_ids": "100"}, GOLDENS / "t5_v1_1")
    yield settings("a template that is a number", {"chat_template": 3})
    yield settings("a rule of texts", {"prefix_ids": ["x"], "suffix_ids": 3}, file="prompt_rule.json", refused=False)

    def proto(change: Callable[[Any], Any]) -> Callable[[Path], Path]:
        model = ModelProto.FromString((GOLDENS / "llama_slow" / "tokenizer.model").read_bytes())
        change(model)
        return alone("tokenizer.model", model.SerializeToString())

    def charsmap(content: bytes) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            model.normalizer_spec.name, model.normalizer_spec.precompiled_charsmap = "x", content

        return change

    units = np.full(1024, 0x7FFFFC00, np.uint32)
    wild = struct.pack("<I", units.nbytes) + units.tobytes() + b"a\0"
    leaf = np.full(1024, 0x100, np.uint32)
    yield Hostile("SentencePiece", "a map that leaves its table", proto(charsmap(wild)), tries)
    yield Hostile(
        "SentencePiece",
        "a map that leaves its texts",
        proto(charsmap(struct.pack("<I", leaf.nbytes) + leaf.tobytes() + b"a")),
        tries,
    )
    yield Hostile("SentencePiece", "a map of four billion bytes", proto(charsmap(b"\xff" * 4 + bytes(2000))), tries)
    yield Hostile("SentencePiece", "a map that is too short", proto(charsmap(b"\1")), tries)
    yield Hostile(
        "SentencePiece", "a score of NaN", proto(lambda model: setattr(model.pieces[300], "score", float("nan"))), tries
    )
    yield Hostile("SentencePiece", "no pieces", proto(lambda model: model.ClearField("pieces")), tries)
    yield Hostile(
        "SentencePiece", "no unknown piece", proto(lambda model: setattr(model.pieces[0], "type", 1)), tries, False
    )
    yield Hostile(
        "SentencePiece", "a byte that is none", proto(lambda model: setattr(model.pieces[5], "piece", "<0xZZ>")), tries
    )
    yield Hostile(
        "SentencePiece", "an empty piece", proto(lambda model: setattr(model.pieces[300], "piece", "")), tries
    )
    yield Hostile(
        "SentencePiece",
        "a piece twice",
        proto(lambda model: setattr(model.pieces[300], "piece", model.pieces[301].piece)),
        tries,
    )
    yield Hostile(
        "SentencePiece",
        "a length of exabytes",
        alone("tokenizer.model", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f"),
        tries,
    )
    yield Hostile("SentencePiece", "groups in groups", alone("tokenizer.model", b"\x0b" * 100_000), tries)
    yield Hostile(
        "llama2.c's tokenizer",
        "a negative length",
        alone("tokenizer.bin", struct.pack("<ifi", 5, 0.0, -5) + b"abc"),
        tries,
    )
    yield Hostile(
        "llama2.c's tokenizer",
        "a length of 2 GB",
        alone("tokenizer.bin", struct.pack("<ifi", 5, 0.0, (1 << 31) - 1) + b"abc"),
        tries,
    )
    yield Hostile(
        "vocab.json",
        "ids of a billion",
        with_merges(b'{"a": 0, "b": 1, "ab": 1000000000}'),
        tries,
    )
    yield Hostile(
        "vocab.json",
        "ids beyond 32 bits",
        with_merges(b'{"a": 0, "b": 1, "ab": 100000000000}'),
        tries,
    )
    yield Hostile(
        "vocab.json",
        "deep JSON",
        with_merges(DEEP),
        tries,
    )
    yield Hostile("tiktoken", "ranks with 5000 digits", alone("tokenizer.model", b"YQ== " + b"9" * 5000), tries)
    yield Hostile(
        "tiktoken",
        "a rank beyond 32 bits",
        alone(
            "x.tiktoken",
            b"".join(b"%s %d\n" % (base64.b64encode(bytes([b])), b << 40) for b in range(256)),
        ),
        tries,
    )


# Chat templates.
def template_cases() -> Iterator[Hostile]:
    def entered(path: Path) -> object:
        return render(path.read_text(encoding="utf-8"), [{"role": "user", "content": "x" * 100}], {})

    for name, template in {
        "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "loops that add": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i + j %}{% endfor %}{% endfor %}",
        "a range of a billion": "{% for i in range(1000000000) %}a{% endfor %}", "a long text": "{{ 'a' * 10000000000 }}",
        "a long text by tilde": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
        "a long text by plus": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
        "a list that doubles": "{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "a great power": "{{ 10 ** (10 ** 10) }}", "a wide field": "{{ '%9999999999d' % 1 }}", "a wide format": "{{ '{:9999999999}'.format(1) }}",
        "a wide centre": "{{ 'a' | center(9999999999) }}", "a wide method": "{{ 'a'.ljust(9999999999) }}", "zeros": "{{ 'a'.zfill(9999999999) }}",
        "replacing that multiplies": "{% set n = namespace(s='a' * 1000) %}{% for i in range(9) %}{% set n.s = n.s.replace('a', n.s) %}{% endfor %}{{ n.s }}",
        "a filter that multiplies": "{% set n = namespace(s='a' * 1000) %}{% for i in range(9) %}{% set n.s = n.s | replace('a', n.s) %}{% endfor %}{{ n.s }}",
        "a join that multiplies": "{% set n = namespace(s='a' * 1000) %}{% for i in range(9) %}{% set n.s = n.s.join(n.s) %}{% endfor %}{{ n.s }}",
        "much text": "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}", "a macro that calls itself": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "a global": "{{ raise_exception.__globals__ }}", "an import": "{% import 'os' as os %}",
        "an include": "{% include '/etc/passwd' %}", "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "a syntax error": "{% if %}", "a long template": "{{ messages[0].content }}" * 100_000, "escapes": "{{ raise_exception('\\x1b[2J') }}",
        "attributes by a filter": "{{ '' | attr('__class__') }}", "formats of attributes": "{{ '{0.__class__.__mro__}'.format(raise_exception) }}", "padding by indents": "{{ 'a\\nb' | indent(9999999999) }}",
    }.items():  # fmt: skip
        yield Hostile(
            "chat template",
            name,
            alone("chat.jinja", template.encode()),
            entered,
            name not in ("attributes by a filter", "formats of attributes", "a class", "a global"),
        )


# Data.
def reads(path: Path) -> object:
    """Read a file of a corpus to its end; raise as a corpus does for a record that cannot be used."""
    unit = Unit(CorpusFile(str(path), path.stat().st_size, True), 0, 1)
    count = 0
    for item in read_unit(unit, DataConfig(path=(str(path),)), (0,)):
        count += 1
        if isinstance(item, BadRecord | SkippedFile):
            raise UserError(str(item))
    return count


def data_cases() -> Iterator[Hostile]:
    gz = gzip.compress(b'{"text": "' + b"a" * 400_000_000 + b'"}', 1)
    for name, file, content in (
        ("deep JSON", "a.jsonl", DEEP), ("a long number", "a.jsonl", b'{"text": ' + HUGE.encode() + b"}"), ("bad UTF-8", "a.jsonl", b'{"text": "\xff"}'),
        ("half a pair", "a.json", b'{"text": "\\ud800"}' * 2), ("deep JSON", "a.json", DEEP), ("an array without end", "a.json", b"[" + b'{"text": "a"},' * 1000),
        ("a number for a text", "a.jsonl", b'{"text": 1}'), ("ids beyond 64 bits", "a.jsonl", b'{"text": [100000000000000000000000]}'),
        ("ids of texts", "a.jsonl", b'{"text": ["a"]}'), ("lists in lists", "a.jsonl", b'{"text": [[1], [2, 3]]}'), ("a quote without end", "a.csv", b'text\n"' + b"a" * 1000),
        ("NUL bytes", "a.txt", b"a\0b"), ("bad UTF-8", "a.txt", b"abc\xff"), ("a damaged gzip", "a.txt.gz", gz[:1000]), ("a damaged zstd", "a.txt.zst", b"\x28\xb5\x2f\xfd" + b"\xff" * 100),
        ("a damaged Parquet", "a.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1"), ("a damaged Arrow", "a.arrow", b"\xff\xff\xff\xff\xff\xff\xff\x7f" + bytes(100)), ("a damaged ArrayRecord", "a.array_record", b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f" + b"\xff" * 100),
        ("llm.c's header of 2 billion tokens", "a.bin", struct.pack("<3i", 20240520, 1, (1 << 31) - 1) + bytes(1012)), ("an odd number of bytes", "a.bin", b"abc"),
        ("a negative count", "a.bin", struct.pack("<3i", 20240520, 1, -1) + bytes(1012)), ("a damaged tar", "a.tar", b"a" * 1024),
    ):  # fmt: skip
        yield Hostile(
            "corpus", f"{name} in {file}", alone(file, content), reads, name != "half a pair"
        )  # of which `prepare` tells
    yield Hostile("corpus", "an inflating gzip", alone("a.jsonl.gz", gz), reads)


def cases() -> list[Hostile]:
    """Return all of them, in a fixed order."""
    makers = (
        safetensors_cases,
        torch_cases,
        meta_cases,
        config_cases,
        gguf_cases,
        tokenizer_cases,
        template_cases,
        data_cases,
    )
    return [case for maker in makers for case in maker()]
