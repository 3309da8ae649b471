"""The recipe of DeepSeek-V2-Lite is that of its paper."""

import pytest

import llama_jax
from llama_jax.config import load_config_module


def test_the_config_of_v2_lite_is_the_recipe_of_its_paper():
    config = load_config_module("deepseek_v2_lite").get_config()
    assert llama_jax.num_parameters(config.model) == 15_706_484_224
    tokens = config.num_steps * config.global_batch_size * config.sequence_length
    assert tokens == pytest.approx(5.7e12, rel=1e-5)
    doc = load_config_module("deepseek_v2_lite").__doc__ or ""
    flops = llama_jax.training.train_flops_per_token(config.model, config.sequence_length) * tokens
    assert f"{config.num_steps:,} steps, {flops:.2e}".replace("e+", "e") in doc.replace("\n", " ")
