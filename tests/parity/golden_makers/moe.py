"""Mixtures of experts and GLM: Qwen2-MoE, Qwen3-MoE, OLMoE, GLM-4-0414, GLM-4.5."""

import json
from typing import Any

from golden_makers.causal import TINY, causal
from golden_makers.common import GOLDENS
from golden_makers.deepseek import make_mtp
from transformers import Glm4MoeForCausalLM

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

GLM4 = TINY | {"eos_token_id": [2, 3], "intermediate_size": 28, "model_type": "glm4", "num_hidden_layers": 3}
GLM4_MOE = {key: value for key, value in EXPERTS.items() if key != "num_experts"} | {
    "first_k_dense_replace": 2,
    "model_type": "glm4_moe",
    "n_routed_experts": 6,
    "num_nextn_predict_layers": 0,
}


OLMOE = {key: value for key, value in EXPERTS.items() if key not in ("head_dim", "moe_intermediate_size")} | {
    "intermediate_size": 10,
    "model_type": "olmoe",
    "num_hidden_layers": 3,
}


def named(model: Any) -> None:
    """In memory the experts are one tensor, in the released files not."""
    assert hasattr(model.model.layers[-1].mlp, "experts")


def glm4_moe_mtp() -> None:
    data = json.loads((GOLDENS / "glm4_moe" / "config.json").read_text())
    make_mtp("glm4_moe_mtp", Glm4MoeForCausalLM, "glm4_moe", data)


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
    "olmoe": causal("olmoe", OLMOE, change=named),
    "glm4": causal("glm4", GLM4 | {"attention_bias": True}),
    "glm4_tied": causal("glm4_tied", GLM4 | {"attention_bias": False, "tie_word_embeddings": True}),
    # As the release wrote it.
    "glm4_moe": causal(
        "glm4_moe",
        GLM4_MOE | {"attention_bias": True, "routed_scaling_factor": 2.5, "use_qk_norm": True},
        change=named,
        config=GLM4_MOE
        | {
            "architectures": ["Glm4MoeForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "n_group": 1,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 2.5,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "torch_dtype": "float32",
            "transformers_version": "4.54.0",
            "use_cache": True,
            "use_qk_norm": True,
        },
    ),
    "glm4_moe_groups": causal(
        "glm4_moe_groups", GLM4_MOE | {"n_group": 3, "n_shared_experts": 2, "norm_topk_prob": False, "topk_group": 2}
    ),
    "glm4_moe_mtp": glm4_moe_mtp,
}
