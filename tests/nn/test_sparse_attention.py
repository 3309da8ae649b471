"""Sparse attention: what the indexer chooses against the formula, training form against decoding form, its loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from flax import nnx
from mixing import (
    BATCH,
    LENGTH,
    assert_decodes_on_a_mesh,
    assert_sharded_is_unsharded,
    decode,
    documents,
    inputs,
    module_of,
    run,
    values_of,
    with_gradients,
)

from llama_jax.config import UserError
from llama_jax.nn import ForwardContext, LatentAttention, Rope, SparseLatentAttention
from llama_jax.nn.attention import attend as kernels, blockwise

TOPK = 5
CONFIG = SparseLatentAttention(
    num_heads=8,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope=Rope(theta=100.0, scaling=None),
    eps=1e-6,
    num_index_heads=8,
    index_head_dim=7,
    index_topk=TOPK,
)
EVERYTHING = dataclasses.replace(CONFIG, index_topk=LENGTH)
LEARNING = dataclasses.replace(CONFIG, index_loss_weight=0.3)
WARMUP = dataclasses.replace(LEARNING, index_warmup=True)
DENSE = LatentAttention(**{f.name: getattr(CONFIG, f.name) for f in dataclasses.fields(LatentAttention)})


def dense_values() -> dict[str, np.ndarray]:
    return {name: value for name, value in values_of(CONFIG).items() if "indexer" not in name}


def scores_in_numpy(values: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Equation 1 of the DeepSeek-V3.2 report, [T, T]; the first dimensions of a head are rotated, in halves."""
    w = {name: value.astype(np.float64) for name, value in values.items()}
    latent = x @ w["q_a_proj.weight"]
    latent = latent / np.sqrt((latent**2).mean(-1, keepdims=True) + 1e-6) * w["q_a_layernorm.weight"]
    q = np.einsum("tc,cih->tih", latent, w["indexer.q_proj.weight"])
    k = x @ w["indexer.k_proj.weight"]
    k = (k - k.mean(-1, keepdims=True)) / np.sqrt(k.var(-1, keepdims=True) + 1e-6)
    k = k * w["indexer.k_norm.weight"] + w["indexer.k_norm.bias"]
    weights = x @ w["indexer.weights_proj.weight"] * 8**-0.5 * 7**-0.5

    def rotate(v: np.ndarray, place: int) -> np.ndarray:
        turned = (v[..., :2] + 1j * v[..., 2:4]) * np.exp(1j * place * np.array([1.0, 0.1]))
        return np.concatenate([turned.real, turned.imag, v[..., 4:]], axis=-1)

    length = len(x)
    q, k = (np.stack([rotate(v[t], t) for t in range(length)]) for v in (q, k))
    return np.einsum("tis,ti->ts", np.maximum(np.einsum("tih,sh->tis", q, k), 0), weights)


def weights_in_numpy(values: dict[str, np.ndarray], x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Attention weights [T, N, T] of the dense module's own queries and keys over what is chosen [T, T]."""
    module = module_of(DENSE, {k: v for k, v in values.items() if "indexer" not in k})
    places = jnp.arange(len(x))[None]
    x = jnp.asarray(x, jnp.float32)[None]
    q, k, _ = module.expand(module.queries(module.query_latents(x), places), module.latents(x, places))
    scores = np.einsum("tnh,nsh->tns", np.asarray(q[0], np.float64), np.asarray(k[0], np.float64)) * 10**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * chosen[:, None]
    return weights / weights.sum(-1, keepdims=True)


def chosen_in_numpy(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` keys of the largest scores among those up to the query."""
    chosen = np.zeros(scores.shape, bool)
    for t in range(len(scores)):
        chosen[t, np.argsort(-scores[t, : t + 1], kind="stable")[:count]] = True
    return chosen


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks small enough that a few dozen queries span several, the last of them partly."""
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 16)


def test_only_the_keys_that_the_formula_chooses_take_part():
    values, x = values_of(CONFIG), inputs(LENGTH, 1)
    as_64 = np.asarray(x[0], np.float64)
    chosen = chosen_in_numpy(scores_in_numpy(values, as_64), TOPK)
    weights = weights_in_numpy(values, as_64, chosen)
    module = module_of(CONFIG, values)
    v = np.einsum("tr,rnv->tnv", module.latents(x, jnp.arange(LENGTH)[None])[0, :, :10], values["v_b_proj.weight"])
    expected = np.einsum("tns,snv,nvd->td", weights, v, values["o_proj.weight"])
    np.testing.assert_allclose(run(CONFIG, values, x, context_of())[0], expected, atol=1e-5)
    dense = run(DENSE, dense_values(), x, context_of())[0]
    np.testing.assert_allclose(expected[:TOPK], dense[:TOPK], atol=1e-5)
    assert np.abs(expected[TOPK:] - dense[TOPK:]).max() > 0.1, "what is left out has to matter"


def test_choosing_everything_is_latent_attention():
    values, x = values_of(EVERYTHING), inputs()
    ctx, positions = documents()
    dense = run(DENSE, dense_values(), x, ctx, positions)
    np.testing.assert_array_equal(run(EVERYTHING, values, x, ctx, positions), dense)
    learning = dataclasses.replace(EVERYTHING, index_loss_weight=1.0)  # goes its own way, for the loss
    np.testing.assert_allclose(run(learning, values, x, ctx, positions), dense, atol=1e-5)


def test_of_equal_scores_the_first_are_chosen():
    """An indexer that says 0 of all keys; every query then sees the first ones of those that it may see."""
    values = values_of(CONFIG) | {"indexer.weights_proj.weight": np.zeros((16, 8), np.float32)}
    x = inputs(LENGTH, 1)
    places = np.arange(LENGTH)
    ctx = context_of(prefix=jnp.asarray((places < TOPK)[None], jnp.int32))
    found = run(CONFIG, values, x, ctx)[0]
    first = run(DENSE, dense_values(), x[:, :TOPK], context_of(causal=False))[0]
    np.testing.assert_allclose(found[:TOPK], first, atol=1e-5)
    weights = weights_in_numpy(values, np.asarray(x[0]), np.broadcast_to(places < TOPK, (LENGTH, LENGTH)))
    assert np.allclose(weights.sum(-1), 1)
    v = np.einsum(
        "tr,rnv->tnv",
        module_of(CONFIG, values).latents(x, jnp.arange(LENGTH)[None])[0, :, :10],
        values["v_b_proj.weight"],
    )
    expected = np.einsum("tns,snv,nvd->td", weights, v, values["o_proj.weight"])
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_packed_is_separate():
    values, x = values_of(LEARNING), inputs()
    ctx, positions = documents()
    packed = run(LEARNING, values, x, ctx, positions)
    for begin, end in ((0, 9), (9, LENGTH - 2)):
        alone = run(LEARNING, values, x[:, begin:end], context_of())
        np.testing.assert_allclose(packed[:, begin:end], alone, atol=1e-5)


def test_decoding_is_the_training_form():
    """At positions that see fewer keys than are chosen, as many, and more; rows of several lengths."""
    values, x = values_of(CONFIG), inputs()
    lengths, steps = jnp.array([1, 4, 8, 2, 7, 3, 5, 6]), 16
    found = decode(CONFIG, values, x, lengths, steps)
    whole = run(CONFIG, values, x, context_of())
    for row, begin in enumerate(lengths):
        np.testing.assert_allclose(found[row], whole[row, begin : begin + steps], atol=1e-5)


def test_decoding_reads_what_is_chosen_alone():
    """Of a long cache the attention is given the chosen entries."""

    def step(values, x: jax.Array, cache: dict[str, jax.Array]) -> jax.Array:
        index = jnp.full((1, 1), 999)
        return module_of(CONFIG, values)(x, positions=index, ctx=context_of(query_places=index), cache=cache)[0]

    cache = {"latent": jnp.zeros((1, 1, 1000, 14)), "index": jnp.zeros((1, 1, 1000, 7))}
    with kernels.calls_of_attend() as calls:
        jax.eval_shape(step, values_of(CONFIG), inputs(1, 1), cache)
    assert [(call.k.shape, call.v.shape) for call in calls] == [((1, 1, TOPK, 14), (1, 1, TOPK, 14))]


def test_the_cache_holds_128_numbers_more_of_a_token():
    released = dataclasses.replace(CONFIG, kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    module = nnx.eval_shape(lambda: released.build(2048, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: module.init_cache(3, 1000, jnp.bfloat16))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == 3 * 1000 * (576 + 128) * 2


@functools.partial(jax.jit, static_argnums=0)
def loss_of(config, values, x, ctx, positions):
    def loss(values):
        return module_of(config, values)(x, positions=positions, ctx=ctx)[2]["loss.indexer"]

    return jax.value_and_grad(loss)(values)


@pytest.mark.quick("warm-up")
@pytest.mark.parametrize("config", [LEARNING, WARMUP], ids=["sparse", "warm-up"])
def test_the_indexers_loss_is_the_formula(config: SparseLatentAttention):
    """Equations 3 (over all keys) and 4 (over the chosen ones); padding does not count."""
    values, x, length = values_of(config), inputs(LENGTH, 1), LENGTH - 3
    as_64 = np.asarray(x[0, :length], np.float64)
    scores = scores_in_numpy(values, as_64)
    chosen = np.tri(length, dtype=bool) if config.index_warmup else chosen_in_numpy(scores, TOPK)
    target = weights_in_numpy(values, as_64, chosen).sum(1)
    target /= target.sum(-1, keepdims=True)
    choice = np.exp(scores) * chosen
    choice /= choice.sum(-1, keepdims=True)
    expected = 0.3 * np.sum(target[chosen] * np.log(target[chosen] / choice[chosen])) / length
    segments = jnp.asarray((np.arange(LENGTH) < length)[None], jnp.int32)
    positions = jnp.arange(LENGTH)[None]
    loss, gradient = loss_of(config, values, x, context_of(segment_ids=segments), positions)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    for name, value in gradient.items():
        assert (float(jnp.abs(value).max()) > 1e-4) == ("indexer" in name), name


@pytest.mark.slow
def test_rows_of_padding_teach_the_indexer_nothing():
    values, x, positions = values_of(LEARNING), inputs(LENGTH, 2), jnp.tile(jnp.arange(LENGTH), (2, 1))
    segments = jnp.ones((2, LENGTH), jnp.int32)
    wanted = loss_of(LEARNING, values, x[:1], context_of(segment_ids=segments[:1]), positions[:1])
    found = loss_of(LEARNING, values, x, context_of(segment_ids=segments.at[1].set(0)), positions)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    assert float(found[0]) > 0
    for value in jax.tree.leaves(loss_of(LEARNING, values, x, context_of(segment_ids=0 * segments), positions)):
        np.testing.assert_array_equal(value, np.zeros(value.shape))


@pytest.mark.slow
def test_the_indexer_learns_from_its_own_loss_alone():
    values, x, (ctx, positions) = values_of(CONFIG), inputs(), documents()
    _, (gradient, d_x) = with_gradients(CONFIG, values, x, inputs(seed=2), ctx, positions)
    _, (learning, d_x_learning) = with_gradients(LEARNING, values, x, inputs(seed=2), ctx, positions)
    for name in values:
        if "indexer" in name:
            assert not gradient[name].any(), name
        else:
            np.testing.assert_allclose(learning[name], gradient[name], atol=1e-4, err_msg=name)
    np.testing.assert_allclose(d_x_learning, d_x, atol=1e-5)


@pytest.mark.slow
def test_the_indexer_learns_to_choose():
    """In the warm-up stage its loss falls, and what it then chooses weighs more than before."""
    config = dataclasses.replace(WARMUP, index_loss_weight=1.0)
    values, x = jax.tree.map(jnp.asarray, values_of(config)), inputs()
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    losses = []
    for _ in range(60):
        loss, gradient = loss_of(config, values, x, context_of(), positions)
        values = {name: value - 0.3 * gradient[name] for name, value in values.items()}
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] > 0


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    assert_sharded_is_unsharded(LEARNING)


def test_eight_devices_decode_as_one_does():
    assert_decodes_on_a_mesh(CONFIG)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"q_lora_rank": None}, "q_lora_rank=None leaves the indexer without"),
        ({"index_topk": 0}, "index_topk=0 must be at least 1"),
        ({"index_head_dim": 3}, "index_head_dim=3 must be at least qk_rope_head_dim=4"),
        ({"index_loss_weight": -1.0}, "index_loss_weight=-1.0 must be at least 0"),
    ],
)
def test_impossible_sizes(fields: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(
    ("ctx", "sentence"),
    [
        (context_of(kernel="splash"), "attention_kernel='splash' cannot do sparse attention: take auto"),
        (context_of(position_bias=jnp.zeros((1, 8, 24, 24))), "sparse attention takes no bias of the scores"),
    ],
)
def test_what_it_cannot_do_is_refused(ctx: ForwardContext, sentence: str):
    with pytest.raises(UserError, match=sentence):
        run(CONFIG, values_of(CONFIG), inputs(), ctx)
