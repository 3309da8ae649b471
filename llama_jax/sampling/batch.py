"""The batch that is continued: texts in rows, which are refilled, and grow with the requests."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llama_jax.models import Model
from llama_jax.nn import PyTree
from llama_jax.sampling.config import SamplingConfig
from llama_jax.sampling.constraints import Constraint
from llama_jax.sampling.loop import (
    FEWEST_STOPS,
    CacheSize,
    Logged,
    Orders,
    Rows,
    advance,
    place,
    power_of_two,
    smallest_ring,
)
from llama_jax.sampling.sampler import Sampler
from llama_jax.sampling.speculative import Speculation


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

    @property
    def ends(self) -> tuple[int, ...]:
        """All ids that end the text."""
        return tuple(dict.fromkeys((*self.stop_ids, *self.config.stop_ids)))


@dataclasses.dataclass
class Text:
    """One sample of a request, as it grows.

    source: row of its prompt in the prefill.
    tokens: the prompt (of an encoder-decoder's answer the start token), to which new tokens are appended.
    """

    ticket: int
    sample: int
    request: Request
    source: int
    tokens: list[int]
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def is_new(self) -> bool:
        """True where it has no new tokens."""
        return len(self.tokens) == self.prompt


def _cached(texts: Sequence[Text]) -> list[int]:
    """Return the numbers of tokens that the cache has of each text: all but the last."""
    return [len(text.tokens) - 1 for text in texts]


class Batch:
    """Texts in the rows of a cache on the device. Rows without a text are done, and hold copies of others."""

    def __init__(self, model: Model, size: CacheSize, cache: PyTree, texts: Sequence[Text]):
        self.size, self.cache = size, cache
        self.texts: dict[int, Text] = dict(enumerate(texts))
        self._model = model
        self._prepared: tuple[Rows, Orders, Sampler] | None = None

    @classmethod
    def of(
        cls, model: Model, size: CacheSize, cache: PyTree, texts: Sequence[Text], *, whole: bool, room: int | None
    ) -> "Batch":
        """Return a batch of texts whose prompts are in a cache, which is taken over where these are its rows.

        `size` is that of the cache; with `whole` nothing else reads it. `room` is that of the batch's own.
        """
        rows = power_of_two(len(texts))
        sources = [text.source for text in texts]
        rings = room is not None and smallest_ring(model.config, size.length, room) is not None
        same = not rings and whole and rows == size.rows and sources == [*range(len(texts))]
        size = dataclasses.replace(size, rows=rows, room=room)
        if not same:
            numbers = (np.resize(x, rows).tolist() for x in (sources, _cached(texts)))
            cache = place(model, size, None, cache, range(rows), *numbers)
        return cls(model, size, cache, texts)

    def add(self, texts: Sequence[Text], cache: PyTree, size: CacheSize) -> None:
        """Copy texts whose prompts are in another cache into free rows. The batch grows where it has to."""
        need = dataclasses.replace(
            self.size,
            rows=max(self.size.rows, power_of_two(len(self.texts) + len(texts))),
            length=max(self.size.length, size.length),
            source=max(self.size.source, size.source),
        )
        if need != self.size:
            order, held = [*self.texts], _cached([*self.texts.values()])
            numbers = (np.resize(x, need.rows).tolist() for x in (order, held))
            self.cache = place(self._model, need, None, self.cache, range(need.rows), *numbers)
            self.texts, self.size = dict(enumerate(self.texts.values())), need
        free = [row for row in range(need.rows) if row not in self.texts][: len(texts)]
        sources = [text.source for text in texts]
        self.cache = place(self._model, need, self.cache, cache, free, sources, _cached(texts))
        self.texts |= dict(zip(free, texts, strict=True))
        self._prepared = None

    def release(self, rows: Sequence[int]) -> None:
        """Take texts out of their rows."""
        for row in rows:
            del self.texts[row]
        self._prepared = None

    def advance(
        self,
        settings: Any,
        count: int,
        *,
        enough: int | None,
        logged: Logged | None,
        speculation: Speculation | None = None,
    ) -> tuple[Rows, PyTree]:
        """Return the rows with up to `count` more tokens in each, and what is `logged`, on the host.

        It ends early as soon as `enough` more rows are done; None goes on until all are.
        """
        rows, orders, plain = self._prepared or self.prepare(settings)
        sampler = plain
        if any(text.constraint for text in self.texts.values()):
            allowed = np.ones((self.size.rows, self._model.config.vocab_size), bool)
            for row, text in self.texts.items():
                if text.constraint:
                    allowed[row] = text.constraint.mask()
            sampler = dataclasses.replace(plain, allowed=allowed)
        until = None if enough is None else self.size.rows - len(self.texts) + enough
        run = functools.partial(advance, logged=logged)
        if speculation is not None and logged is None and sampler.allowed is None:
            run = functools.partial(speculation.advance, texts=self.texts)
        self.cache, found = run(self._model, self.cache, rows, orders, sampler, count, until=until)
        new, log = jax.device_get(found)
        self._prepared = new, orders, plain
        return new, log

    def prepare(self, settings: Any) -> tuple[Rows, Orders, Sampler]:
        """Return the arrays of the texts, and their sampler."""
        size, texts = self.size.rows, self.texts
        num_stops = max(len(text.request.ends) for text in texts.values())
        tokens = np.zeros((size, self.size.length), np.int32)
        lengths, prompts, limits, numbers = np.ones((4, size), np.int32)
        done, seeds = np.ones(size, bool), np.zeros((size, 2), np.uint32)
        # Filled up with -1, so that few sizes are compiled.
        stop_ids = np.full((size, max(FEWEST_STOPS, power_of_two(num_stops))), -1, np.int32)
        for row, text in texts.items():
            request = text.request
            tokens[row, : len(text.tokens)] = text.tokens
            lengths[row], prompts[row] = len(text.tokens), text.prompt
            limits[row] = text.prompt + request.config.max_new_tokens
            done[row], numbers[row] = False, request.row + text.sample
            seeds[row] = request.config.seed >> 32, request.config.seed & 0xFFFFFFFF
            stop_ids[row, : len(request.ends)] = request.ends
        some = next(iter(texts.values())).request
        requests = [texts[row].request if row in texts else some for row in range(size)]
        configs, ends = [request.config for request in requests], [request.ends for request in requests]
        sampler = Sampler.rows(configs, settings, self._model.config.vocab_size, ends)
        rows = Rows(tokens, lengths, done, np.zeros(size, np.int32))
        return rows, Orders(prompts, limits, stop_ids, seeds, numbers), sampler
