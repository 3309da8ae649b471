"""Every leaf of the config that has another value when a run is continued is refused or listed."""

from pathlib import Path

import pytest
from test_witness import base, changed, folder, variants  # noqa: F401 (fixtures)

from llama_jax.config import UserError, leaves, override
from llama_jax.run import Run, RunConfig, continuing
from llama_jax.run.continuing import CHANGEABLE


def test_every_changed_leaf_is_listed_or_refused(
    base: RunConfig,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The leaves are found by the walk; nothing is trained."""
    monkeypatch.setattr(continuing, "_same", lambda *_: False)  # paths that mean the same are allowed
    told: dict[str, str] = {}
    for config in variants(base, folder):
        before = Run(tmp_path, config)
        for key, annotation, value in leaves(config):
            if key in told or key.startswith("resume."):  # this says what is allowed, and is not of the run
                continue
            try:
                new = Run(tmp_path, override(config, {key: changed(config, key, annotation, value, folder)}))
            except UserError:
                continue
            try:
                changes, needed = continuing._changes(before, new)
            except UserError as error:
                told[key] = "refused" if f"{key}=" in str(error) else "silent"
                continue
            lines = continuing._lines(before, new, 0, changes)
            listed = any(line.startswith(f"changed: {key}=") for line in lines) and not needed
            told[key] = "listed" if listed else "silent"
    silent = [key for key, how in told.items() if how == "silent"]
    assert not silent, f"nothing is said of {', '.join(silent)}"
    assert len(told) > 60
    assert {key for key, how in told.items() if how == "listed"} == {k for k in told if k.startswith(CHANGEABLE)}
