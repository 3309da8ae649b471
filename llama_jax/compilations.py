"""Compiled programs on disk: a command that is started again loads them."""

import os
import tempfile
import warnings

import jax

from llama_jax.config import UserError
from llama_jax.remote import default_cache

MAX_BYTES = 4 << 30  # those that were not used for longest are removed
MIN_SECONDS = 0.2  # of a compilation that is kept

COMMANDS = ("train", "sample", "evaluate", "serve")


def keep_compilations(command: str) -> None:
    """Make JAX keep what COMMANDS compile in `compiled/` of the cache directory, up to MAX_BYTES.

    Nothing changes where JAX_COMPILATION_CACHE_DIR or the config names another place, nor where nothing can be written:
    the programs are compiled then, as they are where a file is damaged or the disk full.
    """
    if jax.config.jax_compilation_cache_dir is not None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    if command not in COMMANDS:  # what `plan` reads of a program is not all kept
        return
    try:
        directory = default_cache() / "compiled"
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except (OSError, UserError):
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    # One for each program, of many lines.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache entry")
