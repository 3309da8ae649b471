"""A train state as the flat dict of arrays that a checkpoint has."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.training import TrainState


def param_key(name: str) -> str:
    """Return the name of a parameter's array on disk."""
    return f"params.{name}"


def to_disk(state: TrainState) -> dict[str, Any]:
    """Return a train state as the flat dict that is saved, with buffers among the parameters."""
    paths, _ = jax.tree_util.tree_flatten_with_path(state.opt_state)
    optimizer = {"optimizer." + jax.tree_util.keystr(path, simple=True, separator="."): value for path, value in paths}
    return (
        {"step": state.step}
        | {param_key(name): value for name, value in (state.params | state.buffers).items()}
        | optimizer
    )


def from_disk(flat: dict[str, Any], like: TrainState) -> TrainState:
    """Return the train state of a flat dict, in the structure of `like`: the inverse of `to_disk`."""
    opt_keys = [key for key in to_disk(like) if key.startswith("optimizer.")]
    return TrainState(
        step=flat["step"],
        params={name: flat[param_key(name)] for name in like.params},
        opt_state=jax.tree.unflatten(jax.tree.structure(like.opt_state), [flat[key] for key in opt_keys]),
        buffers={name: flat[param_key(name)] for name in like.buffers},
    )


def not_finite(state: TrainState) -> str | None:
    """Return the name of the first array of a state that has a number which is not finite, None without one."""
    arrays = {name: x for name, x in to_disk(state).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    found = np.asarray(_finite(list(arrays.values())))
    return None if found.all() else list(arrays)[int(found.argmin())]


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    # 0 times a number is finite where the number is; XLA:CPU adds faster than it counts.
    return jnp.stack([jnp.isfinite((x * 0).sum()) for x in arrays])
