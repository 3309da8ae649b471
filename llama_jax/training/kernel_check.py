"""The attention kernel beside the reference, before the first step, on what this run will ask of it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.models import Compute, ModelConfig, abstract_params, assemble
from llama_jax.nn import Call, ForwardContext, attend, calls_of_attend, choose, unzigzag, zigzag
from llama_jax.parallel import axes_of, mesh_axis_sizes, replicate, shard
from llama_jax.training.step import Batch, model_batch

# Scores that the reference may hold on a device at a time; where its all would be more, it goes by blocks of queries.
SCORES = 1 << 26
NUM_DOCUMENTS = 5  # in a row of what is compared


class PreflightFailed(RuntimeError):
    """The attention kernel computes something else than the reference."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far a kernel is from the reference: root mean square of the difference, as a share of the reference's own."""

    kernel: str
    errors: dict[str, float]


def preflight(config: ModelConfig, compute: Compute, batch: Batch) -> list[Agreement]:
    """Compares each kind of attention that the model calls with the float32 reference, forward and gradients.

    Same shapes, dtype, mask and sharding as a train step of this batch on the current mesh; the values are random, and
    so are the documents where rows are packed, and the prefix where there is one. Raises PreflightFailed where they
    disagree by more than rounding does.
    """
    agreements = []
    for call in attention_calls(config, compute, batch):
        agreement = compare(call)
        if agreement is None:
            continue
        limit = tolerance(call.q.dtype)
        for name, error in agreement.errors.items():
            if not error <= limit:
                raise PreflightFailed(
                    f"attention kernel '{agreement.kernel}' disagrees with the reference: {name} differs by "
                    f"{error:.2g} of its size (rounding explains {limit:.2g}), for queries {call.q.str_short()} and "
                    f"keys {call.k.str_short()}: set compute.attention_kernel to another kernel, or reference"
                )
        agreements.append(agreement)
    return agreements


def tolerance(dtype: Any) -> float:
    """What rounding explains: some units in the last place."""
    eps = float(jnp.finfo(dtype).eps)
    return 4 * eps if eps > 1e-4 else 100 * eps


def attention_calls(config: ModelConfig, compute: Compute, batch: Batch) -> list[Call]:
    """The different calls of `attend` in a forward pass of the batch; nothing is computed."""

    def hidden(params: Any, batch: Batch) -> list[jax.Array]:
        key = jax.random.key(0) if config.needs_rng else None
        model = assemble(config, params, dataclasses.replace(compute, remat="none"))
        terms, _ = model.loss_terms(model_batch(batch, config), key=key)
        return [term.hidden for term in terms]

    with calls_of_attend() as calls:
        jax.eval_shape(hidden, abstract_params(config), batch)
    return list({str(call): call for call in calls}.values())


def compare(call: Call) -> Agreement | None:
    """The kernel that this call takes beside the reference; None where that is the reference itself."""
    kernel = choose(call.q, call.k, call.ctx, softcap=call.softcap, dropout=call.dropout)
    if kernel == "reference":
        return None
    fast, exact = _Attention(call, kernel), _Attention(call, "reference")
    masks = {name: None if x is None else jnp.asarray(x, jnp.int32) for name, x in _drawn(call).items()}
    return Agreement(kernel, {name: float(error) for name, error in _errors(fast, exact, masks).items()})


def _drawn(call: Call) -> dict[str, np.ndarray | None]:
    """Documents and prefixes, where the call has them: unlike the batch's own, certain to be several in every row.

    The keys of another sequence are of the same documents, though of some there may be none in either. Every second row
    ends with padding.
    """
    mask, rng = call.ctx.mask, np.random.default_rng(0)
    rows, lengths = call.q.shape[0], {"segment_ids": call.q.shape[1], "key_segment_ids": call.k.shape[2]}
    drawn: dict[str, np.ndarray | None] = {}
    for i, (name, length) in enumerate(lengths.items()):
        begins = np.sort(rng.integers(length, size=(rows, NUM_DOCUMENTS)), axis=1)
        begins[:, 0], begins[:, 1] = 0, np.clip(begins[:, 1], 1, max(1, length // 3))
        begins[:, 2 + i] = begins[:, 3 + i]  # of one document nothing
        segments = (begins[:, :, None] <= np.arange(length)).sum(1)
        segments[::2, length - length // 8 :] = 0
        drawn[name] = None if getattr(mask, name) is None else segments
    drawn["prefix"] = None if mask.prefix is None else rng.random((rows, call.k.shape[2])) < 0.25
    return drawn


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Attention with its gradients, of arrays in the order of the text."""

    call: Call
    kernel: str

    def __hash__(self) -> int:
        return hash((str(self.call), self.kernel))

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, masks: dict[str, Any]) -> jax.Array:
        ctx = dataclasses.replace(self.call.ctx, kernel=self.kernel, is_token=None, dropout_key=None).with_mask(**masks)
        if self.kernel == "reference":
            return self._by_blocks(q, k, v, ctx)
        k, v = (zigzag(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
        y = attend(zigzag(q), k, v, jax.tree.map(zigzag, ctx), scale=self.call.scale)
        return unzigzag(y)

    def _by_blocks(self, q: jax.Array, k: jax.Array, v: jax.Array, ctx: ForwardContext) -> jax.Array:
        rows, length, heads, _ = q.shape
        split = np.prod([mesh_axis_sizes()[axis] for i in (0, 2) for axis in axes_of(q)[i]], dtype=int)
        num_blocks = 1
        while rows * heads * length * k.shape[2] // (split * num_blocks) > SCORES and length % (2 * num_blocks) == 0:
            num_blocks *= 2
        # Whole along the sequence, where a context axis would split it.
        q, size = shard(q, "batch", None, "heads", None), length // num_blocks
        mask = ctx.mask
        ctx = ctx.with_mask(prefix=None if mask.prefix is None else replicate(mask.prefix))

        @jax.checkpoint
        def block(start: jax.Array) -> jax.Array:
            part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
            index = jnp.broadcast_to(start + jnp.arange(size), (rows, size))
            of_block = ctx.with_mask(query_places=index)
            if mask.segment_ids is not None:
                own = replicate(mask.segment_ids)
                keys = own if mask.key_segment_ids is None else replicate(mask.key_segment_ids)
                of_block = of_block.with_mask(segment_ids=part(own), key_segment_ids=keys)
            return attend(part(q), k, v, of_block, scale=self.call.scale)

        blocks = jax.lax.map(block, jnp.arange(num_blocks) * size)
        y = jnp.concatenate([blocks[i] for i in range(num_blocks)], axis=1)
        return shard(y, "batch", "sequence", "heads", None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _errors(fast: _Attention, exact: _Attention, masks: dict[str, Any]) -> dict[str, jax.Array]:
    call = fast.call
    keys = jax.random.split(jax.random.key(0), 4)
    queries, kv = ("batch", "sequence", "heads", None), ("batch", "kv_heads", "sequence", None)

    def random(key: jax.Array, aval: Any, names: tuple[str | None, ...]) -> jax.Array:
        return shard(jax.random.normal(key, aval.shape, jnp.float32).astype(aval.dtype), *names)

    result = jax.ShapeDtypeStruct((*call.q.shape[:3], call.v.shape[3]), call.q.dtype)
    q, direction = random(keys[0], call.q, queries), random(keys[3], result, queries)
    k, v = random(keys[1], call.k, kv), random(keys[2], call.v, kv)

    def with_gradients(attention: _Attention, dtype: Any) -> tuple[jax.Array, ...]:
        inputs = q.astype(dtype), k.astype(dtype), v.astype(dtype)
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, masks), *inputs)
        out = shard(out, *queries)
        return (out, *pull(direction.astype(out.dtype)))

    found = with_gradients(fast, call.q.dtype)
    wanted = with_gradients(exact, jnp.float32)
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
    results = "the result", "the gradient of the queries", "the gradient of the keys", "the gradient of the values"
    sizes = [(rms(a.astype(jnp.float32) - b), rms(b)) for a, b in zip(found, wanted, strict=True)]
    # Where nothing is seen both are 0, and agree.
    return {name: jnp.where(off > 0, off / size, off) for name, (off, size) in zip(results, sizes, strict=True)}
