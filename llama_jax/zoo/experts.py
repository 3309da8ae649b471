"""What families with experts share: the tensors of their feed-forwards, dense layers, multi-token prediction."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from llama_jax.models import DecoderConfig, LayerOverride, MTPDecoderConfig
from llama_jax.nn import SigmoidTopK, SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings

# DeepSeek-V3, section 4.2, and GLM-4.5, section 2.4; the second is 0.1 in the last third of the training.
BIAS_UPDATE_RATE, MTP_WEIGHT = 1e-3, 0.3


def feed_forwards(shared: str = "shared_experts") -> tuple[WeightMapping, ...]:
    """Return the weights of dense feed-forwards, of routers with their experts, and of those called `shared`."""
    parts = (("", "", ""), ("shared.", f"{shared}.", ""), ("experts.", "experts.{expert}.", "e "))
    rows = {
        f"{ours}{name}": (f"{theirs}{name}", pattern.format(e=e))
        for ours, theirs, e in parts
        for name, pattern in (
            ("gate_proj", "{e}f d -> {e}d f"),
            ("up_proj", "{e}f d -> {e}d f"),
            ("down_proj", "{e}d f -> {e}f d"),
        )
    }
    return mappings({"router": ("gate", "e d -> d e")} | rows, "layers.feed_forward.", llama.LAYER + "mlp.")


CHOICE_BIAS = WeightMapping(
    "layers.feed_forward.router.choice_bias", llama.LAYER + "mlp.gate.e_score_correction_bias", "e -> e"
)


def dense_layers(layers: Sequence[int], size: int) -> tuple[LayerOverride, ...]:
    """Return the overrides of a model with experts whose `layers` have a SwiGLU of this width."""
    return (LayerOverride(tuple(layers), SwiGLU(intermediate_size=size, bias=False)),) if layers else ()


def write_dense(config: DecoderConfig) -> tuple[list[int], int]:
    """Return the layers without experts, and their width; where there are none, a usual one."""
    pieces = [(i, piece) for i, (_, piece) in enumerate(config.stacks()["layers"]) if isinstance(piece, SwiGLU)]
    return [i for i, _ in pieces], pieces[0][1].intermediate_size if pieces else 4 * config.hidden_size


def released[C: DecoderConfig](config: C, **experts: Any) -> C:
    """Return the model without what only its training needs, which no config.json can express.

    `experts` are fields of its feed-forward for which a family has no key.
    """
    own: Any = config.feed_forward
    if isinstance(own.router, SigmoidTopK):
        experts["router"] = dataclasses.replace(own.router, bias_update_rate=BIAS_UPDATE_RATE)
    own = dataclasses.replace(own, router_z_loss=0.0, dispatch="auto", **experts)
    config = dataclasses.replace(config, feed_forward=own)
    return dataclasses.replace(config, mtp_weight=MTP_WEIGHT) if isinstance(config, MTPDecoderConfig) else config


def balanced_jointly[C: DecoderConfig](config: C) -> C:
    """Return the model with the one balance loss of all layers that `router_aux_loss_coef` is for in transformers."""
    own: Any = config.feed_forward
    return dataclasses.replace(config, feed_forward=dataclasses.replace(own, balance_over="layers"))


def with_mtp(weights: tuple[WeightMapping, ...]) -> TensorNames:
    """Return the names with the further blocks of multi-token prediction, which files count as layers after the last.

    They repeat the tensors that they share with the model.
    """
    further = tuple(
        dataclasses.replace(w, name=f"mtp_{w.name}", source=w.source.replace("{layer}", "{after}"))
        for w in weights
        if w.name.startswith("layers.")
    )
    own = {
        **{name: (name, "d -> d") for name in ("enorm", "hnorm")},
        "eh_proj": ("eh_proj", "d c -> c d"),
        "norm": ("shared_head.norm", "d -> d"),
    }
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    # A copy may be of any layer: they follow wherever a model's layers end.
    tied = {f"model.layers.{after}.{name}": copies[name] for after in range(1000) for name in copies}
    return TensorNames((*weights, *further, *mappings(own, "mtp_layers.", "model.layers.{after}.")), llama.TIED | tied)


def with_mtp_tensors(config: MTPDecoderConfig, names: Collection[str]) -> MTPDecoderConfig:
    """Return the config without further blocks where a file has none of their tensors: `transformers` writes none."""
    after = f"model.layers.{config.num_layers}."
    return config if any(name.startswith(after) for name in names) else dataclasses.replace(config, num_mtp_layers=0)
