"""GPT-NeoX, GPT-J, Phi, Falcon, Cohere, BLOOM: exact sizes, every spelling of a config.json, nothing of it ignored."""

import dataclasses
import json
from typing import Any

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.nn import Alibi, LinearScaling, Rope

COUNTS = {
    "pythia_14m": 14_067_712,
    "pythia_31m": 30_494_720,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "gpt_neox_20b": 20_554_567_680,
    "redpajama_incite_3b": 2_775_864_320,
    "phi_1": 1_418_270_720,
    "phi_1_5": 1_418_270_720,
    "phi_2": 2_779_683_840,
    "gptj_6b": 6_050_882_784,
    "falcon_rw_1b": 1_311_625_216,
    "falcon_7b": 6_921_720_704,
    "falcon2_11b": 11_102_822_400,
    "falcon_40b": 41_303_293_952,
    "falcon_180b": 178_557_088_768,
    "command_r": 34_980_831_232,
    "command_r_plus": 103_810_674_688,
    "command_r_08_2024": 32_296_476_672,
    "aya_23_8b": 8_028_033_024,
    "aya_expanse_8b": 8_028_033_024,
    "command_r7b": 8_028_033_024,
    "command_a": 111_057_580_032,
    "bloom_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "bloom_176b": 176_247_271_424,
}
NAMES = ("gpt_neox", "phi", "gptj", "falcon", "cohere", "cohere2", "bloom")
SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
NEOX = SMALL | {"model_type": "gpt_neox", "intermediate_size": 40}
FALCON = SMALL | {"model_type": "falcon"}
COHERE = SMALL | {"model_type": "cohere", "intermediate_size": 40}
BLOOM = {"model_type": "bloom", "n_embed": 32, "n_layer": 2, "num_attention_heads": 4}
CONFIGS = {
    "gpt_neox": NEOX,
    "phi": SMALL | {"model_type": "phi"},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 4},
    "falcon": FALCON,
    "cohere": COHERE,
    "cohere2": COHERE | {"model_type": "cohere2"},
    "bloom": BLOOM,
}


def read(name: str, **changes: Any) -> Any:
    """Return the model of the small config with these changes, which comes back from what is written of it."""
    config = zoo.family(name).from_hf(CONFIGS[name] | changes)
    assert zoo.family(name).from_hf(json.loads(json.dumps(zoo.family(name).to_hf(config)))) == config
    return config


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(zoo.presets()[name]) for name in COUNTS} == COUNTS
    assert {preset for name in NAMES for preset in zoo.family(name).presets} == set(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_hugging_face_s_config(name: str):
    family = zoo.family(name)
    for config in family.presets.values():
        assert family.from_hf(json.loads(json.dumps(family.to_hf(config)))) == config


def test_rotary_positions_in_all_spellings():
    old = read("gpt_neox", rotary_emb_base=5000, rotary_pct=0.5, rope_scaling={"type": "linear", "factor": 2.0})
    assert old.attention.rope == Rope(5000.0, LinearScaling(2.0), rotary_dim=4)
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert read("gpt_neox", rope_parameters=new) == old
    # What the files leave out: a quarter of a head in GPT-NeoX, half of it in Phi.
    assert [read(name).attention.rope.rotary_dim for name in ("gpt_neox", "phi", "falcon")] == [2, 4, None]
    assert read("gpt_neox", use_parallel_residual=False).parallel == "none"


def test_falcon_s_kinds_of_blocks():
    kinds = [
        ({}, ("one_norm", 1)),
        ({"multi_query": False}, ("one_norm", 4)),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, ("own_norms", 2)),
        ({"new_decoder_architecture": True, "n_head_kv": 2, "num_ln_in_parallel_attn": 1}, ("one_norm", 2)),
        ({"parallel_attn": False, "multi_query": False}, ("none", 4)),
        ({"parallel_attn": False, "num_kv_heads": 4}, ("none", 1)),
    ]
    for changes, expected in kinds:
        config = read("falcon", **changes)
        assert (config.parallel, config.attention.num_kv_heads) == expected, changes
    # The factor of the scores, 1/sqrt(8), is ALiBi's too.
    alibi = read("falcon", alibi=True, bias=True, rope_theta=10000.0)
    assert (alibi.position_bias, alibi.attention.rope) == (Alibi(4, scale=8**-0.5), None)


def test_cohere_2_s_layers_take_turns():
    for changes in ({}, {"sliding_window_pattern": 4}, {"layer_switch": 4, "_sliding_window_pattern": 4}):
        layers = [mixer for mixer, _ in read("cohere2", **changes).layer_pieces()]
        assert [layer.window for layer in layers] == [4096] * 3 + [None]
        assert [layer.rope is not None for layer in layers] == [True] * 3 + [False]
    full = read("cohere2", layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=8)
    assert [mixer.window for mixer, _ in full.layer_pieces()] == [None, 8] * 2
    assert read("cohere", use_qk_norm=True).attention.qk_norm_over == "own_weights"


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("gpt_neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, "rotary_pct=0.25 and partial_rotary_factor"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("gptj", {"rotary_dim": 6}, "rotary_dim=6 must divide the size of a head, 16"),
        ("gptj", {"rotary": False}, "rotary=False"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn=False"),
        ("falcon", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("cohere", {"head_dim": 16}, "head_dim=16"),
        ("cohere2", {"order_of_interleaved_layers": "global_attn_first"}, "order_of_interleaved_layers"),
        ("cohere2", {"layer_switch": 3, "sliding_window_pattern": 4}, "layer_switch=3 and sliding_window_pattern=4"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("bloom", {"n_inner": 40}, "n_inner=40"),
    ],
)
def test_other_models_are_refused_by_name(name: str, change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        read(name, **change)


@pytest.mark.parametrize(
    ("name", "change", "lost"),
    [
        ("falcon", {"position_bias": Alibi(4)}, r"position_bias|rope"),
        ("falcon", {"embedding_scale": 2.0}, "embedding_scale=2.0"),
        ("bloom", {"position_bias": Alibi(4, scale=2.0)}, r"position_bias\.scale=2.0"),
        ("cohere2", {"parallel": "none"}, "parallel=none"),
    ],
)
def test_nothing_else_is_exported_as_one(name: str, change: dict[str, Any], lost: str):
    with pytest.raises(UserError, match=lost):
        zoo.family(name).to_hf(dataclasses.replace(read(name), **change))
