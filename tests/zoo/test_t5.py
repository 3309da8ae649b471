"""T5 and Switch Transformers: exact sizes, and config.json in all of its spellings."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llama_jax
from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.nn import MLP, Experts, GatedLinearUnit, RelativeBias, Rope, SinusoidalPositions

switch_transformers = zoo.family("switch_transformers")
t5 = zoo.family("t5")

GOLDENS = Path(__file__).parents[1] / "parity" / "goldens"
COUNTS = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
}
SHAPE: dict[str, Any] = {"vocab_size": 64, "d_model": 24, "d_kv": 8, "num_layers": 4, "num_heads": 4, "d_ff": 40}
V1_1 = SHAPE | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(config) for name, config in t5.presets.items()} == COUNTS
    assert num_parameters(switch_transformers.presets["switch_base_8"]) == 619_339_008


@pytest.mark.parametrize("family", [t5, switch_transformers])
def test_presets_survive_hugging_face_config(family):
    for config in family.presets.values():
        assert family.from_hf(family.to_hf(config)) == config


def test_what_the_first_configs_leave_out():
    config = t5.from_hf(SHAPE)
    assert (config.num_encoder_layers, config.num_layers, config.max_positions) == (4, 4, 512)
    assert config.encoder_position_bias == RelativeBias(4, 32, 128, bidirectional=True)
    assert config.feed_forward == MLP(40, "relu", bias=False, dropout=0.1)
    assert (config.tie_embeddings, config.logit_scale, config.decoder_start_id) == (True, 24**-0.5, 0)


def test_version_1_1_in_old_and_new_files():
    old = t5.from_hf(V1_1)
    assert (old.tie_embeddings, old.logit_scale) == (False, 1.0)
    assert old.feed_forward == GatedLinearUnit(40, "gelu_tanh", bias=False, dropout=0.1)
    new = V1_1 | {
        "tie_word_embeddings": True,
        "scale_decoder_outputs": False,
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
    }
    tied = t5.from_hf(new)
    # Such a file is of one made from scratch, or of one converted, whose head is its own.
    assert (tied.tie_embeddings, tied.logit_scale) == (True, 1.0)
    assert t5.with_tensors(tied, {"shared.weight", "lm_head.weight"}) == old
    assert t5.with_tensors(tied, {"shared.weight"}) == tied == t5.from_hf(t5.to_hf(tied))


@pytest.mark.slow
def test_sources_longer_than_n_positions():
    """Distances have no end: the same logits and tokens as transformers', from a source of 600."""
    lm, golden = llama_jax.load(GOLDENS / "t5_v1_0", dtype="float32"), np.load(GOLDENS / "t5_long_source.npz")
    assert lm.config.max_positions < golden["source"].shape[1]
    logits = lm.model(golden["source"], golden["target"])
    np.testing.assert_allclose(logits, golden["logits"], atol=5e-5)
    generated = golden["generated"]
    assert golden["margin"] > 1e-3
    tokens = llama_jax.generate(lm, golden["source"].astype(np.int32), max_new_tokens=generated.shape[1] - 1)
    np.testing.assert_array_equal(tokens[:, -generated.shape[1] + 1 :], generated[:, 1:])


def test_only_positions_themselves_are_a_limit():
    config = t5.from_hf(SHAPE)
    assert config.length_limit > 10**9
    positions = dataclasses.replace(config, positions=SinusoidalPositions())
    turned = dataclasses.replace(config, attention=dataclasses.replace(config.attention, rope=Rope(10_000.0, None)))
    assert positions.length_limit == turned.length_limit == config.max_positions


def test_layers_with_experts():
    config = switch_transformers.from_hf(SHAPE | {"num_decoder_layers": 6, "num_sparse_encoder_layers": 4})
    found = {name: [isinstance(f, Experts) for _, f in stack] for name, stack in config.stacks().items()}
    assert found == {"encoder_layers": [True] * 4, "layers": [False, True] * 3}
    assert config.overrides[0].piece.capacity == 64  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        (t5, {"feed_forward_proj": "gated-swish"}, "feed_forward_proj='gated-swish'"),
        (t5, {"dense_act_fn": "silu"}, "dense_act_fn='silu'"),
        (t5, V1_1 | {"dense_act_fn": "gelu"}, "dense_act_fn='gelu'"),
        (t5, {"is_gated_act": True}, "is_gated_act=True"),
        (t5, {"is_encoder_decoder": False}, "is_encoder_decoder=False"),
        (t5, {"num_heads": "four"}, "num_heads='four'.*int"),
        (t5, {"d_kv": None}, "'d_kv'"),
        (t5, {"num_experts": 8}, "num_experts=8"),
        (switch_transformers, {"feed_forward_proj": "gated-gelu"}, "feed_forward_proj"),
        (switch_transformers, {"router_dtype": "bfloat16"}, "router_dtype='bfloat16'"),
        (switch_transformers, {"router_ignore_padding_tokens": True}, "router_ignore_padding_tokens=True"),
        (switch_transformers, {"expert_capacity": 0}, "capacity=0"),
        (switch_transformers, {"a_new_trick": True}, "a_new_trick"),
    ],
)
def test_what_a_config_asks_for_is_never_ignored(family, change, named):
    with pytest.raises(UserError, match=named):
        family.from_hf(SHAPE | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feed_forward": GatedLinearUnit(40, "gelu", bias=False, dropout=0.1)}, "activation=gelu"),
        ({"feed_forward": GatedLinearUnit(40, "silu", bias=False)}, r"feed_forward\.dropout=.*has no place"),
        ({"logit_scale": 0.5}, "logit_scale=0.5"),
        ({"final_dropout": 0.0}, r"final_dropout=0\.0"),
        ({"norm_placement": "post"}, "norm_placement=post"),
        ({"encoder_position_bias": None}, "encoder_position_bias=None"),
        ({"position_bias": None}, "has RelativeBias, and this model NoneType"),
    ],
)
def test_a_model_that_is_no_t5_is_not_exported_as_one(change, named):
    with pytest.raises(UserError, match=named):
        t5.to_hf(dataclasses.replace(t5.from_hf(SHAPE), **change))


def test_families_know_each_other_s_models_apart():
    dense, sparse = t5.from_hf(SHAPE), switch_transformers.from_hf(SHAPE)
    with pytest.raises(UserError, match="overrides"):
        t5.to_hf(sparse)
    with pytest.raises(UserError, match="has Experts"):
        switch_transformers.to_hf(dense)
