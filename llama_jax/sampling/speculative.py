"""Speculative decoding: tokens are guessed ahead, and the model checks all guesses in one forward pass.

The model draws its own token at every position, with the key of that position, and a guess is kept where it is this
token (Leviathan et al. 2023, with a shared source of randomness as Daliri et al. 2024). So the text is the same as
without guesses, whatever they are, for each seed. A draft model draws with the same keys, hence agrees as often as its
distribution allows.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model, MTPDecoderConfig, cache_shapes
from llama_jax.nn import PyTree
from llama_jax.parallel import replicate, shard
from llama_jax.sampling.config import LARGEST
from llama_jax.sampling.controls import Logits, Written
from llama_jax.sampling.loop import Orders, Rows, SamplingState, _append, _keys, _last
from llama_jax.sampling.sampler import Sampler

PROMPT, MTP = "prompt", "mtp"
NUM_TOKENS = 4
# The longest end of a text that is looked for earlier in the text.
NGRAM = 3
# Tokens of a text that a draft model reads at once when it comes to it.
CATCH_UP = 128

Guess = tuple[Int[Array, "b k"], Bool[Array, " b"], PyTree]


class Speculation:
    """A way to guess tokens, and how many were guessed and right so far.

    draft: a smaller model with the same vocabulary; "prompt" for what followed the last few tokens where they were
        before in the text; "mtp" for the model's own further blocks (multi-token prediction).
    num_tokens: tokens that are guessed at once; None for 4, or the number of further blocks.
    """

    def __init__(self, draft: "LanguageModel | Model | str", num_tokens: int | None = None):
        if not isinstance(draft, LanguageModel | Model) and draft not in (PROMPT, MTP):
            raise UserError(f"draft={draft!r} must be a model that load returns, '{PROMPT}' or '{MTP}'")
        if num_tokens is not None and num_tokens < 1:
            raise UserError(f"draft_tokens={num_tokens} must be at least 1")
        self.kind = draft if isinstance(draft, str) else "model"
        self.draft = draft.model if isinstance(draft, LanguageModel) else draft
        self.num_tokens = num_tokens
        self.proposed, self.accepted, self.passes = 0, 0, 0
        self._owners: list[object] = []
        self._shape: tuple[int, int] | None = None
        self._known = np.zeros(0, np.int32)
        self._memory: PyTree = None

    @classmethod
    def of(
        cls,
        lm: LanguageModel | Model,
        draft: "Speculation | LanguageModel | Model | str | None",
        draft_tokens: Any = None,
    ) -> "Speculation | None":
        """Return the speculation of a user's values for a model; None without a draft. Raises UserError."""
        if draft is None:
            if draft_tokens is not None:
                raise UserError(f"draft_tokens={draft_tokens} needs a draft: a model, '{PROMPT}' or '{MTP}'")
            return None
        found = draft if isinstance(draft, cls) else cls(draft, draft_tokens)
        found.check(lm.model if isinstance(lm, LanguageModel) else lm)
        return found

    @property
    def acceptance_rate(self) -> float:
        """The share of guesses that were right; 0 where there were none."""
        return self.accepted / max(1, self.proposed)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a text for each forward pass of the model over it: 1 without a guess that is right."""
        return 1 + self.accepted / max(1, self.passes)

    def __str__(self) -> str:
        return (
            f"{self.accepted:,} of {self.proposed:,} drafted tokens accepted ({self.acceptance_rate:.0%}), "
            f"{self.tokens_per_pass:.2f} tokens per forward pass"
        )

    @property
    def room(self) -> int:
        """The number of positions that caches need beyond the longest text."""
        return (self.num_tokens or NUM_TOKENS) + 1

    def check(self, model: Model) -> None:
        """Raise UserError where the model cannot be continued with these guesses; complete `num_tokens`."""
        _check_cache("the model", model)
        if self.kind == MTP:
            blocks = getattr(model.config, "num_mtp_layers", 0)
            if not isinstance(model.config, MTPDecoderConfig) or not blocks:
                raise UserError(f"draft='{MTP}' needs a model with num_mtp_layers of 1 or more: take '{PROMPT}'")
            self.num_tokens = self.num_tokens or blocks
            if self.num_tokens > blocks:
                raise UserError(f"draft_tokens={self.num_tokens} must be at most the model's num_mtp_layers={blocks}")
        self.num_tokens = self.num_tokens or NUM_TOKENS
        if isinstance(self.draft, Model):
            own, config = self.draft.config, model.config
            if config.has_source or own.has_source or not own.generates:
                raise UserError(f"draft must be a decoder for a decoder: take '{PROMPT}' for an encoder-decoder")
            if own.vocab_size != config.vocab_size:
                raise UserError(
                    f"the draft's vocab_size={own.vocab_size} must be the model's {config.vocab_size}: take a draft "
                    "with the same tokenizer"
                )
            if self.draft.mesh != model.mesh:
                raise UserError("the draft is on another mesh: load it on that of the model")
            _check_cache("the draft", self.draft)

    def advance(
        self,
        model: Model,
        cache: PyTree,
        rows: Rows,
        orders: Orders,
        sampler: Sampler,
        num_tokens: int,
        *,
        until: int | None = None,
        texts: Mapping[int, object],
    ) -> tuple[PyTree, tuple[Rows, None]]:
        """Do what `loop.advance` does, with guesses; a row gets up to `room` tokens at a time.

        The cache has room for `room` tokens behind every text. `texts` are the objects in the rows: what the draft
        knows of a row is used only as long as its text is the same.
        """
        assert self.num_tokens is not None
        size, width = len(rows.lengths), rows.tokens.shape[1]
        draft = self.draft if isinstance(self.draft, Model) else None
        guesser = _GUESSERS[self.kind](draft and draft.graphdef, self.num_tokens)
        owners = [texts.get(row) for row in range(size)]
        same = self._shape == (size, width) and np.array([a is b for a, b in zip(owners, self._owners, strict=True)])
        known = np.where(same, self._known, 0) if self._shape == (size, width) else np.zeros(size, np.int32)
        rounds = num_tokens if num_tokens >= LARGEST else max(1, num_tokens // self.room)
        limits = np.array([rounds, size if until is None else until], np.int32)
        weights = model.state, draft and draft.state
        with model.on_mesh():
            if self._shape != (size, width):
                self._memory = _empty(model.graphdef, guesser, (size, width), weights)
            cache, self._memory, found = _advance(
                model.graphdef, guesser, weights, (cache, self._memory), (rows, orders, known), sampler, limits
            )
        new, counts = jax.device_get(found)
        self._owners, self._shape, self._known = owners, (size, width), new.lengths - 1
        self.proposed, self.accepted, self.passes = (
            int(a + b) for a, b in zip((self.proposed, self.accepted, self.passes), counts, strict=True)
        )
        return cache, (new, None)


def _check_cache(name: str, model: Model) -> None:
    """Raise UserError where a cache holds states, which cannot be taken back when a guess was wrong."""
    shapes = [jax.tree.leaves(cache_shapes(model.config, length)) for length in (16, 32)]
    if any(a.shape == b.shape for a, b in zip(*shapes, strict=True)):
        raise UserError(f"{name} has layers whose state cannot be taken back (recurrent ones): leave draft out")


@dataclasses.dataclass(frozen=True)
class _FromText:
    """Guess what followed the last tokens of the text where they were before in it (prompt look-up)."""

    graphdef: PyTree
    num_tokens: int

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        """Return what is kept between rounds, empty."""
        return ()

    def catch_up(
        self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Array
    ) -> tuple[PyTree, PyTree]:
        """Return the model's cache, and the memory with all of the texts but their last two tokens or one."""
        return state.cache, memory

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        """Return the next tokens, in which rows there is a guess at all, and the memory."""
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

    def seen(self, memory: PyTree, hidden: Float[Array, "b t d"], start: Int[Array, " b"]) -> PyTree:
        """Return the memory with the model's hidden states of tokens from the places `start` on."""
        return memory


class _FromModel(_FromText):
    """Guess with a smaller model; its cache is the memory."""

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        return own.init_cache(rows, length + CATCH_UP)

    def catch_up(
        self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Array
    ) -> tuple[PyTree, PyTree]:
        rows = state.rows
        end, width = jnp.maximum(rows.lengths - 2, 0), min(CATCH_UP, rows.tokens.shape[1])

        def behind(carry: tuple[Array, PyTree]) -> Array:
            return replicate((carry[0] < end) & ~rows.done).any()

        def body(carry: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            known, memory = carry
            is_token = known[:, None] + jnp.arange(width) < rows.lengths[:, None]
            tokens = _window(rows.tokens, known, width)
            _, memory = own.extend(tokens, cache=memory, lengths=known, is_token=is_token)
            return jnp.minimum(known + width, rows.lengths), memory

        return state.cache, jax.lax.while_loop(behind, body, (known, memory))[1]

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        lengths = state.rows.lengths
        # Two tokens at first: where all guesses were right, the last of them is not in the cache.
        start = jnp.maximum(lengths - 2, 0)
        hidden, memory = own.extend(_window(state.rows.tokens, start, 2), cache=memory, lengths=start)
        first = _drawn(own, _at(hidden, lengths - 1 - start), state, state.rows.tokens, lengths, sampler)

        def step(carry: tuple[Array, Array, PyTree], i: Array) -> tuple[tuple[Array, Array, PyTree], Array]:
            tokens, last, memory = carry
            hidden, memory = own.extend(last[:, None], cache=memory, lengths=lengths + i - 1)
            tokens, last = _drawn(own, hidden, state, tokens, lengths + i, sampler)
            return (tokens, last, memory), last

        (_, _, memory), others = jax.lax.scan(step, (*first, memory), jnp.arange(1, self.num_tokens))
        drafts = jnp.concatenate([first[1][:, None], others.swapaxes(0, 1)], 1)
        return drafts, ~state.rows.done, memory


class _FromHeads(_FromText):
    """Guess with the model's further blocks; their caches and the hidden states of the text are the memory."""

    def memory(self, model: Any, own: Any, rows: int, length: int) -> PyTree:
        length += max(CATCH_UP, 2 * self.num_tokens)
        hidden = jnp.zeros((rows, length, model.config.hidden_size), model.compute.jax_dtype)
        return shard(hidden, "batch", None, None), model.init_further_cache(rows, length)[: self.num_tokens]

    def catch_up(
        self, model: Any, own: Any, state: SamplingState, memory: PyTree, known: Array
    ) -> tuple[PyTree, PyTree]:
        rows, width = state.rows, min(CATCH_UP, state.rows.tokens.shape[1])
        end, most = rows.lengths - 1, state.rows.tokens.shape[1] - width

        def behind(carry: tuple[Array, PyTree, PyTree]) -> Array:
            return replicate((carry[0] < end) & ~rows.done).any()

        def body(carry: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree, PyTree]:
            known, cache, memory = carry
            # The prompt's hidden states are computed once more; what this puts into the cache is there already.
            start = jnp.minimum(known, most)
            is_token = start[:, None] + jnp.arange(width) < rows.lengths[:, None]
            tokens = _window(rows.tokens, start, width)
            hidden, cache = model.extend(tokens, cache=cache, lengths=start, is_token=is_token)
            stored, further = self.seen(memory, hidden, start)
            for depth in range(self.num_tokens):
                tokens = _window(rows.tokens, start + depth + 1, width)
                hidden, further[depth] = model.extend_further(
                    depth, hidden, tokens, cache=further[depth], lengths=start
                )
            return jnp.minimum(start + width, end), cache, (stored, further)

        return jax.lax.while_loop(behind, body, (known, state.cache, memory))[1:]

    def guess(self, model: Any, own: Any, state: SamplingState, memory: PyTree, sampler: Sampler) -> Guess:
        tokens, lengths, (stored, further) = state.rows.tokens, state.rows.lengths, memory
        # Wide enough to correct what the last round put into the caches after wrong guesses.
        width = 2 * self.num_tokens
        start = jnp.maximum(lengths - 1 - width, 0)
        hidden, further, drafts = _window(stored, start, width), [*further], []
        for depth in range(self.num_tokens):
            following = _window(tokens, start + depth + 1, width)
            hidden, further[depth] = model.extend_further(depth, hidden, following, cache=further[depth], lengths=start)
            at_end = _at(hidden, lengths - 2 - start)
            tokens, draft = _drawn(model, at_end, state, tokens, lengths + depth, sampler)
            drafts.append(draft)
        return jnp.stack(drafts, 1), ~state.rows.done, (stored, further)

    def seen(self, memory: PyTree, hidden: Float[Array, "b t d"], start: Int[Array, " b"]) -> PyTree:
        write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))
        return write(memory[0], shard(hidden, "batch", None, None), start), [*memory[1]]


_GUESSERS = {PROMPT: _FromText, "model": _FromModel, MTP: _FromHeads}


def _window(x: Array, start: Int[Array, " b"], width: int) -> Array:
    """Return `width` entries of each row from `start` on, zeros behind the row's end: [B, S, ...] to [B, W, ...]."""
    x = jnp.pad(x, [(0, 0), (0, width), *((0, 0),) * (x.ndim - 2)])
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width, axis=0))(x, start)


def _at(hidden: Float[Array, "b t d"], place: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
    here = jnp.arange(hidden.shape[1]) == place[:, None]
    return jnp.where(here[..., None], hidden, 0).sum(1, keepdims=True)


def _logits(module: Any, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    logits = shard(module.logits(hidden), "batch", None, None)
    never = getattr(module.config, "never_written", ())
    return jnp.where(np.isin(np.arange(logits.shape[-1]), never), -jnp.inf, logits) if never else logits


def _drawn(
    module: Any, hidden: Array, state: SamplingState, tokens: Array, lengths: Array, sampler: Sampler
) -> tuple[Array, Array]:
    """Return the tokens with a guess at the place `lengths`, drawn with the key of this place, and the guess."""
    logits: Logits = _logits(module, hidden)[:, 0]
    logits = sampler.controlled(logits, Written(tokens, lengths, state.orders.prompts))
    drawn = sampler.choose(logits, jax.vmap(jax.random.fold_in)(state.keys, lengths))
    drawn = jnp.minimum(drawn, logits.shape[1] - 1)  # of logits that are not numbers there is no highest
    return jnp.where(jnp.arange(tokens.shape[1]) == lengths[:, None], drawn[:, None], tokens), drawn


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(graphdef: PyTree, guesser: _FromText, size: tuple[int, int], weights: PyTree) -> PyTree:
    return guesser.memory(*_modules(graphdef, guesser, weights), *size)


def _modules(graphdef: PyTree, guesser: _FromText, weights: PyTree) -> tuple[Any, Any]:
    own = None if guesser.graphdef is None else nnx.merge(guesser.graphdef, weights[1])
    return nnx.merge(graphdef, weights[0]), own


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
    graphdef: PyTree,
    guesser: _FromText,
    weights: PyTree,
    caches: tuple[PyTree, PyTree],
    batch: tuple[Rows, Orders, Array],
    sampler: Sampler,
    limits: Array,
) -> tuple[PyTree, PyTree, tuple[Rows, Array]]:
    model, own = _modules(graphdef, guesser, weights)
    (cache, memory), batch = caches, jax.tree.map(lambda x: shard(x, "batch", *(None,) * (x.ndim - 1)), batch)
    rows, orders, known = batch
    state = SamplingState(rows, _last(rows), orders, _keys(orders), cache)
    cache, memory = guesser.catch_up(model, own, state, memory, known)
    state = dataclasses.replace(state, cache=cache)

    def unfinished(carry: tuple[Array, SamplingState, PyTree, Array]) -> Array:
        return (carry[0] < limits[0]) & (replicate(carry[1].rows.done).sum() < limits[1])

    def body(carry: tuple[Array, SamplingState, PyTree, Array]) -> tuple[Array, SamplingState, PyTree, Array]:
        i, state, memory, counts = carry
        drafts, offered, memory = guesser.guess(model, own, state, memory, sampler)
        start = state.rows.lengths - 1
        state, hidden, new = _checked(model, state, drafts, offered, sampler)
        return i + 1, state, guesser.seen(memory, hidden, start), counts + new

    first = jnp.int32(0), state, memory, jnp.zeros(3, jnp.int32)
    _, state, memory, counts = jax.lax.while_loop(unfinished, body, first)
    return state.cache, memory, jax.tree.map(replicate, (state.rows, counts))


def _checked(
    model: Any, state: SamplingState, drafts: Int[Array, "b k"], offered: Bool[Array, " b"], sampler: Sampler
) -> tuple[SamplingState, Float[Array, "b t d"], Int[Array, "3"]]:
    """Return the state with the guesses that are right and one more token, the hidden states, and numbers.

    These are the guesses, the right ones among them, and the rows.
    """
    live, num_guesses = ~state.rows.done, drafts.shape[1]
    inputs = jnp.concatenate([state.last[:, None], drafts], 1)
    hidden, cache = model.extend(inputs, cache=state.cache, lengths=state.rows.lengths - 1)

    def check(carry: tuple[SamplingState, Array, Array], at: tuple[Array, Array]) -> tuple[Any, None]:
        (state, going, right), (logits, draft) = carry, at
        before = state.rows
        paused = dataclasses.replace(state, rows=dataclasses.replace(before, done=before.done | ~going))
        after = _append(paused, logits, sampler)
        rows = dataclasses.replace(after.rows, done=jnp.where(going, after.rows.done, before.done))
        match = going & (rows.lengths > before.lengths) & (after.last == draft)
        return (dataclasses.replace(after, rows=rows), match & ~rows.done, right + (match & offered)), None

    # The last position has no guess to compare with.
    guesses = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1).swapaxes(0, 1)
    first = dataclasses.replace(state, cache=None), live, jnp.zeros_like(state.last)
    (state, _, right), _ = jax.lax.scan(check, first, (_logits(model, hidden).swapaxes(0, 1), guesses))
    numbers = num_guesses * (live & offered).sum(), right.sum(), live.sum()
    return dataclasses.replace(state, cache=cache), hidden, replicate(jnp.stack(numbers).astype(jnp.int32))
