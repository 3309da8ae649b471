"""A server in this process, on a port that is free."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from llama_jax.checkpoint import LanguageModel
from llama_jax.serving import Service, ServingConfig, application
from llama_jax.serving.running import bound

KEY = "a key of the tests"


@contextlib.contextmanager
def serving(lm: LanguageModel, **options: Any) -> Iterator[tuple[str, Service]]:
    """Yield a running server's URL and its service."""
    known: dict[str, Any] = {"name": "fish", "api_key": KEY}
    service = Service(lm, ServingConfig(**known | options), "ChatML")
    server = uvicorn.Server(
        uvicorn.Config(application(service), log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    )
    with bound("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join()
