"""Train steps to plan."""

import dataclasses

import pytest

from llama_jax.models import Compute, DecoderConfig
from llama_jax.parallel import MeshConfig
from llama_jax.planning import Workload
from llama_jax.training import AdamW
from llama_jax.zoo import presets


@pytest.fixture(scope="session")
def workload(tiny_config: DecoderConfig) -> Workload:
    """A tiny model, eight rows."""
    optimizer = AdamW(learning_rate=1e-3, warmup_steps=1)
    return Workload(tiny_config, Compute(), optimizer, MeshConfig(), global_batch_size=8, sequence_length=64)


@pytest.fixture(scope="session")
def llama(workload: Workload) -> Workload:
    """Llama-2 7B with 4M tokens a batch."""
    return dataclasses.replace(
        workload,
        model=presets()["llama2_7b"],
        compute=Compute(remat="full"),
        global_batch_size=1024,
        sequence_length=4096,
        num_steps=1000,
    )
