"""Which experts a token goes to, and how much it takes of each. All of it in float32."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.config import Component, UserError
from llama_jax.nn.dropout import check_rate, random_key
from llama_jax.nn.masks import AttentionMask
from llama_jax.nn.parameters import buffer, cast_and_gather, matmul, parameter
from llama_jax.parallel import reshape, spec


@dataclasses.dataclass(frozen=True)
class Routing:
    """The choices of every token, the best first.

    `experts` [B, T, K] are distinct for a token, `weights` [B, T, K] what their outputs are multiplied by, `sent`
    [B, T, K] whether the choice is made use of at all (None: always). `logits` [B, T, E] are those of the router-z
    loss, `probabilities` [B, T, E] sum to 1 and are those of the balance loss, which counts a token's first `counted`
    choices.
    """

    experts: Int[Array, "b t k"]
    weights: Float[Array, "b t k"]
    logits: Float[Array, "b t e"]
    probabilities: Float[Array, "b t e"]
    counted: int
    sent: Bool[Array, "b t k"] | None = None


class RouterModule(nnx.Module):
    def __call__(self, x: jax.Array, *, mask: AttentionMask) -> Routing:
        """[B, T, D] -> the choices of every token."""
        raise NotImplementedError

    def statistics(self, counts: Float[Array, " e"]) -> dict[str, jax.Array]:
        """What the module's buffers are updated with, by name; from the assignments that each expert got in a row."""
        del counts
        return {}


class Router(Component):
    """Config of a router."""

    @property
    def choices(self) -> int:
        """Experts that a token goes to."""
        raise NotImplementedError

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> RouterModule:
        raise NotImplementedError

    def check(self, num_experts: int) -> None:
        """Raises UserError where it cannot choose among so many experts."""
        if not 1 <= self.choices <= num_experts:
            raise UserError(f"num_experts={num_experts} must be at least the {self.choices} that a token goes to")

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers in it."""
        return False


class _LinearRouter(RouterModule):
    """A logit of every expert."""

    def __init__(self, width: int, num_experts: int, *, bias: bool = False, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "weight", (width, num_experts), ("embed", None), std=width**-0.5)
        self.bias = parameter(rngs, "bias", (num_experts,), (None,), std=0.0) if bias else None

    def logits(self, x: Float[Array, "b t d"]) -> Float[Array, "b t e"]:
        x = x.astype(jnp.float32)
        with jax.default_matmul_precision("highest"):  # on TPU, products of float32 are otherwise of bfloat16
            logits = matmul(x, cast_and_gather(self.weight, x.dtype), out_axis=None)
        return logits if self.bias is None else logits + cast_and_gather(self.bias, x.dtype)


@dataclasses.dataclass(frozen=True)
class SwitchRouter(Router):
    """The likeliest expert alone, times its probability (Fedus et al. 2021, eq. 1 and 2).

    jitter: training multiplies what the router sees by random numbers within this of 1.
    bias: a bias on the logits.
    """

    jitter: float
    bias: bool = False

    def __post_init__(self) -> None:
        check_rate("jitter", self.jitter)

    @property
    def choices(self) -> int:
        return 1

    @property
    def needs_rng(self) -> bool:
        return self.jitter > 0

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> "SwitchRouterModule":
        return SwitchRouterModule(self, width, num_experts, rngs=rngs)


class SwitchRouterModule(_LinearRouter):
    def __init__(self, config: SwitchRouter, width: int, num_experts: int, *, rngs: nnx.Rngs):
        super().__init__(width, num_experts, bias=config.bias, rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"], *, mask: AttentionMask) -> Routing:
        x = x.astype(jnp.float32)
        if self.config.jitter > 0 and mask.dropout_key is not None:
            low, high = 1 - self.config.jitter, 1 + self.config.jitter
            key, split = random_key(mask, "jitter"), spec("batch", "sequence", None, shape=x.shape)
            x = x * jax.random.uniform(key, x.shape, jnp.float32, low, high, out_sharding=split)
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits)
        experts = _best(probabilities, 1)
        return Routing(experts, _of(probabilities, experts), logits, probabilities, counted=1)


@dataclasses.dataclass(frozen=True)
class GShardRouter(Router):
    """The two likeliest experts, their weights sharing 1; training sends the second with twice its weight's chance.

    Lepikhin et al. 2020, section 2.2 and algorithm 1; GLaM's too (Du et al. 2021). Outside of training the second is
    always sent. The balance loss counts the first choices alone.
    """

    @property
    def choices(self) -> int:
        return 2

    @property
    def needs_rng(self) -> bool:
        return True

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> "GShardRouterModule":
        return GShardRouterModule(width, num_experts, rngs=rngs)


class GShardRouterModule(_LinearRouter):
    def __call__(self, x: Float[Array, "b t d"], *, mask: AttentionMask) -> Routing:
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits)
        experts = _best(probabilities, 2)
        weights = _of(probabilities, experts)
        weights /= weights.sum(-1, keepdims=True)
        sent = None
        if mask.dropout_key is not None:
            shape = weights.shape[:2]
            draw = jax.random.uniform(
                random_key(mask, "second"), shape, out_sharding=spec("batch", "sequence", shape=shape)
            )
            sent = jnp.stack([jnp.ones_like(draw, bool), draw < 2 * weights[..., 1]], -1)
        return Routing(experts, weights, logits, probabilities, counted=1, sent=sent)


@dataclasses.dataclass(frozen=True)
class SoftmaxTopK(Router):
    """The likeliest experts of a softmax over all (Mixtral; DeepSeek-V2, section 2.2).

    top_k: experts that a token goes to.
    normalize: whether its weights are divided by their sum.
    scaling: what they are multiplied by after that.
    num_groups: equal groups of experts, such as those of a device; 1 for none.
    top_groups: groups that a token may go to: those with the likeliest expert.
    """

    top_k: int
    normalize: bool
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1

    def __post_init__(self) -> None:
        _check_groups(self)

    @property
    def choices(self) -> int:
        return self.top_k

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        _check_group_size(self, num_experts, 1)

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> "SoftmaxTopKModule":
        return SoftmaxTopKModule(self, width, num_experts, rngs=rngs)


class SoftmaxTopKModule(_LinearRouter):
    def __init__(self, config: SoftmaxTopK, width: int, num_experts: int, *, rngs: nnx.Rngs):
        super().__init__(width, num_experts, rngs=rngs)
        self.config = config

    def __call__(self, x: Float[Array, "b t d"], *, mask: AttentionMask) -> Routing:
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits)
        allowed = _within_groups(probabilities, self.config, best=1, otherwise=0.0)
        experts = _best(allowed, self.config.top_k)
        weights = _of(probabilities, experts)
        if self.config.normalize:
            weights /= weights.sum(-1, keepdims=True)
        return Routing(experts, weights * self.config.scaling, logits, probabilities, counted=self.config.top_k)


@dataclasses.dataclass(frozen=True)
class SigmoidTopK(Router):
    """The highest sigmoids, chosen with a bias that no gradient trains (DeepSeek-V3, section 2.1.2, eq. 12 to 16).

    Each step moves the bias of every expert by `bias_update_rate`, up where it got less than the mean load, down where
    more. Weights are the sigmoids without it.

    top_k: experts that a token goes to.
    normalize: whether its weights are divided by their sum.
    scaling: what they are multiplied by after that.
    num_groups: equal groups of experts, such as those of a node; 1 for none.
    top_groups: groups that a token may go to: those whose two highest sum to most.
    bias_update_rate: of the bias, each step.
    """

    top_k: int
    normalize: bool
    scaling: float
    num_groups: int
    top_groups: int
    bias_update_rate: float

    def __post_init__(self) -> None:
        _check_groups(self)
        if self.bias_update_rate < 0:
            raise UserError(f"bias_update_rate={self.bias_update_rate} must be at least 0")

    @property
    def choices(self) -> int:
        return self.top_k

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        _check_group_size(self, num_experts, 2)

    def build(self, width: int, num_experts: int, *, rngs: nnx.Rngs) -> "SigmoidTopKModule":
        return SigmoidTopKModule(self, width, num_experts, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class _TowardTheMean:
    """Of a bias and the load of every expert, the next bias. A value: modules of equal configs are equal."""

    rate: float

    def __call__(self, bias: Float[Array, "*layers e"], load: Float[Array, "*layers e"]) -> Float[Array, "*layers e"]:
        return bias + self.rate * jnp.sign(load.mean(-1, keepdims=True) - load)


class SigmoidTopKModule(_LinearRouter):
    def __init__(self, config: SigmoidTopK, width: int, num_experts: int, *, rngs: nnx.Rngs):
        super().__init__(width, num_experts, rngs=rngs)
        self.config = config
        self.choice_bias = buffer(jnp.zeros(num_experts), _TowardTheMean(config.bias_update_rate))

    def __call__(self, x: Float[Array, "b t d"], *, mask: AttentionMask) -> Routing:
        logits = self.logits(x)
        scores = jax.nn.sigmoid(logits)
        biased = scores + self.choice_bias[...].astype(jnp.float32)
        experts = _best(_within_groups(biased, self.config, best=2, otherwise=-jnp.inf), self.config.top_k)
        weights = _of(scores, experts)
        if self.config.normalize:
            weights /= weights.sum(-1, keepdims=True) + 1e-20
        probabilities = scores / (scores.sum(-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * self.config.scaling, logits, probabilities, counted=self.config.top_k)

    def statistics(self, counts: Float[Array, " e"]) -> dict[str, jax.Array]:
        return {"choice_bias": counts}


def _check_groups(config: SoftmaxTopK | SigmoidTopK) -> None:
    for name in ("top_k", "num_groups", "top_groups"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)} must be at least 1")
    if config.top_groups > config.num_groups:
        raise UserError(f"top_groups={config.top_groups} is more than num_groups={config.num_groups}")


def _check_group_size(config: SoftmaxTopK | SigmoidTopK, num_experts: int, least: int) -> None:
    groups = config.num_groups
    if num_experts % groups:
        raise UserError(f"num_experts={num_experts} is not divisible by router.num_groups={groups}")
    size = num_experts // groups
    if size * config.top_groups < config.top_k:
        raise UserError(
            f"router.top_k={config.top_k} is more than the {size * config.top_groups} experts of router.top_groups="
            f"{config.top_groups} groups"
        )
    if groups > 1 and size < least:
        raise UserError(f"router.num_groups={groups} leaves groups of {size} of num_experts={num_experts}: take fewer")


def _best(scores: Float[Array, "b t e"], k: int) -> Int[Array, "b t k"]:
    return jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]


def _of(scores: Float[Array, "b t e"], experts: Int[Array, "b t k"]) -> Float[Array, "b t k"]:
    """Scores of the chosen. A masked sum: a gather's gradient would be a scatter."""
    return (jax.nn.one_hot(experts, scores.shape[-1]) * scores[..., None, :]).sum(-1)


def _within_groups(
    scores: Float[Array, "b t e"], config: SoftmaxTopK | SigmoidTopK, *, best: int, otherwise: float
) -> Float[Array, "b t e"]:
    """Scores of the groups whose `best` highest sum to most; `otherwise` in the others."""
    if config.num_groups == 1:
        return scores
    scores = jax.lax.stop_gradient(scores)
    grouped = reshape(scores, (*scores.shape[:2], config.num_groups, -1), "batch", "sequence", None, None)
    of_group = jax.lax.top_k(grouped, best)[0].sum(-1)
    chosen = jax.nn.one_hot(_best(of_group, config.top_groups), config.num_groups).sum(-2)
    kept = jnp.where(chosen[..., None] > 0, grouped, otherwise)
    return reshape(kept, scores.shape, "batch", "sequence", None)
