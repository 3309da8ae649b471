"""The context of a forward pass, of flat fields."""

import dataclasses
from typing import Any

from llama_jax.nn import ForwardContext, Mask

MASK_FIELDS = {field.name for field in dataclasses.fields(Mask)}


def context_of(*causal_and_window: Any, **fields: Any) -> ForwardContext:
    """Return a context with these fields of its own and of its mask; inputs of segment 0 are padding."""
    mask = Mask(*causal_and_window, **{name: x for name, x in fields.items() if name in MASK_FIELDS})
    if mask.segment_ids is not None:
        fields = {"is_token": mask.segment_ids > 0} | fields
    return ForwardContext(mask, **{name: x for name, x in fields.items() if name not in MASK_FIELDS})
