"""GGUF files: the model, the tokenizer and the texts of the directory that they were made from."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind, quants
from gguf_maker import add_sizes, write_gguf

import llama_jax
from llama_jax.__main__ import main
from llama_jax.checkpoint import config_of, load_params, open_source
from llama_jax.checkpoint.formats import write_safetensors
from llama_jax.checkpoint.verifying import llama_logits
from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, abstract_params
from llama_jax.sampling import SamplingConfig, complete
from llama_jax.tokenizers import load_tokenizer

GOLDENS = Path(__file__).parents[2] / "directories" / "goldens"
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"},
}  # fmt: skip


def params(path: Path) -> dict[str, np.ndarray]:
    source = open_source(path)
    return {name: np.asarray(x) for name, x in load_params(source, abstract_params(source.config)).items()}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def directory(folder: Path, **changed: Any) -> Path:
    """A Llama of random weights, wide enough for every block."""
    data = SHAPE | changed
    rng = np.random.default_rng(0)
    width, inner, keys = data["hidden_size"], data["intermediate_size"], data["hidden_size"] // 2
    shapes = {
        "model.embed_tokens": (data["vocab_size"], width), "lm_head": (data["vocab_size"], width),
        "model.norm": (width,),
    }  # fmt: skip
    for layer in range(data["num_hidden_layers"]):
        own = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in own.items()}
    tensors = {f"{name}.weight": rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(data), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


@functools.cache
def random_blocks(kind: Kind, rows: int, width: int) -> np.ndarray:
    """Random blocks of a type that the gguf package cannot write: their scales are small numbers in float16."""
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows, width // block, size), dtype=np.uint8)
    places = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (-2,)}[kind]
    for place in places:
        scales = rng.uniform(1e-4, 1e-3, (rows, width // block, 1)).astype(np.float16).view(np.uint8)
        blocks[..., place % size : place % size + 2] = scales
    return blocks.reshape(rows, -1)


def encoded(kind: Kind, value: np.ndarray) -> np.ndarray:
    if kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K):
        return random_blocks(kind, *value.shape)
    return quants.quantize(value, kind)


def eight_bits(name: str, value: np.ndarray) -> tuple[np.ndarray, Kind]:
    return quants.quantize(value, Kind.Q8_0), Kind.Q8_0


# The released forms: bit for bit what the gguf package makes of the same blocks.
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q5_K", "Q6_K"])
def test_each_type_gives_the_weights_that_it_stores(kind: str, tmp_path: Path):
    check_type(Kind[kind], tmp_path)


def check_type(kind: Kind, tmp_path: Path) -> None:
    folder, stored = directory(tmp_path / "hf"), {}

    def encode(name: str, value: np.ndarray) -> tuple[np.ndarray, Kind]:
        raw = encoded(kind, value)
        stored[name] = quants.dequantize(raw, kind)
        return raw, kind

    file = write_gguf(folder, tmp_path / "model.gguf", encode=encode)
    source = open_source(file)
    assert source.config == open_source(folder).config
    found = params(file)
    np.testing.assert_array_equal(found["embedding.weight"], stored["token_embd.weight"])
    np.testing.assert_array_equal(found["layers.feed_forward.down_proj.weight"][0], stored["blk.0.ffn_down.weight"].T)
    value = stored["blk.0.attn_v.weight"].reshape(2, 64, 256)
    np.testing.assert_array_equal(found["layers.attention.v_proj.weight"][0], np.moveaxis(value, -1, 0))
    if kind == Kind.F32:
        same(found, params(folder))
    elif kind in (Kind.F16, Kind.BF16, Kind.Q8_0):
        for name, x in params(folder).items():
            assert np.abs(found[name] - x).max() <= np.abs(x).max() / {Kind.F16: 2**11, Kind.BF16: 2**8}.get(kind, 250)


def test_a_part_of_a_tensor_is_that_part(tmp_path: Path):
    file = write_gguf(directory(tmp_path / "hf"), tmp_path / "m.gguf", encode=eight_bits)
    tensor = open_source(file).tensors["layers.0.feed_forward.w2.weight"]
    np.testing.assert_array_equal(tensor.read((slice(3, 9), slice(5, 71))), tensor.read()[3:9, 5:71])
    assert tensor.read((slice(4, 4),)).shape == (0, 512)


@pytest.mark.parametrize(("name", "pre"), [("llama2", ""), ("gpt2", "gpt-2"), ("glm", "chatglm-bpe")])
def test_the_same_model_tokenizer_and_texts(name: str, pre: str, tmp_path: Path):
    golden = json.loads((GOLDENS / name / "expected.json").read_text(encoding="utf-8"))

    def extra(writer: gguf.GGUFWriter) -> None:
        first, *others = golden["eos_ids"]
        if others and others[0] != first:
            writer.add_eot_token_id(others[0])
        if others[1:]:
            writer.add_uint32("tokenizer.ggml.eom_token_id", others[1])

    lm = llama_jax.load(write_gguf(GOLDENS / name, tmp_path / "m.gguf", pre=pre, extra=extra), dtype="float32")
    assert sorted(lm.generation.eos_ids) == sorted(golden["eos_ids"])
    assert lm.tokenizer is not None
    texts = [entry["text"] for entry in golden["texts"]]
    assert [lm.tokenizer.encode_prompt(text) for text in texts] == [entry["ids"] for entry in golden["texts"]]
    found = complete(lm, texts, SamplingConfig(golden["max_new_tokens"], 0.0))
    assert [one.token_ids for one in found] == [entry["greedy_ids"] for entry in golden["texts"]]
    for entry in golden["conversations"]:
        answer = llama_jax.chat(lm, entry["messages"], temperature=0.0, max_new_tokens=golden["max_new_tokens"])
        assert answer == entry["greedy_text"]


@pytest.mark.parametrize(("name", "fused"), [("mixtral", False), ("glm", True)])
def test_experts_and_joined_projections(name: str, fused: bool, tmp_path: Path):
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    file = write_gguf(folder, tmp_path / "m.gguf", fused=fused)
    assert open_source(file).config == open_source(folder).config
    same(params(file), params(folder))


def test_llama3_scaling_tokenizer_and_chat_template(tmp_path: Path):
    folder = Path(shutil.copytree(GOLDENS / "llama3", tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["original_max_position_embeddings"] = 10  # one of two pairs is on the ramp
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    file = write_gguf(folder, tmp_path / "m.gguf", pre="llama-bpe")
    assert open_source(file).config == open_source(folder).config
    found, expected = load_tokenizer(file), load_tokenizer(folder)
    for entry in json.loads((folder / "expected.json").read_text(encoding="utf-8"))["texts"]:
        assert found.encode_prompt(entry["text"]) == entry["ids"]
    assert dict(found.chat_templates) == dict(expected.chat_templates)
    assert found.encode("12345 <|eot_id|>") == expected.encode("12345 <|eot_id|>")
    assert found.decode(found.encode("é 你好")) == "é 你好"


def test_a_directory_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "downloads").mkdir()
    write_gguf(GOLDENS / "llama2", tmp_path / "downloads" / "m.gguf")
    for to in ("hf", "native"):
        assert main(["convert", str(tmp_path / "downloads" / "m.gguf"), str(tmp_path / to), "--to", to]) == 0
        report = json.loads((tmp_path / to / "conversion.json").read_text(encoding="utf-8"))
        assert report["form"] == "gguf"
        assert report["witness"] == "numpy"
    same(params(tmp_path / "hf"), params(GOLDENS / "llama2"))
    text = json.loads((GOLDENS / "llama2" / "expected.json").read_text(encoding="utf-8"))["texts"][0]
    outputs = []
    for path in ("downloads", "downloads/m.gguf", "hf", "native"):
        capsys.readouterr()
        words = [
            "sample",
            str(tmp_path / path),
            "--prompt",
            text["text"],
            "--max-new-tokens",
            "6",
            "--temperature",
            "0",
        ]
        assert main(words) == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1
    assert outputs[0].strip()
    shutil.copy(tmp_path / "downloads" / "m.gguf", tmp_path / "downloads" / "n.gguf")
    with pytest.raises(UserError, match=r"has 2 GGUF models: give one, such as '.*m\.gguf'"):
        open_source(tmp_path / "downloads")


def test_a_store_with_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    file = write_gguf(GOLDENS / "llama2", tmp_path / "m.gguf")
    store = fsspec.filesystem("memory")
    store.pipe({"/gguf_models/one/m.gguf": file.read_bytes(), "/gguf_models/one/README.md": b"text"})
    for url in ("memory://gguf_models/one", "memory://gguf_models/one/m.gguf"):
        assert config_of(url) == open_source(GOLDENS / "llama2").config


def test_shards_are_one_model(tmp_path: Path):
    folder = directory(tmp_path / "hf")
    whole = write_gguf(folder, tmp_path / "whole.gguf")
    reader = gguf.GGUFReader(whole)
    for i in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{i + 1}-of-00002.gguf", "llama")
        if i == 0:
            add_sizes(writer, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        for tensor in reader.tensors[i::2]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    whole.unlink()
    same(params(tmp_path / "m-00001-of-00002.gguf"), params(folder))
    with pytest.raises(UserError, match="is one of 2 shards: give the first"):
        open_source(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match=r"00002\.gguf', a shard of the model, is missing"):
        open_source(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("add", "named"),
    [
        (lambda w: w.add_float32("llama.attention.scale", 0.5), "llama.attention.scale=0.5, which is not supported"),
        (lambda w: w.add_uint32("llama.attention.value_length", 32), "value_length=32, and only 64 is supported"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "longrope|not supported"),
        (lambda w: w.add_uint32("split.count", 3), "one of 3 shards"),
    ],
)  # fmt: skip
def test_what_would_change_a_logit_is_refused_by_name(add: Any, named: str, tmp_path: Path):
    def more(writer: gguf.GGUFWriter) -> None:
        add(writer)
        if "longrope" in named:
            writer.add_float32("llama.rope.scaling.factor", 2.0)

    file = write_gguf(directory(tmp_path / "hf"), tmp_path / "m.gguf", extra=more)
    with pytest.raises(UserError, match=named):
        open_source(file)


def test_linear_and_yarn_scaling_and_ignored_keys(tmp_path: Path):
    folder = directory(tmp_path / "hf")
    for kind, rope in {
        "linear": {"rope_type": "linear", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    }.items():

        def extra(writer: gguf.GGUFWriter, rope: dict[str, Any] = rope) -> None:
            writer.add_string("llama.rope.scaling.type", rope["rope_type"])
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_float32("llama.attention.scale", 0.125)
            if "original_max_position_embeddings" in rope:
                writer.add_rope_scaling_orig_ctx_len(16)

        file = write_gguf(folder, tmp_path / f"{kind}.gguf", extra=extra)
        other = directory(tmp_path / kind, rope_parameters=rope | {"rope_theta": 10_000.0})
        found = open_source(file, ["llama.attention.scale"])
        assert found.config == open_source(other).config
        assert isinstance(found.config, DecoderConfig)
        tokens = np.arange(12)[None]
        expected = llama_logits(found.config, open_source(other).tensors, tokens, interleaved=False)
        assert np.abs(llama_logits(found.config, found.tensors, tokens, interleaved=True) - expected).max() < 1e-4


def test_other_architectures_and_tokenizers_are_named(tmp_path: Path):
    file = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(file, "mamba")
    writer.add_tokenizer_model("rwkv")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"general\.architecture='mamba', and of GGUF files llama, gpt2"):
        open_source(file)
    with pytest.raises(UserError, match=r"kind 'rwkv', and llama and gpt2 are read"):
        load_tokenizer(file)


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = directory(tmp_path / "hf")
    file = write_gguf(folder, tmp_path / "m.gguf", encode=eight_bits)
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install 'llama_jax\[gguf\]'"):
        open_source(file)
    same(params(plain), params(folder))  # numbers need no package


def test_damaged_files_give_a_sentence_or_a_model(tmp_path: Path):
    """Two hundred files with flipped bytes or cut off: a UserError, or a model of the right shapes."""
    file = write_gguf(GOLDENS / "llama2", tmp_path / "whole.gguf")
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(0)
    header = content.index(b"output_norm.weight") + 2000  # metadata and the table of tensors
    damaged, sentences = tmp_path / "damaged.gguf", []
    for i in range(200):
        changed = bytearray(content)
        if i % 4 == 0:
            changed = changed[: int(rng.integers(4, len(content)))]
        else:
            for _ in range(int(rng.integers(1, 4))):
                place = int(rng.integers(4, 200 if i % 4 == 1 else header))
                changed[place] = int(rng.integers(0, 256))
        damaged.write_bytes(changed)
        try:
            source = open_source(damaged)
            if i % 8 == 1:
                abstract = abstract_params(source.config)
                if sum(np.prod(a.shape) for a in abstract.values()) < 1 << 22:
                    load_params(source, abstract)
            load_tokenizer(damaged)
        except UserError as error:
            sentences.append(str(error))
    assert len(sentences) > 60
    assert not any("\n" in sentence for sentence in sentences)
