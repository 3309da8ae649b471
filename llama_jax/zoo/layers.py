"""Layers that take turns: `layer_types` of config.json, and the overrides of a config."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from llama_jax.config import Component, Json, UserError
from llama_jax.models import LayerOverride, TransformerConfig
from llama_jax.nn import Mixer
from llama_jax.zoo.reading import ConfigReader

FULL, SLIDING = "full_attention", "sliding_attention"


def every(period: int, num_layers: int, kind: str = FULL, others: str = SLIDING) -> tuple[str, ...]:
    """Return types of layers, the last of every `period` of which is of this `kind`."""
    return tuple(others if (i + 1) % period else kind for i in range(num_layers))


def read_layer_types(
    reader: ConfigReader, num_layers: int, usual: Sequence[str], known: Sequence[str] = (FULL, SLIDING)
) -> tuple[str, ...]:
    """Return the type of every layer, one of `known`; the `usual` ones where the file names none.

    Raises UserError for another type, and for another number of them.
    """
    found = reader.take("layer_types", list, list(usual))
    if len(found) != num_layers or any(kind not in known for kind in found):
        raise UserError(
            f"config.json has layer_types={found!r}, which should be {num_layers} of {', '.join(known)} "
            f"for {reader.label}"
        )
    return tuple(found)


def in_turns[C: TransformerConfig, K: Hashable](config: C, types: Sequence[K], pieces: Mapping[K, Component]) -> C:
    """Return the model whose layers have the piece of their type: attentions, or feed-forwards.

    That of the first layer is the model's own, the others are overrides, in the order of their first layers.
    """
    field = "attention" if isinstance(pieces[types[0]], Mixer) else "feed_forward"
    first, *others = dict.fromkeys(pieces[kind] for kind in types)
    overrides = [
        LayerOverride(tuple(i for i, kind in enumerate(types) if pieces[kind] == piece), piece) for piece in others
    ]
    changes: dict[str, Any] = {field: first, "overrides": (*config.overrides, *overrides)}
    return dataclasses.replace(config, **changes)


def read_windows(reader: ConfigReader, usual: Sequence[str], window: int | None) -> tuple[str, ...]:
    """Return the type of every layer, as `read_layer_types` does; without a window all must be full."""
    known = (FULL,) if window is None else (FULL, SLIDING)
    return read_layer_types(reader, len(usual), [FULL if window is None else kind for kind in usual], known)


def windowed[C: TransformerConfig](config: C, types: Sequence[str], window: int | None) -> C:
    """Return the model whose sliding layers attend to `window` keys."""
    attention: Any = config.attention
    return in_turns(config, types, {FULL: attention, SLIDING: dataclasses.replace(attention, window=window)})


def _types(config: TransformerConfig) -> list[str]:
    """Return the type of every layer: sliding where its attention has a window."""
    return [FULL if getattr(mixer, "window", None) is None else SLIDING for mixer, _ in config.layer_pieces()]


def write_turns(config: TransformerConfig) -> Json:
    """Return `layer_types`, and as `sliding_window` the window of the first layer that has one."""
    windows = (getattr(mixer, "window", None) for mixer, _ in config.layer_pieces())
    window = next((window for window in windows if window is not None), None)
    return {"layer_types": _types(config), "sliding_window": window}


def mixers_by_type(config: TransformerConfig) -> dict[str, Any]:
    """Return an attention of each type that the layers have."""
    return dict(zip(_types(config), (mixer for mixer, _ in config.layer_pieces()), strict=True))
