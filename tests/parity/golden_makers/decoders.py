"""Decoder-only families: GPT-2, GLM and ChatGLM2, Mixtral."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from golden_makers.common import (
    GOLDENS,
    PROMPT_LENGTH,
    Tensors,
    check_reads,
    divide,
    greedy,
    numbered,
    outputs,
    own_config,
    random_ids,
    randomize,
    released,
    search,
    write,
)
from safetensors.torch import load_file
from transformers import GlmConfig, GlmForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

SPECIAL = (0, 1, 2, 3)
IDS = random_ids((2, 24))

GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 2,
    "embd_pdrop": 0.1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 48,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 48,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 64,
}
GLM = {
    "architectures": ["GlmForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [1, 2, 3],
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "model_type": "glm",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_token_id": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "max_position_embeddings": 128,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 64,
}


def find(
    name: str,
    kind: Any,
    config: Any,
    *,
    gain: float = 1.0,
    last_norm: Callable[[Any], list[torch.Tensor]] = lambda model: [model.model.norm.weight],
    change: Callable[[Any], None] = lambda model: None,
    accept: Callable[[Any], bool] = lambda model: True,
) -> tuple[Any, dict[str, Any]]:
    """A random model whose greedy tokens are clear, and these. `change` may alter it before its logits are scaled."""
    config._attn_implementation = config._experts_implementation = "eager"

    def build(seed: int) -> Any:
        model = kind(config).float().eval()
        randomize(model, seed, gain)
        change(model)
        divide(last_norm(model), model(IDS).logits.std())
        return model

    def generate(model: Any) -> tuple[torch.Tensor, float]:
        return greedy(lambda ids: model(ids).logits, IDS[:, :PROMPT_LENGTH])

    return search(name, build, generate, SPECIAL, accept)


def decoded(model: Any, blocks: Any) -> dict[str, Any]:
    """What a decoder computes of the ids."""
    with outputs(numbered("layer", blocks)) as hidden:
        logits = model(IDS).logits
    return {"ids": IDS, "logits": logits, **hidden}


def make_gpt2() -> None:
    model, found = find(
        "gpt2",
        GPT2LMHeadModel,
        GPT2Config.from_dict(GPT2),
        gain=1.5,
        last_norm=lambda model: list(model.transformer.ln_f.parameters()),
    )
    expected = decoded(model, model.transformer.h) | found
    folder = write("gpt2", own_config(model), released(model), expected)
    check_reads(folder, GPT2LMHeadModel, lambda model: model(IDS).logits, expected["logits"])


def make_gpt2_released_names() -> None:
    """OpenAI's file: no prefix, and each layer's causal mask as a tensor."""
    expected = dict(np.load(GOLDENS / "gpt2" / "expected.npz"))
    tensors = {
        key.removeprefix("transformer."): value
        for key, value in load_file(GOLDENS / "gpt2" / "model.safetensors").items()
    }
    for i in range(GPT2["n_layer"]):
        tensors[f"h.{i}.attn.bias"] = torch.ones(1, 1, GPT2["n_ctx"], GPT2["n_ctx"]).tril()
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    folder = write("gpt2_released_names", GPT2, tensors, expected)
    logits = torch.from_numpy(expected["logits"])
    computed = ("attn.bias", "attn.masked_bias")
    check_reads(folder, GPT2LMHeadModel, lambda model: model(IDS).logits, logits, computed)


def make_glm() -> None:
    model, found = find("glm", GlmForCausalLM, GlmConfig.from_dict(GLM))
    expected = decoded(model, model.model.layers) | found
    folder = write("glm", GLM, released(model), expected)
    check_reads(folder, GlmForCausalLM, lambda model: model(IDS).logits, expected["logits"])


def make_chatglm2() -> None:
    """The GLM model under the names of ChatGLM2's own code; both have the same formulas."""
    own, expected = load_file(GOLDENS / "glm" / "model.safetensors"), np.load(GOLDENS / "glm" / "expected.npz")
    write_chatglm("chatglm2", own, expected, {"_name_or_path": "THUDM/chatglm2-6b"})


def make_chatglm3() -> None:
    """A GLM with the rotary base of ChatGLM3-6B-32K, whose config has its quotient by the usual one."""
    model, found = find("chatglm3", GlmForCausalLM, GlmConfig.from_dict(GLM | {"rope_theta": 500000.0}))
    changes = {"_name_or_path": "THUDM/chatglm3-6b-32k", "rope_ratio": 50}
    write_chatglm("chatglm3", released(model), decoded(model, model.model.layers) | found, changes)


def write_chatglm(name: str, own: Tensors, expected: Mapping[str, Any], changes: dict[str, Any]) -> None:
    """A GLM's tensors under ChatGLM's names, and the config of a release with `changes`."""
    rotary = int(GLM["head_dim"] * GLM["partial_rotary_factor"])
    inv_freq = 1.0 / (GLM["rope_theta"] * changes.get("rope_ratio", 1)) ** (torch.arange(0, rotary, 2).float() / rotary)
    tensors: Tensors = {
        "transformer.embedding.word_embeddings.weight": own["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": inv_freq,
        "transformer.encoder.final_layernorm.weight": own["model.norm.weight"],
        "transformer.output_layer.weight": own["lm_head.weight"],
    }
    for i in range(GLM["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"transformer.encoder.layers.{i}."
        for part in ("weight", "bias"):
            tensors[f"{ours}self_attention.query_key_value.{part}"] = torch.cat(
                [own[f"{theirs}self_attn.{which}_proj.{part}"] for which in "qkv"]
            )
        tensors |= {
            f"{ours}input_layernorm.weight": own[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.dense.weight": own[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}post_attention_layernorm.weight": own[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.dense_h_to_4h.weight": own[f"{theirs}mlp.gate_up_proj.weight"],
            f"{ours}mlp.dense_4h_to_h.weight": own[f"{theirs}mlp.down_proj.weight"],
        }
    config = {
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["ChatGLMModel"],
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "bias_dropout_fusion": True,
        "eos_token_id": 2,
        "ffn_hidden_size": GLM["intermediate_size"],
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": GLM["hidden_size"],
        "interleaved_qkv": False,
        "kv_channels": GLM["head_dim"],
        "layernorm_epsilon": GLM["rms_norm_eps"],
        "model_type": "chatglm",
        "multi_query_attention": True,
        "multi_query_group_num": GLM["num_key_value_heads"],
        "num_attention_heads": GLM["num_attention_heads"],
        "num_layers": GLM["num_hidden_layers"],
        "original_rope": True,
        "pad_token_id": 0,
        "padded_vocab_size": GLM["vocab_size"],
        "post_layer_norm": True,
        "pre_seq_len": None,
        "prefix_projection": False,
        "quantization_bit": 0,
        "rmsnorm": True,
        "seq_length": GLM["max_position_embeddings"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.27.1",
        "use_cache": True,
    }
    write(name, config | changes, tensors, expected)


def make_mixtral() -> None:
    model, found = find("mixtral", MixtralForCausalLM, MixtralConfig.from_dict(MIXTRAL))
    expected = decoded(model, model.model.layers) | found
    tensors = released(model)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in tensors
    folder = write("mixtral", MIXTRAL, tensors, expected)
    check_reads(folder, MixtralForCausalLM, lambda model: model(IDS).logits, expected["logits"])


CASES = {
    "gpt2": make_gpt2,
    "gpt2_released_names": make_gpt2_released_names,
    "glm": make_glm,
    "chatglm2": make_chatglm2,
    "chatglm3": make_chatglm3,
    "mixtral": make_mixtral,
}
