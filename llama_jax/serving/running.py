"""The process of a server: its port, its signals, its end."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import override

import uvicorn

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.data import ChatTemplate
from llama_jax.sampling import encoded_chat
from llama_jax.serving.app import Service, ServingConfig, application
from llama_jax.serving.requests import Refused

GRACE_SECONDS = 25.0  # for running requests after SIGTERM: less than Kubernetes' 30
FLUSH_SECONDS = 5  # for the last bytes of answers


class _Server(uvicorn.Server):
    """A server whose signals are `serve`'s: uvicorn's own end by raising the signal again."""

    @override
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(
    lm: LanguageModel,
    config: ServingConfig,
    template: ChatTemplate | str | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    say: Callable[[str], object] = print,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C: requests that run then are finished, a second signal ends at once.

    `template` is that of chats; None for the model's own. Port 0 is any that is free. `say` is called with lines about
    the start and the end. Raises UserError for a port that cannot be had and for a model that writes no text.
    """
    service = Service(lm, config, template)
    if template is not None:
        encoded_chat(lm, [{"role": "user", "content": "a"}], template)  # one that the tokenizer lacks tokens for
    with bound(host, port) as listening:
        service.worker.warm_up()
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listening.getsockname()[1]}"
        say(f"serving {config.name} at {url}/v1, a page at {url}/ (Ctrl-C ends it)")
        asyncio.run(_run(service, listening, say))


async def _run(service: Service, listening: socket.socket, say: Callable[[str], object]) -> None:
    server = _Server(
        uvicorn.Config(
            application(service),
            log_level="warning",
            access_log=False,
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=FLUSH_SECONDS,
        )
    )
    worker, loop, tasks = service.worker, asyncio.get_running_loop(), set[asyncio.Task[None]]()

    def stop(number: int) -> None:
        if worker.draining:
            os._exit(128 + number)
        worker.draining = True
        say(f"stopping: {worker.num_running + worker.num_waiting} texts are finished first (Ctrl-C again ends at once)")
        tasks.add(loop.create_task(drain()))

    async def drain() -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_SECONDS):
                while worker.busy:
                    await asyncio.sleep(0.05)
        worker.refuse_all(Refused(503, "the server is stopping", "stopping"))
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await server.serve(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises UserError where it cannot be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        if isinstance(error, socket.gaierror):
            raise UserError(f"host={host} is not a name or address of this machine: give another --host") from None
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is taken" if taken else f"cannot be had ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"port={port} of {host} {why}: give another --port, or 0 for any that is free") from None
