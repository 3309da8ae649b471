"""The thread that owns the engine, and the calls that the server's event loop waits for."""

import asyncio
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.sampling import Encoded, Engine, Piece, Request, SamplingConfig, TextStream, TokenLogprobs
from llama_jax.serving.metrics import Metrics

logger = logging.getLogger("llama_jax.serving")


class Refused(Exception):
    """A request that gets no answer.

    status: of HTTP.
    code: OpenAI's word for the reason.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass
class Delta:
    """What is new of one choice (text of one sample): text, log-probabilities, the number of tokens, how it ended."""

    choice: int
    text: str = ""
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, later: "Delta") -> None:
        """Append what came after it."""
        self.text += later.text
        self.logprobs += later.logprobs
        self.num_tokens += later.num_tokens
        self.finish_reason = later.finish_reason


class Call:
    """The prompts of one HTTP request and the choices that are written for them; it belongs to the event loop.

    What a slow client has not read yet is one `Delta` a choice, so that it takes no more memory than the texts.
    """

    def __init__(self, prompts: Sequence[Encoded], config: SamplingConfig, arrived: float):
        self.prompts, self.config, self.arrived = prompts, config, arrived
        self.num_choices = len(prompts) * config.num_samples
        self.loop = asyncio.get_running_loop()
        self.gone = False
        self._new: dict[int, Delta] = {}
        self._refused: Refused | None = None
        self._ready, self._open = asyncio.Event(), self.num_choices

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield what is new until all choices have ended. Raises Refused where the request cannot be continued."""
        while self._open:
            await self._ready.wait()
            self._ready.clear()
            if self._refused is not None:
                raise self._refused
            found, self._new = self._new, {}
            for delta in found.values():
                self._open -= delta.finish_reason is not None
                yield delta

    def take(self, new: "Delta | Refused") -> None:
        """Add what has come from the worker."""
        if isinstance(new, Refused):
            self._refused = new
        elif (waiting := self._new.get(new.choice)) is not None:
            waiting.add(new)
        else:
            self._new[new.choice] = new
        self._ready.set()


@dataclasses.dataclass(eq=False)
class _Job:
    """One prompt of a call: `texts` are its samples that have not ended, `times` when each had its last tokens."""

    call: Call
    number: int
    texts: dict[int, TextStream]
    times: dict[int, float]

    @property
    def encoded(self) -> Encoded:
        return self.call.prompts[self.number]


class Worker(threading.Thread):
    """Run the calls of all clients through one engine, in the order of their arrival.

    At most `rows` samples are in the engine (of one prompt perhaps more); at most `max_queue` more prompts wait.
    """

    def __init__(self, lm: LanguageModel, engine: Callable[[], Engine], *, rows: int, max_queue: int, metrics: Metrics):
        super().__init__(name="engine", daemon=True)
        self._lm, self._make, self._engine, self._metrics = lm, engine, engine(), metrics
        self._rows, self._max_queue = rows, max_queue
        self._changed = threading.Condition()  # guards the fields below
        self._waiting: deque[_Job] = deque()
        self._running: dict[int, _Job] = {}  # by ticket; written by this thread alone
        self._stepped: list[_Job] = []  # in the engine's latest step, some of which may have ended in it
        self.draining = self._ended = False

    @property
    def num_waiting(self) -> int:
        """The number of prompts in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of samples in the engine."""
        with self._changed:
            return sum(len(job.texts) for job in self._running.values())

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting or self._running)

    def warm_up(self) -> None:
        """Compile what a first request needs, before the thread starts. Raises UserError where it fails."""
        self._engine.add(Request((0,), SamplingConfig(max_new_tokens=1, temperature=1.0)))
        while not self._engine.idle:
            for piece in self._engine.step():
                if piece.error is not None:
                    raise UserError(piece.error)

    def submit(self, call: Call) -> None:
        """Queue a call. Raises Refused when the server stops or the queue is full."""
        with self._changed:
            if self.draining or self._ended:
                raise Refused(503, "the server is stopping: send the request to another one", "stopping")
            free = self._rows - sum(len(job.texts) for job in self._running.values()) - len(self._waiting)
            if len(call.prompts) > self._rows + self._max_queue:
                limit = self._rows + self._max_queue
                raise Refused(400, f"{len(call.prompts)} prompts are more than {limit}: send fewer in one request")
            if len(call.prompts) - max(free, 0) + len(self._waiting) > self._max_queue:
                raise Refused(429, f"{len(self._waiting)} requests wait already: try again later", "queue_full")
            self._waiting.extend(_Job(call, number, {}, {}) for number in range(len(call.prompts)))
            self._changed.notify()

    def cancel(self, call: Call) -> None:
        """End a call whose client has left, or that has ended."""
        with self._changed:
            call.gone = True  # the thread takes it out of the engine
            self._waiting = deque(job for job in self._waiting if job.call is not call)

    def refuse_all(self, refused: Refused) -> None:
        """End every call."""
        with self._changed:
            calls = {job.call for job in (*self._waiting, *self._running.values(), *self._stepped)}
        for call in calls:
            self.cancel(call)
        _deliver([(call, refused) for call in calls])

    def end(self) -> None:
        """End the thread after its current step."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def run(self) -> None:
        """Step the engine while there is work."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._waiting or self._running)
            if self._ended:
                self.refuse_all(Refused(503, "the server is stopping", "stopping"))
                return
            try:
                self._release()
                self._admit()
                self._stepped = list(self._running.values())
                _deliver([new for piece in self._engine.step() for new in self._take(piece)])
            except Exception as error:  # memory that is used up, say: the next requests get a new engine
                logger.exception("the engine has failed")
                self.refuse_all(Refused(500, f"the engine has failed: {type(error).__name__}", "engine_failed"))
                with self._changed:
                    self._running.clear()
                self._engine = self._make()

    def _release(self) -> None:
        """Take calls that have ended early out of the engine."""
        with self._changed:
            tickets = [ticket for ticket, job in self._running.items() if job.call.gone]
            for ticket in tickets:
                del self._running[ticket]
        for ticket in tickets:
            self._engine.cancel(ticket)

    def _admit(self) -> None:
        """Give the engine waiting prompts while it has free rows."""
        while True:
            with self._changed:
                if not self._waiting or sum(len(job.texts) for job in self._running.values()) >= self._rows:
                    return
                job = self._waiting.popleft()
            config, encoded = job.call.config, job.encoded
            stops = () if config.ignore_eos else encoded.stop_ids
            try:
                streams = {i: TextStream(self._lm, encoded.ids, config.stop) for i in range(config.num_samples)}
                row = job.number * config.num_samples
                ticket = self._engine.add(Request(tuple(encoded.ids), config, stops, row))
            except UserError as error:
                _deliver([(job.call, Refused(400, str(error)))])
                self.cancel(job.call)
                continue
            job.texts = streams
            self._metrics.tokens(prompt=len(encoded.ids))
            with self._changed:
                self._running[ticket] = job

    def _take(self, piece: Piece) -> list[tuple[Call, Delta | Refused]]:
        """Return what a piece brings to its call."""
        job = self._running.get(piece.ticket)
        if job is None or (stream := job.texts.get(piece.sample)) is None:
            return []
        if piece.finish_reason == "error":
            self.cancel(job.call)
            return [(job.call, Refused(500, piece.error or "the text could not be continued"))]
        before = stream.num_tokens
        text = stream.feed(piece.token_ids)
        ended = stream.stopped or piece.finish_reason is not None
        if ended:
            text += stream.flush()
        num_tokens = max(0, stream.num_tokens - before)
        choice = job.number * job.call.config.num_samples + piece.sample
        delta = Delta(choice, text, (piece.logprobs or [])[:num_tokens], num_tokens)
        if ended:
            delta.finish_reason = "stop" if stream.stopped else piece.finish_reason
        self._count(job, piece.sample, num_tokens)
        if ended:
            with self._changed:
                del job.texts[piece.sample]
                if not job.texts:
                    del self._running[piece.ticket]
            if piece.finish_reason is None:  # a stop string, of which the engine does not know
                self._engine.cancel(piece.ticket, piece.sample)
        return [(job.call, delta)]

    def _count(self, job: _Job, sample: int, num_tokens: int) -> None:
        if not num_tokens:
            return
        now, metrics = time.monotonic(), self._metrics
        metrics.tokens(generated=num_tokens)
        if not job.times:
            metrics.observe(lambda m: m.first_token, now - job.call.arrived)
        elif sample in job.times:
            metrics.observe(lambda m: m.between_tokens, (now - job.times[sample]) / num_tokens, num_tokens)
        job.times[sample] = now


def _deliver(found: Sequence[tuple[Call, Delta | Refused]]) -> None:
    """Hand what is new over to the event loops of its calls."""
    for loop in {call.loop for call, _ in found}:
        try:
            loop.call_soon_threadsafe(_hand_over, [entry for entry in found if entry[0].loop is loop])
        except RuntimeError:  # the loop has ended, and its clients with it
            logger.debug("the event loop has ended")


def _hand_over(found: Sequence[tuple[Call, Delta | Refused]]) -> None:
    for call, new in found:
        call.take(new)
