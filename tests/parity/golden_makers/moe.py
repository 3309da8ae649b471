"""Mixtures of experts and GLM: Qwen2-MoE, Qwen3-MoE, GLM-4-0414, GLM-4.5, Kimi-K2."""

from typing import Any

from golden_makers.causal import TINY, causal

EXPERTS = TINY | {
    "intermediate_size": 28,
    "moe_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
}
QWEN3 = EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": True}
QWEN2 = {key: value for key, value in EXPERTS.items() if key != "head_dim"} | {
    "decoder_sparse_step": 2,
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 20,
}


def named(model: Any) -> None:
    """In memory the experts are one tensor, in the released files not."""
    assert hasattr(model.model.layers[-1].mlp, "experts")


CASES = {
    "qwen3_moe": causal("qwen3_moe", QWEN3 | {"mlp_only_layers": [1]}, change=named),
    "qwen3_moe_tied": causal(
        "qwen3_moe_tied", QWEN3 | {"attention_bias": True, "norm_topk_prob": False, "tie_word_embeddings": True}
    ),
    # As the release wrote it.
    "qwen2_moe": causal(
        "qwen2_moe",
        QWEN2,
        change=named,
        config=QWEN2
        | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "max_window_layers": 3,
            "norm_topk_prob": False,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": 4,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "transformers_version": "4.39.0.dev0",
            "use_cache": True,
            "use_sliding_window": False,
        },
    ),
}
