"""Mamba-2: exact sizes, every spelling of a config.json, no key ignored.

The counts are those of transformers' modules of the same config.json.
"""

import json
from typing import Any

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import cache_bytes, num_parameters

COUNTS = {
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1_3b": 1_343_757_312,
    "mamba2_2_7b": 2_702_599_680,
}
FAMILY = zoo.family("mamba2")
SMALL = {"model_type": "mamba2", "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8}


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(config) for name, config in FAMILY.presets.items()} == COUNTS


def test_presets_survive_hugging_face_s_config():
    for config in FAMILY.presets.values():
        assert FAMILY.from_hf(json.loads(json.dumps(FAMILY.to_hf(config)))) == config


@pytest.mark.parametrize("largest", [float("inf"), {"__float__": "Infinity"}])
def test_no_largest_step_in_all_spellings(largest: Any):
    """As JSON of Python has it, and as transformers 5 writes it."""
    config: Any = FAMILY.from_hf(SMALL | {"time_step_limit": [0.25, largest]})
    assert (config.attention.min_step, config.attention.max_step) == (0.25, None)
    assert config.attention.num_groups == 8, "of a key that is not there"


def test_a_row_s_state_is_of_one_size_at_any_length():
    """Of each layer 24 heads x 64 x 128 float32 numbers, and 3 inputs of 1536 + 2 x 128 bfloat16 numbers."""
    config = FAMILY.presets["mamba2_130m"]
    assert cache_bytes(config, 10) == cache_bytes(config, 100_000) == 24 * (24 * 64 * 128 * 4 + 3 * 1792 * 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"expand": 3}, r"num_heads \* head_dim = 64, which is not expand \* hidden_size"),
        ({"time_step_limit": [0.1]}, r"time_step_limit=\[0.1\]"),
        ({"time_step_limit": ["a", 1]}, r"time_step_limit=\['a', 1\]"),
        ({"n_groups": 3}, "num_groups=3 must divide num_heads=8"),
        ({"mamba_rms_norm": True}, "mamba_rms_norm=True"),
    ],
)
def test_what_it_cannot_be(change: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        FAMILY.from_hf(SMALL | change)
