"""docs/coming_from.md: its commands and its code run as they are written, its keys exist."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_run import write_texts

import llama_jax
from llama_jax import config
from llama_jax.__main__ import main, make_parser, parse
from llama_jax.config import config_names, leaves

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "coming_from.md").read_text("utf-8")
SESSION, TABLES = PAGE.split("## Tables")
# In place of the page's config: one that trains in seconds.
CONFIG = """
from llama_jax.config import override
from tiny_run import get_config as tiny
def get_config():
    return override(tiny(), {"global_batch_size": 16, "checkpoint.every_steps": 10, "logging.sample_prompts": ()})
"""


def words_of(command: str) -> list[str]:
    """Return the words after `python -m llama_jax`; train.py and sample.py are its commands."""
    words = shlex.split(command.partition("  #")[0])
    assert words[0] == "python"
    return words[3:] if words[1] == "-m" else [words[1].removesuffix(".py"), *words[2:]]


def commands(text: str) -> list[list[str]]:
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    return [words_of(line) for line in blocks.splitlines()]


def test_commands_and_keys_exist():
    keys = {key for name in ("tiny_python", "bert_base") for key, *_ in leaves(llama_jax.load_config(name))}
    flags = {f"--{key.replace('_', '-')}" for key in keys} | set(make_parser("train").flags)
    own = re.findall(r"\| ([^|]*) \|$", TABLES, re.MULTILINE)
    cells = [code for cell in own for code in re.findall(r"`([^`]*)`", cell)]
    assert len(cells) > 100
    for cell in cells:
        if cell.startswith("--"):
            assert set(re.findall(r"(?:^| )(--[\w.-]+)", cell)) <= flags, cell
    lines = [*commands(SESSION), *(words_of(cell) for cell in cells if cell.startswith("python "))]
    assert len(lines) > 30
    for words in lines:
        if words[-1] != "--help" and words[-2] != "--help":
            args = parse(words)
            if args.command == "train" and args.config in config_names():
                llama_jax.load_config(args.config, args.keys)


@pytest.mark.slow
def test_session_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    write_texts(tmp_path / "texts")
    shutil.copytree(ROOT / "tests" / "directories" / "goldens" / "llama2", tmp_path / "Llama-2-7b-chat-hf")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny_shakespeare.py").write_text(CONFIG)
    directories = config.config_directories()
    monkeypatch.setattr(config, "config_directories", lambda: [tmp_path / "configs", *directories])
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for words in commands(SESSION):
        assert main(words) == 0, (words, capsys.readouterr().err)
    (source,) = re.findall(r"```python\n(.*?)```", SESSION, re.DOTALL)
    exec(compile(source, "docs/coming_from.md", "exec"), {"__name__": "coming_from"})
    assert {line["words"] > 0 for line in llama_jax.open_run("runs/rate_0.001").metrics() if "words" in line} == {True}
    assert llama_jax.open_run("runs/first").steps()[-1] == 60
