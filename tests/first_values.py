"""A model's first values, for tests of what comes after them."""

import jax
import numpy as np

from llama_jax.models import ModelConfig, abstract_params, initialize
from llama_jax.parallel import make_mesh


def first_values(config: ModelConfig) -> dict[str, jax.Array]:
    """Return first values on the current mesh, computed on one device for all meshes: it takes a second to compile."""
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        values = initialize(config, 0)
    return {name: jax.device_put(np.asarray(values[name]), a.sharding) for name, a in abstract_params(config).items()}
