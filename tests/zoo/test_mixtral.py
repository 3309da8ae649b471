"""Mixtral's files: config.json both ways, tensors of every expert, what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel, load, load_params, open_source, save
from llama_jax.config import UserError, override
from llama_jax.models import Compute, DecoderConfig, abstract_params, from_params, num_parameters
from llama_jax.nn import SigmoidTopK
from llama_jax.parallel import make_mesh

mixtral = zoo.family("mixtral")
glam = zoo.all_presets()["glam"]

TINY = {
    "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "attention.num_heads": 4, "attention.num_kv_heads": 2,
    "attention.head_dim": 4, "feed_forward.num_experts": 4, "feed_forward.intermediate_size": 12, "max_positions": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> DecoderConfig:
    return override(mixtral.presets["mixtral_8x7b"], TINY)


@pytest.fixture(scope="module")
def exported(tiny: DecoderConfig, random_params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral") / "hf"
    params = random_params(tiny)
    save(LanguageModel(tiny, from_params(tiny, params, Compute()), None), folder, format="hf")
    return folder


def test_config_json_both_ways(tiny: DecoderConfig):
    for config in (mixtral.presets["mixtral_8x7b"], tiny, override(tiny, {"attention.window": 32})):
        assert mixtral.from_hf(mixtral.to_hf(config)) == config


def test_the_released_config_is_the_preset():
    """What stands in the released file and no default of a class says."""
    released = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
        "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert mixtral.from_hf(released) == mixtral.presets["mixtral_8x7b"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"moe_frequency": 2}, "moe_frequency=2, and a Mixtral can only have 1"),
        ({"num_local_experts": 1}, "num_experts=1 must be at least the 2"),
        ({"attention_bias": True}, "attention_bias=True, which is not supported for a Mixtral"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok='two', which should be of type int"),
    ],
)
def test_config_json_that_cannot_be(change: dict, sentence: str, tiny: DecoderConfig):
    with pytest.raises(UserError, match=sentence):
        mixtral.from_hf(mixtral.to_hf(tiny) | change)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"capacity_factor": 1.25}, r"feed_forward\.\w+=.* has no place in a Mixtral"),
        ({"num_shared": 1}, r"feed_forward\.\w+=.* has no place in a Mixtral"),
        ({"router": SigmoidTopK(2, True, 1.0, 1, 1, 0.0)}, "a Mixtral has SoftmaxTopK"),
    ],
)
def test_what_mixtral_cannot_have_is_not_exported(change: dict, sentence: str, tiny: DecoderConfig):
    experts = dataclasses.replace(tiny.feed_forward, **change)  # type: ignore[type-var]
    with pytest.raises(UserError, match=sentence):
        mixtral.to_hf(dataclasses.replace(tiny, feed_forward=experts))


@pytest.mark.slow
def test_export_and_import_are_the_same_weights(tiny: DecoderConfig, exported: Path, random_params):
    """On one device, and split over the experts."""
    expected = random_params(tiny)
    assert json.loads((exported / "config.json").read_text())["num_local_experts"] == 4
    source = open_source(exported)
    assert source.config == tiny
    names = {name for name in source.tensors if ".experts.3." in name}
    assert names == {
        f"model.layers.{layer}.block_sparse_moe.experts.3.w{i}.weight" for layer in range(2) for i in (1, 2, 3)
    }
    with jax.set_mesh(make_mesh({"expert": 4, "fsdp": 2})):
        found = load_params(source, abstract_params(tiny))
        up = found["layers.feed_forward.experts.up_proj.weight"]
        assert up.addressable_shards[0].data.shape == (2, 1, 8, 12)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.slow
def test_split_over_experts_says_the_same(exported: Path):
    tokens = np.random.default_rng(0).integers(0, 40, (8, 12)).astype(np.int32)
    alone = load(exported, dtype="float32").model(tokens)
    spread = load(exported, dtype="float32", mesh={"expert": 2, "data": 2, "tensor": 2}).model(tokens)
    np.testing.assert_allclose(np.asarray(spread), alone, atol=2e-5)


def test_published_numbers_of_parameters():
    """GLaM's paper says 1.2T, of which a token meets 96.6B."""
    assert num_parameters(mixtral.presets["mixtral_8x7b"]) == 46_702_792_704
    config = glam.presets["glam_64b_64e"]
    idle = sum(feed_forward.idle_parameters(8192) for _, feed_forward in config.layer_pieces())
    assert round((num_parameters(config) - idle) / 1e9, 1) == 96.6
    assert round(num_parameters(config) / 1e12, 1) == 1.2
