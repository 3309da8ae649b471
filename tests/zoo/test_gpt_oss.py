"""GPT-OSS: exact sizes, the released config.json, transformers' defaults, what is refused."""

import dataclasses

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters

family = zoo.family("gpt_oss")

# Of the Hub's pages: bfloat16 and half of the bytes of MXFP4 blocks together.
COUNTS = {"gpt_oss_20b": 20_914_757_184, "gpt_oss_120b": 116_829_156_672}

RELEASED = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip


def without(*keys: str) -> dict:
    return {key: value for key, value in RELEASED.items() if key not in keys}


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_published_ones(name: str):
    config = family.presets[name]
    assert num_parameters(config) == COUNTS[name]
    assert family.from_hf(family.to_hf(config)) == config


@pytest.mark.parametrize(("name", "active"), [("gpt_oss_20b", 3.61e9), ("gpt_oss_120b", 5.13e9)])
def test_active_parameters_are_the_published_ones(name: str, active: float):
    """Without the embedding (model card, table 1)."""
    config, experts = family.presets[name], family.presets[name].feed_forward
    biases = 3 * config.hidden_size * (experts.num_experts - experts.router.top_k)  # three of the width
    idle = config.num_layers * (experts.idle_parameters(config.hidden_size) + biases)
    found = num_parameters(config) - idle - config.vocab_size * config.hidden_size
    assert found == pytest.approx(active, abs=5e6)


def test_the_released_config_is_the_preset():
    assert family.from_hf(RELEASED) == family.presets["gpt_oss_20b"]


def test_absent_keys_have_the_defaults_of_transformers():
    defaults = (
        "attention_bias", "experts_per_token", "head_dim", "layer_types", "max_position_embeddings",
        "num_experts_per_tok", "num_key_value_heads", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window",
        "swiglu_limit",
    )  # fmt: skip
    assert family.from_hf(without(*defaults)) == family.presets["gpt_oss_20b"]
    changed = family.from_hf(without("num_local_experts", "router_aux_loss_coef"))
    assert (changed.feed_forward.num_experts, changed.feed_forward.load_balance_loss) == (128, 0.001)


def test_positions_that_are_not_scaled_are_not_the_default():
    plain = family.from_hf(RELEASED | {"rope_scaling": {"rope_type": "default"}})
    assert plain.attention.rope.scaling is None
    assert family.from_hf(family.to_hf(plain)) == plain


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0, and a GPT-OSS can only have 1.702"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quant_method='fp8'.* take the release"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"layer_types": ["full_attention"]}, "24 of full_attention, sliding_attention"),
        ({"experts_per_token": 2}, "experts_per_token=2 and num_experts_per_tok=4"),
    ],
)
def test_other_models_are_refused_by_name(change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        family.from_hf(RELEASED | change)


@pytest.mark.parametrize(
    ("field", "value"), [("bias", False), ("limit", None), ("activation", "silu"), ("dispatch", "capacity")]
)
def test_experts_of_others_are_not_written(field: str, value: object):
    config = family.presets["gpt_oss_20b"]
    other = dataclasses.replace(config.feed_forward, **{field: value})
    with pytest.raises(UserError, match=field):
        family.to_hf(dataclasses.replace(config, feed_forward=other))
