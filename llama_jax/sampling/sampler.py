"""From logits to a token: controls, then temperature, top-k, top-p and a draw.

A control is a function `(logits [B, V], written) -> logits [B, V]`. Those of a model's files (`controls_of`) come
first, in the order of transformers, then those given to `generate(..., controls=...)`. A plain function is compiled in;
a control with numbers that change from call to call is a dataclass registered as a pytree, as those below.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from llama_jax.checkpoint import GenerationSettings
from llama_jax.config import UserError
from llama_jax.parallel import shard
from llama_jax.sampling.config import LARGEST, SamplingConfig

Logits = Float[Array, "b v"]
Number = float | Array
TokenMask = Bool[Array | np.ndarray, " v"]
# Float32 has hardly a smaller normal number: dividing by less is dividing by 0.
SMALLEST = 1e-37
STATIC = {"static": True}  # metadata of a pytree's field that is compiled in


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """The rows that a control may read: tokens [B, S] up to `lengths` [B], of which `prompts` [B] were given."""

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]

    def last(self, count: int) -> Int[Array, "b n"]:
        """Return the last `count` tokens of each row in their order; -1 where the row is shorter."""
        first = self.lengths - count
        return jnp.stack([self._at(first + i) for i in range(count)], 1) if count else self.tokens[:, :0]

    def _at(self, place: Int[Array, " b"]) -> Int[Array, " b"]:
        # A masked sum in place of an index: it stays on the device that holds the row.
        here = jnp.arange(self.tokens.shape[1]) == place[:, None]
        return jnp.where(place < 0, -1, jnp.where(here, self.tokens, 0).sum(1))


Control = Callable[[Logits, Written], Logits]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen.

    The values are traced, None costs nothing: greedy is all None.
    """

    temperature: Number | None = None
    top_k: Number | None = None
    top_p: Number | None = None
    controls: tuple[Control, ...] = ()

    @classmethod
    def of(cls, config: SamplingConfig) -> "Sampler":
        """Return the sampler of a user's settings; a temperature below 1e-37 is greedy. Raises UserError."""
        own = tuple(_traceable(control) for control in config.controls)
        if config.temperature < SMALLEST:
            return cls(controls=own)
        # As float32, none of them becomes 0 or infinite.
        top_k = None if config.top_k is None else min(config.top_k, LARGEST)
        top_p = None if config.top_p is None or config.top_p == 1 else max(config.top_p, SMALLEST)
        return cls(min(config.temperature, 1 / SMALLEST), top_k, top_p, own)

    def controlled(self, logits: Logits, written: Written) -> Logits:
        """Return `logits` as the controls leave them. Raises UserError for a control that changes shape or type."""
        for control in self.controls:
            changed = control(logits, written)
            if (changed.shape, changed.dtype) != (logits.shape, logits.dtype):
                made, given = (f"{x.dtype}{list(x.shape)}" for x in (changed, logits))
                raise UserError(f"control {control} makes {made} of logits {given}: return the same shape and type")
            logits = changed
        return logits

    def choose(self, logits: Logits, keys: Key[Array, " b"]) -> Int[Array, " b"]:
        """Return one token of each row's float32 logits, drawn with the row's own key."""
        if self.temperature is None:
            return _argmax(logits)
        # The maximum is taken off first, so that no quotient is beyond float32.
        logits = (logits - logits.max(-1, keepdims=True)) / self.temperature
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        # The Gumbel-max trick: the highest of logits plus Gumbel noise is a draw from their softmax.
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        return _argmax(logits + noise)


def top_k(logits: Logits, k: Number) -> Logits:
    """Return float32 [B, V] with -inf at all but each row's k highest; of equal ones the first. `k` may be traced."""
    return jnp.where(_highest(logits, jnp.ones_like(logits), k), logits, -jnp.inf)


def top_p(logits: Logits, p: Number) -> Logits:
    """Return float32 [B, V] with -inf outside each row's nucleus (Holtzman et al. 2020).

    The nucleus is the smallest set of the most probable tokens that together reach probability p: at least one; of
    equally probable ones the first. `p` may be traced.
    """
    return jnp.where(_highest(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _PlainFunction:
    """A control that is not a pytree: part of the compiled program."""

    function: Control = dataclasses.field(metadata=STATIC)

    def __call__(self, logits: Logits, written: Written) -> Array:
        return self.function(logits, written)


def _traceable(control: Control) -> Control:
    if not callable(control):
        raise UserError(f"controls has {control!r}: give functions of logits and of the rows written so far")
    return _PlainFunction(control) if jax.tree_util.all_leaves([control]) else control


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RepetitionPenalty:
    """Make tokens that are in the text less probable (Keskar et al. 2019)."""

    penalty: Number

    def __call__(self, logits: Logits, written: Written) -> Logits:
        there = jnp.arange(written.tokens.shape[1]) < written.lengths[:, None]
        lower = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(_marked(written.tokens, there, logits.shape[1]), lower, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _NoRepeat:
    """Forbid tokens that would complete a sequence of `size` tokens a second time (Paulus et al. 2017)."""

    size: int = dataclasses.field(metadata=STATIC)

    def __call__(self, logits: Logits, written: Written) -> Logits:
        before = written.last(self.size - 1)
        ends = jnp.arange(written.tokens.shape[1])
        same = (ends >= self.size - 1) & (ends < written.lengths[:, None])
        for i in range(self.size - 1):
            # The roll puts the i-th token of the sequence that ends at a place there. Nothing that wraps around counts.
            same &= jnp.roll(written.tokens, self.size - 1 - i, axis=1) == before[:, i : i + 1]
        return jnp.where(_marked(written.tokens, same, logits.shape[1]), -jnp.inf, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _BadSequences:
    """Forbid the `last` token [N] of a sequence whose others, [N, size], are at the end of the text."""

    size: int = dataclasses.field(metadata=STATIC)
    others: Int[Array | np.ndarray, "n k"]
    last: Int[Array | np.ndarray, " n"]

    def __call__(self, logits: Logits, written: Written) -> Logits:
        found = jnp.ones((logits.shape[0], len(self.last)), bool)
        before = written.last(self.size)
        for i in range(self.size):
            found &= before[:, i : i + 1] == self.others[:, i]
        ids = jnp.broadcast_to(jnp.asarray(self.last), found.shape)
        return jnp.where(_marked(shard(ids, "batch", None), found, logits.shape[1]), -jnp.inf, logits)


def _marked(ids: Int[Array, "b n"], where: Bool[Array, "b n"], size: int) -> Bool[Array, "b v"]:
    """Return for each row which of `size` tokens are among the `ids` at the places of `where`."""

    def of_row(ids: Array, where: Array) -> Array:
        return jnp.zeros(size, bool).at[jnp.where(where, ids, size)].set(True, mode="drop")

    rows = jax.vmap(of_row)
    if jax.sharding.get_abstract_mesh().empty:
        return rows(ids, where)
    # A scatter whose index is a row's own: the compiler finds by itself that it is split as the rows are.
    split: Any = jax.sharding.auto_axes(rows, out_sharding=jax.typeof(where).sharding)  # type: ignore[call-arg]
    return shard(split(ids, where), "batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mask:
    """Forbid `tokens` [V] (true), or with `forced` all others, in the rows that `where(written, *numbers)` selects."""

    tokens: TokenMask
    where: Callable[..., Bool[Array, " b"]] | None = dataclasses.field(default=None, metadata=STATIC)  # None: all rows
    numbers: tuple[int | Array, ...] = ()
    forced: bool = dataclasses.field(default=False, metadata=STATIC)

    def __call__(self, logits: Logits, written: Written) -> Logits:
        if self.where is None:
            return jnp.where(self.tokens, -jnp.inf, logits)
        rows = self.where(written, *self.numbers)[:, None]
        if self.forced:
            return jnp.where(rows, jnp.where(self.tokens, 0.0, -jnp.inf), logits)
        return jnp.where(rows & self.tokens, -jnp.inf, logits)


def _too_short(written: Written, length: Number, new: Number) -> Bool[Array, " b"]:
    return (written.lengths < length) | (written.lengths - written.prompts < new)


def _after_one_token(written: Written) -> Bool[Array, " b"]:
    return written.lengths == 1


def _before_last(written: Written, count: Number) -> Bool[Array, " b"]:
    return written.lengths - written.prompts == count - 1


def _at_beginning(written: Written, after_forced: Number) -> Bool[Array, " b"]:
    # After a single token whose next is forced the beginning is one later.
    return written.lengths == written.prompts + (written.prompts == 1) * after_forced


def controls_of(settings: GenerationSettings, vocab_size: int, max_new_tokens: int) -> tuple[Control, ...]:
    """Return the controls that the settings of a model's files require, in the order of transformers.

    Raises UserError for tokens outside the vocabulary, and for settings that have no control here.
    """
    if settings.unknown:
        key = settings.unknown[0]
        raise UserError(
            f"the model's generation settings have {key}, which sampling cannot follow: load it with "
            f"--ignore-config-keys {key}"
        )

    def mask(name: str, ids: Iterable[int]) -> np.ndarray:
        found = np.zeros(vocab_size, bool)
        for i in ids:
            if not 0 <= i < vocab_size:
                raise UserError(
                    f"the model's generation settings have {name} with the token {i}, and the vocabulary has "
                    f"{vocab_size}: load it with --ignore-config-keys {name}"
                )
            found[i] = True
        return found

    controls: list[Control] = []
    if settings.repetition_penalty != 1:
        controls.append(_RepetitionPenalty(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        controls.append(_NoRepeat(settings.no_repeat_ngram_size))
    words = [word for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in settings.eos_ids)]
    mask("bad_words_ids", (i for word in words for i in word))  # longer ones are checked too
    if singles := [word[0] for word in words if len(word) == 1]:
        controls.append(_Mask(mask("bad_words_ids", singles)))
    for size in sorted({len(word) - 1 for word in words} - {0}):
        rows = np.array([word for word in words if len(word) == size + 1], np.int32)
        controls.append(_BadSequences(size, rows[:, :-1], rows[:, -1]))
    if settings.eos_ids and (settings.min_length or settings.min_new_tokens):
        known = [i for i in settings.eos_ids if i < vocab_size]
        lengths = (settings.min_length, settings.min_new_tokens)
        controls.append(_Mask(mask("eos_token_id", known), _too_short, lengths))
    forced = settings.forced_bos_id
    if forced is not None:
        controls.append(_Mask(mask("forced_bos_token_id", [forced]), _after_one_token, forced=True))
    if settings.forced_eos_ids:
        tokens = mask("forced_eos_token_id", settings.forced_eos_ids)
        controls.append(_Mask(tokens, _before_last, (max_new_tokens,), forced=True))
    if settings.suppress_tokens:
        controls.append(_Mask(mask("suppress_tokens", settings.suppress_tokens)))
    if settings.begin_suppress_tokens:
        tokens = mask("begin_suppress_tokens", settings.begin_suppress_tokens)
        controls.append(_Mask(tokens, _at_beginning, (int(forced is not None),)))
    return tuple(controls)
