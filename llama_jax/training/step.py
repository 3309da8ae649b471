"""The train step: a pure function of state, batch and hyper-parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llama_jax.models import OF, STATISTIC, Compute, LossTerm, ModelConfig, Params, assemble, buffers
from llama_jax.nn import Experts, seed_key, zigzag
from llama_jax.parallel import reshape, shard
from llama_jax.training.losses import cross_entropy
from llama_jax.training.optimizer import Hyper, learning_rate, make_optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# On CPUs, products by Eigen where XLA would take YNNPACK: 10 % more of them a second in a Llama's layers.
CPU_COMPILER_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# On TPU v5e and v6e `ragged_dot` would else multiply every row with every expert.
EXPERTS_COMPILER_OPTIONS = {"xla_tpu_enable_ragged_dot_kernel": True}


def compiler_options(config: ModelConfig, platform: str) -> dict[str, Any] | None:
    """What the train step of this model is compiled with, beyond XLA's defaults."""
    experts = any(isinstance(piece, Experts) for _, piece in config.layer_pieces())
    return {"cpu": CPU_COMPILER_OPTIONS, "tpu": EXPERTS_COMPILER_OPTIONS if experts else None}.get(platform)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "buffers"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that training changes, as arrays or as their abstract values.

    Randomness needs no state: it is a function of the run's seed and `step`. `buffers` are what the model has beside
    its parameters and no gradient trains.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any
    buffers: dict[str, Any] = dataclasses.field(default_factory=dict)


def init_state(params: Params, hyper: Hyper, buffer_names: frozenset[str] = frozenset()) -> TrainState:
    """State before the first step. Jit it to get the moments sharded like the parameters.

    `buffer_names` says which of `params`, as a model has them, are buffers.
    """
    trained = {name: value for name, value in params.items() if name not in buffer_names}
    rest = {name: value for name, value in params.items() if name in buffer_names}
    return TrainState(jnp.int32(0), trained, make_optimizer(hyper).init(trained), rest)


def losses(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    compute: Compute,
    *,
    z_loss: float | jax.Array = 0.0,
    label_smoothing: float | jax.Array = 0.0,
    key: jax.Array | None = None,
) -> tuple[list[tuple[LossTerm, jax.Array, jax.Array]], dict[str, jax.Array]]:
    """(prediction, summed loss, summed cross-entropy) of all that the model is trained on, in nats, and the layers'
    auxiliary arrays, [layers, ...]. Smoothing is for the main prediction alone."""
    predictions, aux = predict(params, batch, config, compute, key=key)
    found = []
    for i, p in enumerate(predictions):
        options = {"z_loss": z_loss, "label_smoothing": label_smoothing} if i == 0 else {}
        loss, ce = cross_entropy(
            p.head, p.head_weight, p.hidden, p.targets, p.weights, chunk=compute.loss_chunk, **options
        )
        found.append((p, loss, ce))
    return found, aux


def predict(
    params: Params, batch: Batch, config: ModelConfig, compute: Compute, *, key: jax.Array | None = None
) -> tuple[list[LossTerm], dict[str, jax.Array]]:
    """`loss_terms` of the model of these parameters (buffers among them) for a batch as the data room makes it."""
    return assemble(config, params, compute).loss_terms(in_one_row(batch, config), key=key)


def in_one_row(batch: Batch, config: ModelConfig) -> Batch:
    """The batch as the model takes it: for a decoder a source joined before its target, and all in zigzag order where a
    context axis splits the rows.

    [B, S] and [B, T] become [B, S+T]. The source is a prefix without weight, so that a decoder trains on sequence to
    sequence as a prefix language model (Raffel et al. 2020, section 3.2.1); what is no field of a decoder is left out.
    """
    if config.joins_source and "source_tokens" in batch:
        batch = _joined(batch)
    return {name: zigzag(x) for name, x in batch.items()}


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
    the mean cross-entropy of the weighted targets in nats, `grad_norm` the global norm before clipping; further losses
    and what the layers report (the load of experts, [E]) by name. `compiler_options` are `jax.jit`'s, such as
    `CPU_COMPILER_OPTIONS`; with any, JAX takes the step in no other `jit`.
    """

    def train_step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        key = None
        if config.needs_rng:
            key = jax.random.fold_in(seed_key(hyper.seed), state.step)

        def gradient(part: Batch, number: Any = 0) -> tuple[Params, tuple[Metrics, ...]]:
            def loss(params: Params):
                own_key = None if key is None else jax.random.fold_in(key, number)
                options = {name: getattr(hyper.optimizer, name) for name in ("z_loss", "label_smoothing")}
                found, aux = losses(params | state.buffers, part, config, compute, key=own_key, **options)
                total, metrics = jnp.float32(0), {}
                for (p, value, ce), denominator in zip(
                    found, denominators or [_count(p) for p, *_ in found], strict=True
                ):
                    total += p.coefficient * value / denominator
                    metrics[p.name] = ce / denominator
                amounts, wholes = _shares(aux)
                if accumulation_steps > 1:  # a part's share: losses are means over the rows that have tokens
                    of_losses, of_others = _num_rows(part) / num_rows, 1 / accumulation_steps
                    aux = {n: value * (of_losses if n.startswith("loss.") else of_others) for n, value in aux.items()}
                statistics = {name: value for name, value in aux.items() if name.startswith(STATISTIC)}
                for name, value in aux.items():
                    if name.startswith("loss."):
                        total += value.sum()
                        metrics[f"{name.removeprefix('loss.')}_loss"] = value.sum()
                    elif name not in statistics:
                        metrics[name] = value.mean(0)
                return total, (metrics, statistics, amounts, wholes)

            return jax.grad(loss, has_aux=True)(state.params)

        denominators: list[jax.Array] = []
        num_rows = jnp.maximum(_num_rows(batch), 1)
        if accumulation_steps == 1:
            grads, (metrics, statistics, amounts, wholes) = gradient(batch)
        else:
            # Of the whole batch; all but the weights' sums is compiled away.
            whole, _ = predict(state.params | state.buffers, batch, config, compute)
            denominators += [_count(p) for p in whole]
            # Every n-th row: a part takes rows from every device.
            parts = {name: jnp.moveaxis(_split_rows(x, accumulation_steps), 1, 0) for name, x in batch.items()}
            total = jax.eval_shape(gradient, jax.tree.map(lambda x: x[0], parts))
            zeros = (jax.tree.map(jnp.zeros_like, state.params), jax.tree.map(lambda a: jnp.zeros(a.shape), total[1]))
            # Through the barrier libtpu does not see that the sum over devices could wait for the loop's end; where it
            # does, it fails on the embedding's ("while_loop_all_reduce_code_motion.cc: RET_CHECK failure").
            keep = jax.lax.optimization_barrier
            numbers = jnp.arange(accumulation_steps)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return jax.tree.map(lambda t, g: t + keep(g), total, gradient(*part)), None

            (grads, (metrics, statistics, amounts, wholes)), _ = jax.lax.scan(add, zeros, (parts, numbers))
        metrics |= {name: _ratio(amount, wholes[name]).mean(0) for name, amount in amounts.items()}
        rate = learning_rate(state.step, hyper)
        updates, opt_state = make_optimizer(hyper).update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        metrics |= {
            "learning_rate": rate,
            "grad_norm": optax.tree.norm(grads),
            "num_targets": jnp.maximum(batch["weights"].sum(), 1.0),
        }
        return TrainState(state.step + 1, params, opt_state, _updated(state.buffers, statistics, config)), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def _shares(aux: Metrics) -> tuple[Metrics, Metrics]:
    """Take the shares out of `aux`: (the amounts, what they are shares of), both of which add up over parts."""
    wholes = {name.removeprefix(OF): aux.pop(name) for name in [*aux] if name.startswith(OF)}
    return {name: (aux.pop(name).T * whole.T).T for name, whole in wholes.items()}, wholes


def _ratio(amount: jax.Array, whole: jax.Array) -> jax.Array:
    """[L, ...] / [L]: a share again, 0 where there is nothing."""
    return (amount.T / jnp.maximum(whole.T, 1.0)).T


def _num_rows(batch: Batch) -> jax.Array:
    """Number of rows that have tokens."""
    return (batch["segment_ids"] > 0).any(1).sum()


def _count(prediction: LossTerm) -> jax.Array:
    return jnp.maximum(prediction.weights.sum(), 1.0)


def _updated(values: Params, statistics: Metrics, config: ModelConfig) -> Params:
    """The buffers after a step, each updated by its own rule with the statistic of its name."""
    rules, new = buffers(config), {}
    for name, value in values.items():
        new[name] = value if rules[name] is None else rules[name](value, statistics[STATISTIC + name])
    return new


def make_eval_step(config: ModelConfig, compute: Compute) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """`eval_step(params, batch) -> (summed cross-entropy in nats, number of targets)`, jitted; buffers are among
    `params`."""

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        (main, _, ce), *_ = losses(params, batch, config, compute)[0]
        return ce, main.weights.sum()

    return jax.jit(eval_step)
