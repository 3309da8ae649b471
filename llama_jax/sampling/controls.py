"""What a model's files forbid and force: functions of logits, in the order of `Controls.of`, before a token is chosen.

Each is a small value whose arrays are traced; one more is a dataclass with `__call__(logits, text)` and its place in
that order, which is that of transformers.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.checkpoint import GenerationSettings
from llama_jax.config import UserError
from llama_jax.parallel import shard

Logits = Float[Array, "b v"]


@typing.dataclass_transform(frozen_default=True)
def part[C](*static: str) -> Callable[[type[C]], type[C]]:
    """Make a frozen dataclass a pytree whose fields, except those named, are traced."""

    def register(cls: type[C]) -> type[C]:
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(cls) if field.name not in static]  # type: ignore[arg-type]
        return jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=list(static))

    return register


@part()
class Text:
    """What a control may look at: tokens [B, S] up to `lengths` [B], of which `prompts` [B] were given."""

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]

    def last(self, count: int) -> Int[Array, "b n"]:
        """The last `count` tokens of each row in their order; -1 where the row is shorter."""
        at = self.lengths[:, None] - count + jnp.arange(count)
        return jnp.stack([self._at(at[:, i]) for i in range(count)], 1) if count else at

    def _at(self, place: Int[Array, " b"]) -> Int[Array, " b"]:
        here = jnp.arange(self.tokens.shape[1]) == place[:, None]
        return jnp.where(place < 0, -1, jnp.where(here, self.tokens, 0).sum(1))


def marked(ids: Int[Array, "b n"], where: Bool[Array, "b n"], size: int) -> Bool[Array, "b v"]:
    """For each row which of `size` tokens are among the `ids` at the places of `where`."""

    def of_row(ids: Array, where: Array) -> Array:
        return jnp.zeros(size, bool).at[jnp.where(where, ids, size)].set(True, mode="drop")

    rows = jax.vmap(of_row)
    if jax.sharding.get_abstract_mesh().empty:
        return rows(ids, where)
    # A scatter whose index is a row's own: the compiler finds it split as the rows are.
    split: Any = jax.sharding.auto_axes(rows, out_sharding=jax.typeof(where).sharding)  # type: ignore[call-arg]
    return shard(split(ids, where), "batch", None)


@part()
class RepetitionPenalty:
    """Make tokens that are in the text less probable (Keskar et al. 2019)."""

    penalty: float | Array

    def __call__(self, logits: Logits, text: Text) -> Logits:
        there = jnp.arange(text.tokens.shape[1]) < text.lengths[:, None]
        lower = jnp.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return jnp.where(marked(text.tokens, there, logits.shape[1]), lower, logits)


@part("size")
class NoRepeat:
    """Forbid what would complete a sequence of `size` tokens a second time (Paulus et al. 2017)."""

    size: int

    def __call__(self, logits: Logits, text: Text) -> Logits:
        before = text.last(self.size - 1)
        ends = jnp.arange(text.tokens.shape[1])
        same = (ends >= self.size - 1) & (ends < text.lengths[:, None])
        for i in range(self.size - 1):
            same &= jnp.roll(text.tokens, self.size - 1 - i, axis=1) == before[:, i : i + 1]
        return jnp.where(marked(text.tokens, same, logits.shape[1]), -jnp.inf, logits)


@part("size")
class BadSequences:
    """Forbid the `last` token [N] of a sequence whose others, [N, size], stand at the end of the text."""

    size: int
    others: Int[Array | np.ndarray, "n k"]
    last: Int[Array | np.ndarray, " n"]

    def __call__(self, logits: Logits, text: Text) -> Logits:
        found = jnp.ones((logits.shape[0], len(self.last)), bool)
        before = text.last(self.size)
        for i in range(self.size):
            found &= before[:, i : i + 1] == self.others[:, i]
        ids = jnp.broadcast_to(jnp.asarray(self.last), found.shape)
        return jnp.where(marked(shard(ids, "batch", None), found, logits.shape[1]), -jnp.inf, logits)


@part()
class Forbidden:
    """Forbid tokens [V] (true) always."""

    tokens: Bool[Array | np.ndarray, " v"]

    def __call__(self, logits: Logits, text: Text) -> Logits:
        return jnp.where(self.tokens, -jnp.inf, logits)


@part()
class ForbiddenBefore:
    """Forbid tokens [V] (true) in texts of less than `length` tokens, and before `new` new ones."""

    tokens: Bool[Array | np.ndarray, " v"]
    length: int | Array
    new: int | Array

    def __call__(self, logits: Logits, text: Text) -> Logits:
        early = (text.lengths < self.length) | (text.lengths - text.prompts < self.new)
        return jnp.where(early[:, None] & self.tokens, -jnp.inf, logits)


@part("after_forced")
class ForbiddenFirst:
    """Forbid tokens [V] (true) as the first new one; behind a single token whose next is forced, as the second."""

    tokens: Bool[Array | np.ndarray, " v"]
    after_forced: bool

    def __call__(self, logits: Logits, text: Text) -> Logits:
        first = text.prompts + ((text.prompts == 1) & self.after_forced)
        return jnp.where((text.lengths == first)[:, None] & self.tokens, -jnp.inf, logits)


@part()
class ForcedSecond:
    """Allow only `tokens` [V] (true) behind a single token."""

    tokens: Bool[Array | np.ndarray, " v"]

    def __call__(self, logits: Logits, text: Text) -> Logits:
        return jnp.where((text.lengths == 1)[:, None], jnp.where(self.tokens, 0.0, -jnp.inf), logits)


@part()
class ForcedLast:
    """Allow only `tokens` [V] (true) as the new one number `count`."""

    tokens: Bool[Array | np.ndarray, " v"]
    count: int | Array

    def __call__(self, logits: Logits, text: Text) -> Logits:
        last = text.lengths - text.prompts == self.count - 1
        return jnp.where(last[:, None], jnp.where(self.tokens, 0.0, -jnp.inf), logits)


@part()
class Controls:
    """Functions of logits and text, one after another."""

    parts: tuple[Any, ...] = ()

    @classmethod
    def of(cls, settings: GenerationSettings, vocab_size: int, max_new_tokens: int) -> "Controls":
        """The controls that a model's files ask for, in the order of transformers.

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

        parts: list[Any] = []
        if settings.repetition_penalty != 1:
            parts.append(RepetitionPenalty(settings.repetition_penalty))
        if settings.no_repeat_ngram_size:
            parts.append(NoRepeat(settings.no_repeat_ngram_size))
        words = [word for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in settings.eos_ids)]
        mask("bad_words_ids", (i for word in words for i in word))
        if singles := [word[0] for word in words if len(word) == 1]:
            parts.append(Forbidden(mask("bad_words_ids", singles)))
        for size in sorted({len(word) - 1 for word in words} - {0}):
            rows = np.array([word for word in words if len(word) == size + 1], np.int32)
            parts.append(BadSequences(size, rows[:, :-1], rows[:, -1]))
        if settings.eos_ids and (settings.min_length or settings.min_new_tokens):
            known = [i for i in settings.eos_ids if i < vocab_size]
            parts.append(ForbiddenBefore(mask("eos_token_id", known), settings.min_length, settings.min_new_tokens))
        forced = settings.forced_bos_id
        if forced is not None:
            parts.append(ForcedSecond(mask("forced_bos_token_id", [forced])))
        if settings.forced_eos_ids:
            parts.append(ForcedLast(mask("forced_eos_token_id", settings.forced_eos_ids), max_new_tokens))
        if settings.suppress_tokens:
            parts.append(Forbidden(mask("suppress_tokens", settings.suppress_tokens)))
        if settings.begin_suppress_tokens:
            tokens = mask("begin_suppress_tokens", settings.begin_suppress_tokens)
            parts.append(ForbiddenFirst(tokens, forced is not None))
        return cls(tuple(parts))

    def __call__(self, logits: Logits, text: Text) -> Logits:
        for control in self.parts:
            logits = control(logits, text)
        return logits
