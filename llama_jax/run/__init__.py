"""A run: its directory, and the loop that connects the other packages.

In: a `RunConfig` and a directory. Out: the same directory with metrics, checkpoints and samples in it. A new metric is
a line in `training.py`; a new destination of metrics is a `Logger`.
"""

from llama_jax.run.callbacks import Event as Event
from llama_jax.run.directory import Run as Run, open_run as open_run
from llama_jax.run.reporting import Logger as Logger
from llama_jax.run.resuming import config_to_continue as config_to_continue, resume as resume
from llama_jax.run.training import Preempted as Preempted, RunFailed as RunFailed, train as train
from llama_jax.run_config import (
    LoggingConfig as LoggingConfig,
    ProfileConfig as ProfileConfig,
    ResumeConfig as ResumeConfig,
    RunConfig as RunConfig,
    load_config as load_config,
)
