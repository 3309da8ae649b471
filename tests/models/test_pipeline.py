"""Stages of a pipeline compute what one device computes, each with its own layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sharding import BATCH, COMPUTE, LENGTH, assert_same, batch_of, loss_and_gradient, on_mesh

from llama_jax.config import UserError, override
from llama_jax.models import Compute, DecoderConfig, LayerOverride, abstract_params, check_pipeline, num_microbatches
from llama_jax.models.pipeline import pipelined
from llama_jax.nn import ForwardContext, Mask
from llama_jax.parallel import MESH_AXES, axes_of, make_mesh, shard, split_layers
from llama_jax.training import AdamW, init_state, make_train_step

NUM_LAYERS = 4
ROWS = 2 * BATCH
PLAIN = Compute(attention_kernel="reference", scan_layers=False, loss_chunk=LENGTH)

# Mesh, and options of the computation.
CASES = {
    "2 stages, fsdp and tensor": ({"pipeline": 2, "fsdp": 2, "tensor": 2}, {"remat": "full"}),
    "4 stages and fsdp": ({"pipeline": 4, "fsdp": 2}, {"pipeline_microbatches": 8}),
    "2 stages and data, repeated": ({"pipeline": 2, "data": 2}, {"pipeline_repeats": 2, "pipeline_microbatches": 4}),
    "4 stages and context": ({"pipeline": 4, "context": 2}, {"remat": "dots"}),
}


@pytest.fixture(scope="module")
def config(tiny_config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(tiny_config, num_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def expected(config, random_params):
    return loss_and_gradient(config, PLAIN, random_params(config), batch_of(config.vocab_size, ROWS))


def on_stages(mesh: dict[str, int]) -> jax.sharding.Mesh:
    return make_mesh(mesh, jax.devices()[: int(np.prod(list(mesh.values())))])


@pytest.mark.parametrize(
    ("stages", "repeats", "count"),
    [
        *((4, 1, 8), (2, 2, 2)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((2, 1, 2), (4, 2, 12), (8, 1, 16), (2, 3, 6), (4, 4, 8), (4, 3, 4), (8, 2, 8))
        ),
    ],
)
def test_every_row_goes_through_all_layers_in_their_order(stages: int, repeats: int, count: int):
    """Layers that do not commute, and that see their row's own positions; all numbers are whole."""
    rows, layers = 2 * count, 2 * stages * repeats
    rng = np.random.default_rng(0)
    signs, x = rng.choice([-1.0, 1.0], layers), rng.integers(-9, 9, (rows, 3, 2)).astype(np.float32)
    positions = rng.integers(99, size=(rows, 3)).astype(np.int32)
    segments = rng.integers(9, size=(rows, 3)).astype(np.int32)

    def layer(x, sign, number, positions, segments):
        return sign * x + number * positions[..., None] + segments[..., None]

    def apply(state, x, positions, ctx):
        one = lambda x, own: (layer(x, *own, positions, ctx.mask.segment_ids), None)  # noqa: E731
        return jax.lax.scan(one, x, state)[0]

    wanted = x
    for number in range(layers):
        wanted = layer(wanted, signs[number], number, positions, segments)
    compute = Compute(pipeline_repeats=repeats, pipeline_microbatches=count)
    with jax.set_mesh(on_stages({"pipeline": stages})):
        state = split_layers(jnp.asarray(signs, jnp.float32)), split_layers(jnp.arange(layers, dtype=jnp.float32))
        assert axes_of(state[0]) == (("pipeline",),)
        placed = [shard(jnp.asarray(value), "batch", "sequence") for value in (x, positions, segments)]

        @jax.jit
        def run(state, x, positions, segments):
            return pipelined(apply, state, x, positions, ForwardContext(Mask(segment_ids=segments)), compute)

        found = run(state, *placed)
        assert axes_of(found)[0] == ("pipeline",)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_one_device(case: str, config, random_params, expected):
    mesh, options = CASES[case]
    params = random_params(config)
    with jax.set_mesh(on_stages(mesh)):
        compute = dataclasses.replace(COMPUTE, **options)
        loss, gradient, placed = on_mesh(config, compute, params, batch_of(config.vocab_size, ROWS))
        assert {k: v.sharding.spec for k, v in gradient.items()} == {k: v.sharding.spec for k, v in placed.items()}
        assert all(axes_of(v)[0] == ("pipeline",) for k, v in placed.items() if k.startswith("layers."))
    assert_same((loss, gradient), expected)


@pytest.mark.slow
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_pattern_of_layers_and_a_trained_bias(repeats: int, config, random_params):
    window = dataclasses.replace(config.attention, window=8)
    pattern = dataclasses.replace(config, overrides=(LayerOverride((0, 2), window),))
    if repeats == 2:
        pattern = dataclasses.replace(pattern, num_layers=8, overrides=(LayerOverride((0, 2, 4, 6), window),))
    pattern = override(pattern, {"position_bias": "RelativeBias"})
    params, batch = random_params(pattern), batch_of(pattern.vocab_size, ROWS)
    wanted = loss_and_gradient(pattern, PLAIN, params, batch)
    with jax.set_mesh(on_stages({"pipeline": 2, "fsdp": 2})):
        compute = Compute(attention_kernel="reference", pipeline_repeats=repeats)
        assert_same(on_mesh(pattern, compute, params, batch)[:2], wanted)


@pytest.mark.slow
def test_accumulated_steps_are_those_of_one_device(config, random_params):
    hyper = AdamW(learning_rate=1e-2, warmup_steps=0).hyper(10)
    step = lambda compute, parts: make_train_step(config, compute, accumulation_steps=parts)  # noqa: E731
    params, batch = random_params(config), batch_of(config.vocab_size, ROWS)
    copy = {name: jnp.array(value) for name, value in params.items()}
    state, metrics = step(PLAIN, 1)(init_state(copy, hyper), batch, hyper)
    with jax.set_mesh(on_stages({"pipeline": 2, "data": 2})):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
        split = {name: shard(jnp.asarray(value), "batch", "sequence") for name, value in batch.items()}
        found, own = step(COMPUTE, 2)(jax.jit(init_state)(placed, hyper), split, hyper)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(own[name], metrics[name], rtol=3e-6)
    for name, moment in optimizer_means(state).items():
        largest = float(jnp.abs(moment).max())
        np.testing.assert_allclose(np.asarray(optimizer_means(found)[name]), moment, atol=1e-5 * largest, rtol=0)


def optimizer_means(state) -> dict[str, jax.Array]:
    """Adam's first moments: a tenth of the clipped gradient."""
    means = [x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")]
    return means[0].mu


def test_microbatches_divide_the_rows_of_a_device():
    assert [num_microbatches(Compute(), 4, rows) for rows in (1, 2, 3, 6, 8, 5)] == [4, 8, 12, 12, 16, 4]
    assert num_microbatches(Compute(pipeline_microbatches=32), 4, 8) == 32


@pytest.mark.parametrize(
    ("changes", "options", "mesh", "sentence"),
    [
        ({"num_layers": 6}, {}, {"pipeline": 4}, "4 times or a multiple of that, and the model has 6 of 6 layers"),
        ({}, {"pipeline_repeats": 4}, {"pipeline": 2}, "pipeline_repeats=4 needs equal layers"),
        ({"dropout": 0.1}, {}, {"pipeline": 2}, "does not go with dropout"),
        ({"feed_forward": "Experts", "feed_forward.num_experts": 4}, {}, {"pipeline": 2}, "does not go with experts"),
        ({}, {"scan_layers": False}, {"pipeline": 2}, "needs compute.scan_layers=true"),
        ({}, {"pipeline_microbatches": 6}, {"pipeline": 4}, "pipeline_microbatches=6 must be mesh.pipeline=4 times"),
        ({}, {"pipeline_microbatches": 12}, {"pipeline": 4}, "a divisor of 4, the rows of a device"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(changes, options, mesh, sentence, config):
    sizes = dict.fromkeys(MESH_AXES, 1) | mesh
    check_pipeline(config, Compute(), sizes, ROWS)
    with pytest.raises(UserError, match=sentence):
        check_pipeline(override(config, changes), dataclasses.replace(Compute(), **options), sizes, ROWS)
