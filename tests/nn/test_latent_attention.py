"""Latent attention: the training form against the formula, the decoding form against the training form."""

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
    inputs,
    module_of,
    run,
    values_of,
)

from llama_jax.config import UserError
from llama_jax.nn import LatentAttention, Mask, Rope, YarnScaling
from llama_jax.nn.attention import attend as kernels, blockwise

YARN = YarnScaling(4.0, original_max_positions=16, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.5)
CONFIG = LatentAttention(
    num_heads=8,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    rope=Rope(theta=100.0, scaling=YARN),
    eps=1e-6,
)
CONFIGS = {"query latents": CONFIG, "plain queries": dataclasses.replace(CONFIG, q_lora_rank=None)}


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def rotated(x: np.ndarray, place: int, rope: Rope) -> np.ndarray:
    """Pairs (i, i + half) as complex numbers."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * place * rope.frequencies(x.shape[-1])) * (rope.scaling.magnitude() if rope.scaling else 1)
    y = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([y.real, y.imag], axis=-1)


def in_numpy(config: LatentAttention, values: dict[str, np.ndarray], x: np.ndarray, scale: float) -> np.ndarray:
    """Equations 1 to 11 of the DeepSeek-V2 paper (37 to 47 without query latents), a query at a time; float64."""
    w = {name: value.astype(np.float64) for name, value in values.items()}
    length, rope = x.shape[0], config.rope
    source, of = x, "q"
    if config.q_lora_rank is not None:
        source, of = rms(x @ w["q_a_proj.weight"], w["q_a_layernorm.weight"]), "q_b"
    q_nope, q_rope = (np.einsum("td,dnh->tnh", source, w[f"{of}_{part}_proj.weight"]) for part in ("nope", "rope"))
    latent = rms(x @ w["kv_a_proj.weight"], w["kv_a_layernorm.weight"])
    k_nope, v = (np.einsum("tr,rnh->tnh", latent, w[f"{part}_b_proj.weight"]) for part in ("k", "v"))
    k_rope = x @ w["k_rope_proj.weight"]
    q_rope = np.stack([rotated(q_rope[t], t, rope) for t in range(length)])
    k_rope = np.stack([rotated(k_rope[t], t, rope) for t in range(length)])
    out = np.zeros((length, config.num_heads, config.v_head_dim))
    for t, n in np.ndindex(length, config.num_heads):
        scores = np.array([q_nope[t, n] @ k_nope[s, n] + q_rope[t, n] @ k_rope[s] for s in range(t + 1)]) * scale
        weights = np.exp(scores - scores.max())
        out[t, n] = weights / weights.sum() @ v[: t + 1, n]
    return np.einsum("tnv,nvd->td", out, w["o_proj.weight"])


@pytest.mark.parametrize("name", CONFIGS)
def test_training_form_is_the_formula(name: str):
    config = CONFIGS[name]
    values, x = values_of(config), inputs(7, 1)
    scale = 10**-0.5 * (0.1 * 0.5 * np.log(4) + 1) ** 2
    expected = in_numpy(config, values, np.asarray(x[0], np.float64), scale)
    np.testing.assert_allclose(run(config, values, x, context_of())[0], expected, atol=5e-6)
    assert np.abs(expected).max() > 0.1


def test_scores_are_scaled_as_deepseek_v2_lite_has_it():
    scaling = YarnScaling(40.0, 4096, beta_fast=32.0, beta_slow=1.0, mscale=0.707, mscale_all_dim=0.707)
    lite = dataclasses.replace(CONFIG, qk_nope_head_dim=128, qk_rope_head_dim=64, rope=Rope(1e4, scaling))
    assert lite.scale == pytest.approx(0.114721386793, rel=1e-9)  # 192^-0.5 (0.0707 ln 40 + 1)^2
    assert dataclasses.replace(lite, rope=Rope(1e4, None)).scale == pytest.approx(192**-0.5)
    assert dataclasses.replace(lite, rope=None).scale == pytest.approx(192**-0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_decoding_is_the_training_form(name: str):
    """Rows of several lengths, prompt and then single tokens, at every position after it."""
    config = CONFIGS[name]
    assert config.absorbs(1)
    assert not dataclasses.replace(config, qk_nope_head_dim=128, v_head_dim=128, kv_lora_rank=512).absorbs(200)
    values, x = values_of(config), inputs()
    lengths, steps = jnp.array([1, 4, 8, 2, 7, 3, 5, 6]), 16
    found = decode(config, values, x, lengths, steps)
    whole = run(config, values, x, context_of())
    for row, begin in enumerate(lengths):
        np.testing.assert_allclose(found[row], whole[row, begin : begin + steps], atol=1e-5)
    assert float(jnp.abs(whole).max()) > 0.1


def test_both_forms_agree_on_a_cache():
    """Whichever is cheaper: the choice between them is one of cost alone."""
    values, x = values_of(CONFIG), inputs()
    module = module_of(CONFIG, values)
    index = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
    q, latents = module.queries(module.query_latents(x), index), module.latents(x, index)
    forms = [form(q, latents, context_of(query_places=index)) for form in (module.on_keys, module.on_latents)]
    np.testing.assert_allclose(*forms, atol=1e-5)


def test_the_cache_holds_576_numbers_of_a_token():
    """Of DeepSeek-V2, V2-Lite and V3 alike: 512 for the latent, 64 for the rotary key (section 2.1.4)."""
    lite = dataclasses.replace(
        CONFIG,
        num_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    module = nnx.eval_shape(lambda: lite.build(2048, rngs=nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: module.init_cache(3, 1000, jnp.bfloat16))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) == 3 * 1000 * 576 * 2


def test_packed_is_separate():
    values, x = values_of(CONFIG), inputs(LENGTH, 1)
    segments = jnp.asarray(np.repeat([[1, 2, 0]], [9, 12, 3], axis=1))
    positions = jnp.concatenate([jnp.arange(9), jnp.arange(12), jnp.zeros(3, int)])[None]
    packed = run(CONFIG, values, x, context_of(segment_ids=segments), positions)
    for begin, end in ((0, 9), (9, 21)):
        alone = run(CONFIG, values, x[:, begin:end], context_of())
        np.testing.assert_allclose(packed[:, begin:end], alone, atol=3e-6)


@pytest.mark.slow
def test_eight_devices_compute_what_one_computes():
    assert_sharded_is_unsharded(CONFIG)


def test_eight_devices_decode_as_one_does():
    assert_decodes_on_a_mesh(CONFIG)


@functools.partial(jax.jit, static_argnums=0)
def results(name: str, q, k, v, direction, mask: Mask):
    out, pull = jax.vjp(lambda q, k, v: kernels.KERNELS[name].run(q, k, v, mask, scale=0.3), q, k, v)
    return out, *pull(direction)


@pytest.mark.quick("splash-128-12")
@pytest.mark.parametrize(("kernel", "length", "v_head_dim"), [("blockwise", 40, 5), ("splash", 128, 12)])
def test_values_may_have_another_size_than_keys(kernel: str, length: int, v_head_dim: int, monkeypatch):
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 12)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 8)
    rng = np.random.default_rng(0)
    shapes = (2, length, 4, 8), (2, 2, length, 8), (2, 2, length, v_head_dim), (2, length, 4, v_head_dim)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    for a, b in zip(results(kernel, *arrays, Mask()), results("reference", *arrays, Mask()), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"num_heads": 0}, "num_heads=0 must be at least 1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank=0 must be at least 1"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1, or none"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        ({"rope": Rope(1e4, None, rotary_dim=2)}, r"rope\.rotary_dim has no place in latent attention"),
    ],
)
def test_impossible_sizes(fields: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CONFIG, **fields)
