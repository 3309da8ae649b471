"""A run: its config, its directory, and the loop that ties the rooms together.

In: a `RunConfig` and a directory. Out: the same directory with metrics, checkpoints and samples in it. A new thing to
log is a line in `training.py`; a new place to log to is a class in `reporting.py`.
"""

from llama_jax.run.config import LoggingConfig, ProfileConfig, ResumeConfig, RunConfig, load_config
from llama_jax.run.directory import Run, open_run
from llama_jax.run.planning import plan
from llama_jax.run.training import Preempted, RunFailed, train

__all__ = [
    "LoggingConfig",
    "Preempted",
    "ProfileConfig",
    "ResumeConfig",
    "Run",
    "RunConfig",
    "RunFailed",
    "load_config",
    "open_run",
    "plan",
    "train",
]
