"""A model with its weights: what notebooks and the sampler hold."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llama_jax.models.compute import Compute
from llama_jax.models.decoder import Decoder, ModelConfig
from llama_jax.models.layout import Params, assemble, flatten, init_params


class Model:
    """Callable on tokens; enters its own mesh and is jitted. `module` is the NNX module inside, with its layers."""

    def __init__(self, module: Decoder, mesh: Mesh | None = None):
        self.graphdef, self.state = nnx.split(module)
        self.mesh = mesh

    @property
    def module(self) -> Decoder:
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

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "b t"],
        *,
        positions: Int[Array | np.ndarray, "b t"] | None = None,
        segment_ids: Int[Array | np.ndarray, "b t"] | None = None,
        prefix: Int[Array | np.ndarray, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """int32 [B, T] -> float32 logits [B, T, V]."""
        return self.run(_logits, tokens, positions, segment_ids, prefix)

    def run(self, function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
        """`jit(function)(module, *arguments, **static)` on the model's mesh; keyword arguments are static."""
        with self.on_mesh():
            return _run(function, self.graphdef, tuple(static.items()), self.state, *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(function: Callable[..., Any], graphdef: Any, static: tuple[tuple[str, Any], ...], state: Any, *arguments: Any):
    return function(nnx.merge(graphdef, state), *arguments, **dict(static))


def _logits(module: Decoder, tokens: Any, positions: Any, segment_ids: Any, prefix: Any) -> jax.Array:
    return module(tokens, positions=positions, segment_ids=segment_ids, prefix=prefix)


def build(config: ModelConfig, *, seed: int = 0, compute: Compute | None = None) -> Model:
    """A model with random weights on the current mesh (`jax.set_mesh`), or on one device."""
    mesh = jax.sharding.get_mesh()
    return from_params(config, initialize(config, seed), compute or Compute(), None if mesh.empty else mesh)


def initialize(config: ModelConfig, seed: int) -> Params:
    """`init_params` compiled, on the current mesh: always the same program, so always the same bits."""
    return _initializer(jax.default_backend())(config, seed)


@functools.cache
def _initializer(platform: str) -> Callable[[ModelConfig, int], Params]:
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
