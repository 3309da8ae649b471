"""`Engine`: requests that are continued together."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model, ModelConfig, check_ids
from llama_jax.sampling.batch import Batch, Request as Request, Text
from llama_jax.sampling.beams import beam_search
from llama_jax.sampling.config import LARGEST
from llama_jax.sampling.constraints import Constraint, constraint_of
from llama_jax.sampling.loop import (
    NOT_NUMBERS,
    CacheSize,
    Logged,
    Rows,
    bucket,
    can_be_cut,
    place,
    power_of_two,
    turns_by_length,
)
from llama_jax.sampling.prefill import Prefill, Prefixes
from llama_jax.sampling.sampler import Sampler
from llama_jax.sampling.speculative import MTP, Speculation

PREFILL_CHUNK = 512
DECODE_CHUNK = 8
PREFIX_BYTES = 1 << 28
# Log-probabilities are fetched after this many tokens at the latest.
MOST_LOGGED = 64
# A chunk of tokens that nobody reads before the end.
WHOLE = LARGEST
# Rows that nobody waits for are refilled when a part as large as this of them is done.
ENOUGH = 8


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability (natural logarithm) of a chosen token, and of the most probable ones, highest first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """New tokens of one sample of a request; the last one has the reason of the end, and of an error a sentence.

    `score` is that of a beam search.
    """

    ticket: int
    sample: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: str | None = None
    score: float | None = None


@dataclasses.dataclass
class _Job:
    """Requests whose prompts are being run, and those of their texts that have no row yet."""

    prefill: Prefill
    requests: list[Request]
    pending: list[Text]
    is_new: bool = True


class Engine:
    """Continue requests together, each as if it were alone.

    A batch on the device has rows and positions in powers of two, which grow with the requests. Prompts are run apart
    from it, a chunk at each step, up to their last token but one, and their caches copied into rows that are free: the
    decode loop takes the last token as any other.

    rows: most rows of the batch, rounded up to a power of two.
    length: most tokens of a text, its prompt included; None for the model's positions.
    prefill_chunk: tokens of prompts that a step runs, at most; those of models with states or LongRoPE run whole.
    decode_chunk: new tokens of a row that a step makes, at most; the first one comes alone.
    cache_dtype: type of the cached keys and values: float32, bfloat16 or int8; None for that of the activations.
    prefix_bytes: memory for the caches of earlier texts, whose common beginnings are not computed again.

    speculation: guesses of tokens, of which the texts do not depend.

    It is not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        lm: LanguageModel | Model,
        *,
        rows: int = 8,
        length: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        decode_chunk: int = DECODE_CHUNK,
        cache_dtype: DTypeLike | None = None,
        prefix_bytes: int = PREFIX_BYTES,
        speculation: Speculation | None = None,
    ):
        given = {"rows": rows, "length": length, "prefill_chunk": prefill_chunk, "decode_chunk": decode_chunk}
        for name, value in given.items():
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        self._lm = lm
        self._model, self._settings = (lm, GenerationSettings()) if isinstance(lm, Model) else (lm.model, lm.generation)
        self._model = self._model.for_decoding
        config = self._model.config
        if not config.generates:
            raise UserError(f"{type(config).__name__} continues no texts: load it and call it on tokens")
        self._most, self._decode_chunk = power_of_two(rows), decode_chunk
        self._length = min(length or config.length_limit, config.length_limit)
        start = self._settings.decoder_start_id
        self._start_id = int(getattr(config, "decoder_start_id", 0) if start is None else start)
        cuts = not config.has_source and can_be_cut(config)
        parts = cuts and not turns_by_length(config)
        self._prefill_chunk = prefill_chunk if parts else None
        self._dtype = None if cache_dtype is None else jnp.dtype(cache_dtype).name
        if self._dtype not in (None, "float32", "bfloat16", "int8"):
            raise UserError(f"cache_dtype={cache_dtype} must be float32, bfloat16 or int8")
        if self._dtype == "int8" and not (cuts or config.has_source):
            raise UserError("cache_dtype=int8 is for attention, and this model keeps states: leave it out")
        self._prefixes = Prefixes(self._model, prefix_bytes if parts else 0)
        self._speculation, self._room = speculation, speculation.room if speculation else 0
        # Further blocks read texts from their beginning, which would be written over a window's entries.
        whole = config.has_source or (speculation is not None and speculation.kind == MTP)
        self._kept_room = None if whole else max(1, self._room)
        self._tickets = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._job: _Job | None = None
        self._batch: Batch | None = None

    @property
    def idle(self) -> bool:
        """True where nothing runs or waits."""
        return not (self._waiting or self._job or self._batch)

    @property
    def num_waiting(self) -> int:
        """The number of requests, or samples of them, that have no row yet."""
        return len(self._waiting) + (len(self._job.pending) if self._job else 0)

    @property
    def num_running(self) -> int:
        """The number of rows that are continued."""
        return len(self._batch.texts) if self._batch else 0

    def add(self, request: Request) -> int:
        """Queue a request and return its ticket. Raises UserError for one that cannot be continued."""
        config, model = request.config, self._model.config
        if not request.prompt:
            raise UserError("a prompt without any token cannot be continued: give at least one")
        check_room(model, len(request.prompt), config.max_new_tokens, self._length)
        check_ids(model.vocab_size, np.array([request.prompt]))
        if model.has_source:
            check_ids(model.vocab_size, np.array([[self._start_id]]), "decoder_start_id")
        Sampler.rows([config], self._settings, model.vocab_size, [request.ends])  # refuses impossible settings
        self._constraint(request)
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """End a request, or one sample of it: it has no more pieces. Does nothing where it has ended already."""

        def goes_on(text: Text) -> bool:
            return text.ticket != ticket or sample not in (None, text.sample)

        if sample is None:
            self._waiting = deque(entry for entry in self._waiting if entry[0] != ticket)
        if self._job is not None:
            self._job.pending = [text for text in self._job.pending if goes_on(text)]
            self._job = self._job if self._job.pending else None
        if self._batch is not None:
            self._release(self._batch, [row for row, text in self._batch.texts.items() if not goes_on(text)])

    def step(self) -> list[Piece]:
        """Run a chunk of prompts and a few tokens of all rows, and return what is new."""
        if self._job is None and self._waiting and self.num_running < self._most:
            self._job = self._next_prefill()
        if self._job is not None and self._job.prefill.run():
            if self._job.requests[0].config.num_beams > 1:
                return self._search(self._job)
            self._admit(self._job)
        return [] if self._batch is None else self._decode(self._batch)

    def run(self) -> Iterator[Piece]:
        """Yield the pieces of all steps until it is idle. Raises UserError for a request with an error."""
        while not self.idle:
            for piece in self.step():
                if piece.error is not None:
                    raise UserError(piece.error)
                yield piece

    def _next_prefill(self) -> _Job:
        """Take as many of the waiting requests as there are free rows for, and one at least."""
        room, taken = self._most - self.num_running, list[tuple[int, Request]]()
        budget, width = self._prefill_chunk or LARGEST, 0
        while self._waiting and (
            not taken or sum(max(r.config.num_samples, r.config.num_beams) for _, r in taken) < room
        ):
            request = self._waiting[0][1]
            # Short prompts do not wait for a long one.
            width = max(width, len(request.prompt))
            if taken and power_of_two(len(taken) + 1) * bucket(width, self._length) > budget:
                break
            if taken and _beams(request) != _beams(taken[0][1]):
                break
            taken.append(self._waiting.popleft())
        requests = [request for _, request in taken]
        has_source, start = self._model.config.has_source, self._start_id
        prompts = [(start,) if has_source else request.prompt for request in requests]
        longest = max(len(p) + r.config.max_new_tokens for p, r in zip(prompts, requests, strict=True))
        size = CacheSize(power_of_two(len(taken)), bucket(longest, self._length) + self._room, self._dtype)
        if self._batch is not None:
            size = dataclasses.replace(size, length=max(size.length, self._batch.size.length))
        if has_source:
            masks = [np.array(request.source or [True] * len(request.prompt)) for request in requests]
            sources = [(np.array(r.prompt), mask) for r, mask in zip(requests, masks, strict=True)]
            size = dataclasses.replace(size, source=bucket(max(len(mask) for mask in masks), self._length))
            prefill = Prefill.of_sources(self._model, sources, start, size)
        else:
            prefill = Prefill(self._model, prompts, size, self._prefill_chunk)
            prefill.use(self._prefixes)
        pending = [
            Text(ticket, sample, request, source, list(prompts[source]), self._constraint(request))
            for source, (ticket, request) in enumerate(taken)
            for sample in range(request.config.num_samples)
        ]
        return _Job(prefill, requests, pending)

    def _admit(self, job: _Job) -> None:
        """Give rows to texts whose prompts have been run, as far as there are free ones."""
        if job.is_new:
            job.prefill.keep(self._prefixes)
            job.is_new = False
        room = self._most - self.num_running
        texts, job.pending = job.pending[:room], job.pending[room:]
        cache, size = job.prefill.cache, job.prefill.size
        if self._batch is None:
            self._batch = Batch.of(self._model, size, cache, texts, whole=not job.pending, room=self._kept_room)
        elif texts:
            self._batch.add(texts, cache, size)
        if not job.pending:
            self._job = None

    def _search(self, job: _Job) -> list[Piece]:
        """Run a beam search of prompts that have been run, and return its best sequences."""
        request, texts = job.requests[0], {text.source: text for text in job.pending}
        beams, size = request.config.num_beams, job.prefill.size
        sources = [row // beams for row in range(size.rows * beams)]
        size = dataclasses.replace(size, rows=len(sources))
        cache = place(self._model, size, None, job.prefill.cache, range(size.rows), sources)
        batch = Batch(self._model, size, cache, ())
        batch.texts = {row: texts[source] for row, source in enumerate(sources) if source in texts}
        rows, scores = beam_search(
            self._model, cache, *batch.prepare(self._settings), request.config, len(request.ends)
        )
        self._job = None
        return [
            dataclasses.replace(
                self._piece(text, text.source * beams + text.sample, rows, None),
                score=float(scores[text.source, text.sample]),
            )
            for text in job.pending
        ]

    def _constraint(self, request: Request) -> Constraint | None:
        """Return the state of a text's constraint, None without one. Raises UserError."""
        config = request.config
        if config.json_schema is None and config.regex is None:
            return None
        if isinstance(self._lm, Model):
            raise UserError("json_schema and regex need a tokenizer: give what load returns in place of a bare Model")
        return constraint_of(self._lm, config, request.ends)

    def _decode(self, batch: Batch) -> list[Piece]:
        """Make new tokens and return them; the rows of texts that end are free."""
        texts, count = batch.texts, self._decode_chunk
        if count < WHOLE and any(text.is_new for text in texts.values()):
            count = 1
        if any(text.constraint for text in texts.values()):
            count = 1
        asked = [text.request.config.logprobs for text in texts.values()]
        logged = None
        if (top := max((n for n in asked if n is not None), default=None)) is not None:
            count = min(count, MOST_LOGGED)
            steps = MOST_LOGGED if self._decode_chunk >= WHOLE else power_of_two(min(self._decode_chunk, MOST_LOGGED))
            logged = Logged(min(power_of_two(top) if top else 0, self._model.config.vocab_size), steps)
        waits = bool(self._waiting or self._job)
        enough = max(1, len(texts) // ENOUGH) if self._decode_chunk >= WHOLE else 1
        rows, log = batch.advance(
            self._settings, count, enough=enough if waits else None, logged=logged, speculation=self._speculation
        )
        pieces, ended = list[Piece](), list[int]()
        for row, text in texts.items():
            piece = self._piece(text, row, rows, log)
            if piece.finish_reason is not None:
                ended.append(row)
            if piece.finish_reason is not None or piece.token_ids:
                pieces.append(piece)
        self._release(batch, ended)
        return pieces

    def _piece(self, text: Text, row: int, rows: Rows, log: Any) -> Piece:
        """Return what is new of a text."""
        new = rows.tokens[row, len(text.tokens) : rows.lengths[row]].tolist()
        text.tokens += new
        logprobs, top = None, text.request.config.logprobs
        if top is not None:
            chosen, ids, values = (x[row] for x in log)
            logprobs = [
                TokenLogprobs(
                    token, float(chosen[i]), [*zip(ids[i, :top].tolist(), values[i, :top].tolist(), strict=True)]
                )
                for i, token in enumerate(new)
            ]
        reason, error = None, None
        if rows.fault[row]:
            number = len(text.tokens) - text.prompt + 1
            reason, error = "error", fault_sentence(int(rows.fault[row]), number, text.request.row + text.sample)
        elif rows.done[row]:
            reason = "stop" if new and new[-1] in text.request.ends else "length"
        if text.constraint is not None and error is None:
            try:
                for token in new:
                    text.constraint.consume(token)
            except UserError as failure:
                reason, error = "error", str(failure)
            if reason in (None, "length") and text.constraint.done:
                reason = "stop"
        return Piece(text.ticket, text.sample, new, logprobs, reason, error)

    def _release(self, batch: Batch, rows: Sequence[int]) -> None:
        for row in rows:
            self._prefixes.keep(tuple(batch.texts[row].tokens[:-1]), batch.cache, row, batch.size)
        if rows:
            batch.release(rows)
        if not batch.texts:
            self._batch = None


def _beams(request: Request) -> object:
    """Return what requests must have in common to be searched together."""
    return (request.config, request.ends) if request.config.num_beams > 1 else None


def check_room(config: ModelConfig, length: int, max_new_tokens: int, limit: int) -> None:
    """Raise UserError where a prompt of `length` tokens and the new ones are more than `limit`."""
    if config.has_source:
        if length > limit:
            raise UserError(
                f"a source of {length} tokens is more than the model's {limit} positions: shorten the prompt"
            )
        length = 1
    if length + max_new_tokens > limit:
        what = "the start token" if config.has_source else f"a prompt of {length} tokens"
        advice = f"take at most {limit - length}" if length < limit else "shorten the prompt"
        raise UserError(
            f"{what} and max_new_tokens={max_new_tokens} are more than the model's {limit} positions: {advice}"
        )


def fault_sentence(kind: int, new_token: int, row: int) -> str:
    """Return why a row's logits chose no token."""
    if kind == NOT_NUMBERS:
        problem = "the logits are not numbers (NaN or infinite)"
        advice = "the weights are damaged, or need dtype='float32'"
    else:
        problem, advice = "every token is forbidden", "load the model with --ignore-config-keys for these settings"
    return f"{problem} at new token {new_token} of prompt {row}: {advice}"
