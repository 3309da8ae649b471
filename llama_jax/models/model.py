"""A model with its weights: what notebooks and the sampler hold."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llama_jax.models.compute import Compute
from llama_jax.models.config import ModelConfig
from llama_jax.models.layout import Params, assemble, flatten, init_params
from llama_jax.nn import seed_value


class Model:
    """Callable on tokens; enters its own mesh and is jitted. `module` is the NNX module inside, with its layers."""

    def __init__(self, module: Any, mesh: Mesh | None = None):
        self.graphdef, self.state = nnx.split(module)
        self.mesh = mesh

    @property
    def module(self) -> Any:
        return nnx.merge(self.graphdef, self.state)

    @property
    def config(self) -> ModelConfig:
        return self.module.config

    @property
    def layers(self) -> Any:
        """The blocks, by index."""
        return self.module.layers

    def params(self) -> Params:
        """Parameters by canonical name, stacked over layers."""
        with self.on_mesh():
            return flatten(self.module)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def __call__(self, *arguments: Any, **named: Any) -> Float[Array, "b t v"]:
        """The module's own call, jitted: token ids [B, T] (and what else it takes) -> float32 logits [B, T, V]."""
        return self.run(_call, arguments, named)

    def hidden_states(self, *arguments: Any, **named: Any) -> dict[str, list[Float[Array, "b t d"]]]:
        """What every block gives for the arguments of a call, by stack."""
        return self.run(_hidden_states, arguments, named)

    def run(self, function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
        """`jit(function)(module, *arguments, **static)` on the model's mesh; keyword arguments are static."""
        with self.on_mesh():
            return _run(function, self.graphdef, tuple(static.items()), self.state, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function: Callable[..., Any], graphdef: Any, static: tuple[tuple[str, Any], ...], state: Any, *arguments: Any):
    return function(nnx.merge(graphdef, state), *arguments, **dict(static))


def _call(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> jax.Array:
    return module(*arguments, **named)


def _hidden_states(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> dict[str, list[jax.Array]]:
    return module.hidden_states(*arguments, **named)


def build(config: ModelConfig, *, seed: int = 0, compute: Compute | None = None) -> Model:
    """A model with random weights on the current mesh (`jax.set_mesh`), or on one device; `seed` is below 2**64."""
    mesh = jax.sharding.get_mesh()
    return from_params(config, initialize(config, seed), compute or Compute(), None if mesh.empty else mesh)


def initialize(config: ModelConfig, seed: int) -> Params:
    """`init_params` compiled, on the current mesh: always the same program, so always the same bits."""
    return _initializer(jax.default_backend())(config, seed_value(seed))


@functools.cache
def _initializer(platform: str) -> Callable[[ModelConfig, np.ndarray], Params]:
    # Runs once: fully optimized, XLA:CPU compiles random bits for a second per shape, and they come no faster.
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return jax.jit(init_params, static_argnums=0, compiler_options=options)


def from_params(config: ModelConfig, params: Params, compute: Compute, mesh: Mesh | None = None) -> Model:
    """A model of parameters by name."""
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        graphdef, state = _unrolled(config, compute, params)
    return Model(nnx.merge(graphdef, state), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unrolled(config: ModelConfig, compute: Compute, params: Params) -> Any:
    return nnx.split(assemble(config, params, compute, scan=False))
