"""DeepSeek-V3 (arXiv 2412.19437): V2 with experts balanced by a bias, eight-bit files and multi-token prediction."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.models import MTPDecoderConfig
from llama_jax.nn import LatentAttention, SigmoidTopK, YarnScaling
from llama_jax.zoo import Weight, deepseek_v2
from llama_jax.zoo.reading import ConfigReader, checked

BIAS_UPDATE_RATE = 1e-3  # section 4.2
# Section 4.2 too: 0.1 in the last third of the training.
MTP_WEIGHT = 0.3

SIZES: dict[str, Any] = deepseek_v2.RELEASED | {
    "vocab_size": 129_280,
    "num_layers": 61,
    "hidden_size": 7168,
    "num_heads": 128,
    "q_lora_rank": 1536,
    "scaling": YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0),
    "num_dense": 3,
    "dense_size": 18432,
    "num_experts": 256,
    "num_shared": 1,
    "expert_size": 2048,
    "router": SigmoidTopK(
        top_k=8, normalize=True, scaling=2.5, num_groups=8, top_groups=4, bias_update_rate=BIAS_UPDATE_RATE
    ),
    "load_balance_loss": 1e-4,
}
PRESETS: dict[str, MTPDecoderConfig] = {"deepseek_v3": MTPDecoderConfig(**deepseek_v2.fields(**SIZES))}

_BIAS = Weight(
    "layers.feed_forward.router.choice_bias", "model.layers.{layer}.mlp.gate.e_score_correction_bias", "e -> e"
)
_AFTER = "model.layers.{after}."


def with_mtp(weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The table with the further blocks of multi-token prediction, which files count as layers after the last."""
    further = [
        dataclasses.replace(w, name=f"mtp_{w.name}", source=w.source.replace("{layer}", "{after}"))
        for w in weights
        if w.name.startswith("layers.")
    ]
    return (
        *weights,
        *further,
        Weight("mtp_layers.enorm.weight", _AFTER + "enorm.weight", "d -> d"),
        Weight("mtp_layers.hnorm.weight", _AFTER + "hnorm.weight", "d -> d"),
        Weight("mtp_layers.eh_proj.weight", _AFTER + "eh_proj.weight", "d c -> c d"),
        Weight("mtp_layers.norm.weight", _AFTER + "shared_head.norm.weight", "d -> d"),
    )


MAIN_WEIGHTS = (*deepseek_v2.WEIGHTS, _BIAS)
WEIGHTS = with_mtp(MAIN_WEIGHTS)
# The further blocks repeat what they share; they stand wherever the layers end.
TIED = deepseek_v2.TIED | {
    f"model.layers.{after}.{name}": original
    for after in range(1000)
    for name, original in (
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("shared_head.head.weight", "lm_head.weight"),
    )
}


def read(reader: ConfigReader) -> dict[str, Any]:
    """The fields of an `MTPDecoderConfig`."""
    reader.only(scoring_func="sigmoid", topk_method="noaux_tc", rope_interleave=True)
    take = reader.take
    router = SigmoidTopK(
        top_k=take("num_experts_per_tok", int),
        normalize=take("norm_topk_prob", bool, True),
        scaling=take("routed_scaling_factor", float, 2.5),
        num_groups=take("n_group", int, 8),
        top_groups=take("topk_group", int, 4),
        bias_update_rate=BIAS_UPDATE_RATE,
    )
    further = {"num_mtp_layers": take("num_nextn_predict_layers", int, 0), "mtp_weight": MTP_WEIGHT}
    defaults = {"num_dense": 3, "q_lora_rank": deepseek_v2.Q_LORA_RANK}
    return deepseek_v2.read(reader, router, **defaults) | further


ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV3Model")


def from_hf(data: Mapping[str, Any]) -> MTPDecoderConfig:
    """The model that a `config.json` of model_type `deepseek_v3` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = deepseek_v2.reader_of(data, "a DeepSeek-V3", ARCHITECTURES)
    config = MTPDecoderConfig(**read(reader))
    reader.finish()
    return config


def with_tensors(config: MTPDecoderConfig, names: Collection[str]) -> MTPDecoderConfig:
    """The config without further blocks where a file has nothing of them: `transformers` writes none, whatever its
    config says."""
    config = deepseek_v2.with_tensors(config, names)
    after = f"model.layers.{config.num_layers}."
    return config if any(name.startswith(after) for name in names) else dataclasses.replace(config, num_mtp_layers=0)


def write(config: MTPDecoderConfig, family: str, attention_type: type) -> dict[str, Any]:
    """The keys of a `config.json` that V3 and V3.2 have."""
    return deepseek_v2.write(config, family, attention_type, SigmoidTopK) | {
        "num_nextn_predict_layers": getattr(config, "num_mtp_layers", 0),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def as_released(config: MTPDecoderConfig) -> MTPDecoderConfig:
    """The model without what only its training knows, which no config.json can say."""
    config = deepseek_v2.as_released(config, bias_update_rate=BIAS_UPDATE_RATE)
    return dataclasses.replace(config, mtp_weight=MTP_WEIGHT) if isinstance(config, MTPDecoderConfig) else config


def to_hf(config: MTPDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `DeepseekV3ForCausalLM`.

    Raises UserError for a model that is no DeepSeek-V3, naming what it has that such a one cannot have.
    """
    family = "a Hugging Face DeepSeek-V3"
    data = write(config, family, LatentAttention)
    data |= {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    return checked(data, as_released(config), from_hf, family)
