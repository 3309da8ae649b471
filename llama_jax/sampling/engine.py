"""`Engine`: requests that are continued together."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jax.typing import DTypeLike

from llama_jax.checkpoint import GenerationSettings, LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Model
from llama_jax.sampling.config import SamplingConfig
from llama_jax.sampling.loop import Rows
from llama_jax.sampling.token_ids import check_room, checked_prompts, continued

PREFILL_CHUNK = 256
DECODE_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue.

    prompt: token ids; of an encoder-decoder the source.
    config: how it is continued; its own `stop_ids` end it as well.
    stop_ids: token ids that end the text, and are kept.
    row: number of the prompt, which its draws depend on; sample i draws as prompt `row + i`.
    source: of an encoder-decoder, which tokens of `prompt` are real; None for all of them.
    """

    prompt: tuple[int, ...]
    config: SamplingConfig
    stop_ids: tuple[int, ...] = ()
    row: int = 0
    source: tuple[bool, ...] | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability (natural logarithm) of a chosen token, and of the most probable ones, highest first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """New tokens of one sample of a request; the last one has the reason of the end, and of an error a sentence."""

    ticket: int
    sample: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: str | None = None


class Engine:
    """Continue requests together, each as if it were alone.

    One thread owns it. `length` is the most tokens of a text, its prompt included (default: the model's positions).
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
    ):
        self._model, self._settings = (lm, GenerationSettings()) if isinstance(lm, Model) else (lm.model, lm.generation)
        self._num_rows, self._decode_chunk = rows, decode_chunk
        self._length = min(length or self._model.config.length_limit, self._model.config.length_limit)
        self._tickets = itertools.count()
        self._waiting: deque[tuple[int, int, Request]] = deque()
        self._running: dict[tuple[int, int], tuple[Iterator[Rows], int]] = {}

    @property
    def idle(self) -> bool:
        """Nothing is running or waiting."""
        return not (self._waiting or self._running)

    def add(self, request: Request) -> int:
        """Queue a request and return its ticket. Raises UserError for one that cannot be continued."""
        mask = None if request.source is None else np.array([request.source])
        prompts = checked_prompts(self._model, [list(request.prompt)], None, mask)
        check_room(prompts, request.config.max_new_tokens, self._length)
        ticket = next(self._tickets)
        self._waiting.extend((ticket, sample, request) for sample in range(request.config.num_samples))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request: it has no more pieces. Does nothing where it has ended already."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != ticket)
        self._running = {key: value for key, value in self._running.items() if key[0] != ticket}

    def step(self) -> list[Piece]:
        """Do a little work for all that run, and return what is new."""
        while self._waiting and len(self._running) < self._num_rows:
            ticket, sample, request = self._waiting.popleft()
            self._running[ticket, sample] = (
                self._begin(request, sample),
                (1 if self._model.config.has_source else len(request.prompt)),
            )
        return [piece for key in list(self._running) if (piece := self._advance(*key)) is not None]

    def _begin(self, request: Request, sample: int) -> Iterator[Rows]:
        start_id = self._settings.decoder_start_id
        mask = None if request.source is None else np.array([request.source])
        prompts = checked_prompts(self._model, [list(request.prompt)], None, mask, start_id=start_id)
        stops = tuple(dict.fromkeys((*request.stop_ids, *request.config.stop_ids)))
        config = dataclasses.replace(request.config, stop_ids=stops)
        first_row, chunk = request.row + sample, self._decode_chunk
        return continued(self._model, prompts, config, settings=self._settings, first_row=first_row, chunk=chunk)

    def _advance(self, ticket: int, sample: int) -> Piece | None:
        rows, seen = self._running[ticket, sample]
        try:
            found = next(rows, None)
        except UserError as error:
            del self._running[ticket, sample]
            return Piece(ticket, sample, [], finish_reason="error", error=str(error))
        if found is None:
            del self._running[ticket, sample]
            return Piece(ticket, sample, [], finish_reason="length")
        length = int(found.lengths[0])
        new = np.asarray(found.tokens[0, seen:length]).tolist()
        if found.done[0]:
            del self._running[ticket, sample]
            return Piece(ticket, sample, new, finish_reason="stop")
        self._running[ticket, sample] = rows, length
        return Piece(ticket, sample, new)
