"""The site of guides and API reference is built without a warning, and links from page to page work on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_site_is_built(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "site" / "api" / "llama_jax.nn" / "index.html").read_text("utf-8")
    assert all(f'id="llama_jax.nn.{name}"' in api for name in ("GroupedQuery", "RMSNorm", "attend"))
    architecture = (tmp_path / "site" / "docs" / "architecture" / "index.html").read_text("utf-8")
    assert 'href="../launch/"' in architecture
