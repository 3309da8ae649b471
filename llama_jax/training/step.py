"""The train step: a pure function of state, batch and hyper-parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.models import Compute, Decoder, ModelConfig, assemble
from llama_jax.models.layout import Params
from llama_jax.nn.attention.context import zigzag
from llama_jax.parallel import reshape, shard
from llama_jax.training.losses import cross_entropy
from llama_jax.training.optimizer import Hyper, learning_rate, make_optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# On CPUs, products by Eigen where XLA would take YNNPACK: 10 % more of them a second in a Llama's layers.
CPU_COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as arrays or as their abstract values.

    Randomness needs no state: it is a function of the run's seed and `step`.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any


def init_state(params: Params, hyper: Hyper) -> TrainState:
    """State before the first step. Jit it to get the moments sharded like the parameters."""
    return TrainState(step=jnp.int32(0), params=params, opt_state=make_optimizer(hyper).init(params))


def loss_and_metrics(
    params: Params, batch: Batch, z_loss: float | jax.Array, config: ModelConfig, compute: Compute
) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
    """(summed loss, (summed cross-entropy, the layers' auxiliary scalars)) of a batch, in nats."""
    model = assemble(config, params, compute)
    batch = in_one_row(batch)
    hidden, aux = trunk(model, batch)
    loss, ce = cross_entropy(
        model.head,
        model.head_weight(),
        hidden,
        batch["targets"],
        batch["weights"],
        z_loss=z_loss,
        chunk=compute.loss_chunk,
    )
    return loss, (ce, aux)


def in_one_row(batch: Batch) -> Batch:
    """The batch as a decoder takes it: a source joined before its target, and all in zigzag order where a context axis
    splits the rows.

    [B, S] and [B, T] become [B, S+T]. The source is a prefix without weight, so that a decoder trains on sequence to
    sequence as a prefix language model (Raffel et al. 2020, section 3.2.1); what is no field of a decoder is left out.
    """
    if "source_tokens" in batch:
        batch = _joined(batch)
    return {name: zigzag(x) for name, x in batch.items()}


def trunk(model: Decoder, batch: Batch) -> tuple[jax.Array, Metrics]:
    """`model.trunk` of what `in_one_row` returned."""
    return model.trunk(
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
        prefix=batch.get("prefix"),
    )


def _joined(batch: Batch) -> Batch:
    batch = {name: shard(x, "batch", None) for name, x in batch.items()}
    source, segments = batch["source_segment_ids"], batch["segment_ids"]
    # A decoder's positions count on from the source to the target, as they will when it answers a prompt.
    before = (segments[:, :, None] == source[:, None]).sum(-1, dtype=jnp.int32)
    no_loss = jnp.zeros_like(source)
    pairs = {
        "tokens": (batch["source_tokens"], batch["tokens"]),
        "targets": (no_loss, batch["targets"]),
        "weights": (no_loss.astype(batch["weights"].dtype), batch["weights"]),
        "segment_ids": (source, segments),
        "positions": (batch["source_positions"], jnp.where(segments > 0, batch["positions"] + before, 0)),
        "prefix": ((source > 0).astype(jnp.int32), jnp.zeros_like(segments)),
    }
    return {name: shard(jnp.concatenate(pair, axis=1), "batch", "sequence") for name, pair in pairs.items()}


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[B, T] -> [B / parts, parts, T]."""
    return reshape(x, (x.shape[0] // parts, parts, x.shape[1]), "batch", None, "sequence")


def make_train_step(
    config: ModelConfig,
    compute: Compute,
    *,
    accumulation_steps: int = 1,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, Metrics]]:
    """`train_step(state, batch, hyper) -> (state, metrics)`, jitted, with the state donated.

    Batch arrays are [B, T]: `tokens`, `targets`, `weights`, `segment_ids`, `positions` and, where the objective has
    them, `prefix` and a source (`source_tokens`, `source_segment_ids`, `source_positions`, [B, S]). Metrics: `loss` is
    the mean cross-entropy of the weighted targets in nats, `grad_norm` the global norm before clipping.
    `compiler_options` are `jax.jit`'s, such as `CPU_COMPILER_OPTIONS`; with any, JAX takes the step in no other `jit`.
    """

    def train_step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        denominator = jnp.maximum(batch["weights"].sum(), 1.0)

        def gradient(part: Batch) -> tuple[Params, Metrics]:
            def loss(params: Params):
                value, (ce, aux) = loss_and_metrics(params, part, hyper["z_loss"], config, compute)
                return value / denominator, {"loss": ce / denominator} | aux

            return jax.grad(loss, has_aux=True)(state.params)

        if accumulation_steps == 1:
            grads, metrics = gradient(batch)
        else:
            # Every n-th row: a part takes rows from every device.
            parts = {name: jnp.moveaxis(_split_rows(x, accumulation_steps), 1, 0) for name, x in batch.items()}
            total = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
            zeros = (jax.tree.map(jnp.zeros_like, state.params), jax.tree.map(lambda a: jnp.zeros(a.shape), total[1]))
            # Through the barrier libtpu does not see that the sum over devices could wait for the loop's end; where it
            # does, it fails on the embedding's ("while_loop_all_reduce_code_motion.cc: RET_CHECK failure").
            keep = jax.lax.optimization_barrier
            add = lambda total, part: (jax.tree.map(lambda t, g: t + keep(g), total, gradient(part)), None)  # noqa: E731
            (grads, metrics), _ = jax.lax.scan(add, zeros, parts)
        rate = learning_rate(state.step, hyper)
        updates, opt_state = make_optimizer(hyper).update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics |= {"learning_rate": rate, "grad_norm": optax.tree.norm(grads), "num_targets": denominator}
        return TrainState(state.step + 1, params, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def make_eval_step(config: ModelConfig, compute: Compute) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """`eval_step(params, batch) -> (summed cross-entropy in nats, number of targets)`, jitted."""

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        _, (ce, _) = loss_and_metrics(params, batch, 0.0, config, compute)
        return ce, batch["weights"].sum()

    return jax.jit(eval_step)
