"""From logits to a token: controls, then temperature, top-k, top-p, min-p, typical and a draw.

The order is that of transformers' `generate`: the controls of `controls.py` in their order, what a constraint allows,
then at a temperature above 0 temperature, top-k, top-p, min-p and typical, each on what those before it left. All
numbers may be arrays [B], one for each row, so that a batch holds requests with different settings; a row's token is
the same as alone.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from llama_jax.checkpoint import GenerationSettings
from llama_jax.config import UserError
from llama_jax.sampling.config import LARGEST, SamplingConfig
from llama_jax.sampling.controls import Control, Logits, Number, Written, by_row, column, controls_of, merged

# Float32 has hardly a smaller normal number: dividing by less is dividing by 0.
SMALLEST = 1e-37
# More than all probabilities together: a set that never reaches it is the whole vocabulary.
ALL = 2.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    The values are traced, scalars or one for each row [B]; None costs nothing: greedy is all None. Of several rows
    those of temperature 0 are greedy. `allowed` [B, V] is true for the tokens that constraints leave.
    """

    temperature: Number | None = None
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    controls: tuple[Control, ...] = ()
    allowed: Bool[Array | np.ndarray, "b v"] | None = None

    @classmethod
    def of(
        cls,
        config: SamplingConfig,
        settings: GenerationSettings | None = None,
        vocab_size: int = 0,
        stop_ids: Sequence[int] | None = None,
    ) -> "Sampler":
        """Return the sampler of one user's settings, and those of a model's files, for all rows. See `rows`."""
        return cls.rows([config], settings, vocab_size, None if stop_ids is None else [stop_ids])

    @classmethod
    def rows(
        cls,
        configs: Sequence[SamplingConfig],
        settings: GenerationSettings | None = None,
        vocab_size: int = 0,
        stop_ids: Sequence[Sequence[int]] | None = None,
    ) -> "Sampler":
        """Return the sampler of a batch whose row b is sampled by `configs[b]`; a temperature below 1e-37 is greedy.

        `stop_ids` end the rows' texts (default: those of their configs). Raises UserError as `controls_of` does.
        """
        controls = controls_of(settings or GenerationSettings(), vocab_size, configs, stop_ids)
        drawn = [config if config.temperature >= SMALLEST else None for config in configs]
        # As float32, none of the numbers becomes 0 or infinite.
        return cls(
            merged([c and min(c.temperature, 1 / SMALLEST) for c in drawn], 0.0),
            merged([c and c.top_k and min(c.top_k, LARGEST) for c in drawn], LARGEST),
            merged([c and _share(c.top_p) for c in drawn], ALL),
            merged([c and (c.min_p or None) for c in drawn], 0.0),
            merged([c and _share(c.typical_p) for c in drawn], ALL),
            controls,
        )

    def controlled(self, logits: Logits, written: Written) -> Logits:
        """Return `logits` as the controls leave them. Raises UserError for a control that changes shape or type."""
        for control in self.controls:
            changed = control(logits, written)
            if (changed.shape, changed.dtype) != (logits.shape, logits.dtype):
                made, given = (f"{x.dtype}{list(x.shape)}" for x in (changed, logits))
                raise UserError(f"control {control} makes {made} of logits {given}: return the same shape and type")
            logits = changed
        return logits if self.allowed is None else jnp.where(by_row(self.allowed), logits, -jnp.inf)

    def choose(self, logits: Logits, keys: Key[Array, " b"]) -> Int[Array, " b"]:
        """Return one token of each row's float32 logits, drawn with the row's own key."""
        if self.temperature is None:
            return _argmax(logits)
        # The Gumbel-max trick: the highest of logits plus Gumbel noise is a draw from their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        drawn = _argmax(self.warped(logits) + noise)
        return jnp.where(by_row(self.temperature) > 0, drawn, _argmax(logits)) if np.ndim(self.temperature) else drawn

    def warped(self, logits: Logits) -> Logits:
        """Return controlled float32 logits, up to a constant of each row, as they are drawn from."""
        if self.temperature is None:
            raise UserError("temperature=0 draws nothing: take the highest of the logits")
        temperature = column(self.temperature)
        if np.ndim(temperature):
            temperature = jnp.where(temperature > 0, temperature, 1.0)  # of a greedy row
        # The maximum is taken off first, so that no quotient is beyond float32.
        logits = (logits - logits.max(-1, keepdims=True)) / temperature
        for warp, number in (
            (top_k, self.top_k), (top_p, self.top_p), (min_p, self.min_p), (typical, self.typical_p),
        ):  # fmt: skip
            if number is not None:
                logits = warp(logits, column(number))
        return logits


def _share(p: float | None) -> float | None:
    return None if p is None or p == 1 else max(p, SMALLEST)


def top_k(logits: Logits, k: Number) -> Logits:
    """Return float32 [B, V] with -inf at all but each row's k highest; of equal ones the first. `k` may be traced."""
    return jnp.where(_highest(logits, jnp.ones_like(logits), k), logits, -jnp.inf)


def top_p(logits: Logits, p: Number) -> Logits:
    """Return float32 [B, V] with -inf outside each row's nucleus (Holtzman et al. 2020).

    The nucleus is the smallest set of the most probable tokens that together reach probability p: at least one; of
    equally probable ones the first. `p` may be traced.
    """
    return jnp.where(_highest(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)


def min_p(logits: Logits, p: Number) -> Logits:
    """Return float32 [B, V] with -inf where the probability is below `p` of the row's highest (Nguyen et al. 2024)."""
    return jnp.where(jnp.exp(logits - logits.max(-1, keepdims=True)) < p, -jnp.inf, logits)


def typical(logits: Logits, p: Number) -> Logits:
    """Return float32 [B, V] with -inf outside each row's typical set (Meister et al. 2022).

    It is the smallest set, of tokens whose information is nearest to the row's entropy, that reaches probability p; of
    equally near ones the first.
    """
    information = -jax.nn.log_softmax(logits)
    probability = jnp.exp(-information)
    entropy = jnp.where(probability > 0, probability * information, 0.0).sum(-1, keepdims=True)
    nearness = -jnp.abs(information - entropy)  # -inf for what is excluded already
    return jnp.where(_highest(nearness, probability, p), logits, -jnp.inf)


def logprobs(
    logits: Logits, chosen: Int[Array, " b"], n: int
) -> tuple[Float[Array, " b"], Int[Array, "b n"], Float[Array, "b n"]]:
    """Return log-probabilities of the `chosen` tokens, then the `n` most probable tokens and their log-probabilities.

    They are those of the model's own distribution where `logits` are the model's, before any control.
    """
    found = jax.nn.log_softmax(logits)
    # A masked sum in place of an index: it stays on the device that holds the row.
    own = jnp.where(jnp.arange(logits.shape[1]) == chosen[:, None], found, 0.0).sum(-1)
    highest, ids = jax.lax.top_k(found, n)
    return own, ids, highest


def _highest(logits: Logits, weights: Logits, target: Number) -> Bool[Array, "b v"]:
    """Return the smallest set of highest logits whose weights sum to `target`; all of them where none does.

    Nothing is sorted. The lowest logit that is kept is built bit by bit: 32 sums over the vocabulary, exact, and 15
    times faster than a sort on a CPU.
    """
    rank = _ordered_bits(logits)

    def weight_from(threshold: UInt[Array, "b 1"]) -> Float[Array, "b 1"]:
        return jnp.where(rank >= threshold, weights, 0.0).sum(-1, keepdims=True)

    def set_bit(i: Array, threshold: UInt[Array, "b 1"]) -> UInt[Array, "b 1"]:
        raised = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(weight_from(raised) >= target, raised, threshold)

    lowest = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(rank[:, :1]))
    above, tied = rank > lowest, rank == lowest
    tied_weights = jnp.where(tied, weights, 0.0)
    before = jnp.where(above, weights, 0.0).sum(-1, keepdims=True) + jnp.cumsum(tied_weights, -1) - tied_weights
    return above | (tied & (before < target))


def _ordered_bits(x: Logits) -> UInt[Array, "b v"]:
    """Return integers in the order of the floats whose bits they are."""
    # IEEE floats are sign and magnitude: negative ones are inverted, positive ones moved above them.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _argmax(x: Logits) -> Int[Array, " b"]:
    """Return the first index of each row's highest entry."""
    # XLA:CPU runs `jnp.argmax`, and all that feeds it, entry by entry.
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    return jnp.where(x == x.max(-1, keepdims=True), index, x.shape[-1]).min(-1)
