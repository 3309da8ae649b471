"""Check the arguments of a call of a model: a mistake is refused with a sentence, not answered with wrong logits."""

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from llama_jax.config import UserError
from llama_jax.models.config import ModelConfig
from llama_jax.models.layout import Params, shapes

# Arguments that hold token ids; the others have the shape of these, or of their own ids.
IDS = ("tokens", "source", "target")
FLAGS = ("prefix", "mask", "source_mask")
SHAPE_OF = {"source_mask": "source"}


def checked_inputs(
    kind: type, config: ModelConfig, arguments: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, jax.Array | np.ndarray]:
    """Return the arguments of a call of a module of class `kind` by name, as int32 arrays.

    Types and shapes are always checked; values where they are at hand, which they are not within a function that JAX
    traces (`jit`, `grad`, `vmap`) nor on devices of other processes. Raises UserError.
    """
    given = _by_name(kind, arguments, named)
    shape_of: dict[str, tuple[int, ...]] = {}
    for name, x in given.items():
        _check_array(name, x)
        if name in IDS:
            shape_of[name] = x.shape
    first = next(iter(shape_of))
    for name, x in given.items():
        wanted = SHAPE_OF.get(name, first)
        if name not in IDS and x.shape != shape_of[wanted]:
            raise UserError(f"{name} of shape {x.shape} must have the shape {shape_of[wanted]} of {wanted}")
        if x.shape[0] != shape_of[first][0]:
            raise UserError(f"{name} of shape {x.shape} must have as many rows as {first}, {shape_of[first][0]}")
        if _at_hand(x):
            _check_values(config, name, np.asarray(x))
    _check_texts(config, given)
    return {name: x if x.dtype == np.int32 else x.astype(np.int32) for name, x in given.items()}


def _at_hand(x: Any) -> bool:
    """Return whether this process can read the values of an array now."""
    return isinstance(x, np.ndarray) or (not isinstance(x, Tracer) and x.is_fully_addressable)


def _by_name(kind: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are not None by name. Raises UserError for unknown and for missing ones."""
    names, kind = kind.inputs, kind.__name__
    required = [name for name in IDS if name in names]
    if len(arguments) > len(required):
        raise UserError(f"{kind} takes {' and '.join(required)} by place, others by name: {', '.join(names)}")
    given = dict(zip(required, arguments, strict=False))
    if wrong := [name for name in named if name not in names or name in given]:
        raise UserError(f"{wrong[0]}= is not an argument of {kind}, which takes {', '.join(names)}")
    given |= {name: x for name, x in named.items() if x is not None}
    if missing := [name for name in required if name not in given]:
        raise UserError(f"{kind} needs {missing[0]}, an integer array [batch, length]")
    return given


def _check_array(name: str, x: Any) -> None:
    """Raise UserError unless `x` is an array [B, T] of integers (or of booleans, where it marks tokens)."""
    wanted = "must be an integer array [batch, length]"
    if isinstance(x, str):
        raise UserError(f"{name}={x!r} is a text, and {wanted}: encode it with the model's tokenizer")
    if not isinstance(x, np.ndarray | jax.Array):
        raise UserError(f"{name} is a {type(x).__name__}, and {wanted}: give np.array(...) of rows of one length")
    is_kind = np.issubdtype(x.dtype, np.integer) or (name in FLAGS and x.dtype == bool)
    if x.ndim != 2 or not is_kind:
        hint = f": {name}[None] is a batch of one row" if x.ndim == 1 and is_kind else ""
        raise UserError(f"{name} of shape {x.shape} and type {x.dtype} {wanted}{hint}")
    if not x.size:
        raise UserError(f"{name} of shape {x.shape} is empty: give at least one row of one token")


def _check_values(config: Any, name: str, x: np.ndarray) -> None:
    """Raise UserError where a number of `x` is one that the model has nothing for."""
    if name in IDS:
        check_ids(config.vocab_size, x, name)
    elif name in FLAGS:
        _check_range(name, x, 2, "0 or 1")
    elif name == "positions":
        if (limit := config.position_limit) is not None:
            _check_range(name, x, limit, f"from 0 to {limit - 1}, the model's last position")
    elif name == "token_types" and config.num_token_types:
        _check_range(name, x, config.num_token_types, f"below num_token_types={config.num_token_types}")
    elif name == "segment_ids":
        _check_range(name, x, 2**31, "the number of a document, or 0 at padding")


def _check_texts(config: ModelConfig, given: dict[str, Any]) -> None:
    """Raise UserError where a text of several in a row, by which an encoder counts positions, has too many tokens."""
    marks = given.get("segment_ids", given.get("mask"))
    if config.generates or marks is None or "positions" in given or not _at_hand(marks):
        return
    if config.position_limit is not None and marks.shape[1] > config.position_limit:
        for row in np.asarray(marks):
            check_length(config, int(np.unique(row[row != 0], return_counts=True)[1].max(initial=0)))


def check_length(config: ModelConfig, length: int) -> None:
    """Raise UserError where a text is longer than the model's table of positions."""
    if config.position_limit is not None and length > config.position_limit:
        raise UserError(f"{length} tokens are more than the model's {config.position_limit} positions: shorten them")


def _check_range(name: str, x: np.ndarray, end: int, what: str) -> None:
    outside = (x < 0) | (x >= end)
    if outside.any():
        row, place = np.argwhere(outside)[0]
        raise UserError(f"{name}[{row}, {place}]={x[row, place]} must be {what}")


def check_ids(vocab_size: int, x: np.ndarray, name: str = "tokens") -> None:
    """Raise UserError where an id of `x` [B, T] is outside of the vocabulary."""
    # Two reductions, which cost less than a comparison of every id; ids of models are far below 2**31.
    if x.min() < 0 or x.max() >= vocab_size:
        row, place = np.argwhere((x < 0) | (x >= vocab_size))[0]
        raise UserError(
            f"token id {x[row, place]} is outside the model's vocabulary of {vocab_size}, in {name}[{row}, {place}]: "
            "use the model's own tokenizer"
        )


def check_params(config: ModelConfig, params: Params) -> None:
    """Raise UserError where parameters by name are not those of the config: missing, unknown or of another shape."""
    wanted, kind = shapes(config), type(config).__name__
    if missing := wanted.keys() - params.keys():
        raise UserError(f"the parameters lack '{min(missing)}', which this {kind} has: {len(missing)} are missing")
    if unknown := params.keys() - wanted.keys():
        raise UserError(f"the parameters have '{min(unknown)}', which this {kind} has not: leave it out")
    for name, shape in wanted.items():
        if params[name].shape != shape:
            raise UserError(f"parameter '{name}' has shape {params[name].shape}, and this {kind} needs {shape}")
