"""Goldens of the families whose norms differ from Llama's, or their scales: Gemma, OLMo, Phi-3, Granite."""

from typing import Any

import numpy as np
import torch
from golden_makers.causal import TINY, causal
from golden_makers.common import GOLDENS, check_reads, own_config, released, write
from golden_makers.decoders import IDS
from safetensors.torch import load_file
from transformers import AutoConfig, Gemma3ForConditionalGeneration


def centered(model: Any) -> None:
    """Norms of a factor 1 + weight: factors about 1, and logits of standard deviation 1."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter -= 1
    model.model.embed_tokens.weight *= 0.2  # it is multiplied by the root of the width
    last = model.model.norm.weight
    for _ in range(4 if model.config.__dict__.get("final_logit_softcapping") else 1):  # a cap makes it a fixed point
        last.copy_((1 + last) / model(IDS).logits.std() - 1)


GEMMA = TINY | {"model_type": "gemma", "num_key_value_heads": 1, "pad_token_id": 0}
GEMMA2 = TINY | {
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "model_type": "gemma2",
    "query_pre_attn_scalar": 12,
    "sliding_window": 8,
}
GEMMA3 = TINY | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "query_pre_attn_scalar": 12,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "rope_theta": 1000000.0,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
}
# As the first files were: "gelu" for its approximation.
GEMMA_RELEASED = GEMMA | {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_activation": None,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "transformers_version": "4.38.1",
    "use_cache": True,
}
GEMMA2_RELEASED = GEMMA2 | {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "cache_implementation": "hybrid",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window_size": 8,
    "torch_dtype": "float32",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
}


OLMO2 = TINY | {"model_type": "olmo2", "rms_norm_eps": 1e-06, "rope_theta": 500000.0}
OLMO3 = OLMO2 | {
    "model_type": "olmo3",
    "num_hidden_layers": 5,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "rope_type": "yarn",
    },
    "sliding_window": 8,
}
GRANITE = TINY | {
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "model_type": "granite",
    "residual_multiplier": 0.6,
    "tie_word_embeddings": True,
}
PHI3 = {key: value for key, value in TINY.items() if key != "head_dim"}
PHI3 |= {"hidden_size": 32, "model_type": "phi3", "original_max_position_embeddings": 64, "sliding_window": 8}
# As the files are: the factors in `rope_scaling`, the old length outside of it.
PHI3_LONG = PHI3 | {
    "rope_scaling": {
        "long_factor": [1.0, 1.5, 4.0],
        "short_factor": [1.1, 1.2, 1.3],
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}


def as_released(settings: dict[str, Any], architecture: str) -> dict[str, Any]:
    return settings | {"architectures": [architecture], "torch_dtype": "float32", "use_cache": True}


def make_gemma3() -> None:
    """The whole model, with a tower for images, around the text model of `gemma3_text`."""
    text = GEMMA3 | {"_sliding_window_pattern": 3}
    vision = {
        "hidden_size": 8,
        "image_size": 8,
        "intermediate_size": 8,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 4,
        "vision_use_head": False,
    }
    settings = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    settings |= {"boi_token_index": 61, "eoi_token_index": 62, "image_token_index": 63}
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(AutoConfig.for_model("gemma3", **settings)).float().eval()
    own = load_file(GOLDENS / "gemma3_text" / "model.safetensors")
    missing = model.model.language_model.load_state_dict(
        {key.removeprefix("model."): value for key, value in own.items()}, strict=True
    )
    assert not any(missing)
    expected = dict(np.load(GOLDENS / "gemma3_text" / "expected.npz"))
    tensors = released(model)
    assert "language_model.model.layers.0.self_attn.q_norm.weight" in tensors
    config = own_config(model) | settings
    folder = write("gemma3", config, tensors, expected)
    logits = torch.from_numpy(expected["logits"])
    check_reads(folder, Gemma3ForConditionalGeneration, lambda model: model(IDS).logits, logits)


CASES = {
    "gemma": causal("gemma", GEMMA, config=GEMMA_RELEASED, change=centered),
    "gemma2": causal("gemma2", GEMMA2, config=GEMMA2_RELEASED, change=centered),
    "gemma2_long_window": causal(
        "gemma2_long_window",
        GEMMA2 | {"attention_bias": True, "sliding_window": 48, "tie_word_embeddings": False},
        change=centered,
    ),
    "gemma3_text": causal("gemma3_text", GEMMA3, change=centered),
    "gemma3": make_gemma3,
    "olmo2": causal("olmo2", OLMO2, config=as_released(OLMO2, "Olmo2ForCausalLM")),
    "olmo3": causal("olmo3", OLMO3, config=as_released(OLMO3, "Olmo3ForCausalLM")),
    "olmo3_long_window": causal("olmo3_long_window", OLMO3 | {"sliding_window": 48, "attention_bias": True}),
    "phi3": causal("phi3", PHI3, config=as_released(PHI3 | {"rope_scaling": None}, "Phi3ForCausalLM")),
    "phi3_short": causal("phi3_short", PHI3_LONG, config=as_released(PHI3_LONG, "Phi3ForCausalLM")),
    # Beyond it from the first prompt on: a cache does not cross the border.
    "phi3_long": causal("phi3_long", PHI3_LONG | {"original_max_position_embeddings": 3}, gain=1.2),
    "granite": causal("granite", GRANITE, config=as_released(GRANITE, "GraniteForCausalLM")),
    "granite_biases": causal(
        "granite_biases", GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    ),
}
