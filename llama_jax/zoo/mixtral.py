"""Mixtures of experts of decoders: Mixtral (arXiv 2401.04088) and GLaM (Du et al. 2021, arXiv 2112.06905)."""

import dataclasses
from collections.abc import Mapping

from llama_jax.config import Json, UserError
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import Experts, GatedLinearUnit, GroupedQuery, GShardRouter, RelativeBias, RMSNorm, SoftmaxTopK
from llama_jax.zoo import llama
from llama_jax.zoo.experts import balanced_jointly
from llama_jax.zoo.reading import CAUSAL, ConfigReader, Key
from llama_jax.zoo.registry import Family, MetaFiles, Presets
from llama_jax.zoo.rope import read_rope
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

_BALANCE = 0.02  # weight of the load-balance loss in Mistral's releases


def _experts(intermediate_size: int, num_experts: int, top_k: int, load_balance_loss: float) -> Experts:
    return Experts(
        num_experts=num_experts,
        intermediate_size=intermediate_size,
        router=SoftmaxTopK(top_k, normalize=True),
        activation="silu",
        gated=True,
        load_balance_loss=load_balance_loss,
        balance_over="layers",
    )


# Llama's blocks with eight SwiGLU experts, two of them for each token.
PRESETS: dict[str, DecoderConfig] = {
    "mixtral_8x7b": llama.llama_like(
        vocab_size=32_000,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        feed_forward=_experts(14_336, num_experts=8, top_k=2, load_balance_loss=_BALANCE),
        max_positions=32_768,
        eps=1e-5,
        theta=1_000_000.0,
    ),
}


def _table(before: str, expert: str) -> tuple[WeightMapping, ...]:
    """Return the weights of a router and its experts; `before` and `expert` are prefixes of their tensors."""
    gate_up, down = "e f d -> e d f", "e d f -> e f d"
    return mappings(
        {
            "router": (f"{before}gate", "e d -> d e"),
            "experts.gate_proj": (f"{before}{expert}.w1", gate_up),
            "experts.up_proj": (f"{before}{expert}.w3", gate_up),
            "experts.down_proj": (f"{before}{expert}.w2", down),
        },
        "layers.feed_forward.",
    )


_EXPERT = "experts.{expert}"
_ATTENTION = {name: row[:2] for name, row in llama.ATTENTION.items()}  # without biases
WEIGHTS = (
    *mappings(llama.ENDS | llama.HEAD),
    *mappings(llama.NORMS | _ATTENTION, "layers.", llama.LAYER),
    *_table(llama.LAYER + "block_sparse_moe.", _EXPERT),
)
# Names of newer code.
RENAMES = (
    (r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight"),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
)
# In Mistral's own files, with the rotary pairs interleaved as in Meta's.
META_WEIGHTS = (
    *(w for w in llama.META_WEIGHTS if "feed_forward" not in w.name),
    *_table("layers.{layer}.feed_forward.", _EXPERT),
)


def _read(reader: ConfigReader, fields: Json) -> DecoderConfig:
    reader.activation("hidden_act", "silu", only="silu")
    reader.only(moe_frequency=1)
    rope = read_rope(reader, fields["max_positions"], 1_000_000.0)
    names = ("intermediate_size", "num_experts", "top_k", "load_balance_loss")
    experts = _experts(**{name: fields.pop(name) for name in names})
    return llama.llama_like(**fields, **rope, feed_forward=experts)


def from_meta(params: Json, shapes: Mapping[str, tuple[int, ...]]) -> DecoderConfig:
    """Return the model of Mistral's own `params.json`; the shapes of the tensors show what it leaves out.

    Raises UserError for a key that is not known.
    """
    choice, first = params.get("moe"), "layers.0.feed_forward.experts.0.w1.weight"
    if not isinstance(choice, dict) or {"num_experts", "num_experts_per_tok"} != choice.keys():
        raise UserError(f"params.json has moe={choice!r}, which must be num_experts and num_experts_per_tok")
    if first not in shapes:
        raise UserError(f"the weights lack '{first}'")
    dense = llama.from_meta(
        {key: value for key, value in params.items() if key != "moe"},
        {**shapes, "layers.0.feed_forward.w1.weight": shapes[first]},
    )
    experts = _experts(shapes[first][0], choice["num_experts"], choice["num_experts_per_tok"], _BALANCE)
    return dataclasses.replace(dense, feed_forward=experts)


MIXTRAL = Family(
    name="mixtral",
    title="Mixtral",
    label="a Mixtral",
    presets=PRESETS,
    architectures=("MixtralForCausalLM", "MixtralModel"),
    keys=llama.keys(
        Key("num_local_experts", "feed_forward.num_experts", int, 8),
        Key("num_experts_per_tok", "feed_forward.router.top_k", int, 2),
        Key("router_aux_loss_coef", "feed_forward.load_balance_loss", float, 0.001),
        Key("sliding_window", "attention.window", int, None),
        kv_heads=8,
        max_positions=131_072,
        eps=1e-5,
    ),
    read=_read,
    write=llama.write,
    aliases={"num_experts": "num_local_experts"},
    harmless=CAUSAL | {"router_jitter_noise"},
    names=TensorNames(WEIGHTS, llama.TIED, renames=RENAMES),
    released=balanced_jointly,
    meta=MetaFiles(TensorNames(META_WEIGHTS, llama.META_TIED), from_meta),
)


def _glam(num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, head_dim: int) -> DecoderConfig:
    """Return a GLaM: every other layer has 64 experts, two of them for each token.

    From the paper: the sizes (table 4), experts of two matrices in every other layer, dense layers whose first matrix
    is a GELU-gated pair (section 4), top-2 routing as in GShard, the balance loss of 0.01 (section 5.1), 1024
    positions, a vocabulary of 256K. These sum to 1.16T parameters, 96.6B of them active, as in the paper, with the
    embedding shared. Not from the paper: RMS norms without biases; GShard's capacity of 2T/E, which GLaM's does not
    name; one relative bias for all layers, where GLaM has Transformer-XL's in each. Its weights were never released.
    """
    experts = Experts(
        num_experts=64,
        intermediate_size=intermediate_size,
        router=GShardRouter(),
        activation="gelu_tanh",
        gated=False,
        capacity_factor=1.0,
        load_balance_loss=0.01,
    )
    return DecoderConfig(
        vocab_size=256_000,
        hidden_size=hidden_size,
        num_layers=num_layers,
        max_positions=1024,
        attention=GroupedQuery(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            rope=None,
            qkv_bias=False,
            out_bias=False,
        ),
        feed_forward=GatedLinearUnit(intermediate_size, activation="gelu_tanh", bias=False),
        norm=RMSNorm(eps=1e-6),
        tie_embeddings=True,
        overrides=(LayerOverride(tuple(range(1, num_layers, 2)), experts),),
        position_bias=RelativeBias(num_heads, num_buckets=32, max_distance=128, bidirectional=False),
    )


GLAM = Presets(name="glam", title="GLaM", presets={"glam_64b_64e": _glam(64, 8192, 32_768, 128, 128)})
