"""Goldens of the families with parallel blocks, and of those with ALiBi."""

from typing import Any

from golden_makers.causal import causal

TINY = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 64}
SIZES = TINY | {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3, "max_position_embeddings": 128}
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "attention_probs_dropout_prob": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "gelu_fast",
    "hidden_dropout_prob": 0,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 128,
    "model_type": "gpt_neox",
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.19.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}
GPTJ = {
    "activation_function": "gelu_new",
    "architectures": ["GPTJForCausalLM"],
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "embd_pdrop": 0.0,
    "eos_token_id": 2,
    "gradient_checkpointing": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gptj",
    "n_embd": 32,
    "n_head": 2,
    "n_inner": None,
    "n_layer": 3,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "rotary": True,
    "rotary_dim": 4,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.18.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}


def neox(name: str, settings: dict[str, Any], **options: Any) -> Any:
    return causal(
        name,
        settings | {"model_type": "gpt_neox"},
        blocks=lambda model: model.gpt_neox.layers,
        last_norm=lambda model: list(model.gpt_neox.final_layer_norm.parameters()),
        **options,
    )


def gpt(name: str, settings: dict[str, Any], **options: Any) -> Any:
    """Those whose trunk is called a transformer, as in GPT-2."""
    options = {"last_norm": lambda model: list(model.transformer.ln_f.parameters())} | options
    return causal(name, settings, blocks=lambda model: model.transformer.h, **options)


def with_bias(norm: Any) -> Any:
    """What scales the logits of a model whose head has a bias."""
    return lambda model: [*norm(model).parameters(), model.lm_head.bias]


PHI = {"model_type": "phi", "intermediate_size": 40}
CASES = {
    "gpt_neox": neox("gpt_neox", GPT_NEOX, config=GPT_NEOX),
    "gpt_neox_in_turn": neox(
        "gpt_neox_in_turn",
        SIZES
        | {"intermediate_size": 40, "use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu"}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0}}
        | {"tie_word_embeddings": True},
    ),
    "phi": causal(
        "phi",
        SIZES | PHI | {"num_key_value_heads": 3},
        last_norm=with_bias(lambda model: model.model.final_layernorm),
    ),
    "phi_normed_heads": causal(
        "phi_normed_heads",
        SIZES
        | PHI
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "qk_layernorm": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.34}},
        last_norm=with_bias(lambda model: model.model.final_layernorm),
    ),
    "gptj": gpt("gptj", GPTJ, config=GPTJ, last_norm=with_bias(lambda model: model.transformer.ln_f)),
}
