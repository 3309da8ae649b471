"""The base of all models, and a model with its weights: what notebooks and the sampler hold."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import UserError
from llama_jax.models.config import Compute, ModelConfig, TransformerConfig
from llama_jax.models.forms import check_format, copy_pays, join_small, quantized
from llama_jax.models.inputs import check_length, check_params, checked_inputs
from llama_jax.models.layout import Params, assemble, flatten, init_params
from llama_jax.models.stack import Aux, Layers
from llama_jax.nn import Form, ForwardContext, Mask, PyTree, dropout, gather, matmul, multiplied, seed_value, zigzag
from llama_jax.parallel import axes_of, platform, shard

type Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A cross-entropy that training takes: `coefficient` times the weighted mean over all targets.

    name: its name among the metrics.
    hidden: [B, T, D], the head's inputs.
    targets: [B, T], the token whose logit should be high.
    weights: [B, T], the weight of each target; 0 where there is none.
    head: function of (hidden, head_weight) that returns float32 logits.
    head_weight: the head's parameters as they are stored.
    coefficient: factor of the term in the loss.
    """

    name: str
    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    head: Callable[[jax.Array, PyTree], jax.Array]
    head_weight: PyTree
    coefficient: float = 1.0


class Transformer(nnx.Module):
    """Parts by name and stacks of blocks; subclasses are decoders, encoders and encoder-decoders.

    A model with two stacks has parts whose names begin with `side`, `encoder_`; else it is empty.
    """

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "positions", "segment_ids", "prefix")
    """Names of the arguments of a call, token ids first."""
    embedding: Any

    def __init__(
        self, config: TransformerConfig, parts: dict[str, nnx.Module], stacks: dict[str, Layers], compute: Compute
    ):
        self.config, self.compute = config, compute
        self.part_names, self.stack_names = tuple(parts), tuple(stacks)
        self.head_copy: nnx.Variable | None = nnx.data(None)  # a tied head as [D, V], from which a CPU decodes
        for name, module in (parts | stacks).items():
            setattr(self, name, module)

    def part(self, name: str) -> Any:
        """Return a part, or None where this model has none of that name."""
        return getattr(self, name, None)

    def context(self, mask: Mask, **fields: Any) -> ForwardContext:
        """Return the context of a forward pass with this mask: segment 0 is padding, and the run names the kernels."""
        fields = {"is_token": None if mask.segment_ids is None else mask.segment_ids > 0} | fields
        kernel, strategy = self.compute.attention_kernel, self.compute.context
        return ForwardContext(mask, kernel=kernel, context_strategy=strategy, **fields)

    def run_stack(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"] | None,
        mask: Mask,
        *,
        side: str = "",
        add: Any = 0,
        source: tuple[jax.Array, ForwardContext] | None = None,
        key: jax.Array | None = None,
        outputs: list[jax.Array] | None = None,
    ) -> tuple[Float[Array, "b t d"], ForwardContext, Aux]:
        """Return final hidden states of whole rows, the context they were made with, and auxiliary arrays by name.

        Positions default to 0, 1, 2... Where a context axis splits the sequence, all arrays are in zigzag order.
        `add` is added to the embeddings; `source` is another sequence and the context of the attention to it; `key` is
        for dropout; the results of all blocks are appended to `outputs`.
        """
        if positions is None:
            check_length(self.config, tokens.shape[1])  # a table would give all tokens beyond it its last position
            positions = zigzag(jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
        ctx = self.row_context(mask, tokens.shape[1], key, side=side)
        x = self.embed(tokens, positions, ctx, side=side, add=add)
        layers = getattr(self, f"{side}layers")
        x, aux = layers(x, positions=positions, ctx=ctx, source=source, compute=self.compute, outputs=outputs)
        return self.final(x, ctx, side=side), ctx, aux

    def row_context(self, mask: Mask, length: int, key: jax.Array | None, *, side: str = "") -> ForwardContext:
        """Return the context of whole rows of this length, with the bias of their scores."""
        places = jnp.arange(length)
        return self.context(mask, position_bias=self.bias(places[None], places, side=side), dropout_key=key)

    def cache_context(
        self, length: int, cache: list[PyTree], lengths: Int[Array, " b"], is_token: Bool[Array, "b t"] | None
    ) -> tuple[Int[Array, "b t"], ForwardContext]:
        """Return positions and context of `length` more inputs in rows whose caches hold `lengths` tokens."""
        places, bias = lengths[:, None] + jnp.arange(length), None
        if self.part("position_bias") is not None:
            # Keys of places behind a row's end are masked, so their bias does not matter.
            num_keys = max(x.shape[2] for x in jax.tree.leaves(cache) if x.ndim == 4)  # keys are [B, K, S, H]
            bias = self.bias(places, jnp.arange(num_keys))
        ctx = self.context(Mask(query_places=places), is_token=is_token, position_bias=bias)
        if is_token is not None:  # padding has no position of its own, which could make a row a long one
            places = jnp.minimum(places, places[:, :1] + jnp.maximum(is_token.sum(axis=1)[:, None] - 1, 0))
        return places, ctx

    def bias(self, queries: Int[Array, "#b t"], keys: Int[Array, " s"], *, side: str = "") -> jax.Array | None:
        """Return the bias of the scores between these positions, [1 or B, N, T, S], or None."""
        part = self.part(f"{side}position_bias")
        return None if part is None else part(queries, keys)

    def embed(
        self,
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        ctx: ForwardContext,
        *,
        side: str = "",
        add: Any = 0,
    ) -> Float[Array, "b t d"]:
        """Return the first block's inputs: embeddings, scaled, with positions and `add`, normalised."""
        x = self.embedding(tokens, self.compute.jax_dtype)
        if self.config.embedding_scale != 1:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if (table := self.part(f"{side}positions")) is not None:
            x = x + table(positions, x.dtype)
        x = x + add
        if (norm := self.part(f"{side}embedding_norm")) is not None:
            x = norm(x)
        return dropout(x, self.config.dropout, ctx, f"{side}embedding")

    def final(self, x: Float[Array, "b t d"], ctx: ForwardContext, *, side: str = "") -> Float[Array, "b t d"]:
        """Return the last block's results, normalised where the blocks do not end with a norm."""
        norm = self.part(f"{side}norm")
        return x if norm is None else norm(x)

    def head_weight(self) -> PyTree:
        """Return the argument of `head`, as it is stored: [V, D] where tied, else [D, V]; transposing would copy it."""
        lm_head = self.part("lm_head")
        weight = (self.embedding if lm_head is None else lm_head).weight
        weight = weight if isinstance(weight, Form) else weight[...].astype(self.compute.jax_dtype)
        if (head_bias := self.part("head_bias")) is None:
            return weight
        bias = head_bias.bias[...]
        if isinstance(weight, Form) or axes_of(weight)[0 if lm_head is None else 1]:
            bias = shard(bias, "vocab")  # a fixed one is stored whole, and has to be split as the logits are
        return {"weight": weight, "bias": bias}

    def head(self, hidden: Float[Array, "b t d"], weight: PyTree) -> Float[Array, "b t v"]:
        """Return float32 logits."""
        weight, bias = (weight["weight"], weight["bias"]) if isinstance(weight, dict) else (weight, None)
        # Gathered here, so that the loss, which calls this for chunks of positions, keeps only the stored part.
        tied = self.part("lm_head") is None
        if tied and self.head_copy is not None:
            weight, tied = self.head_copy[...], False
        logits = multiplied(hidden, weight, 1) if isinstance(weight, Form) or not tied else None
        if logits is None:
            weight = weight[...].astype(hidden.dtype) if isinstance(weight, Form) else weight
            weight = gather(weight, ("vocab", "embed") if tied else ("embed", "vocab"))
            logits = matmul(hidden, weight, out_axis="vocab", transposed=tied, dtype=jnp.float32)
        if self.config.logit_scale != 1:
            logits = logits * self.config.logit_scale
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)
        if (cap := self.config.logit_softcap) is not None:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def logits(self, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
        """Return float32 logits of final hidden states."""
        return self.head(hidden, self.head_weight())

    def main_logits(self, **inputs: Any) -> Float[Array, "b _ c"]:
        """Return the float32 logits of a call with these arguments, as [B, T, V]."""
        return self(**inputs)  # type: ignore[operator]

    def loss_terms(self, batch: Batch, *, key: jax.Array | None = None) -> tuple[list[LossTerm], Aux]:
        """Return the terms of the loss, the main one first, and the layers' auxiliary arrays.

        `key` is the random key of dropout and the like; without one there is none.
        """
        raise NotImplementedError

    def main_term(self, hidden: jax.Array, batch: Batch) -> LossTerm:
        """Return the loss of the batch's targets by the head."""
        return LossTerm("loss", hidden, batch["targets"], batch["weights"], self.head, self.head_weight())


@no_type_check  # by the tests' import hook, which cannot check the annotations that are inherited
class _Graph(nnx.GraphDef):
    """A graph definition that computes its hash once: `jit` asks for it at every call, a millisecond for six layers."""

    @functools.cached_property
    def _hash(self) -> int:
        return nnx.GraphDef.__hash__(self)

    def __hash__(self) -> int:
        return self._hash


class Model:
    """A model with its weights: callable on tokens, on the mesh that it holds, and jitted.

    `module` is the NNX module inside, with its layers.
    """

    def __init__(self, module: Any, mesh: Mesh | None = None, *, quantize: str | None = None):
        graphdef, self.state = nnx.split(module)
        self.graphdef = _Graph(graphdef.nodes, graphdef.attributes, graphdef.num_leaves)
        self.mesh, self.quantize = mesh, quantize
        self.config: ModelConfig = module.config
        self._kind = type(module)

    @property
    def module(self) -> Any:
        """The NNX module."""
        return nnx.merge(self.graphdef, self.state)

    @property
    def layers(self) -> Any:
        """The blocks, by index."""
        return self.module.layers

    def quantized(self, format: str) -> "Model":
        """Return the model with its matrices in `format`: int8, int4 or fp8. Raises UserError where that cannot be."""
        check_format(self.config, format)
        if self.quantize is not None:
            raise UserError(f"the model is {self.quantize} already: load it without quantize")
        with self.on_mesh():
            module = nnx.merge(*quantized(self.graphdef, format, self.state))
        return Model(module, self.mesh, quantize=format)

    @functools.cached_property
    def for_decoding(self) -> "Model":
        """The model, on a CPU with copies of the matrices from which that decodes faster."""
        if self.mesh is not None or self.quantize is not None or platform() != "cpu" or not self.config.generates:
            return self
        module = self.module
        if copy_pays(self.config):
            module.head_copy = nnx.Variable(module.embedding.weight[...].astype(module.compute.jax_dtype).T)
        join_small(module, module.compute.jax_dtype)
        return Model(module)

    def params(self) -> Params:
        """Return parameters by name, stacked over layers. Raises UserError for a quantized model."""
        if self.quantize is not None:
            raise UserError(
                f"a model loaded with quantize={self.quantize} has no full weights to write, merge or convert: "
                "load it without quantize"
            )
        with self.on_mesh():
            return flatten(self.module)

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model's mesh is the current one."""
        return _on_mesh(self.mesh)

    def __call__(self, *arguments: Any, **named: Any) -> Float[Array, "b *t v"]:
        """Call the module, jitted: token ids [B, T] (and its other arguments) -> float32 logits [B, T, V].

        Logits of an encoder with a classifier are [B, C]. Raises UserError for arguments that the model has no answer
        to: other types and shapes, ids outside of the vocabulary, positions beyond a table of them. Within a function
        that JAX traces (`jit`, `grad`, `vmap`), and for arrays of several processes, only types and shapes are checked:
        there an id or position beyond a table is taken as its last one. Positions by a formula (rotary, sines) go on
        beyond `max_positions`.
        """
        return self.run(_method, self.inputs(*arguments, **named), name="__call__")

    def inputs(self, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Return the arguments of a call by name, as int32 arrays. Raises UserError as a call does."""
        return checked_inputs(self._kind, self.config, arguments, named)

    def hidden_states(self, *arguments: Any, **named: Any) -> dict[str, list[Float[Array, "b t d"]]]:
        """Return the results of every block for the arguments of a call, by stack."""
        return self.run(_method, self.inputs(*arguments, **named), name="hidden_states")

    def run(self, function: Callable[..., Any], *arguments: Any, **static: Any) -> Any:
        """Call `jit(function)(module, *arguments, **static)` on the model's mesh; keyword arguments are static."""
        with self.on_mesh():
            return _run(function, self.graphdef, tuple(static.items()), self.state, *arguments)


def _on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
    function: Callable[..., Any], graphdef: PyTree, static: tuple[tuple[str, Any], ...], state: PyTree, *arguments: Any
):
    return function(nnx.merge(graphdef, state), *arguments, **dict(static))


def _method(module: Any, inputs: dict[str, Any], *, name: str) -> Any:
    return getattr(module, name)(**inputs)


def build(config: ModelConfig, *, seed: int = 0, compute: Compute | None = None) -> Model:
    """Return a model with random weights on the current mesh (`jax.set_mesh`), or on one device.

    `seed` is below 2**64.
    """
    if not isinstance(config, ModelConfig):
        raise UserError(f"config={config!r} must be a ModelConfig: a DecoderConfig, or one of llama_jax.presets()")
    mesh = jax.sharding.get_mesh()
    return from_params(config, initialize(config, seed), compute or Compute(), None if mesh.empty else mesh)


def initialize(config: ModelConfig, seed: int) -> Params:
    """Return `init_params` compiled, on the current mesh: always the same program, so always the same bits."""
    return _initializer(jax.default_backend())(config, seed_value(seed))


@functools.cache
def _initializer(platform: str) -> Callable[[ModelConfig, np.ndarray], Params]:
    # Runs once: fully optimized, XLA:CPU compiles random bits for a second per shape, and they come no faster.
    options = {"xla_backend_optimization_level": 1} if platform == "cpu" else None
    return jax.jit(init_params, static_argnums=0, compiler_options=options)


def from_params(config: ModelConfig, params: Params, compute: Compute, mesh: Mesh | None = None) -> Model:
    """Return a model of parameters by name. Raises UserError where they are not exactly those of the config."""
    check_params(config, params)
    with _on_mesh(mesh):
        graphdef, state = _unrolled(config, compute, params)
    return Model(nnx.merge(graphdef, state), mesh)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unrolled(config: ModelConfig, compute: Compute, params: Params) -> Any:
    return nnx.split(assemble(config, params, compute, scan=False))
