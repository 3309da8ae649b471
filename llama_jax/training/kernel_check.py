"""Compare the attention kernel with the reference, before the first step, on the run's own shapes and masks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.models import Compute, ModelConfig, abstract_params, assemble
from llama_jax.nn import Call, ForwardContext, attend, calls_of_attend, choose, unzigzag, zigzag
from llama_jax.parallel import axes_of, mesh_axis_sizes, platform, replicate, shard
from llama_jax.training.step import Batch, model_batch

# Scores that the reference may have on a device at a time; where there are more, it works in blocks of queries.
SCORES = 1 << 26
NUM_DOCUMENTS = 5  # in a row of the comparison


class PreflightFailed(RuntimeError):
    """The attention kernel computes another result than the reference."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Distance of a kernel from the reference: root mean square of the difference, relative to the reference's."""

    kernel: str
    errors: dict[str, float]


def preflight(config: ModelConfig, compute: Compute, batch: Batch) -> list[Agreement]:
    """Compare each kind of attention that the model calls with the float32 reference, forward and gradients.

    Shapes, dtype, mask and sharding are those of a train step of this batch on the current mesh; the values are random,
    and so are the documents where rows are packed, and the prefix where there is one. Raises PreflightFailed where
    they disagree by more than rounding explains.
    """
    agreements: list[Agreement] = []
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
    """Return the relative error that rounding explains: some units in the last place."""
    eps = float(jnp.finfo(dtype).eps)
    return 4 * eps if eps > 1e-4 else 100 * eps


def attention_calls(config: ModelConfig, compute: Compute, batch: Batch) -> list[Call]:
    """Return the different calls of `attend` in a forward pass of the batch; nothing is computed."""

    def hidden(params: Any, batch: Batch) -> list[jax.Array]:
        key = jax.random.key(0) if config.needs_rng else None
        model = assemble(config, params, dataclasses.replace(compute, remat="none"))
        terms, _ = model.loss_terms(model_batch(batch, config), key=key)
        return [term.hidden for term in terms]

    with calls_of_attend() as calls:
        jax.eval_shape(hidden, abstract_params(config), batch)
    return list({str(call): call for call in calls}.values())


def compare(call: Call) -> Agreement | None:
    """Compare the kernel that a call takes with the reference; return None where it is the reference itself."""
    sinks = call.sinks is not None
    kernel = choose(call.q, call.k, call.ctx, softcap=call.softcap, dropout=call.dropout, sinks=sinks)
    if kernel == "reference":
        return None
    masks = {name: None if x is None else jnp.asarray(x, jnp.int32) for name, x in _drawn(call).items()}
    # It runs once: fully optimized, XLA:CPU compiles it for three times as long, to the same bits.
    options = {"xla_backend_optimization_level": 1} if platform() == "cpu" else None
    errors = jax.jit(functools.partial(_errors, call, kernel), compiler_options=options)(masks)
    return Agreement(kernel, {name: float(error) for name, error in errors.items()})


def _drawn(call: Call) -> dict[str, np.ndarray | None]:
    """Return random documents and prefixes, where the call has them: several in every row, unlike in some batches.

    Keys of another sequence have the same documents, though each sequence may lack some. Every second row ends with
    padding.
    """
    mask, rng = call.ctx.mask, np.random.default_rng(0)
    rows, lengths = call.q.shape[0], {"segment_ids": call.q.shape[1], "key_segment_ids": call.k.shape[2]}
    drawn: dict[str, np.ndarray | None] = {}
    for i, (name, length) in enumerate(lengths.items()):
        begins = np.sort(rng.integers(length, size=(rows, NUM_DOCUMENTS)), axis=1)
        begins[:, 0], begins[:, 1] = 0, np.clip(begins[:, 1], 1, max(1, length // 3))
        begins[:, 2 + i] = begins[:, 3 + i]  # one document is empty
        segments = (begins[:, :, None] <= np.arange(length)).sum(1)
        segments[::2, length - length // 8 :] = 0
        drawn[name] = None if getattr(mask, name) is None else segments
    drawn["prefix"] = None if mask.prefix is None else rng.random((rows, call.k.shape[2])) < 0.25
    return drawn


def _attention(call: Call, kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, masks: dict[str, Any]) -> jax.Array:
    """Return the attention of a call by a kernel; all arrays are in the order of the text."""
    ctx = dataclasses.replace(call.ctx, kernel=kernel, is_token=None, dropout_key=None).with_mask(**masks)
    sinks = None if call.sinks is None else jnp.linspace(-1.0, 1.0, q.shape[2]).reshape(call.sinks.shape)
    options: dict[str, Any] = {"scale": call.scale, "sinks": sinks}
    if kernel == "reference":
        return _by_blocks(q, k, v, ctx, options)
    k, v = (zigzag(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
    return unzigzag(attend(zigzag(q), k, v, jax.tree.map(zigzag, ctx), **options))


def _by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, ctx: ForwardContext, options: dict[str, Any]) -> jax.Array:
    """Return attention by the reference, for as many queries at a time as keep within SCORES."""
    rows, length, heads, _ = q.shape
    split = np.prod([mesh_axis_sizes()[axis] for i in (0, 2) for axis in axes_of(q)[i]], dtype=int)
    num_blocks = 1
    while rows * heads * length * k.shape[2] // (split * num_blocks) > SCORES and length % (2 * num_blocks) == 0:
        num_blocks *= 2
    # Whole along the sequence, which a context axis would split: every block is a slice of it.
    q, size = shard(q, "batch", None, "heads", None), length // num_blocks
    mask = ctx.mask
    ctx = ctx.with_mask(prefix=None if mask.prefix is None else replicate(mask.prefix))

    @jax.checkpoint  # the backward pass, too, has the scores of one block at a time
    def block(start: jax.Array) -> jax.Array:
        part = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)  # noqa: E731
        of_block = ctx.with_mask(query_places=jnp.broadcast_to(start + jnp.arange(size), (rows, size)))
        if mask.segment_ids is not None:
            own = replicate(mask.segment_ids)
            keys = own if mask.key_segment_ids is None else replicate(mask.key_segment_ids)
            of_block = of_block.with_mask(segment_ids=part(own), key_segment_ids=keys)
        return attend(part(q), k, v, of_block, **options)

    blocks = jax.lax.map(block, jnp.arange(num_blocks) * size)
    y = jnp.concatenate([blocks[i] for i in range(num_blocks)], axis=1)
    return shard(y, "batch", "sequence", "heads", None)


def _errors(call: Call, kernel: str, masks: dict[str, Any]) -> dict[str, jax.Array]:
    """Return the relative error of the kernel's result and of each of its gradients."""
    keys = jax.random.split(jax.random.key(0), 4)
    queries, kv = ("batch", "sequence", "heads", None), ("batch", "kv_heads", "sequence", None)

    def random(key: jax.Array, aval: Any, names: tuple[str | None, ...]) -> jax.Array:
        return shard(jax.random.normal(key, aval.shape, jnp.float32).astype(aval.dtype), *names)

    result = jax.ShapeDtypeStruct((*call.q.shape[:3], call.v.shape[3]), call.q.dtype)
    q, direction = random(keys[0], call.q, queries), random(keys[3], result, queries)
    k, v = random(keys[1], call.k, kv), random(keys[2], call.v, kv)

    def with_gradients(kernel: str, dtype: Any) -> tuple[jax.Array, ...]:
        inputs = q.astype(dtype), k.astype(dtype), v.astype(dtype)
        out, pull = jax.vjp(lambda q, k, v: _attention(call, kernel, q, k, v, masks), *inputs)
        out = shard(out, *queries)
        return (out, *pull(direction.astype(out.dtype)))

    found = with_gradients(kernel, call.q.dtype)
    wanted = with_gradients("reference", jnp.float32)
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))  # noqa: E731
    results = "the result", "the gradient of the queries", "the gradient of the keys", "the gradient of the values"
    sizes = [(rms(a.astype(jnp.float32) - b), rms(b)) for a, b in zip(found, wanted, strict=True)]
    # Where the mask hides everything both are 0, and agree.
    return {name: jnp.where(off > 0, off / size, off) for name, (off, size) in zip(results, sizes, strict=True)}
