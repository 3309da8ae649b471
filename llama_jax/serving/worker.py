"""`Worker` runs the engine for the calls that the server's event loop waits for."""

import asyncio
import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.evaluation import Scorer
from llama_jax.sampling import Encoded, Engine, Piece, Request, SamplingConfig, TextStream, TokenLogprobs
from llama_jax.serving.metrics import Metrics
from llama_jax.serving.requests import Asked, Refused

logger = logging.getLogger("llama_jax.serving")


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
    """One HTTP request and the choices that are written for its prompts.

    What a slow client has not read yet is one `Delta` a choice, so that it takes no more memory than the texts.
    """

    def __init__(self, asked: Asked, arrived: float):
        self.asked, self.arrived = asked, arrived
        self.num_choices = len(asked.prompts) * asked.config.num_samples
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

    def take(self, new: Delta | Refused) -> None:
        """Add what the worker has found."""
        if isinstance(new, Refused):
            self._refused = new
        elif (waiting := self._new.get(new.choice)) is not None:
            waiting.add(new)
        else:
            self._new[new.choice] = new
        self._ready.set()


@dataclasses.dataclass(eq=False)
class _Job:
    """One prompt of a call.

    open: samples that have not ended; `times` is when each had its last tokens.
    ticket, streams: of the engine and its texts, which belong to its thread.
    """

    call: Call
    number: int
    open: int
    times: dict[int, float] = dataclasses.field(default_factory=dict)
    ticket: int | None = None
    streams: dict[int, TextStream] = dataclasses.field(default_factory=dict)

    @property
    def encoded(self) -> Encoded:
        return self.call.asked.prompts[self.number]


type _Found = tuple[_Job, Delta | Refused]


class Worker:
    """Run all calls through one engine, in the order of their arrival.

    At most `rows` samples are in the engine (of one prompt perhaps more); at most `max_queue` more prompts wait. The
    queue belongs to the event loop, the engine to a thread: `_turn` alone runs there, and all that it is given and
    returns is handed over whole.
    """

    def __init__(self, lm: LanguageModel, engine: Callable[[], Engine], *, rows: int, max_queue: int, metrics: Metrics):
        self._lm, self._make, self._engine, self._metrics = lm, engine, engine(), metrics
        self._rows, self._max_queue = rows, max_queue
        self._waiting, self._running, self._gone = deque[_Job](), dict[_Job, None](), list[_Job]()
        self._jobs = dict[int, _Job]()  # by the engine's ticket, of its thread
        self._changed = asyncio.Event()
        self.draining = self.ended = False

    @property
    def num_waiting(self) -> int:
        """The number of prompts in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """The number of samples in the engine."""
        return sum(job.open for job in self._running)

    @property
    def busy(self) -> bool:
        """True while a request waits or runs."""
        return bool(self._waiting or self._running)

    def warm_up(self) -> None:
        """Compile what a first request needs, before the worker runs. Raises UserError where it fails."""
        self._engine.add(Request((0,), SamplingConfig(max_new_tokens=1, temperature=1.0)))
        for _ in self._engine.run():
            pass

    def submit(self, call: Call) -> None:
        """Queue a call. Raises Refused when the server stops or the queue is full."""
        num_prompts, config = len(call.asked.prompts), call.asked.config
        if self.draining or self.ended:
            raise Refused(503, "the server is stopping: send the request to another one", "stopping")
        if num_prompts > (limit := self._rows + self._max_queue):
            raise Refused(400, f"{num_prompts} prompts are more than {limit}: send fewer in one request")
        free = max(0, self._rows - self.num_running - self.num_waiting)
        if num_prompts - free + self.num_waiting > self._max_queue:
            raise Refused(429, f"{self.num_waiting} requests wait already: try again later", "queue_full")
        self._waiting.extend(_Job(call, number, config.num_samples) for number in range(num_prompts))
        self._changed.set()

    def cancel(self, call: Call) -> None:
        """End a call whose client has left, or that has ended."""
        self._waiting = deque(job for job in self._waiting if job.call is not call)
        for job in [job for job in self._running if job.call is call]:
            del self._running[job]
            self._gone.append(job)
        self._changed.set()

    def refuse_all(self, refused: Refused) -> None:
        """End every call."""
        for call in {job.call for job in (*self._waiting, *self._running)}:
            self.cancel(call)
            call.take(refused)

    async def run(self) -> None:
        """Step the engine while there is work, until this is cancelled."""
        thread, loop = ThreadPoolExecutor(1, "engine"), asyncio.get_running_loop()
        try:
            while True:
                await self._changed.wait()
                new, gone, self._gone = self._admitted(), self._gone, []
                try:
                    for job, found in await loop.run_in_executor(thread, self._turn, new, gone):
                        self._deliver(job, found)
                except Exception as error:  # memory that is used up, say: the next requests get a new engine
                    logger.exception("the engine has failed")
                    self.refuse_all(Refused(500, f"the engine has failed: {type(error).__name__}", "engine_failed"))
                    self._jobs, self._gone, self._engine = {}, [], self._make()
                if not (self.busy or self._gone):
                    self._changed.clear()
        finally:
            self.ended = True
            self.refuse_all(Refused(503, "the server is stopping", "stopping"))
            thread.shutdown()

    def _admitted(self) -> list[_Job]:
        """Take waiting prompts out of the queue while there are free rows."""
        found = list[_Job]()
        while self._waiting and self.num_running < self._rows:
            found.append(self._waiting.popleft())
            self._running[found[-1]] = None
            self._metrics.count_tokens(prompt=len(found[-1].encoded.ids))
        return found

    def _deliver(self, job: _Job, new: Delta | Refused) -> None:
        if job not in self._running:  # its client has left during the turn
            return
        job.call.take(new)
        if isinstance(new, Refused):
            self.cancel(job.call)
            return
        job.open -= new.finish_reason is not None
        if not job.open:
            del self._running[job]
        if new.num_tokens:
            now, metrics = time.monotonic(), self._metrics
            metrics.count_tokens(generated=new.num_tokens)
            if not job.times:
                metrics.first_token.observe(now - job.call.arrived)
            elif new.choice in job.times:
                metrics.between_tokens.observe((now - job.times[new.choice]) / new.num_tokens, new.num_tokens)
            job.times[new.choice] = now

    def _turn(self, new: Sequence[_Job], gone: Sequence[_Job]) -> list[_Found]:
        """Take jobs out of the engine and put others in, make new tokens, and return what there is of each job."""
        for job in gone:
            if job.ticket is not None and self._jobs.pop(job.ticket, None) is not None:
                self._engine.cancel(job.ticket)
        return [*self._begin(new), *(self._delta(piece) for piece in self._engine.step())]

    def _begin(self, jobs: Sequence[_Job]) -> Iterator[_Found]:
        """Give jobs to the engine, and yield their prompts where they are to be repeated."""
        logprobs = dict[_Job, list[TokenLogprobs]]()
        if scored := [job for job in jobs if job.call.asked.echo and job.call.asked.config.logprobs is not None]:
            try:
                logprobs = dict(zip(scored, self._logprobs(scored), strict=True))
            except UserError as error:
                yield from ((job, Refused(500, str(error))) for job in scored)
                jobs = [job for job in jobs if job not in scored]
        for job in jobs:
            asked, ids = job.call.asked, tuple(job.encoded.ids)
            config, first = asked.config, job.number * asked.config.num_samples
            if asked.echo:
                ends = None if asked.writes else "length"
                for i in range(first, first + config.num_samples):
                    yield job, Delta(i, asked.echo[job.number], [*logprobs.get(job, [])], finish_reason=ends)
            if not asked.writes:
                continue
            try:
                job.streams = {i: TextStream(self._lm, ids, config.stop) for i in range(config.num_samples)}
                stops = () if config.ignore_eos else job.encoded.stop_ids
                job.ticket = self._engine.add(Request(ids, config, stops, first))
                self._jobs[job.ticket] = job
            except UserError as error:
                yield job, Refused(400, str(error))

    def _logprobs(self, jobs: Sequence[_Job]) -> list[list[TokenLogprobs]]:
        """Return the log-probabilities of the prompts' tokens; those of a first one are not numbers."""
        tops = [job.call.asked.config.logprobs or 0 for job in jobs]
        prompts = [job.encoded.ids for job in jobs]
        rows = [(ids[:-1], ids[-1:]) for ids in prompts if len(ids) > 1]
        scores = iter(Scorer(self._lm, top=max(1, *tops)).score(rows))
        found = list[list[TokenLogprobs]]()
        for ids, top in zip(prompts, tops, strict=True):
            found.append([TokenLogprobs(ids[0], math.nan, [])])
            if len(ids) > 1:
                own, _, best, values = (x.tolist() for x in next(scores))
                pairs = [[*zip(*pair, strict=True)][:top] for pair in zip(best, values, strict=True)]
                found[-1] += map(TokenLogprobs, ids[1:], (x for (x,) in own), pairs)
        return found

    def _delta(self, piece: Piece) -> _Found:
        """Return what a piece brings to its job."""
        job = self._jobs[piece.ticket]
        if piece.finish_reason == "error":
            return job, Refused(500, piece.error or "the text could not be continued")
        stream, ended = job.streams[piece.sample], piece.finish_reason
        before, text = stream.num_tokens, stream.feed(piece.token_ids)
        if stream.stopped and ended is None:  # by a stop string, of which the engine does not know
            self._engine.cancel(piece.ticket, piece.sample)
        if stream.stopped or ended:
            text, ended = text + stream.flush(), "stop" if stream.stopped else ended
            del job.streams[piece.sample]
            if not job.streams:
                del self._jobs[piece.ticket]
        num_tokens = max(0, stream.num_tokens - before)
        choice = job.number * job.call.asked.config.num_samples + piece.sample
        return job, Delta(choice, text, (piece.logprobs or [])[:num_tokens], num_tokens, ended)
