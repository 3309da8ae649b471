"""T5 (arXiv 1910.10683), version 1.0 with ReLU and 1.1 with gated GELU (arXiv 2002.05202).

Sizes from the released configs; the counts they give are tested to the digit. Attention scores are not divided by
sqrt(head_dim), positions are a bias on them, and the logits of the tied head of 1.0 are divided by sqrt(d).
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import MLP, CrossAttention, FeedForward, GatedLinearUnit, GroupedQuery, RelativeBias, RMSNorm
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import ConfigReader, checked, expect


def t5(
    *,
    vocab_size: int,
    hidden_size: int,
    num_encoder_layers: int,
    num_layers: int,
    num_heads: int,
    head_dim: int,
    feed_forward: FeedForward,
    dropout: float,
    version_1_0: bool,
    max_positions: int = 512,
    eps: float = 1e-6,
    num_buckets: int = 32,
    max_distance: int = 128,
    decoder_start_id: int = 0,
    scaled_logits: bool | None = None,
    overrides: tuple[LayerOverride, ...] = (),
    encoder_overrides: tuple[LayerOverride, ...] = (),
) -> EncoderDecoderConfig:
    """A model of T5's pieces; `scaled_logits` is where version 1.0 ties its head, by default."""
    heads: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_heads,
        "head_dim": head_dim,
        "qkv_bias": False,
        "out_bias": False,
        "scale": 1.0,
        "dropout": dropout,
    }
    scaled = version_1_0 if scaled_logits is None else scaled_logits
    return EncoderDecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_encoder_layers=num_encoder_layers,
        max_positions=max_positions,
        attention=GroupedQuery(rope=None, **heads),
        cross_attention=CrossAttention(**heads),
        feed_forward=feed_forward,
        norm=RMSNorm(eps=eps),
        tie_embeddings=version_1_0,
        logit_scale=hidden_size**-0.5 if scaled else 1.0,
        position_bias=RelativeBias(num_heads, num_buckets, max_distance, bidirectional=False),
        encoder_position_bias=RelativeBias(num_heads, num_buckets, max_distance, bidirectional=True),
        decoder_start_id=decoder_start_id,
        dropout=dropout,
        final_dropout=dropout,
        overrides=overrides,
        encoder_overrides=encoder_overrides,
    )


def _preset(layers: int, width: int, heads: int, head_dim: int, ffn: int) -> EncoderDecoderConfig:
    return t5(
        vocab_size=32128,
        hidden_size=width,
        num_encoder_layers=layers,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        feed_forward=MLP(ffn, "relu", bias=False, dropout=0.1),
        dropout=0.1,
        version_1_0=True,
    )


def _preset_1_1(layers: int, width: int, heads: int, ffn: int) -> EncoderDecoderConfig:
    # Trained without dropout; the released configs have 0.1, for fine-tuning.
    return t5(
        vocab_size=32128,
        hidden_size=width,
        num_encoder_layers=layers,
        num_layers=layers,
        num_heads=heads,
        head_dim=64,
        feed_forward=GatedLinearUnit(ffn, "gelu_tanh", bias=False),
        dropout=0.0,
        version_1_0=False,
    )


OBJECTIVES = ("SpanCorruption",)
PRESETS: dict[str, EncoderDecoderConfig] = {
    "t5_small": _preset(6, 512, 8, 64, 2048),
    "t5_base": _preset(12, 768, 12, 64, 3072),
    "t5_large": _preset(24, 1024, 16, 64, 4096),
    "t5_3b": _preset(24, 1024, 32, 128, 16384),
    "t5_11b": _preset(24, 1024, 128, 128, 65536),
    "t5_v1_1_small": _preset_1_1(8, 512, 6, 1024),
    "t5_v1_1_base": _preset_1_1(12, 768, 12, 2048),
    "t5_v1_1_large": _preset_1_1(24, 1024, 16, 2816),
    "t5_v1_1_xl": _preset_1_1(24, 2048, 32, 5120),
    "t5_v1_1_xxl": _preset_1_1(24, 4096, 64, 10240),
}


def _attention(ours: str, norm: str, theirs: str, name: str) -> tuple[Weight, ...]:
    return (
        Weight(f"{norm}.weight", f"{theirs}.layer_norm.weight", "d -> d"),
        Weight(f"{ours}.q_proj.weight", f"{theirs}.{name}.q.weight", "(n h) d -> d n h"),
        Weight(f"{ours}.k_proj.weight", f"{theirs}.{name}.k.weight", "(n h) d -> d n h"),
        Weight(f"{ours}.v_proj.weight", f"{theirs}.{name}.v.weight", "(n h) d -> d n h"),
        Weight(f"{ours}.o_proj.weight", f"{theirs}.{name}.o.weight", "d (n h) -> n h d"),
    )


def weights(feed_forward: Callable[[str, str], tuple[Weight, ...]]) -> tuple[Weight, ...]:
    """The table; `feed_forward(ours, theirs)` are the weights of one, below its name here and its layer's there."""
    found = [Weight("embedding.weight", "shared.weight", "v d -> v d")]
    for ours, bias, their in (
        ("encoder_layers", "encoder_position_bias", "encoder"),
        ("layers", "position_bias", "decoder"),
    ):
        block = their + ".block.{layer}.layer."
        last = 2 if their == "decoder" else 1
        found += _attention(f"{ours}.attention", f"{ours}.input_layernorm", f"{block}0", "SelfAttention")
        if their == "decoder":
            norm = f"{ours}.cross_attention_layernorm"
            found += _attention(f"{ours}.cross_attention", norm, f"{block}1", "EncDecAttention")
        norm = f"{ours}.post_attention_layernorm.weight"
        found.append(Weight(norm, f"{block}{last}.layer_norm.weight", "d -> d"))
        found += feed_forward(f"{ours}.feed_forward", f"{block}{last}")
        # Of the first block, and used in all.
        table = f"{their}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(Weight(f"{bias}.weight", table, "b n -> b n"))
    return (
        *found,
        Weight("encoder_norm.weight", "encoder.final_layer_norm.weight", "d -> d"),
        Weight("norm.weight", "decoder.final_layer_norm.weight", "d -> d"),
        Weight("lm_head.weight", "lm_head.weight", "v d -> d v"),
    )


def plain(ours: str, theirs: str) -> tuple[Weight, ...]:
    """The weights of a plain feed-forward."""
    return (
        Weight(f"{ours}.up_proj.weight", f"{theirs}.wi.weight", "f d -> d f"),
        Weight(f"{ours}.down_proj.weight", f"{theirs}.wo.weight", "d f -> f d"),
    )


def _gated(ours: str, theirs: str) -> tuple[Weight, ...]:
    return (
        Weight(f"{ours}.gate_proj.weight", f"{theirs}.wi_0.weight", "f d -> d f"),
        Weight(f"{ours}.up_proj.weight", f"{theirs}.wi_1.weight", "f d -> d f"),
        Weight(f"{ours}.down_proj.weight", f"{theirs}.wo.weight", "d f -> f d"),
    )


def WEIGHTS(config: EncoderDecoderConfig) -> tuple[Weight, ...]:
    """Version 1.1 has other names for what both have."""
    kind = _gated if isinstance(config.feed_forward, GatedLinearUnit) else plain
    return weights(lambda ours, theirs: kind(ours, f"{theirs}.DenseReluDense"))


# What files may repeat.
_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
TIED = dict.fromkeys(_COPIES, "shared.weight")
# Part of the first releases, and never used.
IGNORED = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)

_A_T5 = "a Hugging Face T5"
ARCHITECTURES = ("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")
ALIASES = {
    "hidden_size": "d_model",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "head_dim": "d_kv",
}
_PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
_GATED = {"gated-gelu": "gelu_tanh", "gated-relu": "relu", "gated-silu": "silu"}


def read_shape(reader: ConfigReader, data: Mapping[str, Any]) -> dict[str, Any]:
    """What T5 and Switch Transformers have in common in their config.json, as arguments of `t5`."""
    take = reader.take
    reader.only(is_encoder_decoder=True, is_decoder=False)
    num_layers = take("num_layers", int)
    num_decoder_layers = take("num_decoder_layers", int, num_layers)
    reader.only(decoder_layers=num_decoder_layers)
    return {
        "vocab_size": take("vocab_size", int),
        "hidden_size": take("d_model", int),
        "num_encoder_layers": num_layers,
        "num_layers": num_decoder_layers,
        "num_heads": take("num_heads", int),
        "head_dim": take("d_kv", int),
        "max_positions": take("n_positions", int, 512),
        "eps": take("layer_norm_epsilon", float, 1e-6),
        "num_buckets": take("relative_attention_num_buckets", int, 32),
        "max_distance": take("relative_attention_max_distance", int, 128),
        "decoder_start_id": take("decoder_start_token_id", int, data.get("pad_token_id") or 0),
        "dropout": take("dropout_rate", float, 0.1),
    }


def from_hf(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a `config.json` of model_type `t5` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a T5", ARCHITECTURES, aliases=ALIASES)
    shape = read_shape(reader, data)
    size, name = reader.take("d_ff", int), reader.take("feed_forward_proj", str, "relu")
    inside = {"bias": False, "dropout": shape["dropout"]}
    if name in _GATED:
        # Both are written, and follow from feed_forward_proj.
        reader.only(dense_act_fn=name.removeprefix("gated-").replace("gelu", "gelu_new"), is_gated_act=True)
        feed_forward: FeedForward = GatedLinearUnit(size, _GATED[name], **inside)  # type: ignore[arg-type]
    elif name in _PLAIN:
        reader.only(dense_act_fn=name, is_gated_act=False)
        feed_forward = MLP(size, _PLAIN[name], **inside)  # type: ignore[arg-type]
    else:
        kinds = ", ".join((*_PLAIN, *_GATED))
        raise UserError(f"config.json has feed_forward_proj={name!r}, which is not supported for a T5: {kinds} are")
    tied = reader.take("tie_word_embeddings", bool, True)
    scaled = reader.take("scale_decoder_outputs", bool, tied)
    reader.finish()
    return t5(**shape, feed_forward=feed_forward, version_1_0=tied, scaled_logits=scaled)


def with_tensors(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config with a head of its own where a file of version 1.1 has one.

    Newer files say of all that the head is tied, and of version 1.1 that logits are not scaled; those made from
    scratch are tied, and those converted from the first releases are not.
    """
    if config.logit_scale == 1 and "lm_head.weight" in names:
        return dataclasses.replace(config, tie_embeddings=False)
    return config


def write_shape(config: EncoderDecoderConfig, family: str) -> dict[str, Any]:
    """The keys that `read_shape` reads, and those that say the same in every such file."""
    config = expect(config, EncoderDecoderConfig, family)
    attention, norm = expect(config.attention, GroupedQuery, family), expect(config.norm, RMSNorm, family)
    bias = expect(config.position_bias, RelativeBias, family)
    return {
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.hidden_size,
        "d_kv": attention.head_dim,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": attention.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": norm.eps,
        "relative_attention_num_buckets": bias.num_buckets,
        "relative_attention_max_distance": bias.max_distance,
        "decoder_start_token_id": config.decoder_start_id,
        "pad_token_id": config.decoder_start_id,
        "dropout_rate": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `T5ForConditionalGeneration`.

    Raises UserError for a model that is no T5, naming what it has that a T5 cannot have.
    """
    shape, feed_forward = write_shape(config, _A_T5), config.feed_forward
    names = _GATED if type(feed_forward) is GatedLinearUnit else _PLAIN
    if not isinstance(feed_forward, GatedLinearUnit):
        feed_forward = expect(feed_forward, MLP, _A_T5)
    by_activation = {activation: name for name, activation in names.items()}
    if feed_forward.activation not in by_activation:
        raise UserError(f"feed_forward.activation={feed_forward.activation} has no place in {_A_T5}")
    data = shape | {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_ff": feed_forward.intermediate_size,
        "feed_forward_proj": by_activation[feed_forward.activation],
        "scale_decoder_outputs": config.logit_scale != 1,
    }
    return checked(data, config, from_hf, _A_T5)
