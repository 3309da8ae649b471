"""Controls: functions `(logits [B, V], written) -> logits [B, V]` that come before temperature and the draw.

`controls_of` makes those of a model's files and of users' settings in the order of transformers' `generate`: logit
bias, repetition penalty (then frequency and presence penalty, which transformers does not have), no repeated n-gram,
forbidden sequences, no end before the minimum length, forced beginning, forced end, suppressed tokens, tokens
suppressed at the beginning, one's own. A plain function is compiled in; a control with numbers that change from call to
call is a pytree: a `Partial` of the numbers, as those below, or a registered dataclass. Numbers are scalars, or arrays
[B] with one for each row; a row with the neutral number keeps its logits bit for bit. Masks are [1, V] or [B, V].
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from llama_jax.checkpoint import GenerationSettings
from llama_jax.config import UserError
from llama_jax.parallel import shard
from llama_jax.sampling.config import SamplingConfig

Logits = Float[Array, "b v"]
Number = float | Array | np.ndarray
Mask = Bool[Array | np.ndarray, "_ v"]  # of one row, for all, or of each


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Written:
    """The rows that a control may read: tokens [B, S] up to `lengths` [B], of which `prompts` [B] were given."""

    tokens: Int[Array, "b s"]
    lengths: Int[Array, " b"]
    prompts: Int[Array, " b"]

    @property
    def num_new(self) -> Int[Array, " b"]:
        """The number of new tokens of each row."""
        return self.lengths - self.prompts

    def last(self, count: int) -> Int[Array, "b n"]:
        """Return the last `count` tokens of each row in their order; -1 where the row is shorter."""
        places = self.lengths[:, None] - count + jnp.arange(count)
        # A masked sum in place of an index: it stays on the device that holds the row.
        here = jnp.arange(self.tokens.shape[1]) == places[..., None]
        return jnp.where(places < 0, -1, jnp.where(here, self.tokens[:, None], 0).sum(-1))


Control = Callable[[Logits, Written], Logits]


def by_row(x: Any) -> Any:
    """Return an array whose first dimension is the batch, split as the rows are; a scalar as it is."""
    return shard(jnp.asarray(x), "batch", *(None,) * (np.ndim(x) - 1)) if np.ndim(x) else x


def column(x: Number) -> Any:
    """Return numbers of the rows, [B], as [B, 1]; a scalar as it is."""
    return by_row(x)[:, None] if np.ndim(x) else x


def merged(values: Sequence[float | None], neutral: float) -> Any:
    """Return one number, or an array with `neutral` for rows that have none; None where all have none."""
    if all(value is None for value in values):
        return None
    if len(values) == 1:
        return values[0]
    kind = np.int32 if isinstance(neutral, int) else np.float32
    return np.array([neutral if value is None else value for value in values], kind)


def _in_rows(control: Control, rows: Bool[Array | np.ndarray, " b"], logits: Logits, written: Written) -> Array:
    """Apply a control to some `rows` (true)."""
    changed = control(logits, written)
    # Of another shape or type it is refused by the caller.
    same = (changed.shape, changed.dtype) == (logits.shape, logits.dtype)
    return jnp.where(column(rows), changed, logits) if same else changed


def _add(bias: Float[Array | np.ndarray, "_ v"], logits: Logits, written: Written) -> Logits:
    return logits + by_row(bias)


def _penalize_repetition(penalty: Number, logits: Logits, written: Written) -> Logits:
    """Make tokens that are in the text less probable (Keskar et al. 2019)."""
    there = jnp.arange(written.tokens.shape[1]) < written.lengths[:, None]
    lower = jnp.where(logits < 0, logits * column(penalty), logits / column(penalty))
    return jnp.where(_counts(written.tokens, there, logits.shape[1]) > 0, lower, logits)


def _penalize_counts(frequency: Number, presence: Number, logits: Logits, written: Written) -> Logits:
    """Take `frequency` off a generated token's logit for each time it was generated, and `presence` once."""
    places = jnp.arange(written.tokens.shape[1])
    new = (places >= written.prompts[:, None]) & (places < written.lengths[:, None])
    counts = _counts(written.tokens, new, logits.shape[1])
    return logits - column(frequency) * counts - column(presence) * (counts > 0)


@functools.cache
def _no_repeat(largest: int) -> Callable[[Number, Logits, Written], Logits]:
    """Forbid tokens that would complete a sequence of `sizes` tokens (0: of any) a second time (Paulus et al. 2017)."""

    def forbid(sizes: Number, logits: Logits, written: Written) -> Logits:
        before, size = written.last(largest - 1), column(sizes)
        ends = jnp.arange(written.tokens.shape[1])
        same = (ends >= size - 1) & (ends < written.lengths[:, None]) & (size > 0)
        for back in range(1, largest):
            # The roll puts the token `back` places before the end of a sequence at its end; none that wraps counts.
            found = jnp.roll(written.tokens, back, axis=1) == before[:, -back][:, None]
            same &= found | (back >= size)
        return jnp.where(_counts(written.tokens, same, logits.shape[1]) > 0, -jnp.inf, logits)

    return forbid


def _forbid_sequences(
    others: Int[Array | np.ndarray, "n k"], last: Int[Array | np.ndarray, " n"], logits: Logits, written: Written
) -> Logits:
    """Forbid the `last` token of a sequence whose `others` are at the end of the text."""
    found = jnp.ones((logits.shape[0], len(last)), bool)
    before = written.last(others.shape[1])
    for i in range(others.shape[1]):
        found &= before[:, i : i + 1] == others[:, i]
    ids = jnp.broadcast_to(jnp.asarray(last), found.shape)
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


def _forbid(tokens: Mask, logits: Logits, written: Written) -> Logits:
    return jnp.where(by_row(tokens), -jnp.inf, logits)


def _forbid_early(tokens: Mask, length: Number, num_new: Number, logits: Logits, written: Written) -> Logits:
    """Forbid tokens before the text has `length` tokens, and `num_new` new ones."""
    early = (written.lengths < length) | (written.num_new < by_row(num_new))
    return jnp.where(early[:, None], _forbid(tokens, logits, written), logits)


def _forbid_first(tokens: Mask, after_forced: Number, logits: Logits, written: Written) -> Logits:
    """Forbid tokens at the beginning, which is one later after a single token whose next is forced."""
    first = written.num_new == (written.prompts == 1) * by_row(after_forced)
    return jnp.where(first[:, None], _forbid(tokens, logits, written), logits)


def _force_second(tokens: Mask, holds: Bool[Array | np.ndarray, " _"], logits: Logits, written: Written) -> Logits:
    """Force one of `tokens` after a single one, in rows where it `holds`."""
    return jnp.where(((written.lengths == 1) & by_row(holds))[:, None], jnp.where(tokens, 0.0, -jnp.inf), logits)


def _force_last(tokens: Mask, count: Number, logits: Logits, written: Written) -> Logits:
    """Force one of `tokens` as the last of `count` new ones."""
    return jnp.where((written.num_new == by_row(count) - 1)[:, None], jnp.where(tokens, 0.0, -jnp.inf), logits)


def _force_beginning(ids: Int[Array | np.ndarray, "_ f"], logits: Logits, written: Written) -> Logits:
    """Force the first new tokens to be `ids` in their order; -1 is padding at the end."""
    here = jnp.arange(ids.shape[1]) == written.num_new[:, None]
    token = jnp.where(here, by_row(ids) + 1, 0).sum(1, keepdims=True) - 1
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


def _masks(vocab_size: int, name: str, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return bool [R, V], true at the ids of each of R rows. Raises UserError for one outside the vocabulary."""
    found = np.zeros((len(rows), vocab_size), bool)
    for row, ids in zip(found, rows, strict=True):
        for i in ids:
            if 0 <= i < vocab_size:
                row[i] = True
            elif hasattr(SamplingConfig, name):
                raise UserError(f"{name} has the token {i}: give ids of the model's vocabulary, 0 to {vocab_size - 1}")
            else:
                raise UserError(
                    f"the model's generation settings have {name} with the token {i}, and the vocabulary has "
                    f"{vocab_size}: load it with --ignore-config-keys {name}"
                )
    return found


def _penalties(settings: GenerationSettings, vocab_size: int, configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    if any(config.logit_bias for config in configs):
        _masks(vocab_size, "logit_bias", [[i for i, _ in config.logit_bias] for config in configs])
        bias = np.zeros((len(configs), vocab_size), np.float32)
        for row, config in zip(bias, configs, strict=True):
            for i, number in config.logit_bias:
                row[i] += number
        yield Partial(_add, bias)
    repetition = [_given(c.repetition_penalty, settings.repetition_penalty, 1) for c in configs]
    if (penalty := merged(repetition, 1.0)) is not None:
        yield Partial(_penalize_repetition, penalty)
    if any(c.frequency_penalty or c.presence_penalty for c in configs):
        pairs = [(c.frequency_penalty or 0.0, c.presence_penalty or 0.0) for c in configs]
        yield Partial(_penalize_counts, *(merged(values, 0.0) for values in zip(*pairs, strict=True)))
    sizes = [_given(c.no_repeat_ngram_size, settings.no_repeat_ngram_size, 0) for c in configs]
    if (size := merged(sizes, 0)) is not None:
        yield Partial(_no_repeat(int(np.max(size))), size)


def _given(value: Any, otherwise: Any, neutral: float) -> Any:
    """Return a user's value, without one that of the files; None for what changes nothing."""
    found = otherwise if value is None else value
    return None if found == neutral else found


def _bad_words(settings: GenerationSettings, vocab_size: int) -> Iterable[Control]:
    words = [word for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in settings.eos_ids)]
    _masks(vocab_size, "bad_words_ids", words)  # longer ones are checked too
    if singles := [word[0] for word in words if len(word) == 1]:
        yield Partial(_forbid, _masks(vocab_size, "bad_words_ids", [singles]))
    for size in sorted({len(word) - 1 for word in words} - {0}):
        rows = np.array([word for word in words if len(word) == size + 1], np.int32)
        yield Partial(_forbid_sequences, rows[:, :-1], rows[:, -1])


def _ends(
    settings: GenerationSettings, vocab_size: int, configs: Sequence[SamplingConfig], stop_ids: Sequence[Sequence[int]]
) -> Iterable[Control]:
    """Yield what holds for the ids that end a text, and the forced beginning."""
    new = [_given(c.min_new_tokens, settings.min_new_tokens, 0) or 0 for c in configs]
    if settings.min_length or any(new):
        ends = [
            {*settings.eos_ids, *(() if config.min_new_tokens is None else stops)}
            for config, stops in zip(configs, stop_ids, strict=True)
        ]
        if any(ends):
            tokens = _masks(vocab_size, "eos_token_id", [[i for i in ids if 0 <= i < vocab_size] for ids in ends])
            yield Partial(_forbid_early, tokens, settings.min_length, merged(new, 0))
    free = [not config.forced_ids for config in configs]
    if settings.forced_bos_id is not None:
        tokens = _masks(vocab_size, "forced_bos_token_id", [[settings.forced_bos_id]])
        if any(free):
            yield Partial(_force_second, tokens, np.array(free))
    if not all(free):
        _masks(vocab_size, "forced_ids", [config.forced_ids for config in configs])
        longest = max(len(config.forced_ids) for config in configs)
        ids = np.full((len(configs), 1 << (longest - 1).bit_length()), -1, np.int32)  # few widths are compiled
        for row, config in zip(ids, configs, strict=True):
            row[: len(config.forced_ids)] = config.forced_ids
        yield Partial(_force_beginning, ids)
    if settings.forced_eos_ids:
        tokens = _masks(vocab_size, "forced_eos_token_id", [settings.forced_eos_ids])
        yield Partial(_force_last, tokens, merged([config.max_new_tokens for config in configs], 0))


def _suppressed(settings: GenerationSettings, vocab_size: int, configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    if settings.suppress_tokens:
        yield Partial(_forbid, _masks(vocab_size, "suppress_tokens", [settings.suppress_tokens]))
    if any(config.banned_ids for config in configs):
        yield Partial(_forbid, _masks(vocab_size, "banned_ids", [config.banned_ids for config in configs]))
    if settings.begin_suppress_tokens:
        tokens = _masks(vocab_size, "begin_suppress_tokens", [settings.begin_suppress_tokens])
        forced = settings.forced_bos_id is not None
        yield Partial(_forbid_first, tokens, merged([int(forced and not c.forced_ids) for c in configs], 0))


def _own(configs: Sequence[SamplingConfig]) -> Iterable[Control]:
    """Yield the users' own controls, those of some rows for these alone, in the order that each row has them."""
    for row in itertools.zip_longest(*(config.controls for config in configs)):
        distinct: dict[int, Any] = {id(control): control for control in row if control is not None}
        for control in distinct.values():
            if not callable(control):
                raise UserError(f"controls has {control!r}: give functions of logits and of the rows written so far")
            found: Any = Partial(control) if jax.tree_util.all_leaves([control]) else control
            here = np.array([other is control for other in row])
            yield found if here.all() else Partial(_in_rows, found, here)
