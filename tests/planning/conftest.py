"""Train steps to plan."""

import dataclasses

import pytest
from make_goldens import planned

from llama_jax.models import Compute, DecoderConfig
from llama_jax.run_config import RunConfig
from llama_jax.zoo import presets


@pytest.fixture(scope="session")
def workload(two_layers: DecoderConfig) -> RunConfig:
    """A tiny model, eight rows."""
    return planned(model=two_layers, global_batch_size=8, sequence_length=64)


@pytest.fixture(scope="session")
def llama(workload: RunConfig) -> RunConfig:
    """Llama-2 7B with 4M tokens a batch."""
    return dataclasses.replace(
        workload,
        model=presets()["llama2_7b"],
        compute=Compute(remat="full"),
        global_batch_size=1024,
        sequence_length=4096,
        num_steps=1000,
    )
