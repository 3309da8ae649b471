"""Files of a web server: read, and fetched again where they have changed."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_jax.config import UserError
from llama_jax.remote import local_copy
from llama_jax.run import Run
from llama_jax.tokenizers import load_tokenizer


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None: ...


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "site"
        server.shutdown()
        thread.join()


def test_files_are_read_and_read_again(site: tuple[str, Path], finished_run: Run):
    url, folder = site
    finished_run.tokenizer.save(folder)
    assert load_tokenizer(f"{url}/tokenizer.model").fingerprint == finished_run.tokenizer.fingerprint
    (folder / "a.txt").write_text("one")
    assert local_copy(f"{url}/a.txt").read_text() == "one"
    (folder / "a.txt").write_text("another")
    assert local_copy(f"{url}/a.txt").read_text() == "another"
    with pytest.raises(UserError, match="does not exist"):
        local_copy(f"{url}/none.txt")
