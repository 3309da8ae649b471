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
from llama_jax.models import Model
from llama_jax.nn import PyTree
from llama_jax.parallel import replicate
from llama_jax.sampling.config import LARGEST
from llama_jax.sampling.drafts import FromBlocks, FromModel, FromText
from llama_jax.sampling.loop import Orders, Rows, SamplingState, append, begun, by_rows, can_be_cut, logits_of
from llama_jax.sampling.sampler import Sampler

PROMPT, MTP = "prompt", "mtp"
GUESSES = (PROMPT, MTP)
NUM_TOKENS = 4


class Speculation:
    """A way to guess tokens, and how many were guessed and right so far.

    draft: a smaller model with the same vocabulary; "prompt" for what followed the last few tokens where they were
        before in the text; "mtp" for the model's own further blocks (multi-token prediction).
    num_tokens: tokens that are guessed at once; None for 4, or the number of further blocks.
    """

    def __init__(self, draft: "LanguageModel | Model | str", num_tokens: int | None = None):
        if not isinstance(draft, LanguageModel | Model) and draft not in GUESSES:
            raise UserError(f"draft={draft!r} must be a model that load returns, '{PROMPT}' or '{MTP}'")
        if num_tokens is not None and num_tokens < 1:
            raise UserError(f"draft_tokens={num_tokens} must be at least 1")
        self.kind = draft if isinstance(draft, str) else "model"
        self.draft = draft.model if isinstance(draft, LanguageModel) else draft
        self.num_tokens = num_tokens
        self.proposed, self.accepted, self.passes = 0, 0, 0
        # For which model and texts the draft's memory is, the memory, and how much of the texts it has.
        self._kept: tuple[tuple[tuple[object, ...], list[object]], PyTree, np.ndarray] | None = None

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
        found = draft if isinstance(draft, Speculation) else cls(draft, draft_tokens)
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
            if not (blocks := getattr(model.config, "num_mtp_layers", 0)):
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
        size, width = rows.tokens.shape
        draft = self.draft if isinstance(self.draft, Model) else None
        guesser = GUESSERS[self.kind](draft and draft.graphdef, self.num_tokens)
        weights, key, owners = (model.state, draft and draft.state), (model, size, width), map(texts.get, range(size))
        before, memory, known = (
            self._kept if self._kept and self._kept[0][0] == key else ((key, [None] * size), None, 0)
        )
        owners = [*owners]
        known = np.where([a is b for a, b in zip(owners, before[1], strict=True)], known, 0).astype(np.int32)
        self._kept = None  # the memory is used up, also where this is interrupted
        rounds = num_tokens if num_tokens >= LARGEST else max(1, num_tokens // self.room)
        limits = np.array([rounds, size if until is None else until], np.int32)
        with model.on_mesh():
            memory = _empty(model.graphdef, guesser, (size, width), weights) if memory is None else memory
            batch = rows, orders, known
            cache, memory, found = _advance(model.graphdef, guesser, weights, (cache, memory), batch, sampler, limits)
        new, (proposed, accepted, passes) = jax.device_get(found)
        self._kept = (key, owners), memory, new.lengths - 1
        self.proposed, self.accepted = self.proposed + int(proposed), self.accepted + int(accepted)
        self.passes += int(passes)
        return cache, (new, None)


def _check_cache(name: str, model: Model) -> None:
    """Raise UserError where a cache holds states, which cannot be taken back when a guess was wrong."""
    if not can_be_cut(model.config):
        raise UserError(f"{name} has layers whose state cannot be taken back (recurrent ones): leave draft out")


GUESSERS = {PROMPT: FromText, "model": FromModel, MTP: FromBlocks}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(graphdef: PyTree, guesser: FromText, size: tuple[int, int], weights: PyTree) -> PyTree:
    return guesser.memory(*_modules(graphdef, guesser, weights), *size)


def _modules(graphdef: PyTree, guesser: FromText, weights: PyTree) -> tuple[Any, Any]:
    own = None if guesser.graphdef is None else nnx.merge(guesser.graphdef, weights[1])
    return nnx.merge(graphdef, weights[0]), own


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
    graphdef: PyTree,
    guesser: FromText,
    weights: PyTree,
    caches: tuple[PyTree, PyTree],
    batch: tuple[Any, Any, Array],
    sampler: Sampler,
    limits: Array,
) -> tuple[PyTree, PyTree, tuple[Rows, Array]]:
    model, own = _modules(graphdef, guesser, weights)
    (cache, memory), (rows, orders, known) = caches, batch
    state = begun(rows, orders, cache)
    cache, memory = guesser.caught_up(model, own, state, memory, by_rows(known))
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
        after = append(paused, logits, sampler)
        rows = dataclasses.replace(after.rows, done=jnp.where(going, after.rows.done, before.done))
        match = going & (rows.lengths > before.lengths) & (after.last == draft)
        return (dataclasses.replace(after, rows=rows), match & ~rows.done, right + (match & offered)), None

    # The last position has no guess to compare with.
    guesses = jnp.pad(drafts, ((0, 0), (0, 1)), constant_values=-1).swapaxes(0, 1)
    first = dataclasses.replace(state, cache=None), live, jnp.zeros_like(state.last)
    (state, _, right), _ = jax.lax.scan(check, first, (logits_of(model, hidden).swapaxes(0, 1), guesses))
    numbers = num_guesses * (live & offered).sum(), right.sum(), live.sum()
    return dataclasses.replace(state, cache=cache), hidden, replicate(jnp.stack(numbers).astype(jnp.int32))
