"""Goldens of the families that differ from Llama in little: Mistral, Qwen and their like."""

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
    "smollm3": causal("smollm3", SMOLLM3, config=SMOLLM3),
    "smollm3_window": causal(
        "smollm3_window", SMOLLM3 | TURNED | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    ),
}
