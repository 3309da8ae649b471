"""The feed-forward of experts."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from llama_jax.config import UserError
from llama_jax.nn.experts.dispatch import dispatch, ranks
from llama_jax.nn.experts.routers import Router, Routing
from llama_jax.nn.feed_forward import ACTIVATIONS, MLP, Activation, GatedLinearUnit
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.mixer import FeedForward, FeedForwardModule
from llama_jax.nn.parameters import child, parameter
from llama_jax.parallel import spec


@dataclasses.dataclass(frozen=True)
class Experts(FeedForward):
    """Feed-forwards of which a router chooses a few for each token: the sum of weight times expert(x).

    Without a capacity nothing is dropped. With one, an expert takes so many tokens of a row, first choices before
    second ones, early positions before late ones; to the others it adds nothing.

    num_experts: to choose from.
    intermediate_size: width inside of each.
    router: which experts a token goes to, and with what weights.
    activation: inside of them: relu, relu_squared, gelu_tanh, silu or tanh.
    gated: down(activation(gate(x)) * up(x)) rather than down(activation(up(x))).
    num_shared: further experts that every token goes to, as one feed-forward of their widths' sum (DeepSeekMoE).
    capacity_factor: tokens of a row that an expert takes, times experts, over the row's assignments; none for all.
    capacity: the same as a number of tokens, whatever the row's length.
    load_balance_loss: coefficient of E times the sum of load times mean probability, 1 where both are uniform.
    router_z_loss: coefficient of the mean squared logsumexp of the router's logits.
    dispatch: capacity multiplies equal numbers of rows for all experts, dropless the rows that there are, with the same
      result; auto takes the faster.
    """

    num_experts: int
    intermediate_size: int
    router: Router
    activation: Activation
    gated: bool
    num_shared: int = 0
    capacity_factor: float | None = None
    capacity: int | None = None
    load_balance_loss: float = 0.0
    router_z_loss: float = 0.0
    dispatch: Literal["auto", "capacity", "dropless"] = "auto"

    def __post_init__(self) -> None:
        for name, least in (("num_experts", 1), ("intermediate_size", 1), ("num_shared", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("load_balance_loss", "router_z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must be at least 0")
        if self.capacity is not None and self.capacity_factor is not None:
            raise UserError(f"capacity={self.capacity} and capacity_factor={self.capacity_factor}: give one of them")
        for name in ("capacity", "capacity_factor"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name}={value} must be above 0, or none to drop nothing")
        if self.activation == "gelu":  # JAX 0.12 refuses erf inside of `shard_map`
            raise UserError("activation='gelu' is not there for experts: take gelu_tanh, its approximation")
        self.router.check(self.num_experts)

    def build(self, width: int, *, rngs: nnx.Rngs) -> "ExpertsModule":
        return ExpertsModule(self, width, rngs=rngs)

    def idle_parameters(self, width: int) -> int:
        matrices = 3 if self.gated else 2
        return (self.num_experts - self.router.choices) * matrices * width * self.intermediate_size

    @property
    def needs_rng(self) -> bool:
        return self.router.needs_rng

    def shared(self) -> FeedForward | None:
        """The experts that every token goes to, as one feed-forward."""
        if not self.num_shared:
            return None
        kind = GatedLinearUnit if self.gated else MLP
        return kind(self.num_shared * self.intermediate_size, self.activation, bias=False)

    @property
    def drops(self) -> bool:
        """Whether an expert may have to leave tokens out."""
        return self.capacity is not None or self.capacity_factor is not None

    def places(self, length: int) -> int:
        """Places that an expert has for a row of so many tokens: without a limit for all, since all may choose it."""
        if self.capacity is not None:
            return min(self.capacity, length)
        if self.capacity_factor is not None:
            share = self.capacity_factor * self.router.choices * length / self.num_experts
            return min(max(math.ceil(share), 1), length)
        return length


class _Matrices(nnx.Module):
    """One matrix of every expert."""

    def __init__(self, num_experts: int, in_dim: tuple[str, int], out_dim: tuple[str, int], *, rngs: nnx.Rngs):
        (in_axis, i), (out_axis, o) = in_dim, out_dim
        axes = ("expert", in_axis, out_axis)
        self.weight = parameter(rngs, "weight", (num_experts, i, o), axes, std=i**-0.5)


class _Stack(nnx.Module):
    """The experts' weights."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs):
        outer, inner, e = ("embed", width), ("mlp", config.intermediate_size), config.num_experts
        self.gate_proj = _Matrices(e, outer, inner, rngs=child(rngs, "gate_proj")) if config.gated else None
        self.up_proj = _Matrices(e, outer, inner, rngs=child(rngs, "up_proj"))
        self.down_proj = _Matrices(e, inner, outer, rngs=child(rngs, "down_proj"))

    def params(self) -> dict[str, nnx.Param]:
        found = {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}
        return {name: matrices.weight for name, matrices in found.items() if matrices is not None}


class ExpertsModule(FeedForwardModule):
    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.router = config.router.build(width, config.num_experts, rngs=child(rngs, "router"))
        self.experts = _Stack(config, width, rngs=child(rngs, "experts"))
        shared = config.shared()
        self.shared = None if shared is None else shared.build(width, rngs=child(rngs, "shared"))

    def __call__(
        self, x: Float[Array, "b t d"], *, mask: AttentionMask
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        """Auxiliary: `loss.load_balance` and `loss.router_z` where they have a coefficient; `experts_load` [E], each
        expert's share of the assignments; `dropped_share`, of those that found no place; both with their number, under
        `of.`, which parts of a batch are weighted by."""
        config, length = self.config, x.shape[1]
        with jax.named_scope("router"):
            routing = self.router(x, mask=mask)
            real = mask.real()
            wanted = jnp.ones_like(routing.experts, bool) if routing.sent is None else routing.sent
            if real is not None:
                wanted &= real[..., None]
        by_capacity = self._by_capacity(length)
        rank, kept = None, wanted
        if config.drops or by_capacity:
            rank = ranks(routing.experts, wanted, config.num_experts)
        if config.drops:
            assert rank is not None
            kept = wanted & (rank < self._limit(real, length))

        def body(rows, weights, product):
            activation, up = ACTIVATIONS[config.activation], product(rows, weights["up"])
            inner = activation(product(rows, weights["gate"])) * up if config.gated else activation(up)
            return product(inner, weights["down"])

        with jax.named_scope("experts"):
            y = dispatch(
                body,
                x,
                routing.experts,
                routing.weights,
                kept,
                self.experts.params(),
                rank=rank if by_capacity else None,
                capacity=config.places(length),
            )
        if self.shared is not None:
            with jax.named_scope("shared"):
                y = y + self.shared(x, mask=mask)[0]
        return y, self._auxiliary(routing, mask, wanted, kept)

    def _by_capacity(self, length: int) -> bool:
        """Places for more than twice the assignments are more work than sorting: so it is where nothing is dropped."""
        config = self.config
        if config.dispatch != "auto":
            return config.dispatch == "capacity"
        return config.drops and config.num_experts * config.places(length) <= 2 * config.router.choices * length

    def _limit(self, real: Bool[Array, "b t"] | None, length: int) -> jax.Array | int:
        """Tokens of each row that an expert takes: [B, 1, 1], or one number for all."""
        config = self.config
        if config.capacity_factor is None or real is None:
            return config.places(length)
        # Padding must not make places: the factor is of the tokens that there are.
        table = jnp.array([config.places(n) for n in range(length + 1)])
        count = real.sum(1)
        return table.at[count].get(out_sharding=spec("batch", shape=count.shape))[:, None, None]

    def _auxiliary(
        self,
        routing: Routing,
        mask: AttentionMask,
        wanted: Bool[Array, "b t k"],
        kept: Bool[Array, "b t k"],
    ) -> dict[str, jax.Array]:
        config = self.config
        assignments = jax.nn.one_hot(routing.experts, config.num_experts) * wanted[..., None]
        counts = assignments.sum((1, 2))  # [B, E]
        number = counts.sum()
        total = jnp.maximum(number, 1.0)
        aux = {
            "experts_load": counts.sum(0) / total,
            "dropped_share": (number - kept.sum()) / total,
            "of.experts_load": number,
            "of.dropped_share": number,
        }
        aux |= {f"statistic.router.{name}": value for name, value in self.router.statistics(counts.mean(0)).items()}

        if config.load_balance_loss > 0:
            load = assignments[:, :, : routing.counted].sum((1, 2))
            load = load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)
            balance = mask.mean_of_rows((load * mask.row_means(routing.probabilities)).sum(-1))
            aux["loss.load_balance"] = config.load_balance_loss * config.num_experts * balance
        if config.router_z_loss > 0:
            z = mask.mean_of_rows(mask.row_means(jax.nn.logsumexp(routing.logits, -1) ** 2))
            aux["loss.router_z"] = config.router_z_loss * z
        return aux
