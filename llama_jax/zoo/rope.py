"""Rotary positions of Hugging Face's config.json, both ways, for all families."""

import dataclasses
import math
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.nn import LinearScaling, Llama3Scaling, LongRopeScaling, RopeScaling, YarnScaling
from llama_jax.zoo.known_keys import is_off
from llama_jax.zoo.layers import FULL, SLIDING
from llama_jax.zoo.reading import ConfigReader, typed

_MISSING: Any = object()
# Scalings by rope_type. Their fields are keys of rope_scaling, but for one name; of the others these may be absent.
_SCALINGS: dict[str, type[Any]] = {
    "linear": LinearScaling,
    "llama3": Llama3Scaling,
    "longrope": LongRopeScaling,
    "yarn": YarnScaling,
}
_OLD_LENGTH = "original_max_position_embeddings"
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}


def _pop_rope(rest: Json, kind: str, key: str, type_: Any, default: Any = _MISSING) -> Any:
    """Take a key of rope_scaling out of `rest`. Raises UserError where it is missing or of another type."""
    if key not in rest and default is _MISSING:
        raise UserError(f"config.json has rope_type={kind!r} without '{key}'")
    return typed(rest.pop(key, default), type_, f"config.json has rope_scaling.{key}")


def _read_scaling(rest: Json, kind: str, max_positions: int) -> RopeScaling | None:
    """Return the scaling of a rope_type, and take its keys out of `rest`."""
    if kind == "dynamic":
        # Frequencies change where a text is longer than max_positions, and no text here becomes that long.
        _pop_rope(rest, kind, "factor", float, 1.0)
    if kind in ("default", "dynamic"):
        return None
    if kind not in _SCALINGS:
        raise UserError(
            f"config.json has rope_type={kind!r}, which is not supported: dynamic, {', '.join(_SCALINGS)} are"
        )
    if kind == "longrope":
        return _read_longrope(rest, max_positions)
    fields = {}
    for name in (field.name for field in dataclasses.fields(_SCALINGS[kind])):
        if name == "original_max_positions":
            fields[name] = _pop_rope(rest, kind, _OLD_LENGTH, int, max_positions)
        elif name == "truncate":
            fields[name] = _pop_rope(rest, kind, name, bool, True)
        else:
            fields[name] = _pop_rope(rest, kind, name, float, _YARN_DEFAULTS.get(name, _MISSING))
    scaling = _SCALINGS[kind](**fields)
    if kind == "yarn":
        # Hugging Face computes it where it is not given; another value would be another model.
        magnitude = scaling.magnitude()
        if abs(_pop_rope(rest, kind, "attention_factor", float, magnitude) - magnitude) > 1e-6:
            raise UserError("config.json has its own rope_scaling.attention_factor, which is not supported")
    return scaling


def _read_longrope(rest: Json, max_positions: int) -> LongRopeScaling:
    kind = "longrope"
    short, long = (
        tuple(typed(x, float, f"config.json has rope_scaling.{name}") for x in _pop_rope(rest, kind, name, list))
        for name in ("short_factor", "long_factor")
    )
    original = _pop_rope(rest, kind, _OLD_LENGTH, int, max_positions)
    usual = long_magnitude(_pop_rope(rest, kind, "factor", float, max_positions / original), original)
    return LongRopeScaling(short, long, original, _pop_rope(rest, kind, "attention_factor", float, usual))


def long_magnitude(factor: float, original: int) -> float:
    """Return LongRoPE's factor of cos and sin, where a config.json has none, for a context `factor` times as long."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _read(settings: Json, max_positions: int, theta: float, before: int | None = None) -> Json:
    """Return `theta`, `scaling` and `partial` (or None) of one rope's settings. Raises UserError for unknown ones."""
    rest = {key: value for key, value in settings.items() if not is_off(value) or key == "truncate"}
    kind = typed(rest.pop("rope_type", rest.pop("type", "default")), str, "config.json has rope_scaling.rope_type")
    rest.pop("type", None)
    rest.pop("finetuned", None)  # whether the weights were trained with it
    if kind == "su" or "short_factor" in rest:
        kind = "longrope"  # names of Phi-3's first releases
    if before is not None and kind in ("llama3", "longrope", "yarn"):
        rest[_OLD_LENGTH] = before
    if kind in ("default", "linear", "dynamic"):
        rest.pop(_OLD_LENGTH, None)  # of the weights before; these kinds do not read it
    theta = _pop_rope(rest, kind, "rope_theta", float, theta)
    scaling = _read_scaling(rest, kind, max_positions)
    partial = _pop_rope(rest, kind, "partial_rotary_factor", float) if "partial_rotary_factor" in rest else None
    if rest:
        raise UserError(
            f"config.json has rope_scaling.{next(iter(rest))}, which is not supported with {kind!r}; where it changes "
            f"no logit, pass --ignore-config-keys rope_scaling.{next(iter(rest))}"
        )
    return {"theta": theta, "scaling": scaling, "partial": partial}


def read_rope(
    reader: ConfigReader,
    max_positions: int,
    theta: float = 10_000.0,
    *,
    partial: float = 1.0,
    other_partials: bool = False,
) -> Json:
    """Return `theta` and `scaling` of both spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    `partial` is the share of a head that the family rotates, and the only one that may be asked for; with
    `other_partials` the usual one, and what was asked for is returned too. Dynamic NTK, which changes nothing up to
    `max_positions`, counts as none. Raises UserError for a kind that is not supported and for keys that are not known.
    """
    theta, before = reader.take("rope_theta", float, theta), reader.take(_OLD_LENGTH, int, None)
    found = reader.take("partial_rotary_factor", float, partial)
    old, new = reader.take("rope_scaling", dict, {}), reader.take("rope_parameters", dict, {})
    if old and new and old != new:
        raise UserError("config.json has both rope_scaling and rope_parameters, and they differ")
    rope = _read(old | new, max_positions, theta, before)
    asked = rope.pop("partial")
    asked = found if asked is None else asked
    if not other_partials and {asked, found} != {partial}:
        raise UserError(f"config.json has partial_rotary_factor={asked}, and {reader.label} can only have {partial}")
    return rope | ({"partial": asked} if other_partials else {})


def read_ropes(
    reader: ConfigReader, max_positions: int, theta: float, local_key: str = "rope_theta", local_theta: float = 0.0
) -> dict[str, Json]:
    """Return `theta` and `scaling` of the layers with all keys and of those with a window, by `layer_types`.

    Both spellings are read: `rope_theta` and `rope_scaling` for the former with `local_key` for the latter, or
    `rope_parameters` of each type. Thetas that the file lacks are `theta` and `local_theta`, by default the other.
    Raises UserError where the spellings differ, and as `read_rope` does.
    """
    full, local = reader.take("rope_theta", float, None), reader.take(local_key, float, None)
    usual = {FULL: theta, SLIDING: local_theta or theta}
    found = {FULL: dict(reader.take("rope_scaling", dict, {})), SLIDING: {}}
    for kind, base in ((FULL, full), (SLIDING, local)):
        found[kind] |= {} if base is None else {"rope_theta": base}
    new = reader.take("rope_parameters", dict, {})
    for kind, settings in new.items():
        if kind not in found or not isinstance(settings, dict):
            raise UserError(f"config.json has rope_parameters.{kind}, which should be settings of {FULL} or {SLIDING}")
        if any(settings.get(key, value) != value for key, value in found[kind].items()):
            raise UserError(f"config.json has rope_parameters.{kind}, and other keys for the same that differ")
        found[kind] |= settings
    ropes = {kind: _read(settings, max_positions, usual[kind]) for kind, settings in found.items()}
    for rope in ropes.values():
        if rope.pop("partial") not in (None, 1.0):
            raise UserError(f"config.json has partial_rotary_factor, and {reader.label} can only have 1.0")
    return ropes


def write_rope(attention: Any, label: str) -> Json:
    """Return `rope_theta` and `rope_scaling` of an attention's rotary positions.

    Raises UserError where it has none, or a scaling that Hugging Face does not have.
    """
    if attention.rope is None:
        raise UserError(f"rope=None has no place in {label}")
    scaling: Any = attention.rope.scaling
    written = None
    if scaling is not None:
        kind = next((name for name, scaling_type in _SCALINGS.items() if type(scaling) is scaling_type), None)
        if kind is None:
            raise UserError(f"{type(scaling).__name__} has no place in {label}")
        keys = {"original_max_positions": _OLD_LENGTH}
        fields = {keys.get(name, name): value for name, value in dataclasses.asdict(scaling).items()}
        lists = {key: list(value) for key, value in fields.items() if isinstance(value, tuple)}
        written = {"rope_type": kind} | fields | lists
    return {"rope_theta": attention.rope.theta, "rope_scaling": written}


def write_ropes(attentions: dict[str, Any], label: str) -> Json:
    """Return `rope_parameters` of the attentions by type of layer, and `rope_theta` and `rope_scaling` of FULL."""
    old = {kind: write_rope(attention, label) for kind, attention in attentions.items()}
    new = {
        kind: {"rope_type": "default", "rope_theta": found["rope_theta"]} | (found["rope_scaling"] or {})
        for kind, found in old.items()
    }
    return {**old.get(FULL, {}), "rope_parameters": new}
