"""A run continued with its own config."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.config import override
from llama_jax.run.directory import Run, open_run
from llama_jax.run.training import train
from llama_jax.run_config import ResumeConfig, RunConfig


def resume(
    run_dir: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    components: Sequence[type] = (),
    **options: Any,
) -> Run:
    """Continue the run in `run_dir` with its own config, and `changes` of it by dotted key.

    `options` are other arguments of `train`. A key that changes the rest of the run has to be in `resume.allow`:
    `{"optimizer.learning_rate": 1e-4, "resume.allow": "optimizer.learning_rate"}`. Raises what `train` raises.
    """
    config = config_to_continue(run_dir, changes, components)
    return train(config, run_dir, components=components, **options)


def config_to_continue(
    run_dir: str | Path, changes: Mapping[str, Any] | None = None, components: Sequence[type] = ()
) -> RunConfig:
    """Return the config of the run in `run_dir` with dotted keys changed; what was allowed before is not any more."""
    config = dataclasses.replace(open_run(run_dir, components).config, resume=ResumeConfig())
    return override(config, changes or {}, components)
