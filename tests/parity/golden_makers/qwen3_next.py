"""Qwen3-Next: the gated delta rule and gated attention, with experts."""

from golden_makers.causal import TINY, causal
from golden_makers.moe import named

QWEN3_NEXT = TINY | {
    "decoder_sparse_step": 1,
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 5,
    "model_type": "qwen3_next",
    "moe_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 20,
}


def centered(model) -> None:
    """Norms whose factor is 1 plus the weight, and the others: factors about 1."""
    named(model)
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear_attn" not in name:
            parameter -= 1


CASES = {
    "qwen3_next": causal(
        "qwen3_next", QWEN3_NEXT, change=centered, last_norm=lambda model: [model.lm_head.weight], gain=1.0
    ),
    "qwen3_next_dense": causal(
        "qwen3_next_dense",
        QWEN3_NEXT
        | {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_value_heads": 2,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "num_hidden_layers": 3,
            "tie_word_embeddings": False,
        },
        change=centered,
        last_norm=lambda model: [model.lm_head.weight],
        gain=1.0,
    ),
}
