"""Configs that a file of `configs/` needs for a run, as this package exports them."""

from llama_jax.run_config import (
    ChecksConfig as ChecksConfig,
    LoggingConfig as LoggingConfig,
    ProfileConfig as ProfileConfig,
    ResumeConfig as ResumeConfig,
    RunConfig as RunConfig,
    load_config as load_config,
)
