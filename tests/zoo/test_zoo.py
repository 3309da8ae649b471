"""The zoo: exact sizes, one declaration for both directions, nothing of a config.json ignored."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import llama_jax
from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import Compute, from_params, init_params, num_parameters
from llama_jax.nn import GroupedQuery, LinearScaling, Llama3Scaling, NTKScaling, Rope, YarnScaling
from llama_jax.zoo import WeightMapping, registry

chatglm = zoo.family("chatglm")
glm = zoo.family("glm")
gpt2 = zoo.family("gpt2")
llama = zoo.family("llama")

COUNTS = {
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama1_33b": 32_528_943_616,
    "llama1_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_34b": 33_743_970_304,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "tinyllama_1_1b": 1_100_048_384,
    "yi_6b": 6_061_035_520,
    "yi_34b": 34_388_917_248,
    "stories260k": 260_032,
    "stories15m": 15_191_712,
    "stories42m": 41_689_600,
    "stories110m": 109_529_856,
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float16",
}


def test_every_preset_has_the_published_number_of_parameters():
    assert {name: num_parameters(config) for name, config in llama.presets.items()} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_presets_survive_hugging_face_config(name):
    assert llama.from_hf(llama.to_hf(llama.presets[name])) == llama.presets[name]


def test_unknown_model_type_is_refused_by_name():
    with pytest.raises(UserError, match=r"'mamba'.*llama"):
        zoo.family("mamba")


def test_a_family_from_outside_the_package_is_exported_and_loaded(tmp_path, monkeypatch):
    """Weights, config and family come back; without it nobody reads them."""
    monkeypatch.setattr(registry, "_registered", {})
    config = llama.from_hf(CONFIG)
    zoo.register(
        dataclasses.replace(
            llama, name="my_llama", label="a MyLlama", architectures=("MyLlamaModel",), presets={"my_tiny": config}
        )
    )
    params = init_params(config, 0)
    lm = llama_jax.LanguageModel(config, from_params(config, params, Compute(dtype="float32")), None, "my_llama")
    llama_jax.save(lm, tmp_path / "mine", format="hf")
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["architectures"] == ["MyLlamaModel"]
    again = llama_jax.load(tmp_path / "mine", dtype="float32")
    assert (again.model_type, again.config) == ("my_llama", config)
    for name, value in again.model.params().items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)
    assert llama_jax.presets()["my_tiny"] == config
    monkeypatch.setattr(registry, "_registered", {})
    with pytest.raises(UserError, match="'my_llama' is not one of the families"):
        llama_jax.load(tmp_path / "mine")


# -- the table


TABLES = llama.names.weights + llama.meta.names.weights + gpt2.names.weights + glm.names.weights + chatglm.names.weights
WEIGHTS = {(w.name, w.pattern): w for w in TABLES}.values()


def _shape(weight: WeightMapping) -> tuple[int, ...]:
    sizes = {"v": 10, "d": 6, "n": 4, "k": 2, "h": 8, "f": 7, "p": 9}
    right = weight.pattern.split("->")[1].replace("(two h)", "h").replace("(half two h)", "h").split()
    return tuple(sizes[axis] for axis in right)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{w.name} {w.pattern}")
@settings(max_examples=30)
@given(data=st.data())
def test_reading_a_part_is_a_part_of_reading_all(weight, data):
    shape = _shape(weight)
    source = np.random.default_rng(0).normal(size=weight.source_shape(shape))
    everything = tuple(slice(0, size) for size in shape)
    whole = weight.to_canonical(source[weight.source_slices(everything, shape)], everything, shape)
    np.testing.assert_array_equal(weight.to_source(whole), source)
    assert whole.shape == shape
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in shape]
    slices = tuple(slice(*bound) for bound in bounds)
    part = weight.to_canonical(source[weight.source_slices(slices, shape)], slices, shape)
    np.testing.assert_array_equal(part, whole[slices])


def test_only_the_wanted_heads_are_read():
    weight = next(w for w in llama.meta.names.weights if w.name == "layers.attention.q_proj.weight")
    slices = weight.source_slices((slice(0, 3), slice(1, 2), slice(0, 6)), (6, 4, 6))
    assert slices == (slice(6, 12), slice(0, 3))


def test_interleaved_pairs_become_halves():
    weight = next(w for w in llama.meta.names.weights if w.name == "layers.attention.k_proj.weight")
    source = np.arange(12.0)[:, None]  # two heads of six, one input
    slices = (slice(0, 1), slice(0, 2), slice(0, 6))
    halves = weight.to_canonical(source, slices, (1, 2, 6))
    assert halves[0].tolist() == [[0, 2, 4, 1, 3, 5], [6, 8, 10, 7, 9, 11]]


def test_interleaved_pairs_of_half_a_head_become_halves_of_it():
    weight = next(w for w in glm.names.weights if w.name == "layers.attention.k_proj.bias")
    halves = weight.to_canonical(np.arange(16.0), (slice(0, 2), slice(0, 8)), (2, 8))
    assert halves[0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert halves[1].tolist() == [8, 10, 9, 11, 12, 14, 13, 15]


# -- config.json


def test_defaults_of_old_configs():
    config = llama.from_hf(CONFIG | {"num_key_value_heads": None})
    assert config.attention == GroupedQuery(4, 4, 6, Rope(10000.0, None), False, False)
    assert not config.tie_embeddings


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(2.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            YarnScaling(4.0, 32, 32.0, 1.0, 0.0, 0.0),
        ),
        (
            {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "finetuned": True},
            YarnScaling(16.0, 64, 32.0, 1.0, 0.0, 0.0),
        ),
        ({"rope_type": "default"}, None),
        # Nothing up to max_positions, and no text becomes longer.
        ({"type": "dynamic", "factor": 2.0}, None),
        ({"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}, None),
    ],
)
def test_both_spellings_of_rotary_scaling(scaling, expected):
    old = llama.from_hf(CONFIG | {"rope_theta": 5000.0, "rope_scaling": scaling})
    new = llama.from_hf(CONFIG | {"rope_parameters": scaling | {"rope_theta": 5000.0}})
    assert old.attention.rope == new.attention.rope == Rope(5000.0, expected)
    assert llama.from_hf(llama.to_hf(old)) == old


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "linear"}}, "linear.*factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "surprise": 1}}, "surprise"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 3.0}},
            "attention_factor",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": 0}}, "truncate"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "wide"}, "hidden_size='wide'.*int"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_heads=0"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2'.*float"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"a_new_trick": True}, "a_new_trick"),
    ],
)
def test_what_a_config_asks_for_is_never_ignored(change, named):
    with pytest.raises(UserError, match=named):
        llama.from_hf(CONFIG | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"qkv_bias": True}, r"attention\.out_bias=False"),
        ({"rope": None}, "rope"),
        ({"rope": Rope(10000.0, NTKScaling(2.0))}, "NTKScaling"),
    ],
)
def test_a_model_that_is_no_llama_is_not_exported_as_one(change, named):
    config = llama.from_hf(CONFIG)
    changed = dataclasses.replace(config, attention=dataclasses.replace(config.attention, **change))
    with pytest.raises(UserError, match=named):
        llama.to_hf(changed)


def test_meta_params():
    shapes = {
        "tok_embeddings.weight": (64, 24),
        "layers.0.feed_forward.w1.weight": (40, 24),
        "output.weight": (64, 24),
    }
    params = {"dim": 24, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "vocab_size": -1, "multiple_of": 8}
    config = llama.meta.from_meta(params, shapes)
    assert (config.vocab_size, config.max_positions, config.tie_embeddings) == (64, 2048, False)
    scaled = llama.meta.from_meta(params | {"use_scaled_rope": True, "rope_theta": 500_000}, shapes)
    assert scaled.attention.rope == Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192))
    assert scaled.max_positions == 131_072
    with pytest.raises(UserError, match="moe"):
        llama.meta.from_meta(params | {"moe": {"num_experts": 8}}, shapes)
    with pytest.raises(UserError, match="n_heads='4'"):
        llama.meta.from_meta(params | {"n_heads": "4"}, shapes)
