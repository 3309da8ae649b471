"""Direct preference optimization: the loss of pairs of answers against a frozen reference."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llama_jax.data import Preference
from llama_jax.models import OF, Compute, LossTerm, ModelConfig, Params, assemble, merge_adapters
from llama_jax.training.losses import cross_entropy, token_cross_entropy

REFERENCE = "reference."
"""Before the names of the frozen copy of the first parameters."""

type Batch = dict[str, jax.Array]


def copies_reference(config: ModelConfig, preference: Preference | None) -> bool:
    """Return whether training keeps a frozen copy of its first parameters; with adapters the base is there anyway."""
    return preference is not None and config.adapters is None


def split_pairs(segment_ids: Int[Array, "b t"], branch: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Return the numbers of answers: 2n - 1 for the chosen one of the row's pair n and 2n for the rejected one."""
    return jnp.where(segment_ids > 0, 2 * segment_ids - 1 + branch, 0)


def num_pairs(batch: Batch) -> Float[Array, ""]:
    """Return the number of pairs in a batch whose answers are numbered."""
    return _of_answers(batch["segment_ids"], batch["weights"])[1].sum()


def preference_losses(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    compute: Compute,
    preference: Preference,
    *,
    key: jax.Array | None = None,
) -> tuple[list[tuple[LossTerm, jax.Array, jax.Array]], dict[str, jax.Array]]:
    """Return the summed loss of a batch's pairs as `losses` does, its term with a weight for each pair, and metrics.

    `params` has the reference, too; answers are numbered by `split_pairs`. The metrics have the names of TRL's, and are
    means over pairs. The gradient is exact: the loss depends on the tokens' cross-entropies through their sums alone,
    so that it is that of a cross-entropy with the derivatives by these sums as weights (Rafailov et al. 2023, sec. 4).
    """
    (term, *_), aux = assemble(config, params, compute).loss_terms(batch, key=key)
    base, _ = merge_adapters(config, {})
    frozen = {n.removeprefix(REFERENCE): x for n, x in params.items() if n.startswith(REFERENCE)} or params
    (of_base, *_), _ = assemble(base, frozen, compute).loss_terms(batch)
    segments = batch["segment_ids"]
    sums = []
    for which in (term, of_base):
        arguments = jax.lax.stop_gradient((which.head_weight, which.hidden))
        values = token_cross_entropy(which.head, *arguments, term.targets, chunk=compute.loss_chunk)
        sums.append(_of_answers(segments, jnp.where(term.weights > 0, -values * term.weights, 0))[0])
    exists = _of_answers(segments, term.weights)[1]
    ours, theirs = sums
    rewards = preference.beta * (ours - theirs)  # [B, P, 2]
    margins = rewards[..., 0] - rewards[..., 1]
    wrong = preference.label_smoothing
    loss = -(1 - wrong) * jax.nn.log_sigmoid(margins) - wrong * jax.nn.log_sigmoid(-margins)
    loss = jnp.where(exists, loss, 0).sum()
    by_margin = jnp.where(exists, jax.nn.sigmoid(margins) - (1 - wrong), 0)
    slopes = preference.beta * jnp.stack([-by_margin, by_margin], axis=-1)  # by the cross-entropies of both answers
    weights = term.weights * _to_tokens(segments, slopes)
    surrogate, _ = cross_entropy(
        term.head, term.head_weight, term.hidden, term.targets, weights, chunk=compute.loss_chunk
    )
    value = loss + surrogate - jax.lax.stop_gradient(surrogate)
    found = {
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/accuracies": (margins > 0).astype(jnp.float32),
        "rewards/margins": margins,
        "logps/chosen": ours[..., 0],
        "logps/rejected": ours[..., 1],
    }
    count = exists.sum()[None].astype(jnp.float32)
    for name, values in found.items():
        aux[name] = jnp.where(exists, values, 0).sum()[None] / jnp.maximum(count, 1)
        aux[OF + name] = count
    return [(dataclasses.replace(term, weights=exists.astype(jnp.float32)), value, loss)], aux


def _of_answers(segments: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (sums of the tokens' values [B, T] by answer, [B, P, 2], and which of the P pairs are there, [B, P])."""
    length = segments.shape[1]
    answers = jnp.arange(1, 2 * (length // 2) + 1)
    sums = jnp.where(segments[:, None] == answers[:, None], values[:, None], 0).sum(-1)
    sums = sums.reshape(sums.shape[0], length // 2, 2)
    return sums, (sums != 0).any(-1)


def _to_tokens(segments: jax.Array, of_answers: jax.Array) -> jax.Array:
    """Return for each token the value of its answer: [B, P, 2] -> [B, T]."""
    flat = of_answers.reshape(of_answers.shape[0], -1)
    answers = jnp.arange(1, flat.shape[1] + 1)
    return jnp.where(segments[:, None] == answers[:, None], flat[..., None], 0).sum(1)
