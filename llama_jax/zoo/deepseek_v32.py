"""DeepSeek-V3.2: V3 whose attention reads only what an indexer chooses ("DeepSeek-V3.2-Exp", 2025)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_jax.models import MTPDecoderConfig
from llama_jax.nn import LatentAttention, SparseLatentAttention
from llama_jax.zoo import Weight, deepseek_v2, deepseek_v3
from llama_jax.zoo.deepseek_v3 import TIED as TIED, with_tensors as with_tensors
from llama_jax.zoo.reading import checked


def _sparse(fields: dict[str, Any], num_heads: int, head_dim: int, topk: int) -> dict[str, Any]:
    latent = fields["attention"]
    sizes = {f.name: getattr(latent, f.name) for f in dataclasses.fields(LatentAttention)}
    sparse = SparseLatentAttention(**sizes, num_index_heads=num_heads, index_head_dim=head_dim, index_topk=topk)
    return fields | {"attention": sparse}


PRESETS: dict[str, MTPDecoderConfig] = {
    "deepseek_v32": MTPDecoderConfig(
        **_sparse(deepseek_v2.fields(**deepseek_v3.SIZES), num_heads=64, head_dim=128, topk=2048)
    )
}

_INDEXER = "model.layers.{layer}.self_attn.indexer."
WEIGHTS = deepseek_v3.with_mtp(
    (
        *deepseek_v3.MAIN_WEIGHTS,
        # Its rotary part comes first, in halves as ours.
        Weight("layers.attention.indexer.q_proj.weight", _INDEXER + "wq_b.weight", "(n h) c -> c n h"),
        Weight("layers.attention.indexer.k_proj.weight", _INDEXER + "wk.weight", "h d -> d h"),
        Weight("layers.attention.indexer.k_norm.weight", _INDEXER + "k_norm.weight", "h -> h"),
        Weight("layers.attention.indexer.k_norm.bias", _INDEXER + "k_norm.bias", "h -> h"),
        Weight("layers.attention.indexer.weights_proj.weight", _INDEXER + "weights_proj.weight", "n d -> d n"),
    )
)


ARCHITECTURES = ("DeepseekV32ForCausalLM", "DeepseekV32Model")


def from_hf(data: Mapping[str, Any]) -> MTPDecoderConfig:
    """The model that a `config.json` of model_type `deepseek_v32` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = deepseek_v2.reader_of(data, "a DeepSeek-V3.2", ARCHITECTURES)
    sizes = [reader.take(key, int) for key in ("index_n_heads", "index_head_dim", "index_topk")]
    config = MTPDecoderConfig(**_sparse(deepseek_v3.read(reader), *sizes))
    # Said by other keys already.
    kinds = ["sparse" if piece is config.feed_forward else "dense" for _, piece in config.stacks()["layers"]]
    reader.only(mlp_layer_types=kinds, layer_types=["indexed_attention"] * config.num_layers)
    reader.finish()
    return config


def to_hf(config: MTPDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `DeepseekV32ForCausalLM`.

    Raises UserError for a model that is no DeepSeek-V3.2, naming what it has that such a one cannot have.
    """
    family = "a Hugging Face DeepSeek-V3.2"
    data = deepseek_v3.write(config, family, SparseLatentAttention)
    attention = config.attention
    assert isinstance(attention, SparseLatentAttention)
    data |= {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "index_n_heads": attention.num_index_heads,
        "index_head_dim": attention.index_head_dim,
        "index_topk": attention.index_topk,
    }
    released = dataclasses.replace(
        deepseek_v3.as_released(config), attention=dataclasses.replace(attention, index_loss_weight=0.0)
    )
    return checked(data, released, from_hf, family)
