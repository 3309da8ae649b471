"""The feed-forward of experts: routing, capacity, balance losses and metrics."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from llama_jax.config import Known, UserError
from llama_jax.nn.base import FeedForward, FeedForwardModule, ForwardContext, check_above_zero, check_at_least
from llama_jax.nn.experts.dispatch import apply_experts, ranks
from llama_jax.nn.experts.groups import Product
from llama_jax.nn.experts.routers import Router, Routing, SoftmaxTopK
from llama_jax.nn.feed_forward import ACTIVATIONS, MLP, Activation, GatedLinearUnit, activated
from llama_jax.nn.parameters import Projection, cast_and_gather, child, matmul, parameter
from llama_jax.nn.quantized import Form
from llama_jax.parallel import spec


@dataclasses.dataclass(frozen=True)
class Experts(FeedForward):
    """Feed-forwards of which a router chooses a few for each token: the sum of gate times expert(x).

    Without a capacity nothing is dropped. With one, an expert takes a limited number of tokens of a row, first choices
    before second ones, early positions before late ones; to the others it adds nothing.

    num_experts: number of experts to choose from.
    intermediate_size: width inside of each.
    router: choice of each token's experts and of their gates.
    activation: inside of them: relu, relu_squared, gelu_tanh, quick_gelu, silu or tanh.
    gated: down(activation(gate(x)) * up(x)) rather than down(activation(up(x))).
    bias: biases on all projections of the chosen experts; the shared ones have none.
    limit: of gated ones, as in GPT-OSS: gate(x) is at most this, up(x) within this of 0, and 1 is added to it; or none.
    num_shared: number of further experts for every token, as one feed-forward of their widths' sum (DeepSeekMoE).
    shared_size: width of that feed-forward where it is another; none for the sum.
    shared_gate: multiply its result by the sigmoid of a linear map of the token to one number (Qwen1.5-MoE).
    capacity_factor: tokens of a row that an expert takes, times experts, over the row's assignments; none for all.
    capacity: the same as a number of tokens, whatever the row's length.
    load_balance_loss: coefficient of E times the sum over experts of load times mean probability, about 1 at the least;
      a load is an expert's share of the assignments. Losses of layers are added up.
    balance_over: tokens that loads and probabilities are means over, of a part where the batch is accumulated. row: of
      each row, then the mean over rows (DeepSeek; GShard, whose k is E squared times the coefficient). batch: of all
      rows (Switch). layers: of all rows in all layers of a stack, one loss, whose loads add up to top_k instead of 1
      (router_aux_loss_coef of Mixtral, Qwen, OLMoE and GPT-OSS in transformers).
    router_z_loss: coefficient of the mean squared logsumexp of the router's logits.
    dispatch: capacity multiplies equal numbers of rows for all experts, dropless the rows that there are, with the same
      result; auto takes the faster.
    """

    num_experts: int
    intermediate_size: int
    router: Router
    activation: Activation
    gated: bool
    bias: bool = False
    limit: float | None = None
    num_shared: int = 0
    shared_size: int | None = None
    shared_gate: bool = False
    capacity_factor: float | None = None
    capacity: int | None = None
    load_balance_loss: float = 0.0
    balance_over: Literal["row", "batch", "layers"] = "row"
    router_z_loss: float = 0.0
    dispatch: Literal["auto", "capacity", "dropless"] = "auto"

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        router = known.make(SoftmaxTopK)
        return super().follow(known) | {"gated": not isinstance(known.old, MLP), "router": router}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_experts", "intermediate_size")
        check_at_least(self, 0, "num_shared", "load_balance_loss", "router_z_loss")
        if self.num_shared == 0 and (self.shared_size is not None or self.shared_gate):
            raise UserError(
                f"shared_size={self.shared_size} and shared_gate={self.shared_gate} are of shared experts, and "
                "num_shared=0: set it to 1"
            )
        check_above_zero(self, "shared_size", "limit")
        if self.capacity is not None and self.capacity_factor is not None:
            raise UserError(f"capacity={self.capacity} and capacity_factor={self.capacity_factor}: give one of them")
        check_above_zero(self, "capacity", "capacity_factor", hint=", or none to drop nothing")
        if self.limit is not None and (not self.gated or self.num_shared):
            raise UserError(f"limit={self.limit} is for gated experts without shared ones: set it to none")
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

    def shared(self) -> FeedForward:
        """Return the shared experts as one feed-forward."""
        kind = GatedLinearUnit if self.gated else MLP
        size = self.num_shared * self.intermediate_size if self.shared_size is None else self.shared_size
        return kind(size, self.activation, bias=False)

    @property
    def drops(self) -> bool:
        """True where an expert may have to leave out tokens."""
        return self.capacity is not None or self.capacity_factor is not None

    def slots(self, length: int) -> int:
        """Return the number of slots that an expert has for a row of `length` tokens: without a limit, all of them."""
        if self.capacity is not None:
            return min(self.capacity, length)
        if self.capacity_factor is not None:
            share = self.capacity_factor * self.router.choices * length / self.num_experts
            return min(max(math.ceil(share), 1), length)
        return length


class _Matrices(nnx.Module):
    """One matrix of every expert."""

    summed_dims = (1,)

    def __init__(
        self, num_experts: int, in_dim: tuple[str, int], out_dim: tuple[str, int], *, bias: bool, rngs: nnx.Rngs
    ):
        (in_axis, i), (out_axis, o) = in_dim, out_dim
        axes = ("expert", in_axis, out_axis)
        self.weight: nnx.Variable | Form = parameter(rngs, "weight", (num_experts, i, o), axes, std=i**-0.5)
        self.bias = parameter(rngs, "bias", (num_experts, o), ("expert", out_axis), std=0.0) if bias else None


class _Stack(nnx.Module):
    """The experts' matrices."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs):
        outer, inner, e = ("embed", width), ("mlp", config.intermediate_size), config.num_experts
        matrices = functools.partial(_Matrices, e, bias=config.bias)
        self.gate_proj = matrices(outer, inner, rngs=child(rngs, "gate_proj")) if config.gated else None
        self.up_proj = matrices(outer, inner, rngs=child(rngs, "up_proj"))
        self.down_proj = matrices(inner, outer, rngs=child(rngs, "down_proj"))

    def params(self) -> dict[str, nnx.Variable | Form]:
        """Return the stored matrices by name, and the biases inside of the experts."""
        named = {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}
        named = {name: matrices for name, matrices in named.items() if matrices is not None}
        found: dict[str, nnx.Variable | Form] = {name: matrices.weight for name, matrices in named.items()}
        biases = {f"{name}_bias": matrices.bias for name, matrices in named.items() if name != "down"}
        return found | {name: bias for name, bias in biases.items() if bias is not None}


class ExpertsModule(FeedForwardModule):
    """A router, its experts, and the shared experts where there are any."""

    def __init__(self, config: Experts, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.router = config.router.build(width, config.num_experts, rngs=child(rngs, "router"))
        self.experts = _Stack(config, width, rngs=child(rngs, "experts"))
        self.shared = config.shared().build(width, rngs=child(rngs, "shared")) if config.num_shared else None
        gate = child(rngs, "shared_gate")
        self.shared_gate = (
            Projection({"embed": width}, {"_one": 1}, bias=False, rngs=gate) if config.shared_gate else None
        )

    def __call__(
        self, x: Float[Array, "b t d"], *, ctx: ForwardContext
    ) -> tuple[Float[Array, "b t d"], dict[str, jax.Array]]:
        """Map [B, T, D] to [B, T, D], with auxiliary arrays.

        `loss.load_balance` (of all layers together its factors, `product.load_balance`) and `loss.router_z` where they
        have a coefficient; `experts_load` [E], each expert's share of the assignments; `dropped_share`, the share of
        those without a slot; for both, their number under `of.`, by which micro-batches are weighted.
        """
        config, length = self.config, x.shape[1]
        with jax.named_scope("router"):
            routing = self.router(x, ctx=ctx)
            wanted = jnp.ones_like(routing.experts, bool) if routing.sent is None else routing.sent
            if ctx.is_token is not None:
                wanted &= ctx.is_token[..., None]
        by_capacity = self._by_capacity(length)
        # Ranks cost a sort; they are needed only to drop, or to give each assignment its slot.
        rank, kept = None, wanted
        if config.drops or by_capacity:
            rank = ranks(routing.experts, wanted, config.num_experts)
        if config.drops:
            assert rank is not None
            kept = wanted & (rank < self._limit(ctx.is_token, length))

        def body(rows: jax.Array, matrices: dict[str, jax.Array], product: Product) -> jax.Array:
            def projected(name: str) -> jax.Array:
                y = product(rows, matrices[name])
                if config.bias:  # a product with ones gives every row the bias of its expert
                    y += product(jnp.ones_like(rows[..., :1]), matrices[f"{name}_bias"][:, None])
                return y

            activation, up = ACTIVATIONS[config.activation], projected("up")
            if not config.gated:
                return product(activated(activation, up), matrices["down"])
            gate = projected("gate")
            if config.limit is not None:
                gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit) + 1
            return product(activated(activation, gate, up), matrices["down"])

        with jax.named_scope("experts"):
            y = apply_experts(
                body,
                x,
                routing.experts,
                routing.gates,
                kept,
                self.experts.params(),
                rank=rank if by_capacity else None,
                capacity=config.slots(length),
            )
        if (bias := self.experts.down_proj.bias) is not None:
            # Outside of the experts, whose results are sums over the devices that split their width.
            chosen = jax.nn.one_hot(routing.experts, config.num_experts) * (routing.gates * kept)[..., None]
            y = y + matmul(chosen.sum(2).astype(x.dtype), cast_and_gather(bias, x.dtype))
        if self.shared is not None:
            with jax.named_scope("shared"):
                of_shared = self.shared(x, ctx=ctx)[0]
                y = y + (of_shared if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x)) * of_shared)
        return y, self._auxiliary(routing, ctx, wanted, kept)

    def _by_capacity(self, length: int) -> bool:
        """Return the way of dispatch: by capacity or sorted."""
        config = self.config
        # With slots for more than twice the assignments, empty ones cost more than sorting; so it is where none is
        # dropped.
        if config.dispatch != "auto":
            return config.dispatch == "capacity"
        return config.drops and config.num_experts * config.slots(length) <= 2 * config.router.choices * length

    def _limit(self, is_token: Bool[Array, "b t"] | None, length: int) -> jax.Array | int:
        """Return the number of tokens of each row that an expert takes: [B, 1, 1], or one number for all."""
        config = self.config
        if config.capacity_factor is None or is_token is None:
            return config.slots(length)
        # Padding must not make slots: the factor multiplies the number of tokens.
        table = jnp.array([config.slots(n) for n in range(length + 1)])
        count = is_token.sum(1)
        return table.at[count].get(out_sharding=spec("batch", shape=count.shape))[:, None, None]

    def _auxiliary(
        self, routing: Routing, ctx: ForwardContext, wanted: Bool[Array, "b t k"], kept: Bool[Array, "b t k"]
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
            # Assignments have no gradient; the mean probability passes it to the router.
            of_rows = config.balance_over == "row"
            means = ctx.row_means if of_rows else ctx.batch_means
            load = means(jax.nn.one_hot(routing.counted, config.num_experts).sum(2))
            probability = config.load_balance_loss * config.num_experts * means(routing.probabilities)
            if config.balance_over == "layers":
                aux["product.load_balance"] = jnp.stack([load, probability])
            else:
                balance = (load * probability).sum(-1) / routing.counted.shape[-1]
                aux["loss.load_balance"] = ctx.mean_of_rows(balance) if of_rows else balance
        if config.router_z_loss > 0:
            z = ctx.mean_of_rows(ctx.row_means(jax.nn.logsumexp(routing.logits, -1) ** 2))
            aux["loss.router_z"] = config.router_z_loss * z
        return aux
