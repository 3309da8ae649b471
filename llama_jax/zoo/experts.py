"""What families with experts share: the tensors of their feed-forwards, dense layers, multi-token prediction."""

import dataclasses
from collections.abc import Collection, Sequence

from llama_jax.models import DecoderConfig, LayerOverride, MTPDecoderConfig
from llama_jax.nn import SwiGLU
from llama_jax.zoo import llama
from llama_jax.zoo.weights import TensorNames, WeightMapping, mappings


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
