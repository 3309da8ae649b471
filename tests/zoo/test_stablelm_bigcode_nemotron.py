"""StableLM, GPT-BigCode and Nemotron: exact sizes, every spelling of a config.json, no key ignored.

The counts are those of transformers' modules of the same config.json.
"""

import dataclasses
import json
from typing import Any

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.nn import LayerNorm, LinearScaling, Rope

COUNTS = {
    "stablelm_3b_4e1t": 2_795_443_200,
    "stable_code_3b": 2_795_443_200,
    "stablelm_2_1_6b": 1_644_515_328,
    "stablelm_2_12b": 12_143_185_920,
    "santacoder": 1_124_886_528,
    "starcoderbase_1b": 1_137_207_296,
    "starcoderbase_3b": 3_043_311_104,
    "starcoderbase_7b": 7_327_263_232,
    "starcoder": 15_517_456_384,
    "minitron_4b": 4_190_509_056,
    "minitron_8b": 8_271_699_968,
    "nemotron4_15b": 15_628_775_424,
    "nemotron4_340b": 341_029_195_776,
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS = {
    "stablelm": SMALL | {"model_type": "stablelm", "intermediate_size": 40, "num_key_value_heads": 4},
    "gpt_bigcode": {"model_type": "gpt_bigcode", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "nemotron": SMALL | {"model_type": "nemotron", "intermediate_size": 40},
}


def read(name: str, **changes: Any) -> Any:
    """Return the model of the small config with these changes, which comes back from what is written of it."""
    config = zoo.family(name).from_hf(CONFIGS[name] | changes)
    assert zoo.family(name).from_hf(json.loads(json.dumps(zoo.family(name).to_hf(config)))) == config
    return config


def test_presets_have_the_published_number_of_parameters():
    presets = {preset: config for name in CONFIGS for preset, config in zoo.family(name).presets.items()}
    assert {name: num_parameters(config) for name, config in presets.items()} == COUNTS


@pytest.mark.parametrize("name", CONFIGS)
def test_presets_survive_hugging_face_s_config(name: str):
    family = zoo.family(name)
    for config in family.presets.values():
        assert family.from_hf(json.loads(json.dumps(family.to_hf(config)))) == config


@pytest.mark.parametrize(("name", "usual"), [("stablelm", 2), ("nemotron", 4)])
def test_rotary_positions_in_all_spellings(name: str, usual: int):
    assert read(name).attention.rope == Rope(10_000.0, None, rotary_dim=usual)
    scaling = {"type": "linear", "factor": 2.0}
    old = read(name, rope_theta=5000.0, partial_rotary_factor=0.75, rope_scaling=scaling)
    assert old.attention.rope == Rope(5000.0, LinearScaling(2.0), rotary_dim=6)
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.75}
    assert read(name, rope_parameters=new) == old
    assert read(name, partial_rotary_factor=1.0).attention.rope.rotary_dim is None


def test_stablelm_s_kinds_of_blocks():
    assert read("stablelm").parallel == "none"
    both = read("stablelm", use_parallel_residual=True, qk_layernorm=True, norm_eps=1e-6)
    assert (both.parallel, both.attention.qk_norm_over) == ("one_norm", "own_weights")
    assert (both.attention.qk_norm, both.norm) == (LayerNorm(1e-6, bias=False), LayerNorm(1e-6, bias=True))
    biased = read("stablelm", use_qkv_bias=True).attention
    assert (biased.qkv_bias, biased.out_bias) == (True, False)
    assert read("stablelm", rope_pct=0.5) == read("stablelm", partial_rotary_factor=0.5)


def test_bigcode_s_heads_share_a_key_unless_multi_query_is_off():
    assert read("gpt_bigcode", num_key_value_heads=4).attention.num_kv_heads == 1
    assert read("gpt_bigcode", multi_query=False, num_key_value_heads=1).attention.num_kv_heads == 4


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("stablelm", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("stablelm", {"rope_pct": 0.25, "partial_rotary_factor": 0.5}, "rope_pct=0.25 and partial_rotary_factor"),
        ("gpt_bigcode", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("nemotron", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("nemotron", {"use_qkv_bias": True}, "use_qkv_bias=True"),
    ],
)
def test_other_models_are_refused_by_name(name: str, change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        read(name, **change)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_norm_of_another_kind_has_no_place(name: str):
    """Else the other factor would be read from the file: 1 plus the weight, or the weight."""
    config = read(name)
    other = dataclasses.replace(config.norm, zero_centered=not config.norm.zero_centered)
    with pytest.raises(UserError, match=r"norm\.zero_centered"):
        zoo.family(name).to_hf(dataclasses.replace(config, norm=other))
