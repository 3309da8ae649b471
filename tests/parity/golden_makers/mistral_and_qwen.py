"""Goldens of the families that differ from Llama in little: Mistral, Qwen and their like."""

from collections.abc import Callable
from typing import Any

from golden_makers.causal import TINY, causal

# Keys of released files, most of which are older than those that the library writes today.
RELEASED = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "float32",
    "transformers_version": "4.43.1",
    "use_cache": True,
}
NO_HEAD_DIM = {key: value for key, value in TINY.items() if key != "head_dim"}
QWEN2 = (
    NO_HEAD_DIM
    | RELEASED
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "max_window_layers": 2,
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "sliding_window": 128,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
    }
)
QWEN3 = (
    TINY
    | RELEASED
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
)
SOME_SLIDING = {"max_window_layers": 1, "sliding_window": 8, "use_sliding_window": True}
MISTRAL = (
    NO_HEAD_DIM
    | RELEASED
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "sliding_window": 8,
        "tie_word_embeddings": False,
    }
)
# Windows in the first, the last, and a middle layer.
TURNS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"]
SMOLLM3 = (
    NO_HEAD_DIM
    | RELEASED
    | {
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "num_hidden_layers": 4,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    }
)
TURNED = {"no_rope_layers": [0, 1, 0, 1], "layer_types": None, "sliding_window": 8, "use_sliding_window": True}
STARCODER2 = (
    NO_HEAD_DIM
    | {key: value for key, value in RELEASED.items() if key != "rms_norm_eps"}
    | {
        "architectures": ["Starcoder2ForCausalLM"],
        "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_epsilon": 1e-5,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-5,
        "norm_type": "layer_norm",
        "residual_dropout": 0.1,
        "rope_theta": 9999.4420358813,
        "sliding_window": 8,
        "use_bias": True,
    }
)
OPT = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 40,
    "hidden_size": 24,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 48,
    "model_type": "opt",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float32",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
    "word_embed_proj_dim": 24,
}
INTERNLM3 = (
    TINY
    | RELEASED
    | {
        "architectures": ["InternLM3ForCausalLM"],
        "bias": False,
        "model_type": "internlm3",
        "qkv_bias": False,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
        "rope_theta": 50000.0,
        "tie_word_embeddings": False,
    }
)


def opt(name: str, **changes: Any) -> Callable[[], None]:
    """OPT's golden; where norms come last, the logits are scaled by the last of them."""
    settings = OPT | changes
    first = settings["do_layer_norm_before"]

    def smaller_biases(model: Any) -> None:
        """Or the next token would hardly depend on the text."""
        for key, parameter in model.named_parameters():
            parameter.data *= 0.2 if key.endswith("bias") and not first else 1.0

    return causal(
        name,
        settings,
        config=settings,
        blocks=lambda model: model.model.decoder.layers,
        change=smaller_biases,
        gain=1.5 if first else 4.0,
        last_norm=lambda model: list(
            (model.model.decoder if first else model.model.decoder.layers[-1]).final_layer_norm.parameters()
        ),
    )


CASES = {
    "mistral": causal("mistral", MISTRAL, config=MISTRAL),
    "mistral_nemo": causal("mistral_nemo", TINY | {"model_type": "mistral", "sliding_window": None}),
    "mistral_long_window": causal("mistral_long_window", TINY | {"model_type": "mistral", "sliding_window": 40}),
    "ministral": causal(
        "ministral",
        TINY | {"model_type": "ministral", "layer_types": TURNS, "num_hidden_layers": 5, "sliding_window": 8},
    ),
    "qwen2": causal("qwen2", QWEN2, config=QWEN2),
    "qwen2_window": causal("qwen2_window", TINY | SOME_SLIDING | {"model_type": "qwen2"}),
    "qwen3": causal("qwen3", QWEN3, config=QWEN3),
    "qwen3_window": causal("qwen3_window", TINY | SOME_SLIDING | {"model_type": "qwen3", "attention_bias": True}),
    "internlm3": causal("internlm3", INTERNLM3, config=INTERNLM3),
    "internlm3_biases": causal("internlm3_biases", TINY | {"model_type": "internlm3", "qkv_bias": True, "bias": True}),
    "opt": opt("opt"),
    "opt_norms_last": opt("opt_norms_last", do_layer_norm_before=False, tie_word_embeddings=False),
    "starcoder2": causal("starcoder2", STARCODER2, config=STARCODER2),
    "starcoder2_no_biases": causal(
        "starcoder2_no_biases", TINY | {"model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": False}
    ),
    "smollm3": causal("smollm3", SMOLLM3, config=SMOLLM3),
    "smollm3_window": causal(
        "smollm3_window", SMOLLM3 | TURNED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    ),
}
