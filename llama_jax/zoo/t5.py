"""T5 (arXiv 1910.10683), version 1.0 with ReLU and 1.1 with gated GELU (arXiv 2002.05202), and Switch Transformers.

Sizes from the released configs; the counts they give are tested to the digit. Attention scores are not divided by
sqrt(head_dim), positions are a bias on them, and the logits of the tied head of 1.0 are divided by sqrt(d). In Switch
Transformers (arXiv 2101.03961) every second feed-forward is a choice of one expert. mT5 (Xue et al. 2021, arXiv
2010.11934) is version 1.1 with a vocabulary for a hundred languages.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import (
    MLP,
    CrossAttention,
    Experts,
    FeedForward,
    GatedLinearUnit,
    GroupedQuery,
    RelativeBias,
    RMSNorm,
    SwitchRouter,
)
from llama_jax.zoo.reading import ConfigReader, Key, expect
from llama_jax.zoo.registry import Family
from llama_jax.zoo.weights import TensorNames, mappings


def t5(
    *,
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    dropout: float,
    version_1_0: bool,
    max_positions: int = 512,
    eps: float = 1e-6,
    num_buckets: int = 32,
    max_distance: int = 128,
    decoder_start_id: int = 0,
    scaled_logits: bool | None = None,
    **fields: Any,
) -> EncoderDecoderConfig:
    """Return a model of T5's pieces; `scaled_logits` None scales them in `version_1_0`, whose head is tied.

    `fields` are the others of `EncoderDecoderConfig`.
    """
    heads: Json = {
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
        hidden_size=hidden_size,
        max_positions=max_positions,
        attention=GroupedQuery(rope=None, **heads),
        cross_attention=CrossAttention(**heads),
        norm=RMSNorm(eps=eps),
        tie_embeddings=version_1_0,
        logit_scale=max(hidden_size, 1) ** -0.5 if scaled else 1.0,
        position_bias=RelativeBias(num_heads, num_buckets, max_distance, bidirectional=False),
        encoder_position_bias=RelativeBias(num_heads, num_buckets, max_distance, bidirectional=True),
        decoder_start_id=decoder_start_id,
        dropout=dropout,
        final_dropout=dropout,
        **fields,
    )


def _preset(
    layers: int, width: int, heads: int, head_dim: int, ffn: int, *, version_1_0: bool = True
) -> EncoderDecoderConfig:
    # Version 1.1 was trained without dropout; the released configs have 0.1, for fine-tuning.
    relu, gated = MLP(ffn, "relu", bias=False, dropout=0.1), GatedLinearUnit(ffn, "gelu_tanh", bias=False)
    return t5(
        vocab_size=32128,
        hidden_size=width,
        num_encoder_layers=layers,
        num_layers=layers,
        num_heads=heads,
        head_dim=head_dim,
        feed_forward=relu if version_1_0 else gated,
        dropout=0.1 if version_1_0 else 0.0,
        version_1_0=version_1_0,
    )


_PRESETS: dict[str, EncoderDecoderConfig] = {
    "t5_small": _preset(6, 512, 8, 64, 2048),
    "t5_base": _preset(12, 768, 12, 64, 3072),
    "t5_large": _preset(24, 1024, 16, 64, 4096),
    "t5_3b": _preset(24, 1024, 32, 128, 16384),
    "t5_11b": _preset(24, 1024, 128, 128, 65536),
    "t5_v1_1_small": _preset(8, 512, 6, 64, 1024, version_1_0=False),
    "t5_v1_1_base": _preset(12, 768, 12, 64, 2048, version_1_0=False),
    "t5_v1_1_large": _preset(24, 1024, 16, 64, 2816, version_1_0=False),
    "t5_v1_1_xl": _preset(24, 2048, 32, 64, 5120, version_1_0=False),
    "t5_v1_1_xxl": _preset(24, 4096, 64, 64, 10240, version_1_0=False),
}
_MT5_PRESETS = {
    f"mt5_{size}": dataclasses.replace(_PRESETS[f"t5_v1_1_{size}"], vocab_size=250_112)
    for size in ("small", "base", "large", "xl", "xxl")
}


def _names(feed_forward: dict[str, tuple[str, ...]]) -> TensorNames:
    """Return the names of a family whose feed-forward has these rows, below its layer's name."""

    def attention(place: str, name: str, ours: str, norm: str) -> dict[str, tuple[str, ...]]:
        rows = {f"{ours}.{n}_proj": (f"{place}.{name}.{n}", "(n h) d -> d n h") for n in "qkv"}
        rows[f"{ours}.o_proj"] = (f"{place}.{name}.o", "d (n h) -> n h d")
        return rows | {norm: (f"{place}.layer_norm", "d -> d")}

    def inside(place: str) -> dict[str, tuple[str, ...]]:
        rows = {f"feed_forward.{n}": (f"{place}.{source}", *more) for n, (source, *more) in feed_forward.items()}
        return rows | {"post_attention_layernorm": (f"{place}.layer_norm", "d -> d")}

    own = attention("layer.0", "SelfAttention", "attention", "input_layernorm")
    cross = attention("layer.1", "EncDecAttention", "cross_attention", "cross_attention_layernorm")
    outside = {
        "embedding": ("shared", "v d -> v d"),
        # The table of the first block is used in all.
        "encoder_position_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "b n -> b n"),
        "position_bias": ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias", "b n -> b n"),
        "encoder_norm": ("encoder.final_layer_norm", "d -> d"),
        "norm": ("decoder.final_layer_norm", "d -> d"),
        "lm_head": ("lm_head", "v d -> d v"),
    }
    weights = (
        *mappings(outside),
        *mappings(own | inside("layer.1"), "encoder_layers.", "encoder.block.{layer}."),
        *mappings(own | cross | inside("layer.2"), "layers.", "decoder.block.{layer}."),
    )
    # Tensors that files may repeat.
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    # Part of the first releases, and never used.
    ignored = (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",)
    return TensorNames(weights, dict.fromkeys(copies, "shared.weight"), ignored)


_IN, _OUT = "f d -> d f", "d f -> f d"
_NAMES_1_0 = _names({"up_proj": ("DenseReluDense.wi", _IN), "down_proj": ("DenseReluDense.wo", _OUT)})
_NAMES_1_1 = _names(
    {
        "gate_proj": ("DenseReluDense.wi_0", _IN),
        "up_proj": ("DenseReluDense.wi_1", _IN),
        "down_proj": ("DenseReluDense.wo", _OUT),
    }
)
_PLAIN = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}
_GATED = {"gated-gelu": "gelu_tanh", "gated-relu": "relu", "gated-silu": "silu"}


def _read(reader: ConfigReader, fields: Json) -> Json:
    """Return the arguments of `t5` that T5 and Switch Transformers have in common."""
    reader.only(is_encoder_decoder=True, is_decoder=False)
    if fields["num_layers"] is None:
        fields["num_layers"] = fields["num_encoder_layers"]
    padding = reader.data.get("pad_token_id") or 0  # begins an answer where no key names another token
    if fields["decoder_start_id"] is None:
        fields["decoder_start_id"] = padding
    reader.only(decoder_layers=fields["num_layers"])
    return fields


def _read_t5(reader: ConfigReader, fields: Json, usual: str = "relu") -> EncoderDecoderConfig:
    size, name = fields.pop("intermediate_size"), reader.take("feed_forward_proj", str, usual)
    inside = {"bias": False, "dropout": fields["dropout"]}
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
    scaled = reader.take("scale_decoder_outputs", bool, fields["version_1_0"])
    return t5(**_read(reader, fields), feed_forward=feed_forward, scaled_logits=scaled)


def _read_mt5(reader: ConfigReader, fields: Json) -> EncoderDecoderConfig:
    reader.only(scale_decoder_outputs=False)
    return dataclasses.replace(_read_t5(reader, fields, "gated-gelu"), logit_scale=1.0)


def _write(config: EncoderDecoderConfig) -> Json:
    return {"is_encoder_decoder": True, "pad_token_id": config.decoder_start_id}


def _write_t5(config: EncoderDecoderConfig, label: str) -> Json:
    feed_forward: Any = config.feed_forward
    names = _GATED if type(feed_forward) is GatedLinearUnit else _PLAIN
    by_activation = {activation: name for name, activation in names.items()}
    if feed_forward.activation not in by_activation:
        raise UserError(f"feed_forward.activation={feed_forward.activation} has no place in {label}")
    own = {
        "feed_forward_proj": by_activation[feed_forward.activation],
        "scale_decoder_outputs": config.logit_scale != 1,
    }
    return _write(config) | own


def _with_tensors(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """Return the config with a separate head where a file of version 1.1 has one.

    Newer files have a tied head in their config whatever it is, and for version 1.1 that logits are not scaled; those
    made from scratch are tied, and those converted from the first releases are not.
    """
    if config.logit_scale == 1 and "lm_head.weight" in names:
        return dataclasses.replace(config, tie_embeddings=False)
    return config


T5 = Family(
    name="t5",
    title="T5",
    label="a T5",
    objectives=("SpanCorruption",),
    presets=_PRESETS,
    architectures=("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
    keys=(
        Key("vocab_size", "vocab_size", int),
        Key("d_model", "hidden_size", int),
        Key("d_kv", "attention.head_dim", int),
        Key("d_ff", "feed_forward.intermediate_size", int),
        Key("num_layers", "num_encoder_layers", int),
        Key("num_decoder_layers", "num_layers", int, None),
        Key("num_heads", "attention.num_heads", int),
        Key("n_positions", "max_positions", int, 512),
        Key("layer_norm_epsilon", "norm.eps", float, 1e-6),
        Key("relative_attention_num_buckets", "position_bias.num_buckets", int, 32),
        Key("relative_attention_max_distance", "position_bias.max_distance", int, 128),
        Key("decoder_start_token_id", "decoder_start_id", int, None),
        Key("dropout_rate", "dropout", float, 0.1),
        Key("tie_word_embeddings", "tie_embeddings", bool, True, argument="version_1_0"),
    ),
    read=_read_t5,
    write=_write_t5,
    aliases={
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    # Version 1.1 has other names for what both have.
    names=lambda config: _NAMES_1_1 if isinstance(config.feed_forward, GatedLinearUnit) else _NAMES_1_0,
    with_tensors=_with_tensors,
)
_TIED = "tie_word_embeddings"
MT5 = dataclasses.replace(
    T5,
    name="mt5",
    title="mT5",
    label="an mT5",
    presets=_MT5_PRESETS,
    architectures=("MT5ForConditionalGeneration", "MT5Model"),
    # Released files say that nothing is tied; transformers 5 writes that it is, whatever the weights are.
    keys=tuple(dataclasses.replace(key, default=False) if key.key == _TIED else key for key in T5.keys),
    read=_read_mt5,
)


def _switch(
    size: int, steps: tuple[int, int], experts: Experts, *, num_encoder_layers: int, num_layers: int, **shape: Any
) -> EncoderDecoderConfig:
    """Return a model with experts in the second of every `steps` (encoder, decoder) layers, or in all."""

    def sparse(count: int, step: int) -> tuple[LayerOverride, ...]:
        layers = tuple(i for i in range(count) if step == 1 or i % step == 1)
        return (LayerOverride(layers, experts),) if layers else ()

    return t5(
        **shape,
        num_encoder_layers=num_encoder_layers,
        num_layers=num_layers,
        feed_forward=MLP(size, "relu", bias=False, dropout=shape["dropout"]),
        encoder_overrides=sparse(num_encoder_layers, steps[0]),
        overrides=sparse(num_layers, steps[1]),
    )


def _experts(size: int, num_experts: int, jitter: float, bias: bool, **options: Any) -> Experts:
    router = SwitchRouter(jitter, bias=bias)
    return Experts(num_experts, size, router, activation="relu", gated=False, balance_over="batch", **options)


def _read_switch(reader: ConfigReader, fields: Json) -> EncoderDecoderConfig:
    take, size = reader.take, fields.pop("intermediate_size")
    reader.only(
        feed_forward_proj="relu",
        dense_act_fn="relu",
        is_gated_act=False,
        add_cross_attention=False,
        router_dtype="float32",
        router_ignore_padding_tokens=False,
        router_type="tokens_masked",
        num_selected_experts=1,
    )
    experts = _experts(
        size,
        take("num_experts", int, 8),
        jitter=take("router_jitter_noise", float, 0.01),
        bias=take("router_bias", bool, False),
        capacity=take("expert_capacity", int, 64),
        load_balance_loss=take("router_aux_loss_coef", float, 0.001),
        router_z_loss=take("router_z_loss_coef", float, 0.001),
    )
    fields = _read(reader, fields)
    steps = []
    for name, layers in (("encoder", fields["num_encoder_layers"]), ("decoder", fields["num_layers"])):
        sparse = take(f"num_sparse_{name}_layers", int, 3)
        # The original code has one sparse layer in a model that asks for none, too.
        steps.append(take(f"{name}_sparse_step", int, layers // sparse if sparse else layers))
    return _switch(size, (steps[0], steps[1]), experts, **fields)


def _write_switch(config: EncoderDecoderConfig, label: str) -> Json:
    stacks = {"encoder": config.stacks()["encoder_layers"], "decoder": config.stacks()["layers"]}
    sparse = {name: [i for i, (_, f) in enumerate(s) if isinstance(f, Experts)] for name, s in stacks.items()}
    found = [f for s in stacks.values() for _, f in s if isinstance(f, Experts)]
    experts = expect(found[0] if found else None, Experts, label=label)
    router = expect(experts.router, SwitchRouter, label=label)
    feed_forward: Any = config.feed_forward
    data = _write(config) | {
        "dense_act_fn": feed_forward.activation,
        "num_experts": experts.num_experts,
        "router_jitter_noise": router.jitter,
        "router_bias": router.bias,
        "router_dtype": "float32",
        "expert_capacity": experts.capacity,
        "router_aux_loss_coef": experts.load_balance_loss,
        "router_z_loss_coef": experts.router_z_loss,
    }
    for name, layers in sparse.items():
        data[f"num_sparse_{name}_layers"] = len(layers)
        data[f"{name}_sparse_step"] = layers[1] - layers[0] if len(layers) > 1 else len(stacks[name])
    return data


def _released_switch(config: EncoderDecoderConfig) -> EncoderDecoderConfig:
    """Return the model with the balance loss of the paper, the only one that a config.json can express."""

    def balanced(override: LayerOverride) -> LayerOverride:
        piece = override.piece
        piece = dataclasses.replace(piece, balance_over="batch") if isinstance(piece, Experts) else piece
        return dataclasses.replace(override, piece=piece)

    encoder, decoder = (tuple(map(balanced, layers)) for layers in (config.encoder_overrides, config.overrides))
    return dataclasses.replace(config, encoder_overrides=encoder, overrides=decoder)


SWITCH_TRANSFORMERS = dataclasses.replace(
    T5,
    name="switch_transformers",
    title="Switch Transformers",
    label="a Switch Transformer",
    presets={
        "switch_base_8": _switch(
            3072,
            (2, 2),
            _experts(3072, 8, jitter=0.01, bias=False, capacity=64, load_balance_loss=0.001, router_z_loss=0.001),
            vocab_size=32128,
            hidden_size=768,
            num_encoder_layers=12,
            num_layers=12,
            num_heads=12,
            head_dim=64,
            dropout=0.1,
            version_1_0=True,
        ),
    },
    architectures=("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel"),
    read=_read_switch,
    write=_write_switch,
    names=_names(
        {
            "up_proj": ("mlp.wi", _IN),
            "down_proj": ("mlp.wo", _OUT),
            "router": ("mlp.router.classifier", "e d -> d e", "e -> e"),
            "experts.up_proj": ("mlp.experts.expert_{expert}.wi", "e f d -> e d f"),
            "experts.down_proj": ("mlp.experts.expert_{expert}.wo", "e d f -> e f d"),
        }
    ),
    released=_released_switch,
    with_tensors=None,
)
