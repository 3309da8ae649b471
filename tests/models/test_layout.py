"""Parameters by name: where first values come from, and the way from names to modules and back."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.models import (
    Compute,
    DecoderConfig,
    LayerOverride,
    abstract_params,
    assemble,
    flatten,
    initialize,
    layers_with,
    num_parameters,
    per_layer,
)
from llama_jax.models.config import repeating_pattern
from llama_jax.nn import GroupedQuery, SwiGLU
from llama_jax.parallel import make_mesh


@pytest.fixture(scope="module")
def mixed_config(two_layers: DecoderConfig) -> DecoderConfig:
    """Four layers: biases in the attention of 1 and 2, and in the feed-forward of 2."""
    biased = dataclasses.replace(two_layers.attention, qkv_bias=True)
    return dataclasses.replace(
        two_layers,
        num_layers=4,
        overrides=(
            LayerOverride((1, 2), biased),
            LayerOverride((2,), SwiGLU(intermediate_size=24, bias=True)),
        ),
    )


@pytest.fixture(scope="module")
def first_values(two_layers: DecoderConfig) -> dict[str, np.ndarray]:
    return jax.device_get(initialize(two_layers, 0))


def test_names_and_shapes_are_the_canonical_ones(two_layers):
    biased = dataclasses.replace(
        two_layers,
        attention=dataclasses.replace(two_layers.attention, qkv_bias=True, out_bias=True),
        feed_forward=SwiGLU(intermediate_size=24, bias=True),
    )
    length, d, n, k, h, f, v = 2, 16, 4, 2, 8, 24, 40
    expected = {
        "embedding.weight": (v, d),
        "layers.input_layernorm.weight": (length, d),
        "layers.post_attention_layernorm.weight": (length, d),
        "layers.attention.q_proj.weight": (length, d, n, h),
        "layers.attention.k_proj.weight": (length, d, k, h),
        "layers.attention.v_proj.weight": (length, d, k, h),
        "layers.attention.o_proj.weight": (length, n, h, d),
        "layers.attention.q_proj.bias": (length, n, h),
        "layers.attention.k_proj.bias": (length, k, h),
        "layers.attention.v_proj.bias": (length, k, h),
        "layers.attention.o_proj.bias": (length, d),
        "layers.feed_forward.gate_proj.weight": (length, d, f),
        "layers.feed_forward.up_proj.weight": (length, d, f),
        "layers.feed_forward.down_proj.weight": (length, f, d),
        "layers.feed_forward.gate_proj.bias": (length, f),
        "layers.feed_forward.up_proj.bias": (length, f),
        "layers.feed_forward.down_proj.bias": (length, d),
        "norm.weight": (d,),
        "lm_head.weight": (d, v),
    }
    assert {name: a.shape for name, a in abstract_params(biased).items()} == expected
    assert num_parameters(biased) == sum(int(np.prod(shape)) for shape in expected.values())
    tied = dataclasses.replace(biased, tie_embeddings=True)
    assert abstract_params(tied).keys() == expected.keys() - {"lm_head.weight"}
    assert num_parameters(biased) - num_parameters(tied) == v * d


def test_first_values_are_the_same_on_every_mesh(two_layers, first_values):
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2, "data": 2})):
        found = initialize(two_layers, 0)
        specs = {name: a.sharding.spec for name, a in abstract_params(two_layers).items()}
    assert {name: a.sharding.spec for name, a in found.items()} == specs
    for name, value in first_values.items():
        np.testing.assert_array_equal(np.asarray(found[name]), value, err_msg=name)


@pytest.mark.slow
def test_first_values_know_neither_depth_nor_neighbours(two_layers, first_values):
    changed = dataclasses.replace(
        two_layers,
        num_layers=3,
        attention=dataclasses.replace(two_layers.attention, qkv_bias=True),
        feed_forward=SwiGLU(intermediate_size=24, bias=True),
        tie_embeddings=True,
        # The same pieces, but built apart from the other layers.
        overrides=(LayerOverride((1,), two_layers.attention),),
    )
    found = initialize(changed, 0)
    assert found.keys() >= first_values.keys() - {"lm_head.weight"}
    for name in found.keys() & first_values.keys():
        same = found[name][:2] if name.startswith("layers.") else found[name]
        np.testing.assert_array_equal(same, first_values[name], err_msg=name)


def test_first_values_are_all_different_and_of_the_right_size(two_layers, first_values):
    other_seed = initialize(two_layers, 1)
    rows = {}
    for name, value in first_values.items():
        if "norm" in name:
            np.testing.assert_array_equal(value, 1)
            continue
        fan_in = {"o_proj": 4 * 8, "down_proj": 24}.get(name.split(".")[-2], 16)
        std = 0.02 if name.startswith(("embedding", "lm_head")) else fan_in**-0.5
        assert abs(value.std() / std - 1) < 0.15, name
        for i, layer in enumerate(value if name.startswith("layers.") else value[None]):
            rows[name, i] = layer.ravel()[:64] / std
        rows[name, "other seed"] = np.asarray(other_seed[name]).ravel()[:64] / std
    for a, b in itertools.combinations(rows, 2):
        assert abs(np.corrcoef(rows[a], rows[b])[0, 1]) < 0.6, f"{a} and {b} are drawn from one key"


def test_flatten_is_the_inverse_of_assemble(mixed_config, random_params):
    params = random_params(mixed_config)
    found = flatten(assemble(mixed_config, params, Compute(), scan=False))
    assert found.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_stacked_parameter_has_the_layers_that_own_it(mixed_config, random_params):
    owners = layers_with(mixed_config)
    assert owners["layers.attention.q_proj.weight"] == (0, 1, 2, 3)
    assert owners["layers.attention.q_proj.bias"] == (1, 2)
    assert owners["layers.feed_forward.down_proj.bias"] == (2,)
    params = random_params(mixed_config)
    assert {name: params[name].shape[0] for name in owners} == {name: len(layers) for name, layers in owners.items()}
    layers = per_layer(mixed_config, params)
    np.testing.assert_array_equal(layers[2]["attention.q_proj.bias"], params["layers.attention.q_proj.bias"][1])
    assert "attention.q_proj.bias" not in layers[3]


def test_pieces_of_other_shapes_need_other_names(two_layers):
    one_head = GroupedQuery(1, 1, 8, None, qkv_bias=False, out_bias=False)
    config = dataclasses.replace(two_layers, overrides=(LayerOverride((1,), one_head),))
    with pytest.raises(
        ValueError, match=r"'layers.attention.k_proj.weight' has shape \(16, 1, 8\) in layer 1 and \(16, 2, 8\)"
    ):
        layers_with(config)


def reading(pieces: tuple[int, ...], prefix: int, period: int) -> tuple[int, ...] | None:
    """The pieces that (prefix, period) stands for, or None when the period does not fit."""
    rest = len(pieces) - prefix
    if (rest and not period) or (period and rest % period):
        return None
    return pieces[:prefix] + (pieces[prefix : prefix + period] * (rest // period) if period else ())


@given(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple))
def test_repeating_pattern_is_exact_and_the_shortest(pieces: tuple[int, ...]):
    prefix, period = repeating_pattern(pieces)
    assert reading(pieces, prefix, period) == pieces
    total = len(pieces)
    right = [p + q for p in range(total + 1) for q in range((total - p) // 2 + 1) if reading(pieces, p, q) == pieces]
    assert prefix + period == min(right), "fewer blocks to compile would do"


@given(st.integers(0, 3), st.integers(1, 3), st.integers(2, 4))
def test_repeating_pattern_finds_a_prefix_and_a_period(prefix: int, period: int, repeats: int):
    pieces = tuple(f"first {i}" for i in range(prefix)) + tuple(f"then {i}" for i in range(period)) * repeats
    assert repeating_pattern(pieces) == (prefix, period)


def test_abstract_params_allocate_nothing_and_know_their_place(two_layers):
    huge = dataclasses.replace(two_layers, hidden_size=1 << 17, vocab_size=1 << 20)
    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        abstract = abstract_params(huge, jnp.bfloat16)
        embedding = abstract["embedding.weight"]
        assert embedding.dtype == jnp.bfloat16
        assert embedding.sharding.shard_shape(embedding.shape) == (1 << 19, 1 << 15)
