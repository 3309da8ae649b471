"""Goldens of GPT-OSS: its window on both sides of the text's length, its YaRN too, and a file in MXFP4."""

from typing import Any

import torch
from golden_makers.causal import TINY, causal
from golden_makers.common import Tensors, released, write
from golden_makers.decoders import decoded, find
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

YARN = {"beta_fast": 2.0, "beta_slow": 1.0, "factor": 4.0, "rope_type": "yarn", "truncate": False}
# Below 7, so that the gate and both sides of the other half are clamped.
SIZES = TINY | {
    "head_dim": 16,
    "intermediate_size": 12,
    "model_type": "gpt_oss",
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "swiglu_limit": 1.5,
}
# The text is longer than the window and the original length; keys as transformers 5 writes them.
SHORT = SIZES | {
    "rope_parameters": YARN | {"original_max_position_embeddings": 16, "rope_theta": 100.0},
    "sliding_window": 8,
}
# It is shorter than both.
LONG = SIZES | {
    "attention_bias": False,
    "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    "num_key_value_heads": 4,
    "rope_parameters": YARN | {"original_max_position_embeddings": 64, "rope_theta": 100.0},
    "sliding_window": 32,
}
# As it was released: keys of the time, and blocks of 32 inputs.
RELEASED = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 2,
    "experts_per_token": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initial_context_length": 16,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 64,
    "model_type": "gpt_oss",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "output_router_logits": False,
    "pad_token_id": 1,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 8,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and scales of [E, inputs, outputs]: the largest of 32 inputs is at most 6 times the scale."""
    groups = weight.transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6.0))
    codes = ((groups.abs() / 2.0**exponent)[..., None] - E2M1).abs().argmin(-1) + 8 * (groups < 0)
    blocks = codes[..., ::2] | (codes[..., 1::2] << 4)
    return blocks.to(torch.uint8), (exponent[..., 0] + 127).to(torch.uint8)


def make_mxfp4() -> None:
    """The model rounded to what its file holds; transformers' own code makes the numbers of the file."""
    quantized: Tensors = {}

    def round_weights(model: Any) -> None:
        quantized.clear()
        for i, layer in enumerate(model.model.layers):
            for part in ("gate_up_proj", "down_proj"):
                weight, name = getattr(layer.mlp.experts, part), f"model.layers.{i}.mlp.experts.{part}"
                blocks, scales = quantize(weight)
                weight.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
                quantized[f"{name}_blocks"], quantized[f"{name}_scales"] = blocks, scales

    settings = {key: value for key, value in RELEASED.items() if key != "quantization_config"}
    config = GptOssConfig.from_dict(settings)
    model, found = find("gpt_oss_mxfp4", GptOssForCausalLM, config, gain=1.5, change=round_weights)
    tensors = released(model)
    whole = {name.removesuffix("_blocks") for name in quantized if name.endswith("_blocks")}
    assert whole <= set(tensors)
    kept = {name: value for name, value in tensors.items() if name not in whole}
    write("gpt_oss_mxfp4", RELEASED, kept | quantized, decoded(model, model.model.layers) | found)


CASES = {"gpt_oss": causal("gpt_oss", SHORT), "gpt_oss_long": causal("gpt_oss_long", LONG), "gpt_oss_mxfp4": make_mxfp4}
