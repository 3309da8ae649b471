"""A report served while its runs go on: the page, and newer data when it asks for them."""

import errno
import functools
import hashlib
import http.server
import json
import threading
import time
from collections.abc import Sequence
from typing import Any, override

from llama_jax.config import UserError
from llama_jax.reports.collecting import collect, stamps
from llama_jax.reports.page import Report

HOST = "127.0.0.1"
STORE_SECONDS = 20.0  # between two looks at runs in a store


class Source:
    """The newest report of some paths, made again where their files have changed."""

    def __init__(self, paths: Sequence[str], metric: str | None):
        self.paths, self.metric = paths, metric
        self._lock, self._stamps, self._time = threading.Lock(), None, 0.0
        self._found = ("", Report({}))

    def newest(self) -> tuple[str, Report]:
        """Return (name of this version, report). Raises what `collect` does."""
        with self._lock:
            found, now = stamps(self.paths), time.monotonic()
            old = found is None and now - self._time < STORE_SECONDS
            if not self._found[0] or not (old or (found is not None and found == self._stamps)):
                report = Report(collect(self.paths, self.metric))
                same = {key: value for key, value in report.data.items() if key != "date"}
                self._found = (hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16], report)
                self._stamps, self._time = found, now
            return self._found


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers `/` with the page, and `/data` with its data, or with the sentence of a mistake."""

    def __init__(self, source: Source, *args: Any):
        self.source = source
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer a request."""
        # Another site's page may have this address under its own name: it would read the runs.
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            return self._answer(403, "text/plain", "the page is at http://localhost")
        if self.path not in ("/", "/data"):
            return self._answer(404, "text/plain", "the page is at /")
        try:
            version, report = self.source.newest()
        except (UserError, OSError) as error:  # a run may be removed while it is read
            if self.path == "/":
                return self._answer(503, "text/plain", str(error))
            return self._answer(200, "application/json", json.dumps({"error": str(error)}))
        if self.path == "/":
            return self._answer(200, "text/html", report.html(watched=True), version)
        if self.headers.get("If-None-Match") == f'"{version}"':
            return self._answer(304, "application/json", "", version)
        return self._answer(200, "application/json", json.dumps(report.data), version)

    def _answer(self, status: int, kind: str, text: str, version: str | None = None) -> None:
        body = text.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-cache")
            if version is not None:
                self.send_header("ETag", f'"{version}"')
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the browser has closed the page
            self.close_connection = True

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a page asks every few seconds."""


def server(paths: Sequence[str], metric: str | None = None, port: int = 0) -> http.server.ThreadingHTTPServer:
    """Return a server of the report on this machine alone; port 0 is any that is free.

    Raises UserError for a port that cannot be had, and what `collect` does.
    """
    source = Source(paths, metric)
    source.newest()
    try:
        return http.server.ThreadingHTTPServer((HOST, port), functools.partial(Handler, source))
    except (OSError, OverflowError) as error:
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        why = "is taken" if taken else f"cannot be had ({getattr(error, 'strerror', None) or error})"
        raise UserError(f"port={port} {why}: give another --port, or 0 for any that is free") from None


def watch(paths: Sequence[str], metric: str | None = None, port: int = 0) -> None:
    """Serve the report until Ctrl-C. Raises what `server` does."""
    with server(paths, metric, port) as running:
        print(f"report: http://{HOST}:{running.server_port}/ (Ctrl-C ends it)", flush=True)
        try:
            running.serve_forever()
        except KeyboardInterrupt:
            print("\nended")
