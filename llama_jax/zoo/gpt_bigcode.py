"""BigCode's SantaCoder (arXiv 2301.03988) and StarCoder (arXiv 2305.06161): GPT-2 with one key head."""

import dataclasses
from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import LearnedPositions
from llama_jax.zoo.gpt2 import GPT2
from llama_jax.zoo.gpt_neox import ends, layer_norm_decoder
from llama_jax.zoo.reading import ConfigReader
from llama_jax.zoo.weights import TensorNames, mappings


def _bigcode(*, max_positions: int, num_kv_heads: int = 1, **fields: Any) -> DecoderConfig:
    places: Json = {"max_positions": max_positions, "positions": LearnedPositions(max_positions), "rope": None}
    return layer_norm_decoder(**fields, **places, num_kv_heads=num_kv_heads)


def _released(layers: int, width: int, heads: int, **fields: Any) -> DecoderConfig:
    usual: Json = {"vocab_size": 49_152, "max_positions": 8192, "dropout": 0.1, "attention_dropout": 0.1}
    sizes: Json = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "tie_embeddings": True}
    return _bigcode(**usual | sizes | fields)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    kv_heads = 1 if reader.take("multi_query", bool, True) else fields["num_heads"]
    reader.only(scale_attn_weights=True, add_cross_attention=False)
    return _bigcode(**fields, num_kv_heads=kv_heads)


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    return {"multi_query": attention.num_kv_heads == 1, "embd_pdrop": config.dropout}


def _names(config: DecoderConfig) -> TensorNames:
    attention: Any = config.attention
    # Queries, then the only key and value; where every head has its own, those of each head follow its queries.
    several = attention.num_kv_heads > 1
    axes = "k h" if several else "(k h)"
    fused = {f"{name}_proj": ("c_attn", f"{axes} d -> d k h", f"{axes} -> k h") for name in "qkv"}
    rows = {
        "input_layernorm": ("ln_1", "d -> d", "d -> d"),
        "attention.o_proj": ("attn.c_proj", "d (n h) -> n h d", "d -> d"),
        "post_attention_layernorm": ("ln_2", "d -> d", "d -> d"),
        "feed_forward.up_proj": ("mlp.c_fc", "f d -> d f", "f -> f"),
        "feed_forward.down_proj": ("mlp.c_proj", "d f -> f d", "d -> d"),
    }
    layer = "transformer.h.{layer}."
    return TensorNames(
        ends("transformer.wte", "transformer.ln_f")
        + mappings({"positions": ("wpe", "p d -> p d")}, theirs="transformer.")
        + mappings(fused, "layers.attention.", f"{layer}attn.", joined=int(several), merged=several)
        + mappings(rows, "layers.", layer),
        {"lm_head.weight": "transformer.wte.weight"},
    )


GPT_BIGCODE = dataclasses.replace(
    GPT2,
    name="gpt_bigcode",
    title="SantaCoder and StarCoder",
    label="a GPT-BigCode",
    presets={
        "santacoder": _released(24, 2048, 16, vocab_size=49_280, max_positions=2048, activation="gelu_tanh"),
        "starcoderbase_1b": _released(24, 2048, 16, activation="gelu_tanh"),
        "starcoderbase_3b": _released(36, 2816, 22, activation="gelu_tanh"),
        "starcoderbase_7b": _released(42, 4096, 32, activation="gelu_tanh"),
        "starcoder": _released(40, 6144, 48),
    },
    architectures=("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
    read=_read,
    write=_write,
    # Of the inference code of the first releases; num_key_value_heads is written, and multi_query decides.
    harmless={*GPT2.harmless, "inference_runner", "num_key_value_heads", "pad_key_length", "validate_runner_input"},
    names=_names,
)
