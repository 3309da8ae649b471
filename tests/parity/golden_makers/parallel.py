"""Goldens of the families with parallel blocks, and of those with ALiBi."""

from typing import Any
from unittest import mock

from golden_makers import common
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


BLOOM = {
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["BloomForCausalLM"],
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "masked_softmax_fusion": True,
    "model_type": "bloom",
    "n_embed": 24,
    "n_inner": None,
    "n_layer": 3,
    "num_attention_heads": 6,
    "offset_alibi": 100,
    "pad_token_id": 3,
    "pretraining_tp": 1,
    "seq_length": 128,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "slow_but_exact": False,
    "torch_dtype": "float32",
    "transformers_version": "4.20.0",
    "unk_token_id": 0,
    "use_cache": True,
    "vocab_size": 64,
}
# Cohere's own keys, as Command R7B has them.
COHERE2 = {
    "architectures": ["Cohere2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "cache_implementation": "hybrid",
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 128,
    "model_type": "cohere2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "order_of_interleaved_layers": "local_attn_first",
    "pad_token_id": 0,
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 8,
    "sliding_window_pattern": 4,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0.dev0",
    "use_cache": True,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "vocab_size": 64,
}


FALCON = SIZES | {"model_type": "falcon", "num_attention_heads": 4, "hidden_size": 32}


def falcon(name: str, **settings: Any) -> Any:
    return gpt(name, FALCON | settings)


def make_falcon_rw() -> None:
    """The library's plain attention of today adds ALiBi twice; its other one once, as the code of the release."""
    settings = {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "ffn_hidden_size": 40}

    def change(model: Any) -> None:
        model.config._attn_implementation = "sdpa"

    with mock.patch.dict(common.PLAIN, attn_implementation="sdpa"):
        gpt("falcon_rw", FALCON | settings, change=change, gain=2.0)()


def quieter(model: Any) -> None:
    """Embeddings that do not outweigh what the layers add: a tied head would only repeat the last token."""
    for parameter in model.transformer.word_embeddings_layernorm.parameters():
        parameter.data *= 0.25


def offset(model: Any) -> None:
    """The factor of these norms is 1 plus the weight: here as far from 1 as that of others."""
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.data -= 1


COHERE = SIZES | {"model_type": "cohere", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
COHERE |= {"intermediate_size": 40, "logit_scale": 0.25, "rope_parameters": {"rope_type": "default", "rope_theta": 8e6}}
# As Minitron has them.
NEMOTRON = {
    "architectures": ["NemotronForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 8,
    "hidden_act": "relu2",
    "hidden_size": 24,
    "initializer_range": 0.0134,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "mlp_bias": False,
    "model_type": "nemotron",
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.45.0",
    "use_cache": True,
    "vocab_size": 64,
}
# As StarCoder has them.
BIGCODE = {
    "activation_function": "gelu",
    "architectures": ["GPTBigCodeForCausalLM"],
    "attention_softmax_in_fp32": True,
    "attn_pdrop": 0.1,
    "bos_token_id": 1,
    "embd_pdrop": 0.1,
    "eos_token_id": 2,
    "inference_runner": 0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_batch_size": None,
    "max_sequence_length": None,
    "model_type": "gpt_bigcode",
    "multi_query": True,
    "n_embd": 32,
    "n_head": 4,
    "n_inner": 40,
    "n_layer": 3,
    "n_positions": 64,
    "pad_key_length": True,
    "pre_allocate_kv_cache": False,
    "resid_pdrop": 0.1,
    "scale_attention_softmax_in_fp32": True,
    "scale_attn_weights": True,
    "torch_dtype": "float32",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "validate_runner_input": True,
    "vocab_size": 64,
}
# As StableLM 2's 12B has them.
STABLELM = {
    "architectures": ["StableLmForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 128,
    "model_type": "stablelm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "qk_layernorm": True,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0",
    "use_cache": True,
    "use_parallel_residual": True,
    "use_qkv_bias": False,
    "vocab_size": 64,
}
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
    "falcon_7b": falcon("falcon_7b"),
    "falcon_40b": falcon(
        "falcon_40b", new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=40, hidden_size=16
    ),
    "falcon_11b": falcon(
        "falcon_11b",
        new_decoder_architecture=True,
        num_kv_heads=2,
        num_ln_in_parallel_attn=1,
        ffn_hidden_size=40,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500042.0},
    ),
    "falcon_rw": make_falcon_rw,
    "bloom": gpt("bloom", BLOOM, config=BLOOM, change=quieter),
    "cohere": causal("cohere", COHERE | {"attention_bias": True}),
    "cohere_normed_heads": causal("cohere_normed_heads", COHERE | {"use_qk_norm": True, "tie_word_embeddings": False}),
    "cohere2": causal("cohere2", COHERE2, config=COHERE2),
    "cohere2_wide_window": causal(
        "cohere2_wide_window",
        COHERE
        | {"model_type": "cohere2", "sliding_window": 32}
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "stablelm": causal("stablelm", STABLELM, config=STABLELM),
    "stablelm_in_turn": causal(
        "stablelm_in_turn",
        SIZES
        | {"model_type": "stablelm", "intermediate_size": 40, "num_key_value_heads": 3, "use_qkv_bias": True}
        | {"tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    ),
    "gpt_bigcode": gpt("gpt_bigcode", BIGCODE, config=BIGCODE),
    "gpt_bigcode_all_heads": gpt(
        "gpt_bigcode_all_heads",
        SIZES | {"model_type": "gpt_bigcode", "multi_query": False, "tie_word_embeddings": False},
    ),
    "nemotron": causal(
        "nemotron",
        NEMOTRON,
        config=NEMOTRON,
        last_norm=lambda model: [model.lm_head.weight],
        change=offset,
    ),
    "nemotron_biases": causal(
        "nemotron_biases",
        SIZES
        | {"model_type": "nemotron", "intermediate_size": 40, "num_key_value_heads": 3, "hidden_act": "gelu"}
        | {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        last_norm=lambda model: [model.lm_head.weight],
        change=offset,
    ),
    "gptj": gpt("gptj", GPTJ, config=GPTJ, last_norm=with_bias(lambda model: model.transformer.ln_f)),
}
