"""The package as others install it: a wheel, with nothing of the checkout around it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_brings_its_configs(tmp_path: Path):
    pip = ("-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT), cwd=tmp_path)
    (wheel,) = tmp_path.glob("llama_jax-*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    code = """
from llama_jax import config
print(config.__file__)
print(*config.config_names())
config.load_config_module("tiny_python").get_config()
config.load_config_module("mixtures/llama1").get_config()
"""
    file, names = run("-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(file).is_relative_to(site)
    assert "tiny_python" in names.split()
    configs = {f.relative_to(ROOT / "configs").with_suffix("").as_posix() for f in (ROOT / "configs").rglob("*.py")}
    assert set(names.split()) == configs
