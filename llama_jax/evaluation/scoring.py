"""Log-probabilities of given tokens under a left-to-right model, in batches of few shapes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.models import check_ids
from llama_jax.nn import unzigzag, zigzag
from llama_jax.parallel import replicate, shard
from llama_jax.sampling import tokenizer_of

CHUNK = 128  # positions of each row whose logits exist at a time
SMALLEST = 16  # positions of a row

type Row = tuple[Sequence[int], Sequence[int]]
"""Input ids, and the ids that may follow the last of them."""
type Scores = tuple[np.ndarray, ...]
"""Of a row's T inputs and K choices: log-probabilities of what follows each input, float32 [T, K], and bool [T, K],
true where the token is the most probable one. Only the last position differs between the choices. With `top`, also the
ids that are most probable after each input, and their log-probabilities: both [T, top], highest first."""


class Scorer:
    """Scores of rows under a decoder, on its mesh.

    Rows are sorted by length and padded to powers of two, a batch has always `batch_size` rows or, where there are
    fewer, a power of two: `shapes` collects the shapes [B, T, K] of the programs. `progress(done, total)` is called
    with numbers of rows. `top` is the number of most probable tokens that are returned too.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int = 8,
        top: int = 0,
        progress: Callable[[int, int], object] = lambda done, total: None,
    ):
        """Raises UserError for a model without the likelihood of a text, and an impossible batch size."""
        kind = type(lm.config).__name__
        if lm.config.has_source:
            raise UserError(
                f"{kind} gives no likelihood of a text alone: evaluate it by BLEU, with pairs or with --source and "
                "--reference"
            )
        if not lm.config.generates:
            raise UserError(f"{kind} looks ahead and gives no likelihood of a text: evaluate a classifier with pairs")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.lm, self.batch_size, self.progress = lm, batch_size, progress
        self.top = min(_power_of_two(top) if top else 0, lm.config.vocab_size)  # few programs
        self.shapes: set[tuple[int, int, int]] = set()

    def score(self, rows: Sequence[Row]) -> list[Scores]:
        """Return the scores of all rows, in their order.

        Raises UserError for ids outside of the vocabulary and for logits that are not numbers.
        """
        found: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (_power_of_two(len(rows[i][1])), len(rows[i][0])), reverse=True)
        size = min(self.batch_size, _power_of_two(len(rows)))
        for first in range(0, len(order), size):
            numbers = order[first : first + size]
            for i, scores in zip(numbers, self._batch([rows[i] for i in numbers], size), strict=True):
                found[i] = scores
            self.progress(first + len(numbers), len(rows))
        return found

    def _batch(self, rows: Sequence[Row], size: int) -> list[Scores]:
        """Return the scores of one batch, filled up to `size` rows."""
        length = padded_length(max(len(inputs) for inputs, _ in rows), self.lm.config.length_limit)
        shape = size, length, _power_of_two(max(len(choices) for _, choices in rows))
        self.shapes.add(shape)
        tokens, is_token, targets = (
            np.zeros(shape[:2], np.int32),
            np.zeros(shape[:2], np.int32),
            np.zeros(shape, np.int32),
        )
        is_token[:, 0] = 1  # a row without any token would attend to nothing
        for i, (inputs, choices) in enumerate(rows):
            end = len(inputs)
            tokens[i, :end], is_token[i, :end] = inputs, 1
            targets[i, : end - 1] = np.asarray(inputs[1:], np.int32)[:, None]
            targets[i, end - 1, : len(choices)] = choices
        for ids in (tokens, targets.reshape(size, -1)):
            check_ids(self.lm.config.vocab_size, ids)
        arguments = tokens, is_token, targets
        logprobs, greedy, *most = map(np.asarray, self.lm.model.run(_scores, *arguments, top=self.top))
        scores = []
        for i, (inputs, choices) in enumerate(rows):
            part = logprobs[i, : len(inputs), : len(choices)]
            if np.isnan(part).any():
                raise UserError("the logits are not numbers: the weights are damaged, or need dtype='float32'")
            scores.append((part, greedy[i, : len(inputs), : len(choices)], *(x[i, : len(inputs)] for x in most)))
        return scores


def score(
    lm: LanguageModel, prompts: Sequence[Any], continuations: Sequence[Any], *, batch_size: int = 8
) -> list[list[float]]:
    """Return the log-probability (natural logarithm) of each token of each continuation, after its prompt.

    Both are lists of as many texts or token ids. Of texts the tokens are those of prompt and continuation together: a
    token that has parts of both counts for the continuation. They are the model's own, before any control of sampling.

    Raises UserError for impossible texts or ids, and for a model without the likelihood of a text.
    """
    if isinstance(prompts, str) or isinstance(continuations, str) or len(prompts) != len(continuations):
        raise UserError("prompts and continuations must be two lists of as many texts or token ids")
    scorer, limit = Scorer(lm, batch_size=batch_size), lm.config.length_limit
    rows, counts = list[Row](), list[int]()
    for number, pair in enumerate(zip(prompts, continuations, strict=True)):
        ids, count = _ids_of_texts(lm, *pair) if all(isinstance(x, str) for x in pair) else _ids(*pair)
        if not 0 < count < len(ids):
            what = "continuation" if count <= 0 else "prompt, and no BOS before it"
            raise UserError(f"prompts[{number}] has an empty {what}: give at least one token of each")
        if len(ids) - 1 > limit:
            raise UserError(f"prompts[{number}] with its continuation has {len(ids)} tokens: the model reads {limit}")
        rows.append((ids[:-1], ids[-1:]))
        counts.append(count)
    found = scorer.score(rows) if rows else []
    return [logprobs[-count:, 0].tolist() for (logprobs, _), count in zip(found, counts, strict=True)]


def _ids(prompt: Any, continuation: Any) -> tuple[list[int], int]:
    first, last = np.asarray(prompt), np.asarray(continuation)
    if any(x.ndim != 1 or (x.size and not np.issubdtype(x.dtype, np.integer)) for x in (first, last)):
        raise UserError(f"prompt {prompt!r} and continuation {continuation!r} must be two texts or two lists of ids")
    return [*first.tolist(), *last.tolist()], len(last)


def _ids_of_texts(lm: LanguageModel, prompt: str, continuation: str) -> tuple[list[int], int]:
    """Return the ids of both, and how many of them are the continuation's."""
    tokenizer = tokenizer_of(lm)
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + continuation)
    same = next(
        (i for i, ids in enumerate(zip(before, whole, strict=False)) if ids[0] != ids[1]), min(len(before), len(whole))
    )
    return [*tokenizer.prefix_ids, *whole], len(whole) - same


def _scores(
    module: Any, tokens: Int[Array, "b t"], is_token: Int[Array, "b t"], targets: Int[Array, "b t k"], *, top: int
) -> tuple[Float[Array, "b t k"] | Bool[Array, "b t k"] | Float[Array, "b t n"] | Int[Array, "b t n"], ...]:
    """Return log-probabilities of the targets, and true where they are the most probable token (the first of such).

    Above 0, `top` asks for the ids of so many most probable tokens and their log-probabilities as well.
    """
    hidden = unzigzag(module.trunk(zigzag(tokens), segment_ids=zigzag(is_token))[0])
    hidden, targets = shard(hidden, "batch", None, None), shard(targets, "batch", None, None)
    weight, length = module.head_weight(), tokens.shape[1]

    def chunk(parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        hidden, targets = parts
        logits = module.head(hidden, weight)
        ids = jnp.arange(logits.shape[-1])
        total = jax.nn.logsumexp(logits, axis=-1)
        best = jnp.where(logits == logits.max(-1, keepdims=True), ids, logits.shape[-1]).min(-1)
        # A sum over the vocabulary, and not a lookup, which would gather it where it is split over devices.
        picked = [jnp.where(ids == targets[..., k, None], logits, 0.0).sum(-1) for k in range(targets.shape[-1])]
        found = jnp.stack(picked, -1) - total[..., None], best[..., None] == targets
        if not top:
            return found
        highest, ids = jax.lax.top_k(shard(logits, "batch", None, None), top)
        return *found, ids, highest - total[..., None]

    if length <= CHUNK:
        return jax.tree.map(replicate, chunk((hidden, targets)))
    padding = -length % CHUNK

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, CHUNK, x.shape[-1]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = replicate(jnp.moveaxis(x, 0, 1))
        return x.reshape(x.shape[0], -1, x.shape[-1])[:, :length]

    return jax.tree.map(join, jax.lax.map(chunk, (split(hidden), split(targets))))


def padded_length(length: int, limit: int) -> int:
    """Return the positions of a row to compile for: the next power of two, at least 16, and at most `limit`."""
    return max(length, min(max(SMALLEST, _power_of_two(length)), limit))


def _power_of_two(size: int) -> int:
    """Return the next power of two."""
    return 1 << max(size - 1, 0).bit_length()
