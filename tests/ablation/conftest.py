"""A sweep's base: the run that takes seconds, shorter, on a corpus that is tokenized once."""

from pathlib import Path

import pytest
import tiny_run

from llama_jax.config import override
from llama_jax.run import RunConfig


@pytest.fixture(scope="session")
def sweep_base(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder: Path = tmp_path_factory.mktemp("sweep")
    changes = {
        "data.path": str(tiny_run.write_texts(folder / "texts")),
        "data.cache_dir": str(folder / "cache"),
        "num_steps": 4,
        "optimizer.warmup_steps": 1,
        "checkpoint.every_steps": 2,
        "logging.sample_prompts": (),
        "compute.preflight": False,
    }
    return override(tiny_run.get_config(), changes)
