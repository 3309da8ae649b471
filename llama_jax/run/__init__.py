"""A run: its config, its directory, and the loop that ties the rooms together.

In: a `RunConfig` and a directory. Out: the same directory with metrics, checkpoints and samples in it. A new thing to
log is a line in `training.py`; a new place to log to is a class in `reporting.py`.
"""

from llama_jax.run.directory import Run as Run, open_run as open_run
from llama_jax.run.training import Preempted as Preempted, RunFailed as RunFailed, train as train
from llama_jax.run_config import (
    LoggingConfig as LoggingConfig,
    ProfileConfig as ProfileConfig,
    ResumeConfig as ResumeConfig,
    RunConfig as RunConfig,
    load_config as load_config,
)
