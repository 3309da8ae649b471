"""Controls: functions `(logits [B, V], written) -> logits [B, V]` that come before temperature and the draw.

`controls_of` makes those of a model's files and of users' settings in the order of transformers' `generate`: logit
bias, repetition penalty (then frequency and presence penalty, which transformers does not have), no repeated n-gram,
forbidden sequences, no end before the minimum length, forced beginning, forced end, suppressed tokens, tokens
suppressed at the beginning, one's own. A plain function is compiled in; a control with numbers that change from call to
call is a dataclass registered as a pytree, as those below. Their numbers are scalars, or arrays [B] with one for each
row; a row with the neutral number keeps its logits bit for bit.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.checkpoint import GenerationSettings
from llama_jax.config import UserError
from llama_jax.parallel import shard
from llama_jax.sampling.config import SamplingConfig

Logits = Float[Array, "b v"]
Number = float | Array | np.ndarray
TokenMask = Bool[Array | np.ndarray, " v"] | Bool[Array | np.ndarray, "b v"]
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


def by_row(x: Any) -> Any:
    """Return an array whose first dimension is the batch, split as the rows are; a scalar as it is."""
    return shard(jnp.asarray(x), "batch", *(None,) * (np.ndim(x) - 1)) if np.ndim(x) else x


def column(x: Number) -> Any:
    """Return numbers of the rows, [B], as [B, 1]; a scalar as it is."""
    return by_row(x)[:, None] if np.ndim(x) else x


def merged(values: Sequence[float | None], neutral: float) -> Number | None:
    """Return one number, or an array with `neutral` for rows that have none; None where all have none."""
    if all(value is None for value in values):
        return None
    if len(values) == 1:
        return values[0]
    kind = np.int32 if isinstance(neutral, int) else np.float32
    return np.array([neutral if value is None else value for value in values], kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _PlainFunction:
    """A control that is not a pytree: part of the compiled program."""

    function: Control = dataclasses.field(metadata=STATIC)

    def __call__(self, logits: Logits, written: Written) -> Array:
        return self.function(logits, written)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OfRows:
    """A control of some `rows` [B] (true)."""

    control: Control
    rows: Bool[Array | np.ndarray, " b"]

    def __call__(self, logits: Logits, written: Written) -> Array:
        changed = self.control(logits, written)
        # Of another shape or type it is refused by the caller.
        same = (changed.shape, changed.dtype) == (logits.shape, logits.dtype)
        return jnp.where(column(self.rows), changed, logits) if same else changed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Bias:
    """Add numbers, [V] or [B, V], to the logits."""

    bias: Float[Array | np.ndarray, "..."]

    def __call__(self, logits: Logits, written: Written) -> Logits:
        return logits + (by_row(self.bias) if np.ndim(self.bias) == 2 else self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _RepetitionPenalty:
    """Make tokens that are in the text less probable (Keskar et al. 2019)."""

    penalty: Number

    def __call__(self, logits: Logits, written: Written) -> Logits:
        there = jnp.arange(written.tokens.shape[1]) < written.lengths[:, None]
        penalty = column(self.penalty)
        lower = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(_counts(written.tokens, there, logits.shape[1]) > 0, lower, logits)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _CountPenalties:
    """Take `frequency` off a generated token's logit for each time it was generated, and `presence` once."""

    frequency: Number
    presence: Number

    def __call__(self, logits: Logits, written: Written) -> Logits:
        places = jnp.arange(written.tokens.shape[1])
        new = (places >= written.prompts[:, None]) & (places < written.lengths[:, None])
        counts = _counts(written.tokens, new, logits.shape[1])
        return logits - column(self.frequency) * counts - column(self.presence) * (counts > 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _NoRepeat:
    """Forbid tokens that would complete a sequence of `sizes` tokens (0: of any) a second time (Paulus et al. 2017)."""

    largest: int = dataclasses.field(metadata=STATIC)
    sizes: Number

    def __call__(self, logits: Logits, written: Written) -> Logits:
        before, size = written.last(self.largest - 1), column(self.sizes)
        ends = jnp.arange(written.tokens.shape[1])
        same = (ends >= size - 1) & (ends < written.lengths[:, None]) & (size > 0)
        for back in range(1, self.largest):
            # The roll puts the token `back` places before the end of a sequence at its end. Nothing that wraps around
            # counts.
            found = jnp.roll(written.tokens, back, axis=1) == before[:, -back][:, None]
            same &= found | (back >= size)
        return jnp.where(_counts(written.tokens, same, logits.shape[1]) > 0, -jnp.inf, logits)


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
        return jnp.where(_counts(by_row(ids), found, logits.shape[1]) > 0, -jnp.inf, logits)


def _counts(ids: Int[Array, "b n"], where: Bool[Array, "b n"], size: int) -> Int[Array, "b v"]:
    """Return for each row how often each of `size` tokens is among the `ids` at the places of `where`."""

    def of_row(ids: Array, where: Array) -> Array:
        return jnp.zeros(size, jnp.int32).at[jnp.where(where, ids, size)].add(1, mode="drop")

    rows = jax.vmap(of_row)
    if jax.sharding.get_abstract_mesh().empty:
        return rows(ids, where)
    # A scatter whose index is a row's own: the compiler finds by itself that it is split as the rows are.
    split: Any = jax.sharding.auto_axes(rows, out_sharding=jax.typeof(where).sharding)  # type: ignore[call-arg]
    return shard(split(ids, where), "batch", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Mask:
    """Forbid `tokens` (true), or with `forced` all others, in the rows that `where(written, *numbers)` selects."""

    tokens: TokenMask
    where: Callable[..., Bool[Array, " b"]] | None = dataclasses.field(default=None, metadata=STATIC)  # None: all rows
    numbers: tuple[Number, ...] = ()
    forced: bool = dataclasses.field(default=False, metadata=STATIC)

    def __call__(self, logits: Logits, written: Written) -> Logits:
        tokens = by_row(self.tokens) if np.ndim(self.tokens) == 2 else self.tokens
        if self.where is None:
            return jnp.where(tokens, -jnp.inf, logits)
        rows = self.where(written, *(by_row(x) for x in self.numbers))[:, None]
        if self.forced:
            return jnp.where(rows, jnp.where(tokens, 0.0, -jnp.inf), logits)
        return jnp.where(rows & tokens, -jnp.inf, logits)


def _too_short(written: Written, length: Number, new: Number) -> Bool[Array, " b"]:
    return (written.lengths < length) | (written.lengths - written.prompts < new)


def _after_one_token(written: Written, holds: Number) -> Bool[Array, " b"]:
    return (written.lengths == 1) & (holds > 0)


def _before_last(written: Written, count: Number) -> Bool[Array, " b"]:
    return written.lengths - written.prompts == count - 1


def _at_beginning(written: Written, after_forced: Number) -> Bool[Array, " b"]:
    # After a single token whose next is forced the beginning is one later.
    return written.lengths == written.prompts + (written.prompts == 1) * after_forced


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Forced:
    """Force the first new tokens to be `ids`, [F] or [B, F], in their order; -1 is padding at the end."""

    ids: Int[Array | np.ndarray, "..."]

    def __call__(self, logits: Logits, written: Written) -> Logits:
        ids = by_row(self.ids) if np.ndim(self.ids) == 2 else self.ids
        here = jnp.arange(self.ids.shape[-1]) == (written.lengths - written.prompts)[:, None]
        token = jnp.where(here, ids + 1, 0).sum(1, keepdims=True) - 1
        only = jnp.where(jnp.arange(logits.shape[1]) == token, 0.0, -jnp.inf)
        return jnp.where(token < 0, logits, only)


def controls_of(
    settings: GenerationSettings,
    vocab_size: int,
    configs: Sequence[SamplingConfig],
    stop_ids: Sequence[Sequence[int]] | None = None,
) -> tuple[Control, ...]:
    """Return the controls of a model's files and of users' settings: one for all rows, or one for each row.

    What a user gives replaces what the files say of the same thing: the penalty of repetition, the size of an n-gram
    that does not come twice, new tokens before the end, the beginning. `stop_ids` are those that end each row (default:
    those of its config). Raises UserError for tokens outside the vocabulary, and for settings of the files that have no
    control here.
    """
    if settings.unknown:
        key = settings.unknown[0]
        raise UserError(
            f"the model's generation settings have {key}, which sampling cannot follow: load it with "
            f"--ignore-config-keys {key}"
        )
    stops = [config.stop_ids for config in configs] if stop_ids is None else stop_ids
    return (
        *_penalties(settings, vocab_size, configs),
        *_bad_words(settings, vocab_size),
        *_ends(settings, vocab_size, configs, stops),
        *_suppressed(settings, vocab_size, configs),
        *_own(configs),
    )


def _mask(vocab_size: int, name: str, ids: Iterable[int], *, of_files: bool = True) -> np.ndarray:
    """Return bool [V], true at the ids. Raises UserError for one outside the vocabulary."""
    found = np.zeros(vocab_size, bool)
    for i in ids:
        if not 0 <= i < vocab_size and of_files:
            raise UserError(
                f"the model's generation settings have {name} with the token {i}, and the vocabulary has "
                f"{vocab_size}: load it with --ignore-config-keys {name}"
            )
        if not 0 <= i < vocab_size:
            raise UserError(f"{name} has the token {i}: give ids of the model's vocabulary, 0 to {vocab_size - 1}")
        found[i] = True
    return found


def _stacked(rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return what holds for all rows, or [B, ...] with what holds for each."""
    return rows[0] if len(rows) == 1 else np.stack([*rows])


def _penalties(settings: GenerationSettings, vocab_size: int, configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    if any(config.logit_bias for config in configs):
        rows = np.zeros((len(configs), vocab_size), np.float32)
        for row, config in zip(rows, configs, strict=True):
            _mask(vocab_size, "logit_bias", (i for i, _ in config.logit_bias), of_files=False)
            for i, number in config.logit_bias:
                row[i] += number
        yield _Bias(_stacked(rows))
    repetition = [_given(c.repetition_penalty, settings.repetition_penalty, 1) for c in configs]
    if (penalty := merged(repetition, 1.0)) is not None:
        yield _RepetitionPenalty(penalty)
    frequency = merged([c.frequency_penalty or None for c in configs], 0.0)
    presence = merged([c.presence_penalty or None for c in configs], 0.0)
    if frequency is not None or presence is not None:
        yield _CountPenalties(0.0 if frequency is None else frequency, 0.0 if presence is None else presence)
    sizes = [_given(c.no_repeat_ngram_size, settings.no_repeat_ngram_size, 0) for c in configs]
    if (size := merged(sizes, 0)) is not None:
        yield _NoRepeat(int(np.max(size)), size)


def _given(value: Any, otherwise: Any, neutral: float) -> Any:
    """Return a user's value, without one that of the files; None for what changes nothing."""
    found = otherwise if value is None else value
    return None if found == neutral else found


def _bad_words(settings: GenerationSettings, vocab_size: int) -> Iterable[Control]:
    words = [word for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in settings.eos_ids)]
    _mask(vocab_size, "bad_words_ids", (i for word in words for i in word))  # longer ones are checked too
    if singles := [word[0] for word in words if len(word) == 1]:
        yield _Mask(_mask(vocab_size, "bad_words_ids", singles))
    for size in sorted({len(word) - 1 for word in words} - {0}):
        rows = np.array([word for word in words if len(word) == size + 1], np.int32)
        yield _BadSequences(size, rows[:, :-1], rows[:, -1])


def _ends(
    settings: GenerationSettings,
    vocab_size: int,
    configs: Sequence[SamplingConfig],
    stop_ids: Sequence[Sequence[int]],
) -> Iterable[Control]:
    """Yield what holds for the ids that end a text, and the forced beginning."""
    new = merged([_given(c.min_new_tokens, settings.min_new_tokens, 0) for c in configs], 0)
    if settings.min_length or new is not None:
        ends = [
            {*settings.eos_ids, *(() if config.min_new_tokens is None else stops)}
            for config, stops in zip(configs, stop_ids, strict=True)
        ]
        if any(ends):
            rows = [_mask(vocab_size, "eos_token_id", (i for i in ids if 0 <= i < vocab_size)) for ids in ends]
            yield _Mask(_stacked(rows), _too_short, (settings.min_length, 0 if new is None else new))
    if settings.forced_bos_id is not None:
        tokens = _mask(vocab_size, "forced_bos_token_id", [settings.forced_bos_id])
        if (holds := merged([None if c.forced_ids else 1 for c in configs], 0)) is not None:
            yield _Mask(tokens, _after_one_token, (holds,), forced=True)
    if longest := max(len(config.forced_ids) for config in configs):
        width = 1 << (longest - 1).bit_length()  # few widths are compiled
        for config in configs:
            _mask(vocab_size, "forced_ids", config.forced_ids, of_files=False)
        rows = [
            np.pad(config.forced_ids, (0, width - len(config.forced_ids)), constant_values=-1) for config in configs
        ]
        yield _Forced(_stacked(rows).astype(np.int32))
    if settings.forced_eos_ids:
        tokens = _mask(vocab_size, "forced_eos_token_id", settings.forced_eos_ids)
        counts = merged([config.max_new_tokens for config in configs], 0)
        assert counts is not None
        yield _Mask(tokens, _before_last, (counts,), forced=True)


def _suppressed(settings: GenerationSettings, vocab_size: int, configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    if settings.suppress_tokens:
        yield _Mask(_mask(vocab_size, "suppress_tokens", settings.suppress_tokens))
    if any(config.banned_ids for config in configs):
        yield _Mask(_stacked([_mask(vocab_size, "banned_ids", c.banned_ids, of_files=False) for c in configs]))
    if settings.begin_suppress_tokens:
        tokens = _mask(vocab_size, "begin_suppress_tokens", settings.begin_suppress_tokens)
        forced = settings.forced_bos_id is not None
        later = merged([int(forced and not c.forced_ids) for c in configs], 0)
        assert later is not None
        yield _Mask(tokens, _at_beginning, (later,))


def _own(configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    """Yield the users' own controls, those of some rows for these alone, in the order that each row has them."""
    for place in range(max(len(config.controls) for config in configs)):
        at_place = [config.controls[place] if place < len(config.controls) else None for config in configs]
        for i, control in enumerate(at_place):
            if control is None or any(control is earlier for earlier in at_place[:i]):
                continue
            if not callable(control):
                raise UserError(f"controls has {control!r}: give functions of logits and of the rows written so far")
            found = _PlainFunction(control) if jax.tree_util.all_leaves([control]) else control
            rows = np.array([other is control for other in at_place])
            yield found if rows.all() else _OfRows(found, rows)
