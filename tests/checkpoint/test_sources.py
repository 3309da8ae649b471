"""The forms that weights of others come in: wrapped, fused, repeated or renamed, they are the same weights."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax import zoo
from llama_jax.checkpoint import load_params, open_source
from llama_jax.checkpoint.formats import read_directory, read_meta, write_safetensors
from llama_jax.checkpoint.verifying import source_logits
from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, abstract_params, from_params
from llama_jax.nn import RMSNorm
from llama_jax.zoo import WeightMapping
from llama_jax.zoo.glm import glm as make_glm

deepseek_v2 = zoo.family("deepseek_v2")
glm = zoo.family("glm")
llama = zoo.family("llama")

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"

Arrays = dict[str, np.ndarray]


def written(folder: Path, config: dict[str, Any] | None, tensors: Arrays, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / name, tensors)
    return folder


def golden(name: str) -> tuple[dict[str, Any], Arrays]:
    config = json.loads((GOLDENS / name / "config.json").read_text(encoding="utf-8"))
    return config, {key: np.array(tensor.read()) for key, tensor in read_directory(GOLDENS / name).items()}


def params(folder: Path) -> Arrays:
    source = open_source(folder)
    return {name: np.asarray(x) for name, x in load_params(source, abstract_params(source.config)).items()}


def same(found: Path, golden_name: str) -> None:
    assert open_source(found).config == open_source(GOLDENS / golden_name).config
    expected = params(GOLDENS / golden_name)
    again = params(found)
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


# One of each family and naming.
ALL = (
    "bart", "bert_classifier", "bert_mlm", "bert_old_names", "chatglm2", "deepseek_v2", "deepseek_v32", "glm", "gpt2",
    "llama_gqa", "marian", "mixtral", "roberta_mlm", "switch_transformers", "t5_v1_0", "t5_v1_1",
)  # fmt: skip


@pytest.mark.quick("bart", "bert_old_names", "deepseek_v32", "gpt2", "t5_v1_0")
@pytest.mark.parametrize("name", ALL)
def test_wrappers_and_computed_tensors_change_nothing(name: str, tmp_path: Path):
    config, tensors = golden(name)

    def inside(key: str) -> str:
        first, dot, rest = key.partition(".")
        return f"module.{first}{dot}_orig_mod.{rest}" if dot else f"module.{key}"

    wrapped = {f"_orig_mod.{inside(key)}": value for key, value in tensors.items()}
    wrapped |= {
        f"{place}rotary_emb.inv_freq": np.ones(4, np.float32)
        for place in ("", "model.", "_orig_mod.module.model.layers.0.self_attn.", "model.layers.1.attention.")
    }
    same(written(tmp_path / "wrapped", config, wrapped), name)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("bart", "model."), ("bert_pretraining", "bert."), ("chatglm2", "transformer."), ("gpt2", "transformer."),
        ("llama_tied", "model."), ("marian", "model."), ("mixtral", "model."), ("roberta_mlm", "roberta."),
        ("deepseek_v2", "model."), ("glm", "model."), ("bert_old_names", "bert."),
    ],
)  # fmt: skip
def test_a_trunk_may_lack_its_prefix(name: str, prefix: str, tmp_path: Path):
    config, tensors = golden(name)
    assert any(key.startswith(prefix) for key in tensors)
    same(written(tmp_path / "trunk", config, {k.removeprefix(prefix): v for k, v in tensors.items()}), name)


def test_a_trunk_that_needs_a_head_is_refused_in_a_sentence(tmp_path: Path):
    config, tensors = golden("llama_gqa")
    trunk = {k.removeprefix("model."): v for k, v in tensors.items() if not k.startswith("lm_head")}
    folder = written(tmp_path / "trunk", config | {"architectures": ["LlamaModel"]}, trunk)
    with pytest.raises(UserError, match=r"lacks the tensor 'lm_head\.weight': it is a model without a head"):
        params(folder)


def test_a_bert_without_its_pooler(tmp_path: Path):
    config, tensors = golden("bert_pretraining")
    trunk = {
        key: value for key, value in tensors.items() if key.startswith("bert.") and not key.startswith("bert.pooler")
    }
    for architecture in ("BertModel", "TFBertModel"):
        folder = written(tmp_path / architecture, config | {"architectures": [architecture]}, trunk)
        assert not open_source(folder).config.pooler
        assert params(folder)


def _fused(tensors: Arrays, parts: tuple[str, str, str], place: str, fused: str) -> Arrays:
    """Experts as newer code holds them: gate and up projection [E, 2F, D], down projection [E, D, F]."""
    gate, up, down = parts
    rest = {key.replace(place, fused): value for key, value in tensors.items() if ".experts." not in key}
    for layer in {key.partition(".experts.")[0] for key in tensors if ".experts." in key}:
        numbers = range(sum(key.startswith(f"{layer}.experts.") for key in tensors) // 3)

        def stacked(part: str, layer: str = layer, numbers: range = numbers) -> np.ndarray:
            return np.stack([tensors[f"{layer}.experts.{i}.{part}.weight"] for i in numbers])

        new = layer.replace(place, fused)
        rest[f"{new}.experts.gate_up_proj"] = np.concatenate([stacked(gate), stacked(up)], axis=1)
        rest[f"{new}.experts.down_proj"] = stacked(down)
    return rest


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_experts_in_one_tensor(name: str, tmp_path: Path):
    config, tensors = golden(name)
    parts = ("w1", "w3", "w2") if name == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    fused = _fused(tensors, parts, "block_sparse_moe", "mlp")
    assert not any("experts.0" in key for key in fused)
    same(written(tmp_path / "fused", config, fused), name)


def _meta_names(name: str, table: tuple[WeightMapping, ...], own: tuple[WeightMapping, ...]) -> Arrays:
    """A golden's tensors under Meta's names, rotary pairs side by side."""
    _, tensors = golden(name)
    config = open_source(GOLDENS / name).config
    theirs = {weight.name: weight for weight in table}
    found = {}
    for weight in own:
        for layer in range(config.num_layers) if "{layer}" in weight.source else (None,):
            experts = range(config.feed_forward.num_experts) if "{expert}" in weight.source else (None,)
            for expert in experts:
                place = weight.source.format(layer=layer, expert=expert)
                if place not in tensors:
                    continue
                value = tensors[place]
                if weight.name.endswith(("q_proj.weight", "k_proj.weight")):
                    rows = value.reshape(-1, 2, config.attention.head_dim // 2, value.shape[-1])
                    value = np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(value.shape)
                found[theirs[weight.name].source.format(layer=layer, expert=expert)] = value
    return found


@pytest.mark.parametrize("name", ["llama_gqa", "ministral", "mixtral"])
def test_consolidated_safetensors_beside_either_config(name: str, tmp_path: Path):
    family = zoo.family(open_source(GOLDENS / name).model_type)
    config, _ = golden(name)
    config |= {"max_position_embeddings": 512}
    tensors = _meta_names(name, family.meta.names.weights, family.names.weights)
    of_hub = written(tmp_path / "hub", config, tensors, "consolidated.safetensors")
    expected = params(GOLDENS / name)
    sizes = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "norm_eps": config["rms_norm_eps"], "vocab_size": -1,
        "head_dim": open_source(of_hub).config.attention.head_dim, "hidden_dim": config["intermediate_size"],
        "rope_theta": open_source(of_hub).config.attention.rope.theta, "sliding_window": None,
    }  # fmt: skip
    if name == "ministral":
        sizes["_sliding_window"] = [8, None, 8, None, 8]
    if name == "mixtral":
        sizes["moe"] = {
            "num_experts": config["num_local_experts"],
            "num_experts_per_tok": config["num_experts_per_tok"],
        }
    own = written(tmp_path / "own", None, tensors, "consolidated.safetensors")
    (own / "params.json").write_text(json.dumps(sizes), encoding="utf-8")
    # A Llama whose file has Mistral's keys is a Mistral.
    assert open_source(own).model_type == ("mistral" if name == "llama_gqa" else name)
    for folder in (of_hub, own):
        found = params(folder)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    # Beside Hugging Face's own files, these are read.
    shutil.copy(GOLDENS / name / "config.json", own)
    shutil.copy(GOLDENS / name / "model.safetensors", own)
    assert open_source(own).form == "huggingface"
    assert open_source(own).config == open_source(GOLDENS / name).config


def test_an_import_from_consolidated_safetensors_is_compared_with_its_source(tmp_path: Path):
    config, _ = golden("llama_gqa")
    tensors = _meta_names("llama_gqa", llama.meta.names.weights, llama.names.weights)
    folder = written(tmp_path / "hub", config, tensors, "consolidated.safetensors")
    report = llama_jax.convert(folder, tmp_path / "native", to="native")
    assert report["witness"] == "numpy"


def test_numpy_is_no_reference_for_options_that_it_lacks():
    source = open_source(GOLDENS / "llama_gqa")
    inputs = source.config.example(np.random.default_rng(0))
    logits, reference = source_logits(source, inputs)
    assert reference == "numpy"
    assert isinstance(source.config, DecoderConfig)
    for change in ({"window": 2}, {"softcap": 1.0}, {"scale": 1.0}):
        attention = dataclasses.replace(source.config.attention, **change)  # type: ignore[type-var]
        config = dataclasses.replace(source.config, attention=attention)
        other, reference = source_logits(dataclasses.replace(source, config=config), inputs)
        assert reference == "llama_jax"
        assert np.abs(other - logits).max() > 1e-3


def test_a_t5_made_from_scratch_has_a_tied_head_that_is_not_scaled(tmp_path: Path):
    config, tensors = golden("t5_v1_1")
    config |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    same(written(tmp_path / "converted", config, tensors), "t5_v1_1")
    scratch = written(tmp_path / "scratch", config, {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    found = open_source(scratch).config
    assert (found.tie_embeddings, found.logit_scale) == (True, 1.0)
    np.testing.assert_array_equal(params(scratch)["embedding.weight"], tensors["shared.weight"])


def test_queries_with_and_without_a_latent_are_told_by_the_tensors(tmp_path: Path):
    config, tensors = golden("deepseek_v2_lite")
    config.pop("q_lora_rank", None)
    with_latent = open_source(GOLDENS / "deepseek_v2").config
    assert deepseek_v2.with_tensors(with_latent, tensors).attention.q_lora_rank is None
    without = open_source(GOLDENS / "deepseek_v2_lite").config
    _, others = golden("deepseek_v2")
    assert deepseek_v2.with_tensors(without, others).attention.q_lora_rank == 1536
    same(written(tmp_path / "lite", config, tensors), "deepseek_v2_lite")


def test_files_without_model_type(tmp_path: Path):
    config, tensors = golden("llama_gqa")
    config["architectures"] = ["LLaMAForCausalLM"]
    del config["model_type"]
    same(written(tmp_path / "old", config, tensors), "llama_gqa")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json.*merge"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "adapter_model.bin.*merge"),
    ],
)
@pytest.mark.parametrize("name", ["llama_gqa", "meta_llama2_2_shards"])
def test_an_adapter_beside_weights_is_refused_by_name(name: str, change: Callable, named: str, tmp_path: Path):
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / "adapted"))
    open_source(folder)
    change(folder)
    with pytest.raises(UserError, match=named):
        open_source(folder)


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("model.layers.0.mlp.up_proj.qweight", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.scales", "MLX"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "adapter"),
    ],
)
def test_quantized_and_adapted_tensors_are_refused_by_name(extra: str, named: str, tmp_path: Path):
    config, tensors = golden("llama_gqa")
    folder = written(tmp_path / "other", config, tensors | {extra: np.ones(3, np.float32)})
    with pytest.raises(UserError, match=named):
        open_source(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "mlx"])
def test_quantized_configs_are_refused_by_name(method: str, tmp_path: Path):
    config, tensors = golden("llama_gqa")
    quantized = {"quantization_config": {"quant_method": method, "bits": 4}}
    if method == "mlx":
        quantized = {"quantization": {"group_size": 64, "bits": 4}}
    with pytest.raises(UserError, match=rf"(?i)quantized by {method}"):
        open_source(written(tmp_path / "quantized", config | quantized, tensors))


def test_weights_of_another_framework_are_named(tmp_path: Path):
    config, _ = golden("llama_gqa")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(UserError, match=r"neither model\.safetensors.*it has tf_model\.h5, which is not read"):
        open_source(tmp_path)


def test_keys_that_are_ignored_as_it_is_asked(tmp_path: Path):
    config, tensors = golden("llama_gqa")
    folder = written(tmp_path / "tricky", config | {"a_new_trick": 3}, tensors)
    with pytest.raises(UserError, match="--ignore-config-keys a_new_trick"):
        llama_jax.load(folder)
    lm = llama_jax.load(folder, dtype="float32", ignore_config_keys=("a_new_trick",))
    assert lm.config == open_source(GOLDENS / "llama_gqa").config
    with pytest.raises(UserError, match="'no_such_key'"):
        llama_jax.load(folder, ignore_config_keys=("no_such_key",))


def test_meta_directories_still_say_what_they_lack(tmp_path: Path):
    (tmp_path / "params.json").write_text('{"dim": 3}', encoding="utf-8")
    with pytest.raises(UserError, match="'n_layers'"):
        read_meta(tmp_path)


def test_an_own_glm_with_a_small_vocabulary_comes_back(tmp_path: Path, random_params: Callable):
    sizes: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
        "intermediate_size": 24, "max_positions": 32,
    }  # fmt: skip
    for kind, cast_last in (("glm", False), ("chatglm", True)):
        config = make_glm(**sizes, norm=RMSNorm(1e-5, cast_last=cast_last))
        model = from_params(config, random_params(config), Compute(dtype="float32"))
        llama_jax.save(llama_jax.LanguageModel(config, model, None, kind), tmp_path / kind, format="hf")
        again = llama_jax.load(tmp_path / kind, dtype="float32")
        assert again.config == config
        expected, found = model.params(), again.model.params()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
