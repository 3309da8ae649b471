"""The choice of a token's experts and of their gates, computed in float32."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Known, UserError
from llama_jax.nn.base import ForwardContext, Piece, check_at_least, check_rate
from llama_jax.nn.draws import draw
from llama_jax.nn.parameters import buffer, cast_and_gather, matmul, parameter
from llama_jax.parallel import reshape


@dataclasses.dataclass(frozen=True)
class Routing:
    """The choices of every token, the best first.

    experts: [B, T, K], distinct for a token.
    gates: [B, T, K], factors of the experts' outputs.
    logits: [B, T, E], for the router-z loss.
    probabilities: [B, T, E], for the balance loss; they sum to 1.
    counted: [B, T, C], the experts of every token that the balance loss counts.
    sent: [B, T, K], false at choices that are not made use of; None where all are.
    """

    experts: Int[Array, "b t k"]
    gates: Float[Array, "b t k"]
    logits: Float[Array, "b t e"]
    probabilities: Float[Array, "b t e"]
    counted: Int[Array, "b t c"]
    sent: Bool[Array, "b t k"] | None = None


class RouterModule(nnx.Module):
    """Chooses the experts of every token."""

    def __call__(self, x: jax.Array, *, ctx: ForwardContext) -> Routing:
        """Return the choices of every token, from [B, T, D]."""
        raise NotImplementedError

    def statistics(self, counts: Float[Array, " e"]) -> dict[str, jax.Array]:
        """Return the statistics of the module's buffers by name, from the number of assignments of each expert."""
        del counts
        return {}


class Router(Piece):
    """Config of a router: a rule for the logits of a linear map, or with another `build`, any module."""

    @property
    def choices(self) -> int:
        """The number of experts that a token goes to."""
        raise NotImplementedError

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        """Return the module for inputs of this width."""
        return LinearRouter(self, width, num_experts, rngs=rngs)

    def route(self, logits: Float[Array, "b t e"], ctx: ForwardContext) -> Routing:
        """Return the choices by these logits."""
        raise NotImplementedError

    def check(self, num_experts: int) -> None:
        """Raise UserError where it cannot choose among this number of experts."""
        if not 1 <= self.choices <= num_experts:
            raise UserError(f"num_experts={num_experts} must be at least the {self.choices} that a token goes to")


class LinearRouter(RouterModule):
    """A logit for every expert by a linear map, for the `route` of its config."""

    def __init__(self, config: Router, width: int, num_experts: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.config: Any = config
        self.weight = parameter(rngs, "weight", (width, num_experts), ("embed", None), std=width**-0.5)
        self.bias = parameter(rngs, "bias", (num_experts,), (None,), std=0.0) if bias else None

    def __call__(self, x: Float[Array, "b t d"], *, ctx: ForwardContext) -> Routing:
        return self.config.route(self.logits(x), ctx)

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        """Return float32 logits, of products in full precision."""
        x = x.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):  # on TPU, products of float32 are otherwise of bfloat16
            logits = matmul(x, cast_and_gather(self.weight, x.dtype))
        return logits if self.bias is None else logits + cast_and_gather(self.bias, x.dtype)


@dataclasses.dataclass(frozen=True)
class SwitchRouter(Router):
    """The likeliest expert alone, times its probability (Fedus et al. 2021, eq. 1 and 2).

    jitter: in training the router's inputs are multiplied by random numbers within this of 1.
    bias: a bias on the logits.
    """

    jitter: float
    bias: bool = False

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        return {"jitter": 0.01}  # Fedus et al. 2021

    def __post_init__(self) -> None:
        check_rate("jitter", self.jitter)

    @property
    def choices(self) -> int:
        return 1

    @property
    def needs_rng(self) -> bool:
        return self.jitter > 0

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        return _JitteredRouter(self, width, num_experts, bias=self.bias, rngs=rngs)

    def route(self, logits: Float[Array, "b t e"], ctx: ForwardContext) -> Routing:
        probabilities = jax.nn.softmax(logits)
        experts = _best(probabilities, 1)
        return Routing(experts, _of(probabilities, experts), logits, probabilities, counted=experts)


class _JitteredRouter(LinearRouter):
    def __call__(self, x: Float[Array, "b t d"], *, ctx: ForwardContext) -> Routing:
        x = x.astype(jnp.float32)
        if self.config.jitter > 0 and ctx.dropout_key is not None:
            low, high = 1 - self.config.jitter, 1 + self.config.jitter
            factors = functools.partial(jax.random.uniform, dtype=jnp.float32, minval=low, maxval=high)
            x = x * draw(factors, ctx, "jitter", x.shape, ("batch", "sequence", None))
        return super().__call__(x, ctx=ctx)


@dataclasses.dataclass(frozen=True)
class GShardRouter(Router):
    """The two likeliest experts, whose gates sum to 1; training uses the second with twice its gate's probability.

    Lepikhin et al. 2020, section 2.2 and algorithm 1; also GLaM (Du et al. 2021). Outside of training the second is
    always used. The balance loss counts the first choices alone.
    """

    @property
    def choices(self) -> int:
        return 2

    @property
    def needs_rng(self) -> bool:
        return True

    def route(self, logits: Float[Array, "b t e"], ctx: ForwardContext) -> Routing:
        probabilities = jax.nn.softmax(logits)
        experts = _best(probabilities, 2)
        gates = _of(probabilities, experts)
        gates /= gates.sum(-1, keepdims=True)
        sent = None
        if ctx.dropout_key is not None:
            drawn = draw(jax.random.uniform, ctx, "second", gates.shape[:2], ("batch", "sequence"))
            sent = jnp.stack([jnp.ones_like(drawn, bool), drawn < 2 * gates[..., 1]], -1)
        return Routing(experts, gates, logits, probabilities, counted=experts[..., :1], sent=sent)


class _TopK(Router):
    """A choice of the `top_k` best experts, within the best groups of experts where there are groups."""

    top_k: int
    normalize: bool
    scaling: float
    num_groups: int
    top_groups: int
    best_of_group: ClassVar[int]
    """Number of a group's highest scores by whose sum groups are chosen."""

    @classmethod
    def follow(cls, known: Known) -> dict[str, Any]:
        usual = {"top_k": 2, "normalize": True, "bias_update_rate": 0.001}  # Mixtral; the rate is DeepSeek-V3's
        return usual | {"scaling": 1.0, "num_groups": 1, "top_groups": 1}

    def __post_init__(self) -> None:
        check_at_least(self, 1, "top_k", "num_groups", "top_groups")
        if self.top_groups > self.num_groups:
            raise UserError(f"top_groups={self.top_groups} is more than num_groups={self.num_groups}")

    @property
    def choices(self) -> int:
        return self.top_k

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        groups = self.num_groups
        if num_experts % groups:
            raise UserError(f"num_experts={num_experts} is not divisible by router.num_groups={groups}")
        size = num_experts // groups
        if size * self.top_groups < self.top_k:
            raise UserError(
                f"router.top_k={self.top_k} is more than the {size * self.top_groups} experts of router.top_groups="
                f"{self.top_groups} groups"
            )
        if groups > 1 and size < self.best_of_group:
            raise UserError(
                f"router.num_groups={groups} leaves groups of {size} of num_experts={num_experts}: take fewer"
            )

    def _within_groups(self, scores: Float[Array, "b t e"], otherwise: float) -> Float[Array, "b t e"]:
        """Return the scores of the best groups, and `otherwise` in the others."""
        if self.num_groups == 1:
            return scores
        scores = jax.lax.stop_gradient(scores)
        grouped = reshape(scores, (*scores.shape[:2], self.num_groups, -1), "batch", "sequence", None, None)
        of_group = jax.lax.top_k(grouped, self.best_of_group)[0].sum(-1)
        chosen = jax.nn.one_hot(_best(of_group, self.top_groups), self.num_groups).sum(-2)
        kept = jnp.where(chosen[..., None] > 0, grouped, otherwise)
        return reshape(kept, scores.shape, "batch", "sequence", None)


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK(_TopK):
    """The likeliest experts of a softmax over all (Mixtral; DeepSeek-V2, section 2.2).

    top_k: number of experts that a token goes to.
    normalize: divide its gates by their sum.
    scaling: factor of the gates after that.
    num_groups: equal groups of experts, such as those of a device; 1 for none.
    top_groups: number of groups that a token may go to: those with the likeliest experts.
    bias: a bias on the logits.
    """

    top_k: int
    normalize: bool
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    bias: bool = False

    best_of_group = 1

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        return LinearRouter(self, width, num_experts, bias=self.bias, rngs=rngs)

    def route(self, logits: Float[Array, "b t e"], ctx: ForwardContext) -> Routing:
        probabilities = jax.nn.softmax(logits)
        experts = _best(self._within_groups(probabilities, otherwise=0.0), self.top_k)
        gates = _of(probabilities, experts)
        if self.normalize:
            gates /= gates.sum(-1, keepdims=True)
        return Routing(experts, gates * self.scaling, logits, probabilities, counted=experts)


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(_TopK):
    """The highest sigmoids, chosen with a bias that no gradient trains (DeepSeek-V3, section 2.1.2, eq. 12 to 16).

    Each step moves the bias of every expert by `bias_update_rate`, up where its load was below the mean, down where it
    was above. Gates are the sigmoids without the bias; the balance loss counts the `top_k` highest of these, whatever
    the bias and the groups (eq. 18).

    top_k: number of experts that a token goes to.
    normalize: divide its gates by their sum.
    scaling: factor of the gates after that.
    num_groups: equal groups of experts, such as those of a node; 1 for none.
    top_groups: number of groups that a token may go to: those whose two highest have the largest sum.
    bias_update_rate: change of the bias in a step.
    """

    top_k: int
    normalize: bool
    scaling: float
    num_groups: int
    top_groups: int
    bias_update_rate: float

    best_of_group = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "bias_update_rate")

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        return _BiasedRouter(self, width, num_experts, rngs=rngs)

    def route_biased(self, logits: Float[Array, "b t e"], bias: Float[Array, " e"]) -> Routing:
        """Return the choices by logits and the bias of every expert."""
        scores = jax.nn.sigmoid(logits)
        experts = _best(self._within_groups(scores + bias, otherwise=-jnp.inf), self.top_k)
        gates = _of(scores, experts)
        if self.normalize:
            gates /= gates.sum(-1, keepdims=True) + 1e-20
        probabilities = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        counted = _best(scores, self.top_k)
        return Routing(experts, gates * self.scaling, logits, probabilities, counted=counted)


@dataclasses.dataclass(frozen=True)
class _TowardTheMean:
    """Update rule of the bias, from the load of every expert; a value, so that modules of equal configs are equal."""

    rate: float

    def __call__(self, bias: Float[Array, "*layers e"], load: Float[Array, "*layers e"]) -> Float[Array, "*layers e"]:
        return bias + self.rate * jnp.sign(load.mean(-1, keepdims=True) - load)


class _BiasedRouter(LinearRouter):
    """A linear router with the buffer `choice_bias` [E]."""

    def __init__(self, config: SigmoidTopK, width: int, num_experts: int, *, rngs: nnx.Rngs):
        super().__init__(config, width, num_experts, rngs=rngs)
        self.choice_bias = buffer(jnp.zeros(num_experts), _TowardTheMean(config.bias_update_rate))

    def __call__(self, x: Float[Array, "b t d"], *, ctx: ForwardContext) -> Routing:
        return self.config.route_biased(self.logits(x), self.choice_bias[...].astype(jnp.float32))

    def statistics(self, counts: Float[Array, " e"]) -> dict[str, jax.Array]:
        return {"choice_bias": counts}


def _best(scores: Float[Array, "b t e"], k: int) -> Int[Array, "b t k"]:
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]


def _of(scores: Float[Array, "b t e"], experts: Int[Array, "b t k"]) -> Float[Array, "b t k"]:
    """Return the scores of the chosen experts."""
    # By a masked sum: the gradient of a gather would be a scatter.
    return (jax.nn.one_hot(experts, scores.shape[-1]) * scores[..., None, :]).sum(-1)
