"""Every attention kernel against the formula in numpy, float64: results and gradients, of any lengths and masks.

There may be more queries than keys or fewer, and none is a multiple of a block. A query that sees nothing gets zeros
and passes no gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from in_text_order import attention_and_gradients

from llama_jax.nn import CrossAttention, ForwardContext, Mask
from llama_jax.nn.attention import attend as kernels, blockwise
from llama_jax.parallel import make_mesh, shard

ROWS = 2
NAMES = "the result", "the gradient of the queries", "of the keys", "of the values"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which a few dozen positions have several, the last of them partly."""
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 8)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 6)


@dataclasses.dataclass(frozen=True)
class Case:
    """T queries of S keys. `segments` are drawn with documents of which there is nothing in the other sequence."""

    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    prefix: bool = False
    segments: bool = False
    cache: bool = False
    heads: tuple[int, int] = (4, 2)
    head_dims: tuple[int, int] = (8, 8)
    dtype: Any = jnp.float32

    @property
    def scale(self) -> float:
        return self.head_dims[0] ** -0.5

    def mask(self, rng: np.random.Generator) -> Mask:
        def documents(length: int, numbers: list[int]) -> np.ndarray:
            ends = np.sort(rng.integers(length + 1, size=(ROWS, len(numbers) - 1)), axis=1)
            return np.asarray(numbers)[(ends[:, :, None] <= np.arange(length)).sum(1)].astype(np.int32)

        fields: dict[str, Any] = {}
        if self.segments:
            fields["segment_ids"] = documents(self.queries, [1, 2, 4, 5, 6])
            if self.queries != self.keys or not self.causal:
                fields["key_segment_ids"] = documents(self.keys, [1, 3, 4, 6, 0])
                fields["key_segment_ids"][1] = 0  # a row without a source
        if self.prefix:
            fields["prefix"] = (rng.random((ROWS, self.keys)) < 0.3).astype(np.int32)
        if self.cache:
            begins = rng.integers(self.keys - self.queries + 1, size=(ROWS, 1))
            fields["query_places"] = (begins + np.arange(self.queries)).astype(np.int32)
        return Mask(self.causal, self.window, **fields)


def allowed_by(mask: Mask, num_queries: int, num_keys: int) -> np.ndarray:
    """[B, T, S] as the fields of the mask say it."""
    q = np.tile(np.arange(num_queries), (ROWS, 1)) if mask.query_places is None else np.asarray(mask.query_places)
    distance = np.arange(num_keys) - q[:, :, None]  # of key from query, positive after it
    allowed = distance <= 0 if mask.causal else np.ones(distance.shape, bool)
    if mask.prefix is not None:
        allowed |= np.asarray(mask.prefix)[:, None] == 1
    if mask.window is not None:
        allowed &= np.abs(distance) < mask.window
    if mask.segment_ids is not None:
        of_keys = mask.segment_ids if mask.key_segment_ids is None else mask.key_segment_ids
        allowed &= np.asarray(mask.segment_ids)[:, :, None] == np.asarray(of_keys)[:, None]
    return allowed


def formula(q, k, v, direction, allowed: np.ndarray, scale: float) -> tuple[np.ndarray, ...]:
    """The result, and its gradients along `direction`; q [B, T, N, H], k [B, K, S, H], v [B, K, S, V]."""
    q, k, v, direction = (np.asarray(x, np.float64) for x in (q, k, v, direction))
    (rows, _, num_heads, _), (_, num_kv_heads, *_) = q.shape, k.shape
    out, d_q, d_k, d_v = (np.zeros(x.shape) for x in (direction, q, k, v))
    for b, n in np.ndindex(rows, num_heads):
        of = b, n // (num_heads // num_kv_heads)
        scores = np.where(allowed[b], scale * q[b, :, n] @ k[of].T, -np.inf)
        top = scores.max(1, keepdims=True)
        unnormalised = np.exp(scores - np.where(np.isfinite(top), top, 0))
        total = unnormalised.sum(1, keepdims=True)
        weights = unnormalised / np.where(total > 0, total, 1)
        out[b, :, n] = weights @ v[of]
        d_weights = direction[b, :, n] @ v[of].T
        d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True))
        d_q[b, :, n] = scale * d_scores @ k[of]
        d_k[of] += scale * d_scores.T @ q[b, :, n]
        d_v[of] += weights.T @ direction[b, :, n]
    return out, d_q, d_k, d_v


def inputs(case: Case, rng: np.random.Generator) -> tuple[jax.Array, ...]:
    """q, k, v and a random direction of the result."""
    (n, kv), (h, v) = case.heads, case.head_dims
    shapes = (ROWS, case.queries, n, h), (ROWS, kv, case.keys, h), (ROWS, kv, case.keys, v), (ROWS, case.queries, n, v)
    return tuple(jnp.asarray(rng.normal(size=shape), case.dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(name: str, scale: float, q, k, v, direction, mask: Mask):
    """The kernel's result, and its gradients along `direction`."""
    out, pull = jax.vjp(lambda q, k, v: kernels.KERNELS[name].run(q, k, v, mask, scale=scale), q, k, v)
    return out, *pull(direction)


def assert_is(found, wanted, dtype: Any) -> None:
    # Of what is near 0 in truth, as where each query sees one key, only the rounding is left: hence 0.05 at least.
    limit = 2e-6 if dtype == jnp.float32 else 1.5e-2
    for name, one, other in zip(NAMES, found, wanted, strict=True):
        assert one.dtype == dtype
        error = np.sqrt(np.mean((np.asarray(one, np.float64) - other) ** 2)) / max(0.05, np.sqrt(np.mean(other**2)))
        assert error < limit, (name, error)


def check(case: Case, *names: str, seed: int = 0) -> np.ndarray:
    """The kernels against the formula; returns which queries see something."""
    rng = np.random.default_rng(seed)
    mask, arrays = case.mask(rng), inputs(case, rng)
    allowed = allowed_by(mask, case.queries, case.keys)
    sees = allowed.any(2)
    wanted = formula(*arrays, allowed, case.scale)
    mask = jax.tree.map(jnp.asarray, mask)
    for name in names:
        found = results(name, case.scale, *arrays, mask)
        assert_is(found, wanted, case.dtype)
        for x in found[:2]:
            assert not np.asarray(x, np.float32)[~sees].any(), "a query that sees nothing gets zeros, and no gradient"
    return sees


CASES = {
    "more queries, whole blocks of them": Case(32, 13),
    "cross attention of documents": Case(37, 17, segments=True),
    "cross attention of documents, long source": Case(11, 26, segments=True, dtype=jnp.bfloat16),
    "causal, more queries": Case(31, 7, causal=True, head_dims=(8, 5)),
    "window, queries beyond the last key's": Case(40, 11, causal=True, window=5),
    "window both ways, more keys": Case(9, 30, window=3, heads=(4, 1)),
    "prefix in a window, documents": Case(29, 29, causal=True, prefix=True, window=7, segments=True),
    "queries at places of a cache": Case(13, 31, causal=True, cache=True, head_dims=(8, 10), heads=(4, 4)),
    "causal, documents": Case(27, 27, causal=True, segments=True, heads=(4, 1)),
    "more queries": Case(31, 13),
    "more keys": Case(9, 29, heads=(4, 4)),
    "as many": Case(23, 23, heads=(4, 1), head_dims=(8, 5)),
    "cross attention of documents, as many": Case(20, 20, segments=True, heads=(2, 2)),
    "causal, more keys": Case(10, 31, causal=True, head_dims=(8, 12)),
    "window both ways, more queries": Case(37, 15, window=4),
    "prefix, more queries": Case(31, 13, causal=True, prefix=True),
    "queries at places of a cache, window": Case(1, 31, causal=True, window=6, cache=True),
}


@pytest.mark.quick(
    "causal, documents",
    "cross attention of documents, long source",
    "prefix in a window, documents",
    "queries at places of a cache",
)
@pytest.mark.parametrize("case", CASES)
def test_reference_and_blockwise_are_the_formula(case: str):
    sees = check(CASES[case], "reference", "blockwise")
    if case in ("cross attention of documents", "window, queries beyond the last key's"):
        assert not sees.all(), "else it shows nothing of queries that see nothing"


def drawn(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    kv, group, head_dim = (int(rng.choice(sizes)) for sizes in ((1, 2), (1, 2), (4, 8)))
    same, causal = bool(rng.random() < 0.3), bool(rng.random() < 0.5)
    queries, keys = (int(n) for n in rng.integers(1, 70, size=2))
    segments = bool(rng.random() < 0.5)
    return Case(
        queries=keys if same else queries,
        keys=keys,
        causal=causal,
        window=int(rng.integers(1, 40)) if rng.random() < 0.4 else None,
        prefix=causal and bool(rng.random() < 0.3),
        segments=segments,
        cache=not same and causal and not segments and queries <= keys and bool(rng.random() < 0.5),
        heads=(kv * group, kv),
        head_dims=(head_dim, int(rng.choice((head_dim, 3, 10)))),
        dtype=jnp.bfloat16 if rng.random() < 0.2 else jnp.float32,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(32))
def test_whatever_is_drawn_is_the_formula(seed: int):
    check(drawn(seed), "reference", "blockwise", seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(700, 500), (300, 200), (900, 500), (600, 200), (130, 700)])
def test_the_real_blocks_are_the_formula(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 128)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 512)
    check(Case(queries, keys, segments=True), "blockwise")
    check(Case(queries, keys), "blockwise")


ACCELERATED = {
    "causal, documents": Case(256, 256, causal=True, segments=True, heads=(4, 1), head_dims=(16, 8)),
    "window, documents": Case(128, 128, causal=True, window=70, segments=True),
    "window both ways": Case(128, 128, window=40),
    "not causal": Case(128, 128, heads=(2, 2)),
}


@pytest.mark.quick("causal, documents")
@pytest.mark.parametrize("case", ACCELERATED)
def test_kernels_of_others_are_the_formula(case: str, monkeypatch: pytest.MonkeyPatch):
    """Splash is interpreted. In cuDNN's place stands what JAX computes of the same call elsewhere."""
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: plain(*args, **options)
    )
    assert check(ACCELERATED[case], "splash", "cudnn").all()


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_what_kernels_of_others_accept_leaves_no_query_without_a_key(name: str):
    refuses = {"splash": kernels.splash_refuses, "cudnn": kernels.cudnn_refuses}[name]
    accepted = 0
    for seed in range(300):
        case = dataclasses.replace(drawn(seed), dtype=jnp.bfloat16)
        case = dataclasses.replace(case, queries=128 if seed % 2 else case.queries, keys=128 if seed % 3 else case.keys)
        if case.cache and case.queries > case.keys:
            continue
        rng = np.random.default_rng(seed)
        mask = case.mask(rng)
        q, k, *_ = inputs(dataclasses.replace(case, head_dims=(8, 8)), rng)
        if refuses(q, k, mask) is None:
            accepted += 1
            assert allowed_by(mask, case.queries, case.keys).any(2).all(), case
    assert accepted > 10


@functools.partial(jax.jit, static_argnums=0)
def attended(scale: float, q, k, v, direction, mask: Mask):
    """`attend` and its gradients on the current mesh, of arrays in the order of the text."""
    return attention_and_gradients(q, k, v, direction, ForwardContext(mask), scale=scale)


@pytest.mark.parametrize(
    ("mesh", "case"),
    [
        ({"context": 4}, Case(24, 16, segments=True)),
        ({"context": 4}, Case(16, 27)),
        ({"context": 4}, Case(13, 24)),
        ({"data": 2, "tensor": 2}, Case(31, 13, segments=True)),
    ],
    ids=["both split", "queries split", "keys split", "no context"],
)
def test_another_sequence_on_a_mesh_is_the_formula(mesh: dict[str, int], case: Case):
    rng = np.random.default_rng(0)
    mask, arrays = case.mask(rng), inputs(case, rng)
    wanted = formula(*arrays, allowed_by(mask, case.queries, case.keys), case.scale)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        placed = [shard(x, *(None,) * 4) for x in arrays]
        masked = jax.tree.map(lambda x: shard(jnp.asarray(x), None, None), mask)
        assert_is(attended(case.scale, *placed, masked), wanted, case.dtype)


def test_segment_ids_of_as_many_queries_as_keys():
    q, k, v, _ = inputs(Case(9, 5), np.random.default_rng(0))
    with pytest.raises(ValueError, match="segment ids need as many queries as keys, or key_segment_ids"):
        kernels.attend(q, k, v, context_of(False, segment_ids=jnp.ones((ROWS, 9), jnp.int32)), scale=1.0)


@pytest.mark.parametrize("kernel", ["reference", "blockwise"])
def test_a_target_without_a_source_reads_nothing(kernel: str):
    """Cross attention gives it the bias of the output alone, and its source and projections no gradient."""
    from flax import nnx

    module = CrossAttention(2, 2, 4, qkv_bias=True, out_bias=True).build(8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, source = (jnp.asarray(rng.normal(size=(ROWS, n, 8)), jnp.float32) for n in (19, 7))
    segments, of_source = jnp.ones((ROWS, 19), jnp.int32), jnp.asarray([[1] * 7, [0] * 7], jnp.int32)
    ctx = context_of(False, segment_ids=segments, key_segment_ids=of_source, kernel=kernel)

    @jax.jit
    def results(x, source):
        y, pull = jax.vjp(lambda x, source: module(x, module.keys(source), ctx=ctx), x, source)
        return y, pull(jnp.ones_like(y))

    y, gradients = results(x, source)
    np.testing.assert_allclose(y[1], np.broadcast_to(module.o_proj.bias[...], y[1].shape), atol=1e-7)
    for gradient in gradients:
        assert np.abs(gradient[0]).max() > 0.01
        assert not np.asarray(gradient[1]).any()
