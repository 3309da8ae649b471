"""Guesses of the next tokens: from the text itself, from a smaller model, from the model's further blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llama_jax.nn import PyTree
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.controls import Written
from llama_jax.sampling.loop import SamplingState, logits_of
from llama_jax.sampling.sampler import Sampler

# The longest end of a text that is looked for earlier in the text.
NGRAM = 3
# Tokens of a text that a draft reads at once when it comes to it.
CATCH_UP = 128

Guess = tuple[Int[Array, "b k"], Bool[Array, " b"], PyTree]
Lengths = Int[Array, " b"]


@dataclasses.dataclass(frozen=True)
class FromText:
    """Guess what followed the last tokens of the text where they were before in it (prompt look-up).

    The guess is of `num_tokens` tokens. The methods are pure functions; `model` is the one whose tokens are guessed,
    `own` the draft model of `graphdef`. The memory is what is kept between guesses.
    """

    graphdef: PyTree
    num_tokens: int

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        """Return an empty memory."""
        return ()

    def caught_up(self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Lengths) -> PyTree:
        """Return the model's cache, and the memory with the whole texts, of which it has the first `known` tokens."""
        return state.cache, memory

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        """Return the next tokens, the rows in which there is a guess at all, and the memory."""
        tokens, lengths = state.rows.tokens, state.rows.lengths
        width = tokens.shape[1]
        last = Written(tokens, lengths, state.orders.prompts).last(NGRAM)
        place = jnp.arange(width)
        same, common = place < lengths[:, None], jnp.zeros_like(tokens)
        for i in range(NGRAM):
            # The roll puts the token i + 1 places before a place there; nothing that wraps around counts.
            same &= (place > i) & (jnp.roll(tokens, i + 1, axis=1) == last[:, NGRAM - 1 - i, None])
            common += same
        # The longest common end, of equally long ones the latest.
        best = jnp.where(common > 0, common * width + place, 0).max(1)
        start = best % width
        # Behind the end of the text it goes on as from there: a period is continued.
        ahead = jnp.arange(self.num_tokens) % jnp.maximum(lengths - start, 1)[:, None]
        here = (start[:, None] + ahead)[..., None] == place
        return jnp.where(here, tokens[:, None], 0).sum(-1), best > 0, memory

    def seen(self, memory: PyTree, hidden: Float[Array, "b t d"], start: Lengths) -> PyTree:
        """Return the memory with the model's hidden states of the tokens from the places `start` on."""
        return memory


class FromModel(FromText):
    """Guess with a smaller model; its cache is the memory."""

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        return own.init_cache(rows, length + CATCH_UP)

    def caught_up(self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Lengths) -> PyTree:
        def read(start: Lengths, inputs: dict[str, Array], memory: PyTree) -> PyTree:
            return own.extend(cache=memory, lengths=start, **inputs)[1]

        return state.cache, _read(read, state, memory, known)

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        lengths = state.rows.lengths
        # Two tokens at first: where all guesses were right, the last of them is not in the cache.
        start = jnp.maximum(lengths - 2, 0)
        hidden, memory = own.extend(_window(state.rows.tokens, start, 2), cache=memory, lengths=start)
        first = _drawn(own, _window(hidden, lengths - 1 - start, 1), state, state.rows.tokens, lengths, sampler)

        def step(carry: tuple[Array, Array, PyTree], i: Array) -> tuple[tuple[Array, Array, PyTree], Array]:
            tokens, last, memory = carry
            hidden, memory = own.extend(last[:, None], cache=memory, lengths=lengths + i - 1)
            tokens, last = _drawn(own, hidden, state, tokens, lengths + i, sampler)
            return (tokens, last, memory), last

        (_, _, memory), others = jax.lax.scan(step, (*first, memory), jnp.arange(1, self.num_tokens))
        drafts = jnp.concatenate([first[1][:, None], others.swapaxes(0, 1)], 1)
        return drafts, ~state.rows.done, memory


class FromBlocks(FromText):
    """Guess with the model's further blocks; the memory is their caches, and the hidden states of the texts."""

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        length += max(CATCH_UP, 2 * self.num_tokens)
        hidden = jnp.zeros((rows, length, model.config.hidden_size), model.compute.jax_dtype)
        return shard(hidden, "batch", None, None), model.init_further_cache(rows, length)[: self.num_tokens]

    def caught_up(self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Lengths) -> PyTree:
        def read(start: Lengths, inputs: dict[str, Array], caches: PyTree) -> PyTree:
            # The prompt's hidden states are computed once more; what this puts into the cache is there already.
            hidden, cache = model.extend(cache=caches[0], lengths=start, **inputs)
            stored, further = self.seen(caches[1], hidden, start)
            for depth in range(self.num_tokens):
                hidden, further[depth] = self._deeper(model, depth, hidden, state.rows.tokens, further, start)
            return cache, (stored, further)

        return _read(read, state, (state.cache, memory), known)

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        tokens, lengths, (stored, further) = state.rows.tokens, state.rows.lengths, memory
        # So many that what the last guess put into the caches, and was wrong, is corrected.
        width = 2 * self.num_tokens
        start = jnp.maximum(lengths - 1 - width, 0)
        hidden, further, drafts = _window(stored, start, width), [*further], []
        for depth in range(self.num_tokens):
            hidden, further[depth] = self._deeper(model, depth, hidden, tokens, further, start)
            at_end = _window(hidden, lengths - 2 - start, 1)
            tokens, draft = _drawn(model, at_end, state, tokens, lengths + depth, sampler)
            drafts.append(draft)
        return jnp.stack(drafts, 1), ~state.rows.done, (stored, further)

    def seen(self, memory: PyTree, hidden: Float[Array, "b t d"], start: Lengths) -> PyTree:
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))
        return write(memory[0], shard(hidden, "batch", None, None), start), [*memory[1]]

    def _deeper(
        self, model: Any, depth: int, hidden: Array, tokens: Array, caches: list[PyTree], start: Lengths
    ) -> tuple[Array, PyTree]:
        later = _window(tokens, start + depth + 1, hidden.shape[1])
        return model.extend_further(depth, hidden, later, cache=caches[depth], lengths=start)


def _read(read: Any, state: SamplingState, caches: PyTree, known: Lengths) -> PyTree:
    """Return `caches` with the whole texts but the last token, by `read(start, inputs, caches)` of a part of them."""
    rows, end = state.rows, state.rows.lengths - 1
    width = min(CATCH_UP, rows.tokens.shape[1])

    def behind(carry: tuple[Lengths, PyTree]) -> Array:
        return replicate((carry[0] < end) & ~rows.done).any()

    def body(carry: tuple[Lengths, PyTree]) -> tuple[Lengths, PyTree]:
        start = jnp.minimum(carry[0], rows.tokens.shape[1] - width)
        is_token = start[:, None] + jnp.arange(width) < rows.lengths[:, None]
        inputs = {"tokens": _window(rows.tokens, start, width), "is_token": is_token}
        return jnp.minimum(carry[0] + width, end), read(start, inputs, carry[1])

    return jax.lax.while_loop(behind, body, (known, caches))[1]


def _window(x: Array, start: Lengths, width: int) -> Array:
    """Return `width` entries of each row from `start` on, zeros behind the row's end: [B, S, ...] to [B, W, ...]."""
    x = jnp.pad(x, [(0, 0), (0, width), *((0, 0),) * (x.ndim - 2)])
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width, axis=0))(x, start)


def _drawn(
    module: Any, hidden: Float[Array, "b 1 d"], state: SamplingState, tokens: Array, lengths: Lengths, sampler: Sampler
) -> tuple[Array, Array]:
    """Return the tokens with a guess at the places `lengths`, drawn with the keys of these places, and the guess."""
    logits = logits_of(module, hidden)[:, 0]
    logits = sampler.controlled(logits, Written(tokens, lengths, state.orders.prompts))
    drawn = sampler.choose(logits, jax.vmap(jax.random.fold_in)(state.keys, lengths))
    drawn = jnp.minimum(drawn, logits.shape[1] - 1)  # of logits that are not numbers there is no highest
    return jnp.where(jnp.arange(tokens.shape[1]) == lengths[:, None], drawn[:, None], tokens), drawn
