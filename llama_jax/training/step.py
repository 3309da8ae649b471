"""The train step: a pure function of state, batch and hyper-parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llama_jax.data import Preference
from llama_jax.models import OF, PRODUCT, STATISTIC, Compute, LossTerm, ModelConfig, Params, assemble, buffers, frozen
from llama_jax.nn import Experts, seed_key, zigzag
from llama_jax.parallel import reshape, shard
from llama_jax.training.losses import cross_entropy
from llama_jax.training.optimizer import Hyper, learning_rate, make_optimizer
from llama_jax.training.preference import REFERENCE, num_pairs, preference_losses, split_pairs

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# On CPUs with AVX-512, LLVM would else take half of its width: 8 % of a step in bfloat16, 3 % in float32.
CPU_COMPILER_OPTIONS = {"xla_cpu_prefer_vector_width": 512}
# On TPU v5e and v6e `ragged_dot` would else multiply every row with every expert.
EXPERTS_COMPILER_OPTIONS = {"xla_tpu_enable_ragged_dot_kernel": True}
# On GPUs each layer would else wait for its weights before its first product, and for its gradients after the last.
GPU_COMPILER_OPTIONS: dict[str, Any] = dict.fromkeys(
    ("xla_gpu_pipeline_all_gather", "xla_gpu_pipeline_reduce_scatter", "xla_gpu_pipeline_all_reduce"),
    "COLLECTIVE_PIPELINING_MODE_ON",
)


def compiler_options(config: ModelConfig, platform: str) -> dict[str, Any] | None:
    """Return the options that the train step of this model is compiled with; None for XLA's defaults."""
    if platform == "gpu":
        return GPU_COMPILER_OPTIONS if _has_options(*GPU_COMPILER_OPTIONS.items()) else None
    experts = any(isinstance(piece, Experts) for _, piece in config.layer_pieces())
    return {"cpu": CPU_COMPILER_OPTIONS, "tpu": EXPERTS_COMPILER_OPTIONS if experts else None}.get(platform)


@functools.cache
def _has_options(*options: tuple[str, Any]) -> bool:
    """Return whether the XLA of this JAX knows these options; those of GPUs have other names in some versions."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state", "buffers"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """State of training, as arrays or as their abstract values.

    There is no random state: randomness is a function of the run's seed and `step`. `buffers` are the model's arrays
    that no gradient trains.
    """

    step: Any
    params: dict[str, Any]
    opt_state: Any
    buffers: dict[str, Any] = dataclasses.field(default_factory=dict)


def init_state(
    params: Params, hyper: Hyper, buffer_names: frozenset[str] = frozenset(), *, reference: bool = False
) -> TrainState:
    """Return the state before the first step. Jit it to get the moments sharded like the parameters.

    `buffer_names` are those among `params` that no gradient trains; `reference` keeps a frozen copy of all.
    """
    trained = {name: value for name, value in params.items() if name not in buffer_names}
    rest = {name: value for name, value in params.items() if name in buffer_names}
    if reference:  # copied: the step takes over its arguments' memory, each array once
        rest |= {REFERENCE + name: jnp.copy(value) for name, value in params.items()}
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
) -> tuple[list[tuple[LossTerm, jax.Array, jax.Array]], Metrics]:
    """Return [(loss term, summed loss, summed cross-entropy)] in nats, the main term first, and the layers' auxiliary
    arrays, [layers, ...].

    `params` has the buffers, too. z-loss and smoothing are for the main term alone; `key` is for dropout.
    """
    terms, aux = assemble(config, params, compute).loss_terms(model_batch(batch, config), key=key)
    found: list[tuple[LossTerm, jax.Array, jax.Array]] = []
    for i, term in enumerate(terms):
        options = {"z_loss": z_loss, "label_smoothing": label_smoothing} if i == 0 else {}
        loss, ce = cross_entropy(
            term.head, term.head_weight, term.hidden, term.targets, term.weights, chunk=compute.loss_chunk, **options
        )
        found.append((term, loss, ce))
    return found, aux


def model_batch(batch: Batch, config: ModelConfig) -> Batch:
    """Return the batch as the model takes it: for a decoder a source joined before its target, and all of it in zigzag
    order where a context axis splits the rows. The answers of a pair become two documents.

    [B, S] and [B, T] become [B, S+T]. The source is a prefix without weight, so that a decoder trains on sequence to
    sequence as a prefix language model (Raffel et al. 2020, section 3.2.1); what is no field of a decoder is left out.
    """
    if config.joins_source and "source_tokens" in batch:
        batch = _joined(batch)
    if "branch" in batch:
        batch = batch | {"segment_ids": split_pairs(batch["segment_ids"], batch["branch"])}
    return {name: zigzag(x) for name, x in batch.items()}


def _joined(batch: Batch) -> Batch:
    """Return the batch with each source before its target, as one row."""
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


class _Measures(NamedTuple):
    """Measurements of a batch along with its gradient; those of micro-batches add up to those of the whole.

    metrics: losses, and means that the layers report.
    statistics: by name, what the buffers' rules take.
    amounts: numerators of the shares that the layers report, [layers, ...].
    wholes: denominators of these, [layers].
    """

    metrics: Metrics
    statistics: Metrics
    amounts: Metrics
    wholes: Metrics


class _Whole(NamedTuple):
    """Sizes of the global batch that a micro-batch is a part of: losses are means over all of it.

    num_targets: of each loss term, at least 1.
    num_rows: that have tokens, at least 1.
    num_parts: micro-batches.
    """

    num_targets: list[jax.Array]
    num_rows: jax.Array
    num_parts: int


def _loss(
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    whole: _Whole | None,
    *,
    buffers: Params,
    hyper: Hyper,
    config: ModelConfig,
    compute: Compute,
    preference: Preference | None,
) -> tuple[jax.Array, _Measures]:
    """Return the loss to differentiate; of a micro-batch its share of the loss of the `whole`, which None is for."""
    optimizer = hyper.optimizer
    options = {"z_loss": optimizer.z_loss, "label_smoothing": optimizer.label_smoothing}
    if preference is None:
        found, aux = losses(params | buffers, batch, config, compute, key=key, **options)
    else:
        pairs = model_batch(batch, config)
        found, aux = preference_losses(params | buffers, pairs, config, compute, preference, key=key)
    total: jax.Array = jnp.float32(0)
    metrics: Metrics = {}
    counts = [_num_targets(term) for term, *_ in found] if whole is None else whole.num_targets
    for (term, loss, ce), count in zip(found, counts, strict=True):
        total += term.coefficient * loss / count
        metrics[term.name] = ce / count
    amounts, wholes = _take_shares(aux)
    _multiply(aux)
    if whole is not None:  # the layers' losses are means over the rows that have tokens, the rest over micro-batches
        of_losses, of_others = _num_rows(batch) / whole.num_rows, 1 / whole.num_parts
        aux = {name: value * (of_losses if name.startswith("loss.") else of_others) for name, value in aux.items()}
    statistics = {name: value for name, value in aux.items() if name.startswith(STATISTIC)}
    for name, value in aux.items():
        if name.startswith("loss."):
            total += value.sum()
            metrics[f"{name.removeprefix('loss.')}_loss"] = value.sum()
        elif name not in statistics:
            metrics[name] = value.mean(0)
    return total, _Measures(metrics, statistics, amounts, wholes)


def gradient(params: Params, batch: Batch, config: ModelConfig, compute: Compute, hyper: Hyper) -> Params:
    """Return the gradient of the loss of a train step by parameter, before clipping, without dropout.

    `params` has the buffers, too, which have no gradient, and with adapters the weights that are not trained.
    """
    kept = {name: params[name] for name in frozen(config)}
    trained = {name: value for name, value in params.items() if name not in kept}
    fixed = {"buffers": kept, "hyper": hyper, "config": config, "compute": compute}
    loss = functools.partial(_loss, **fixed, preference=None)
    return jax.grad(loss, has_aux=True)(trained, batch, None, None)[0]


def _accumulate(
    gradient: Callable[..., tuple[Params, _Measures]],
    params: Params,
    batch: Batch,
    key: jax.Array | None,
    whole: _Whole,
) -> tuple[Params, _Measures]:
    """Return the sum of the micro-batches' gradients and measures, one micro-batch at a time."""
    size = whole.num_parts
    # Every n-th row: a micro-batch takes rows from every device.
    split = {
        name: reshape(x, (x.shape[0] // size, size, x.shape[1]), "batch", None, "sequence") for name, x in batch.items()
    }
    micro_batches = {name: jnp.moveaxis(x, 1, 0) for name, x in split.items()}

    def one(micro_batch: Batch, number: jax.Array | int) -> tuple[Params, _Measures]:
        own_key = None if key is None else jax.random.fold_in(key, number)
        return gradient(params, micro_batch, own_key, whole)

    def add(total: tuple[Params, _Measures], xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        # Through the barrier libtpu does not see that the sum over devices could wait for the loop's end; where it
        # does, it fails on the embedding's ("while_loop_all_reduce_code_motion.cc: RET_CHECK failure").
        keep = jax.lax.optimization_barrier
        return jax.tree.map(lambda t, g: t + keep(g), total, one(*xs)), None

    _, measures = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro_batches), 0)
    # Gradients begin sharded like the parameters; shapes of measures have no sharding to keep.
    zeros = jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda a: jnp.zeros(a.shape), measures)
    total, _ = jax.lax.scan(add, zeros, (micro_batches, jnp.arange(size)))
    return total


def make_train_step(
    config: ModelConfig,
    compute: Compute,
    *,
    accumulation_steps: int = 1,
    preference: Preference | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, Metrics]]:
    """Return `train_step(state, batch, hyper) -> (state, metrics)`, jitted, with the state donated.

    Batch arrays are [B, T]: `tokens`, `targets`, `weights`, `segment_ids`, `positions` and, where the objective has
    them, `prefix` and a source (`source_tokens`, `source_segment_ids`, `source_positions`, [B, S]). Metrics: `loss` is
    the mean cross-entropy of the weighted targets in nats, `grad_norm` the global norm before clipping; further losses
    and what the layers report (the load of experts, [E]) by name. Where one of these two is not finite, `skipped` is 1
    and the next state is the same, every bit of it, but for the number of the step. With a `preference`, `loss` is the
    mean over pairs, and `rewards/margins` and others are those of `preference_losses`. `compiler_options` are
    `jax.jit`'s, such as `CPU_COMPILER_OPTIONS`; with any, JAX takes the step in no other `jit`.
    """

    def train_step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        # Randomness is a function of seed and step, so that a run that continues draws as if it had never stopped.
        key = jax.random.fold_in(seed_key(hyper.seed), state.step) if config.needs_rng else None
        fixed = {"buffers": state.buffers, "hyper": hyper, "config": config, "compute": compute}
        gradient = jax.grad(functools.partial(_loss, **fixed, preference=preference), has_aux=True)
        if accumulation_steps == 1:
            grads, found = gradient(state.params, batch, None if key is None else jax.random.fold_in(key, 0), None)
        else:
            # The forward pass of the global batch: all but the sums of its weights is compiled away.
            if preference is None:
                model = assemble(config, state.params | state.buffers, compute)
                terms, _ = model.loss_terms(model_batch(batch, config))
                counts = [_num_targets(term) for term in terms]
            else:
                counts = [jnp.maximum(num_pairs(model_batch(batch, config)), 1.0)]
            num_rows = jnp.maximum(_num_rows(batch), 1)
            whole = _Whole(counts, num_rows, accumulation_steps)
            grads, found = _accumulate(gradient, state.params, batch, key, whole)
        rate, grad_norm = learning_rate(state.step, hyper), optax.tree.norm(grads)
        taken = jnp.isfinite(found.metrics["loss"]) & jnp.isfinite(grad_norm)

        def update(old: tuple[Params, Any, Params]) -> tuple[Params, Any, Params]:
            updates, opt_state = make_optimizer(hyper).update(grads, old[1], old[0])
            params = jax.tree.map(lambda p, u: p - rate * u, old[0], updates)
            return params, opt_state, _updated(old[2], found.statistics, config)

        # A branch, not a choice for each array: that would copy the moments on a CPU, which updates them in place.
        new = jax.lax.cond(taken, update, lambda old: old, (state.params, state.opt_state, state.buffers))
        metrics = found.metrics | {name: _ratio(x, found.wholes[name]).mean(0) for name, x in found.amounts.items()}
        metrics |= {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "skipped": 1.0 - taken,
            "num_targets": jnp.maximum(batch["weights"].sum(), 1.0),
        }
        return TrainState(state.step + 1, *new), metrics

    return jax.jit(train_step, donate_argnums=0, compiler_options=compiler_options)


def _take_shares(aux: Metrics) -> tuple[Metrics, Metrics]:
    """Remove the shares from `aux`; return (their amounts, what they are shares of), which add up over micro-batches.

    A layer reports a share [layers, ...] by its name, and the whole [layers] by `of.` and its name.
    """
    wholes = {name.removeprefix(OF): aux.pop(name) for name in [*aux] if name.startswith(OF)}
    return {name: (aux.pop(name).T * whole.T).T for name, whole in wholes.items()}, wholes


def _multiply(aux: Metrics) -> None:
    """Replace the factors of losses in `aux` [layers, 2, E] by the sums of the products of their means over layers."""
    for name in [name for name in aux if name.startswith(PRODUCT)]:
        one, other = aux.pop(name).mean(0)
        loss = "loss." + name.removeprefix(PRODUCT)
        # Other layers may have this loss each by itself.
        aux[loss] = jnp.append(aux.get(loss, jnp.zeros(0)), one @ other)


def _ratio(amount: jax.Array, whole: jax.Array) -> jax.Array:
    """Return [L, ...] / [L], and 0 where there is nothing."""
    return (amount.T / jnp.maximum(whole.T, 1.0)).T


def _num_rows(batch: Batch) -> jax.Array:
    """Return the number of rows that have tokens."""
    return (batch["segment_ids"] > 0).any(1).sum()


def _num_targets(term: LossTerm) -> jax.Array:
    """Return the sum of a loss term's weights, or 1 if that is larger."""
    return jnp.maximum(term.weights.sum(), 1.0)


def _updated(values: Params, statistics: Metrics, config: ModelConfig) -> Params:
    """Return the buffers after a step, each updated by its rule with the statistic of its name."""
    rules = buffers(config)
    return {
        name: value if (rule := rules.get(name)) is None else rule(value, statistics[STATISTIC + name])
        for name, value in values.items()
    }


def make_eval_step(
    config: ModelConfig, compute: Compute, *, preference: Preference | None = None
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Return `eval_step(params, batch) -> (summed cross-entropy in nats, number of targets)`, jitted; `params` has the
    buffers, too. With a `preference` it is the summed loss, and the number of pairs.
    """

    def eval_step(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        if preference is None:
            (main, _, ce), *_ = losses(params, batch, config, compute)[0]
        else:
            pairs = model_batch(batch, config)
            (main, _, ce), *_ = preference_losses(params, pairs, config, compute, preference)[0]
        return ce, main.weights.sum()

    return jax.jit(eval_step)
