"""GPTQ and AWQ directories give the float weights that they stand for, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.__main__ import main
from llama_jax.checkpoint import load_params, open_source
from llama_jax.checkpoint.formats import write_safetensors
from llama_jax.config import UserError
from llama_jax.models import abstract_params

WIDTH, INNER, KEYS, GROUP = 32, 48, 16, 16
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 24, "hidden_size": WIDTH,
    "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
MATRICES = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (WIDTH, KEYS), "self_attn.v_proj": (WIDTH, KEYS),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (WIDTH, INNER), "mlp.up_proj": (WIDTH, INNER),
    "mlp.down_proj": (INNER, WIDTH),
}  # fmt: skip
Arrays = dict[str, np.ndarray]


def packed(numbers: np.ndarray, bits: int, order: list[int]) -> np.ndarray:
    """Integers [rows, columns] in int32s along the columns: of each group `order[i]` has the bits from i * bits."""
    size = len(order)
    words = np.zeros((numbers.shape[0], numbers.shape[1] // size), np.uint32)
    for row in range(words.shape[0]):
        for column in range(words.shape[1]):
            for i, number in enumerate(order):
                words[row, column] |= np.uint32(int(numbers[row, column * size + number]) << (i * bits))
    return words.view(np.int32)


def quantized(
    method: str, shape: tuple[int, int], rng: np.random.Generator, *, bits: int, group: int, ordered: bool, offset: int
) -> tuple[Arrays, np.ndarray]:
    """The parts in the file of a random matrix [inputs, outputs], and its float weights [outputs, inputs]."""
    group = shape[0] if group == -1 else group
    q = rng.integers(0, 1 << bits, shape)
    # A zero of the first version is at least 1: it stores one less.
    zeros = rng.integers(offset, 1 << bits, (shape[0] // group, shape[1]))
    scales = rng.uniform(0.01, 0.1, zeros.shape).astype(np.float16)
    places = np.arange(shape[0]) // group
    if ordered:
        places = rng.permutation(places)
    plain = list(range(32 // bits))
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        parts = {"qweight": packed(q, bits, order), "qzeros": packed(zeros, bits, order)}
    else:
        parts = {"qweight": packed(q.T, bits, plain).T, "qzeros": packed(zeros - offset, bits, plain)}
        parts["g_idx"] = places.astype(np.int32)
    value = (q - zeros[places]).astype(np.float32) * scales.astype(np.float32)[places]
    return parts | {"scales": scales}, value.T


def directories(
    folder: Path, method: str = "gptq", *, bits: int = 4, group: int = GROUP, ordered: bool = False, offset: int = 1
) -> tuple[Path, Path]:
    """The quantized directory, and one with the weights that it stands for."""
    rng = np.random.default_rng(1)
    files: tuple[Arrays, Arrays] = {}, {}
    others = {"model.embed_tokens": (24, WIDTH), "lm_head": (24, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(2):
        place = f"model.layers.{layer}."
        others |= {f"{place}{name}_layernorm": (WIDTH,) for name in ("input", "post_attention")}
        for name, shape in MATRICES.items():
            parts, value = quantized(method, shape, rng, bits=bits, group=group, ordered=ordered, offset=offset)
            files[0].update({f"{place}{name}.{part}": np.ascontiguousarray(x) for part, x in parts.items()})
            files[0][f"{place}{name}.bias"] = np.zeros(shape[1], np.float16)  # as AutoGPTQ writes
            files[1][f"{place}{name}.weight"] = value
    for name, shape in others.items():
        value = rng.normal(0, 0.5, shape).astype(np.float16)
        files[0][f"{name}.weight"] = value
        files[1][f"{name}.weight"] = value
    own = {"quant_method": method, "bits": bits, "group_size": group, "desc_act": ordered, "sym": False}
    own |= {"version": "gemm", "zero_point": True} if method == "awq" else {}
    own |= {"checkpoint_format": "gptq_v2"} if method == "gptq" and not offset else {}
    for name, data, tensors in (("q", CONFIG | {"quantization_config": own}, files[0]), ("float", CONFIG, files[1])):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(data), encoding="utf-8")
        write_safetensors(folder / name / "model.safetensors", tensors)
    return folder / "q", folder / "float"


def params(path: Path) -> Arrays:
    source = open_source(path)
    return {name: np.asarray(x) for name, x in load_params(source, abstract_params(source.config)).items()}


def same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gptq", {}), ("gptq", {"bits": 8}), ("gptq", {"bits": 2}), ("gptq", {"ordered": True}),
        ("gptq", {"group": -1}), ("gptq", {"offset": 0}), ("awq", {"offset": 0}), ("awq", {"offset": 0, "group": -1}),
    ],
)  # fmt: skip
def test_the_weights_that_they_stand_for(method: str, options: dict[str, Any], tmp_path: Path):
    found, expected = directories(tmp_path, method, **options)
    assert open_source(found).config == open_source(expected).config
    same(params(found), params(expected))


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_part_is_that_part_of_the_whole(method: str, tmp_path: Path):
    tensors = open_source(
        directories(tmp_path, method, ordered=method == "gptq", offset=int(method == "gptq"))[0]
    ).tensors
    tensor = tensors["model.layers.1.mlp.down_proj.weight"]
    whole, rng = tensor.read(), np.random.default_rng(0)
    for _ in range(30):
        (a, b), (c, d) = (sorted(rng.integers(0, size + 1, 2).tolist()) for size in tensor.shape)
        np.testing.assert_array_equal(tensor.read((slice(a, b), slice(c, d))), whole[a:b, c:d])


def test_stored_zeros_wrap_around(tmp_path: Path):
    """The first version stores zero - 1 in the same bits: 0 becomes 15."""
    found, _ = directories(tmp_path)
    tensors = {name: np.array(tensor.read()) for name, tensor in _files(found).items()}
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qzeros"] = np.full_like(tensors[f"{name}.qzeros"], -1)
    write_safetensors(found / "model.safetensors", tensors)
    value = open_source(found).tensors[f"{name}.weight"].read()
    assert value.min() == 0.0  # zeros of 0
    assert value.max() > 0.1


def _files(folder: Path) -> Any:
    from llama_jax.checkpoint.formats import read_directory

    return read_directory(folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_older_files_say_the_same(method: str, tmp_path: Path):
    found, expected = directories(tmp_path, method, offset=int(method == "gptq"))
    (found / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    old = (
        {"bits": 4, "group_size": GROUP} if method == "gptq" else {"w_bit": 4, "q_group_size": GROUP, "version": "GEMM"}
    )
    (found / {"gptq": "quantize_config.json", "awq": "quant_config.json"}[method]).write_text(json.dumps(old))
    (found / "model.safetensors").rename(found / "gptq_model-4bit-16g.safetensors")
    same(params(found), params(expected))


def test_convert_with_a_check_of_logits(tmp_path: Path):
    found, expected = directories(tmp_path)
    assert main(["convert", str(found), str(tmp_path / "hf"), "--to", "hf"]) == 0
    report = json.loads((tmp_path / "hf" / "conversion.json").read_text(encoding="utf-8"))
    assert report["witness"] == "numpy"
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text(encoding="utf-8"))
    same(params(tmp_path / "hf"), params(expected))


def _bits(data: dict[str, Any], tensors: Arrays) -> None:
    data["quantization_config"]["bits"] = 3


def _format(data: dict[str, Any], tensors: Arrays) -> None:
    data["quantization_config"]["checkpoint_format"] = "marlin"


def _group(data: dict[str, Any], tensors: Arrays) -> None:
    data["quantization_config"]["group_size"] = 8


def _without_zeros(data: dict[str, Any], tensors: Arrays) -> None:
    del tensors["model.layers.0.mlp.up_proj.qzeros"]


def _index(data: dict[str, Any], tensors: Arrays) -> None:
    tensors["model.layers.0.mlp.up_proj.g_idx"][3] = 99


def _biased(data: dict[str, Any], tensors: Arrays) -> None:
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_bits, "GPTQ with bits=3, and 2, 4, 8 are read"),
        (_format, "GPTQ with format='marlin', and 'gptq', 'gptq_v2' are read"),
        (_group, r"scales' with shape .* bits=4 and group_size=8 asks for|qzeros' with shape"),
        (_without_zeros, "without 'model.layers.0.mlp.up_proj.qzeros'"),
        (_index, "g_idx' beyond its 2 groups: it is damaged"),
        (_biased, r"has the tensor 'model\.layers\.0\.mlp\.up_proj\.bias', for which its config has no place"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[Any, Arrays], None], named: str, tmp_path: Path):
    found, _ = directories(tmp_path)
    data = json.loads((found / "config.json").read_text(encoding="utf-8"))
    tensors = {name: np.array(tensor.read()) for name, tensor in _files(found).items()}
    change(data, tensors)
    (found / "config.json").write_text(json.dumps(data), encoding="utf-8")
    write_safetensors(found / "model.safetensors", tensors)
    with pytest.raises(UserError, match=named):
        params(found)
