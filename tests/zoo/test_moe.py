"""Mixtures of experts, Qwen3-Next, and GLM's later generations: sizes, released config.json files, refusals."""

import json

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters
from llama_jax.nn import Experts, GroupedQuery, SwiGLU

# Of transformers' models on torch's meta device, without the routers' biases, which are no parameters.
COUNTS = {
    "qwen1_5_moe_a2_7b": ("qwen2_moe", 14_315_784_192),
    "qwen2_57b_a14b": ("qwen2_moe", 57_408_658_944),
    "qwen3_30b_a3b": ("qwen3_moe", 30_532_122_624),
    "qwen3_235b_a22b": ("qwen3_moe", 235_093_634_560),
    "qwen3_coder_30b_a3b": ("qwen3_moe", 30_532_122_624),
    "qwen3_coder_480b_a35b": ("qwen3_moe", 480_154_875_392),
    "qwen3_next_80b_a3b": ("qwen3_next", 79_674_391_296),
    "olmoe_1b_7b": ("olmoe", 6_919_161_856),
    "glm4_9b_0414": ("glm4", 9_400_279_040),
    "glm4_32b_0414": ("glm4", 32_566_081_536),
    "glm4_5": ("glm4_moe", 352_797_814_784),
    "glm4_5_air": ("glm4_moe", 106_852_245_504),
    "deepseek_r1": ("deepseek_v3", 671_026_404_352),
    "deepseek_v3_1": ("deepseek_v3", 671_026_404_352),
    "moonlight_16b_a3b": ("deepseek_v3", 15_960_108_544),
    "kimi_k2": ("kimi_k2", 1_026_408_209_408),
}
# What stands in released files and decides a logit, and keys of other code that does not.
QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "decoder_sparse_step": 1, "hidden_act": "silu",
    "max_window_layers": 28, "output_router_logits": False, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
RELEASED = {
    "qwen2_57b_a14b": QWEN | {
        "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "moe_intermediate_size": 2560, "norm_topk_prob": False,
        "num_attention_heads": 28, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28,
        "num_key_value_heads": 4, "rope_theta": 1000000.0, "shared_expert_intermediate_size": 20480,
        "sliding_window": 131072,
    },
    "qwen3_coder_480b_a35b": QWEN | {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 6144,
        "intermediate_size": 8192, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": 2560, "norm_topk_prob": True, "num_attention_heads": 96, "num_experts": 160,
        "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8, "qkv_bias": False,
        "rope_scaling": None, "rope_theta": 10000000, "shared_expert_intermediate_size": 0, "sliding_window": None,
        "use_qk_norm": True,
    },
    "qwen3_next_80b_a3b": QWEN | {
        "architectures": ["Qwen3NextForCausalLM"], "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25, "rope_scaling": None, "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
    },
    "olmoe_1b_7b": {
        "architectures": ["OlmoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
        "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False,
        "pad_token_id": 1, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 50304,
    },
    "glm4_5_air": {
        "architectures": ["Glm4MoeForCausalLM"], "attention_bias": True, "attention_dropout": 0.0,
        "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 10944, "max_position_embeddings": 131072,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128, "n_shared_experts": 1,
        "norm_topk_prob": True, "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "num_nextn_predict_layers": 0, "pad_token_id": 151329, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000, "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False, "topk_group": 1, "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
    },
    "moonlight_16b_a3b": {
        "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 11264, "kv_lora_rank": 512, "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "pretraining_tp": 1,
        "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0, "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": True,
        "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 163840,
    },
}  # fmt: skip


def test_the_published_number_of_parameters():
    presets = zoo.presets()
    assert {name: num_parameters(presets[name]) for name in COUNTS} == {name: n for name, (_, n) in COUNTS.items()}


@pytest.mark.parametrize("name", COUNTS)
def test_presets_survive_hugging_face_config(name: str):
    family, config = zoo.family(COUNTS[name][0]), zoo.presets()[name]
    data = family.to_hf(config)
    assert data["model_type"] == COUNTS[name][0]
    assert family.from_hf(json.loads(json.dumps(data))) == config


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_config_is_the_preset(name: str):
    assert zoo.family(COUNTS[name][0]).from_hf(RELEASED[name]) == zoo.presets()[name]


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        (
            "qwen2_57b_a14b",
            {"use_sliding_window": True},
            "use_sliding_window=True, and a Qwen2-MoE can only have False",
        ),
        ("qwen2_57b_a14b", {"decoder_sparse_step": 0}, "decoder_sparse_step=0.*at least 1"),
        ("qwen2_57b_a14b", {"use_qk_norm": True}, "use_qk_norm=True, which is not supported for a Qwen2-MoE"),
        ("qwen3_coder_480b_a35b", {"use_qk_norm": False}, "use_qk_norm=False, and a Qwen3-MoE can only have True"),
        ("qwen3_coder_480b_a35b", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size=8"),
        ("qwen3_coder_480b_a35b", {"qkv_bias": True}, "qkv_bias=True, which is not supported"),
        ("qwen3_coder_480b_a35b", {"mlp_only_layers": [62]}, r"mlp_only_layers=\[62\].*below 62"),
        ("qwen3_next_80b_a3b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, and a Qwen3-Next can only"),
        ("qwen3_next_80b_a3b", {"layer_types": ["linear_attention"]}, "layer_types=.*48 of full_attention, linear_att"),
        ("qwen3_next_80b_a3b", {"linear_num_value_heads": 24}, "num_value_heads=24 must be a multiple"),
        ("olmoe_1b_7b", {"clip_qkv": 8.0}, "clip_qkv=8.0, which is not supported for an OLMoE"),
        ("glm4_5_air", {"partial_rotary_factor": 1.0}, "partial_rotary_factor=1.0, and a GLM-4.5 can only have 0.5"),
        ("glm4_5_air", {"scoring_func": "softmax"}, "scoring_func='softmax', which is not supported"),
        ("glm4_5_air", {"n_group": 3}, "num_experts=128 is not divisible by router.num_groups=3"),
        ("moonlight_16b_a3b", {"scoring_func": "softmax"}, "scoring_func='softmax', and a DeepSeek-V3 can only have"),
    ],
)
def test_what_a_config_asks_for_is_never_ignored(name: str, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        zoo.family(COUNTS[name][0]).from_hf(RELEASED[name] | change)


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({}, range(28)),
        ({"decoder_sparse_step": 3}, range(2, 28, 3)),
        ({"mlp_only_layers": [0, 5]}, [i for i in range(28) if i not in (0, 5)]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0, 1]}, range(3, 28, 2)),
    ],
)
def test_layers_without_experts(change: dict, sparse):
    """Every step-th layer but those that are named has experts; what is written has the same layers."""
    family = zoo.family("qwen2_moe")
    config = family.from_hf(RELEASED["qwen2_57b_a14b"] | change)
    pieces = [piece for _, piece in config.layer_pieces()]
    assert [i for i, piece in enumerate(pieces) if isinstance(piece, Experts)] == list(sparse)
    assert {piece.intermediate_size for piece in pieces if isinstance(piece, SwiGLU)} <= {18944}
    assert family.from_hf(family.to_hf(config)) == config


def test_layers_with_the_delta_rule():
    """Those that `layer_types` names, or all but the last of every `full_attention_interval`; both are written."""
    family, released = zoo.family("qwen3_next"), RELEASED["qwen3_next_80b_a3b"]
    config = family.from_hf(released | {"full_attention_interval": 3, "mlp_only_layers": [4]})
    assert [i for i, (piece, _) in enumerate(config.layer_pieces()) if isinstance(piece, GroupedQuery)] == [
        *range(2, 48, 3)
    ]
    data = family.to_hf(config)
    assert data["layer_types"] == 16 * ["linear_attention", "linear_attention", "full_attention"]
    assert family.from_hf(data) == config
    for kind in ("full_attention", "linear_attention"):
        config = family.from_hf(released | {"layer_types": [kind] * 48})
        assert family.from_hf(family.to_hf(config)) == config


def test_what_only_training_knows_does_not_keep_a_model_from_hugging_face():
    for name in ("qwen3_30b_a3b", "glm4_5_air"):
        family, config = zoo.family(COUNTS[name][0]), zoo.presets()[name]
        data = family.to_hf(config)
        experts = config.feed_forward.__class__(**vars(config.feed_forward) | {"router_z_loss": 0.1})
        assert family.to_hf(config.__class__(**vars(config) | {"feed_forward": experts})) == data
