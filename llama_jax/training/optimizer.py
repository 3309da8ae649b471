"""AdamW with linear warm-up, a decay and clipping, its hyper-parameters traced."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from llama_jax.config import UserError
from llama_jax.models import is_stacked
from llama_jax.nn import seed_value

Hyper = dict[str, Any]
Schedule = Literal["cosine", "linear", "inverse_sqrt", "constant"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019); the defaults are the Llama recipe.

    learning_rate: peak.
    warmup_steps: steps of linear warm-up to the peak.
    weight_decay: on matrices only, not on norms and biases.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    eps: added to the root of the second moment.
    clip_norm: largest global norm of the gradient.
    schedule: after the warm-up: a cosine or a line down to the end, the inverse square root of the step (Vaswani et al.
      2017, eq. 3; without an end), or constant.
    final_fraction: where the cosine or the line ends, as a part of the peak.
    z_loss: weight of logsumexp(logits)^2 in the loss.
    label_smoothing: share of a target's probability that is spread evenly over the vocabulary.
    accumulation_steps: parts that a global batch is computed in; the result is that of the whole.
    """

    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    final_fraction: float = 0.1
    z_loss: float = 0.0
    accumulation_steps: int = 1
    schedule: Schedule = "cosine"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("warmup_steps", "weight_decay", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be below 0")
        for name in ("beta1", "beta2", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"final_fraction={self.final_fraction} must lie between 0 and 1")
        if self.accumulation_steps < 1:
            raise UserError(f"accumulation_steps={self.accumulation_steps} must be at least 1")

    def hyper(self, num_steps: int, seed: int = 0) -> Hyper:
        """What the train step takes as traced scalars; `num_steps` is where a decay ends, `seed` what dropout draws
        from."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "accumulation_steps"}
        values |= {"schedule": get_args(Schedule).index(self.schedule), "num_steps": num_steps}
        return {name: jnp.float32(value) for name, value in values.items()} | {"seed": jnp.asarray(seed_value(seed))}


def learning_rate(step: jax.Array | int, hyper: Hyper) -> jax.Array:
    """Rate of the update that takes `step` to `step + 1`: warm-up reaches the peak after `warmup_steps` updates."""
    step = jnp.float32(step)
    warmup, peak, final = hyper["warmup_steps"], hyper["learning_rate"], hyper["final_fraction"]
    progress = jnp.clip((step - warmup) / jnp.maximum(hyper["num_steps"] - warmup, 1), 0, 1)
    by_name = {
        "cosine": final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress)),
        "linear": 1 - (1 - final) * progress,
        "inverse_sqrt": jnp.sqrt(jnp.maximum(warmup, 1) / (step + 1)),
        "constant": jnp.ones_like(progress),
    }
    which = hyper["schedule"].astype(jnp.int32)
    decay = jnp.stack([by_name[name] for name in get_args(Schedule)])[which]
    return peak * jnp.where(step < warmup, (step + 1) / jnp.maximum(warmup, 1), decay)


def is_matrix(name: str, value: Any) -> bool:
    """Whether a parameter is decayed: two dimensions or more in each layer, and no bias, nor a table of biases (T5's of
    relative positions)."""
    return value.ndim - is_stacked(name) >= 2 and not any(part.endswith("bias") for part in name.split("."))


def make_optimizer(hyper: Hyper) -> optax.GradientTransformation:
    """Clipping, Adam and decoupled decay; `update` wants the parameters, and its result is scaled by -learning rate."""

    def decayed(params: Any) -> dict[str, bool]:
        return {name: is_matrix(name, value) for name, value in params.items()}

    return optax.chain(
        optax.clip_by_global_norm(hyper["clip_norm"]),
        optax.scale_by_adam(b1=hyper["beta1"], b2=hyper["beta2"], eps=hyper["eps"]),
        optax.add_decayed_weights(hyper["weight_decay"], mask=decayed),
    )
