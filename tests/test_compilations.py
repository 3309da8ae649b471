"""The commands keep compiled programs on disk, where nobody has said another place."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from llama_jax.__main__ import main
from llama_jax.compilations import MAX_BYTES, keep_compilations

DIRECTORY, SIZE = "jax_compilation_cache_dir", "jax_compilation_cache_max_size"
KEYS = (DIRECTORY, SIZE, "jax_persistent_cache_min_compile_time_secs")
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    before = {key: getattr(jax.config, key) for key in KEYS}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    jax.config.update(DIRECTORY, None)
    yield
    for key, value in before.items():
        jax.config.update(key, value)


@pytest.mark.parametrize(("command", "kept"), [("sample", True), ("train", True), ("plan", False)])
def test_commands_keep_them_in_the_cache_directory(command: str, kept: bool, tmp_path: Path, capsys):
    assert main([command, str(tmp_path / "nothing")]) == 2
    assert jax.config.jax_compilation_cache_dir == (str(tmp_path / "cache" / "compiled") if kept else None)
    assert not kept or jax.config.jax_compilation_cache_max_size == MAX_BYTES


def test_another_place_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # nowhere
    keep_compilations("train")
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    jax.config.update(DIRECTORY, str(tmp_path))
    keep_compilations("train")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("cache", ["file/within", "s3://bucket"])
def test_nothing_is_kept_where_nothing_can_be_written(cache: str, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_JAX_CACHE", cache if "//" in cache else str(tmp_path / cache))
    keep_compilations("train")
    assert jax.config.jax_compilation_cache_dir is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
def test_a_second_start_loads_them(finished_run, tmp_path: Path):
    """It writes none, and prints the same; nothing comes on stderr."""
    outs, files = [], []
    for _ in range(2):
        command = [sys.executable, str(ROOT / "sample.py"), str(finished_run.directory), "--prompt", "the cat"]
        command += ["--max-new-tokens", "4", "--quiet"]
        result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        assert result.stderr == ""
        outs.append(result.stdout)
        files.append(sorted(file.name for file in (tmp_path / "cache" / "compiled").glob("*-cache")))
    assert outs[0] == outs[1]
    assert files[0] == files[1] != []
