"""Falcon (Almazrouei et al. 2023, arXiv 2311.16867), Falcon2-11B (arXiv 2407.14885) and Falcon-RW (arXiv 2306.01116).

Three kinds of blocks: the 7B has one key head and one norm for both sublayers, the 40B and 180B groups of heads and a
norm for each, the 11B groups and one norm; Falcon-RW's sublayers follow each other, with biases and ALiBi. Falcon-RW's
own code rounds ALiBi's slopes, and their products with positions, to bfloat16; here they are float32.
"""

from typing import Any

from llama_jax.config import Json
from llama_jax.models import DecoderConfig
from llama_jax.nn import Activation, Alibi
from llama_jax.zoo.gpt_neox import NORMS, ends, fused_layers, layer_norm_decoder, rotary
from llama_jax.zoo.reading import CAUSAL, SIZES, ConfigReader, Key, expect, read_rope, write_rope
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames


def _falcon(*, alibi: bool = False, theta: float = 10_000.0, scaling: Any = None, **fields: Any) -> DecoderConfig:
    heads = fields["num_heads"]
    head_dim = fields["hidden_size"] // max(heads, 1)
    # The scale of the scores is ALiBi's too.
    bias = Alibi(heads, scale=head_dim**-0.5) if alibi else None
    rope = None if alibi else rotary(head_dim, theta, scaling)
    return layer_norm_decoder(rope=rope, position_bias=bias, attention_bias=fields["bias"], **fields)


def _released(layers: int, width: int, heads: int, kv_heads: int, parallel: str, **fields: Any) -> DecoderConfig:
    usual: Json = {"vocab_size": 65_024, "max_positions": 2048, "bias": False, "tie_embeddings": True}
    sizes: Json = {"num_layers": layers, "hidden_size": width, "num_heads": heads, "num_kv_heads": kv_heads}
    return _falcon(**usual | sizes | fields, parallel=parallel)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.only(apply_residual_connection_post_layernorm=False)
    kv_heads = reader.take("num_kv_heads", int, fields["num_heads"])
    groups = reader.take("new_decoder_architecture", bool, False)
    one_key = reader.take("multi_query", bool, True)
    if groups:
        reader.only(parallel_attn=True)
        norms = reader.take("num_ln_in_parallel_attn", int, 2)
        fields["parallel"] = "own_norms" if norms == 2 else "one_norm"
    else:
        kv_heads = 1 if one_key else fields["num_heads"]
        reader.only(num_ln_in_parallel_attn=1)
        fields["parallel"] = "one_norm" if reader.take("parallel_attn", bool, True) else "none"
    rope = read_rope(reader, fields["max_positions"])
    if reader.take("alibi", bool, False):
        rope = {"alibi": True}
    return _falcon(**fields, num_kv_heads=kv_heads, **rope)


def _write(config: DecoderConfig, label: str) -> Json:
    attention: Any = config.attention
    one_key = attention.num_kv_heads == 1
    alibi = config.position_bias is not None
    groups = config.parallel == "own_norms" or (config.parallel == "one_norm" and not one_key)
    return {
        "alibi": expect(config.position_bias, Alibi, type(None), label=label) is not None,
        "multi_query": one_key,
        "new_decoder_architecture": groups,
        "num_kv_heads": attention.num_kv_heads,
        "num_ln_in_parallel_attn": (2 if config.parallel == "own_norms" else 1) if groups else None,
        "parallel_attn": config.parallel != "none",
        **({} if alibi else write_rope(attention, label)),
    }


def _names(config: DecoderConfig) -> TensorNames:
    attention: Any = config.attention
    ours = ("input_layernorm", "post_attention_layernorm")
    own = {name: (theirs, "d -> d", "d -> d") for name, theirs in zip(ours, ("ln_attn", "ln_mlp"), strict=True)}
    norms, group = own if config.parallel == "own_norms" else NORMS, attention.num_heads // attention.num_kv_heads
    return TensorNames(
        ends("transformer.word_embeddings", "transformer.ln_f")
        + fused_layers("transformer.h.{layer}.", "self_attention", norms, group),
        {"lm_head.weight": "transformer.word_embeddings.weight"},
    )


FALCON = Family(
    name="falcon",
    title="Falcon",
    label="a Falcon",
    presets={
        "falcon_rw_1b": _released(24, 2048, 32, 32, "none", bias=True, alibi=True, vocab_size=50_304),
        "falcon_7b": _released(32, 4544, 71, 1, "one_norm"),
        "falcon2_11b": _released(
            60, 4096, 32, 8, "one_norm", theta=500_042.0, max_positions=8192, tie_embeddings=False
        ),
        "falcon_40b": _released(60, 8192, 128, 8, "own_norms"),
        "falcon_180b": _released(80, 14_848, 232, 8, "own_norms"),
    },
    architectures=("FalconForCausalLM", "FalconModel"),
    keys=(
        *SIZES,
        Key("ffn_hidden_size", "feed_forward.intermediate_size", int, None),
        Key("activation", "feed_forward.activation", Activation, "gelu"),
        Key("bias", "feed_forward.bias", bool, False),
        Key("max_position_embeddings", "max_positions", int, 2048),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-5),
        # Here the embeddings' too.
        Key("hidden_dropout", "dropout", float, 0.0),
        Key("attention_dropout", "attention.dropout", float, 0.0, argument="attention_dropout"),
        Key("tie_word_embeddings", "tie_embeddings", bool, True),
    ),
    read=_read,
    write=_write,
    aliases={
        "n_embed": "hidden_size",
        "n_head": "num_attention_heads",
        "n_head_kv": "num_kv_heads",
        "n_layer": "num_hidden_layers",
    },
    harmless=CAUSAL,
    names=_names,
)
