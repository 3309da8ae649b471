"""Variants made equal in size: a width is adjusted until parameters, FLOPs or cache bytes are those of the baseline."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from llama_jax.ablation.variants import Variant
from llama_jax.config import UserError, leaves, override
from llama_jax.models import cache_bytes_per_token, num_parameters
from llama_jax.run_config import RunConfig

TOLERANCE = 0.01
MOST_PROBES = 40
# Widths that a quantity is adjusted by, the first that a config has.
WIDTHS = {
    "parameters": ("model.feed_forward.intermediate_size",),
    "flops": ("model.feed_forward.intermediate_size",),
    "cache_bytes": ("model.attention.head_dim", "model.attention.kv_lora_rank", "model.attention.v_head_dim"),
}

type Match = str | tuple[str, str] | Mapping[str, str] | None


QUANTITIES: dict[str, Callable[[RunConfig], float | None]] = {  # of a run's config; None: it has no such quantity
    "parameters": lambda config: num_parameters(config.model),
    "flops": lambda config: config.flops_per_token,
    "cache_bytes": lambda config: (
        cache_bytes_per_token(config.model, config.compute.jax_dtype) if config.model.generates else None
    ),
}


def asked_match(match: Any) -> tuple[str, str | None] | None:
    """Return (quantity, key or None) of the argument `match`. Raises UserError for another quantity."""
    if match is None:
        return None
    pair = next(iter(match.items())) if isinstance(match, Mapping) and len(match) == 1 else match
    quantity, key = (pair, None) if isinstance(pair, str) else pair if isinstance(pair, tuple | list) else (pair, None)
    if not isinstance(quantity, str) or quantity not in QUANTITIES:
        raise UserError(f"match={match!r} must be one of {', '.join(QUANTITIES)}, or (quantity, key)")
    return quantity, key


def matched(variant: Variant, target: float, quantity: str, key: str | None) -> tuple[Variant, dict[str, Any]]:
    """Return the variant with the width `key` at which its `quantity` is nearest to `target`, and what was adjusted.

    Raises UserError where it is not within 1 %.
    """
    keys = {name for name, annotation, _ in leaves(variant.config) if annotation is int}
    key = key or next((width for width in WIDTHS[quantity] if width in keys), None)
    if key not in keys:
        what = f"has no whole number '{key}'" if key else "has no width that match knows"
        raise UserError(f"variant '{variant.name}' {what}: give match=('{quantity}', KEY), such as {min(keys)}")
    if key in variant.changes:
        raise UserError(
            f"variant '{variant.name}' changes {key}, which match='{quantity}' adjusts: give "
            f"match=('{quantity}', KEY) with another key"
        )

    @functools.cache
    def measured(value: int) -> float | None:
        """Return the quantity at this width, None where the config does not allow it."""
        try:
            return QUANTITIES[quantity](override(variant.config, {key: value}, variant.components))
        except UserError:
            return None

    value, got = _nearest(measured, next(v for k, _, v in leaves(variant.config) if k == key), target)
    if abs(got - target) > TOLERANCE * target:
        raise UserError(
            f"variant '{variant.name}' cannot have {target:,.0f} {quantity.replace('_', ' ')} within 1 %: the nearest "
            f"is {got:,.0f} at {key}={value}; take another key in match=('{quantity}', KEY) or another base"
        )
    config = override(variant.config, {key: value}, variant.components)
    found = {"key": key, "value": value, "quantity": quantity, "target": target, "got": got}
    return dataclasses.replace(variant, config=config), found


def _nearest(measured: Callable[[int], float | None], start: int, target: float) -> tuple[int, float]:
    """Return (value, quantity) of a whole number at which a growing quantity is nearest to `target`, from `start` on.

    Quantities of widths are nearly affine: the line through the ends of the bracket finds it in a few probes.
    """
    seen: dict[int, float] = {}

    def probe(value: int) -> tuple[int, float]:
        """Return the first width from `value` on that is allowed, or below it, and its quantity."""
        for near in (*range(value, value + 8), *range(value - 1, max(value - 9, 0), -1)):
            if (found := measured(near)) is not None:
                seen[near] = found
                return near, found
        raise UserError(f"no width near {value} is possible: give another key to match")

    if measured(start) == target:
        return start, target
    low, high = probe(1), probe(start)
    while high[1] < target and high[0] < start * 4096:
        low, high = high, probe(2 * high[0])
    for _ in range(MOST_PROBES):
        if high[0] - low[0] <= 1 or not low[1] < target < high[1]:
            break
        share = (target - low[1]) / (high[1] - low[1])
        guess = min(max(low[0] + round(share * (high[0] - low[0])), low[0] + 1), high[0] - 1)
        found = probe(guess)
        if found[0] in (low[0], high[0]):  # only some widths are allowed, such as even ones: the last few in turn
            _ = [probe(value) for value in range(max(low[0], high[0] - 16), high[0])]
            break
        low, high = (found, high) if found[1] <= target else (low, found)
    return min(seen.items(), key=lambda item: (abs(item[1] - target), item[0]))
