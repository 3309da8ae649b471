"""Every family against the original code, layer by layer, so that a failure names its layer.

The goldens are from `make_goldens.py` beside this file; Llama, the first, has tests of its own.
"""

import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import zoo_table
from zoo_table import GOLDENS, HEADS, difference, expected, model_types

import llama_jax
from llama_jax.checkpoint import LanguageModel, exporting, load_params, open_source
from llama_jax.checkpoint.formats import read_directory, write_safetensors
from llama_jax.models import abstract_params

TYPES = {name: model_type for name, model_type in model_types().items() if model_type != "llama"}
CASES = sorted(TYPES)
# Each kind of architecture, and what is peculiar to one of them.
QUICK = ("bart", "bert_bin", "bloom", "chatglm2", "cohere2", "deepseek_v32", "gemma2", "gpt2", "gpt_oss", "mamba2")
QUICK += ("mixtral", "modernbert", "qwen3", "qwen3_next", "t5_v1_0")
GENERATING = [name for name in CASES if "generated" in expected(name)]
TOLERANCE, FP8_BLOCK = 5e-5, 16
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

# Released under other names, or with tensors that others repeat: an export is like this golden.
EXPORTED_AS = {
    "bart_bin": "bart",
    "bert_bin": "bert_pretraining",
    "bert_old_names": "bert_pretraining",
    "gemma3": "gemma3_text",
    "gpt2_released_names": "gpt2",
    "marian_bin": "marian",
    "t5_v1_0_bin": "t5_v1_0",
}
# One golden of each family, in the names of its newest files.
FAMILIES = {TYPES[name]: name for name in sorted(set(CASES) - set(EXPORTED_AS), key=len, reverse=True)}
# Computed, or a copy of another tensor: not in every file of the family.
COMPUTED = re.compile(
    r".*\.position_ids|.*\.inv_freq|cls\.predictions\.decoder\..*|lm_head\.decoder\..*"
    r"|model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"
)


@functools.cache
def loaded(name: str) -> LanguageModel:
    return llama_jax.load(GOLDENS / name, dtype="float32")


@functools.cache
def computed(name: str) -> dict[str, np.ndarray]:
    return zoo_table.computed(loaded(name), expected(name))


def of_heads(module, arguments, named, *, heads: tuple[str, ...]) -> dict[str, jax.Array]:
    return {key: (module if key == "logits" else getattr(module, key))(*arguments, **named) for key in heads}


@pytest.mark.quick("gpt2", "t5_v1_1")
@pytest.mark.parametrize("name", CASES, scope="module")
def test_layer_by_layer(name):
    golden, found = expected(name), computed(name)
    layers = sorted(key for key in golden if re.fullmatch(r"(encoder_)?layer_\d+", key))
    assert len(layers) >= 2
    assert [key for key in found if re.fullmatch(r"(encoder_)?layer_\d+", key) and key not in layers] == []
    for key in layers:
        assert golden[key].std() > 0.1
        # Rounding goes with the size of a layer's numbers, and with the kernels of a processor.
        assert difference(golden, found, key) < TOLERANCE * max(1, golden[key].std()), key


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", CASES, scope="module")
def test_logits(name):
    golden = expected(name)
    heads = tuple(key for key in ("logits", *HEADS) if key in golden)
    assert heads
    arguments = [golden[key] for key in ("ids", "source", "target") if key in golden]
    named = {key: golden[key] for key in ("mask", "source_mask", "token_types") if key in golden}
    found = loaded(name).model.run(of_heads, arguments, named, heads=heads)
    for key in heads:
        assert difference(golden, found, key) < TOLERANCE, key
        if key in ("logits", "mtp_logits"):
            assert 0.9 < golden[key].std() < 1.1


@pytest.mark.quick("gpt2", "t5_v1_1")
@pytest.mark.parametrize("name", GENERATING, scope="module")
def test_greedy_tokens(name):
    """With the cache; the goldens' own margins are far above the error.

    They are of the logits alone: of a bare model nothing is forced (`tests/directories` has what the files force).
    """
    golden, found, model = expected(name), computed(name), loaded(name).model
    assert golden["margin"] > 10 * difference(golden, found, "logits")
    generated = golden["generated"]
    if "source" in golden:
        new, options = generated[:, 1:], {"source_mask": golden["source_mask"]}
        tokens = llama_jax.generate(model, golden["source"], max_new_tokens=new.shape[1], **options)
    else:
        new = generated[:, 5:]
        tokens = llama_jax.generate(model, generated[:, :5], max_new_tokens=new.shape[1])
    assert new.shape[1] == 20
    assert all(len(set(row)) > 5 for row in new)
    np.testing.assert_array_equal(tokens[:, -generated.shape[1] :], generated)


def tensors_of(name: str) -> dict[str, np.ndarray]:
    """A golden's trained tensors; those in blocks of fp8 or MXFP4 as the numbers they stand for."""
    found = {key: tensor.read() for key, tensor in read_directory(GOLDENS / name).items()}
    for key in [key for key in found if key.endswith("_scale_inv")]:
        weight, scale = found[key.removesuffix("_scale_inv")], found.pop(key)
        scale = scale.repeat(FP8_BLOCK, 0).repeat(FP8_BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        found[key.removesuffix("_scale_inv")] = weight.astype(np.float32) * scale
    for name in [key.removesuffix("_blocks") for key in found if key.endswith("_blocks")]:
        blocks, scale = found.pop(f"{name}_blocks"), found.pop(f"{name}_scales").astype(np.float32)
        codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*scale.shape, 32)
        values = E2M1[codes & 7] * np.where(codes & 8, -1, 1) * 2 ** (scale[..., None] - 127)
        found[name] = values.reshape(*scale.shape[:-1], -1).swapaxes(-1, -2).astype(np.float32)
    return {key: value for key, value in found.items() if not COMPUTED.fullmatch(key)}


@pytest.mark.quick(*QUICK)
@pytest.mark.parametrize("name", CASES, scope="module")
def test_export_gives_the_tensors_back(name, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Quickly, only the export of a few also compares logits, which `test_logits` holds of these tensors."""
    if name in QUICK and name not in ("bart", "deepseek_v32", "gpt2"):
        monkeypatch.setattr(exporting, "check_conversion", lambda *_: {})
    llama_jax.save(loaded(name), tmp_path / "export", format="hf")
    assert open_source(tmp_path / "export").config == loaded(name).config
    wanted = tensors_of(EXPORTED_AS.get(name, name))
    exported = {key: tensor.read() for key, tensor in read_directory(tmp_path / "export").items()}
    exported = {key: value for key, value in exported.items() if not COMPUTED.fullmatch(key)}
    assert sorted(exported) == sorted(wanted)
    for key, value in wanted.items():
        assert exported[key].dtype == np.float32
        np.testing.assert_array_equal(exported[key], value, err_msg=key, strict=True)


abstract = functools.cache(abstract_params)


def changed(name: str, folder: Path, *, without: str | None = None, surplus: str | None = None, key: str | None = None):
    """Opens a golden with one tensor taken out or put in, or one more key in its config, as loading does."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | ({key: 1} if key else {})))
    tensors = {key: tensor.read() for key, tensor in read_directory(GOLDENS / name).items() if key != without}
    if surplus:
        tensors[surplus] = np.ones((2, 3), np.float32)
    write_safetensors(folder / "model.safetensors", tensors)
    source = open_source(folder)
    return load_params(source, abstract(source.config))


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_missing_tensor_is_refused_by_name(model_type, tmp_path):
    name = FAMILIES[model_type]
    blocks = [key for key in sorted(tensors_of(name)) if re.search(r"\.\d+\.", key)]
    for i, tensor in enumerate((blocks[0], blocks[len(blocks) // 2], blocks[-1])):
        with pytest.raises(llama_jax.UserError, match=re.escape(tensor)):
            changed(name, tmp_path / str(i), without=tensor)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_surplus_tensor_is_refused_by_name(model_type, tmp_path):
    with pytest.raises(llama_jax.UserError, match=r"extra\.3\.weight"):
        changed(FAMILIES[model_type], tmp_path / "changed", surplus="extra.3.weight")


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_unknown_key_is_refused_by_name(model_type, tmp_path):
    with pytest.raises(llama_jax.UserError, match="secret_option"):
        changed(FAMILIES[model_type], tmp_path / "changed", key="secret_option")


def test_further_blocks_of_qwen3_next_are_left_out(tmp_path):
    assert changed("qwen3_next", tmp_path / "changed", surplus="mtp.fc.weight").keys() == (
        changed("qwen3_next", tmp_path / "same").keys()
    )
