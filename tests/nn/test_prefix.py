"""A prefix that all of its document see: the formula, the kernels that can, the refusals of those that cannot."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contexts import context_of
from in_text_order import attention_and_gradients

from llama_jax.config import UserError
from llama_jax.nn import Mask
from llama_jax.nn.attention import attend as kernels, blockwise
from llama_jax.parallel import make_mesh, shard

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 40, 4, 2, 8
SCALE = HEAD_DIM**-0.5
SEGMENTS = np.repeat([[1, 2, 3], [1, 2, 0]], [5, 21, 14], axis=1)
RNG = np.random.default_rng(1)
SCATTERED = RNG.random((BATCH, LENGTH)) < 0.3
# A document's first tokens; of the second row's first document none.
LEADING = np.zeros((BATCH, LENGTH), int)
LEADING[:, 5:14] = LEADING[:1, :3] = LEADING[:1, 26:39] = 1
PLACES = np.array([range(10, 34), range(13, 37)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of which the rows have several, the last of them partly."""
    monkeypatch.setattr(blockwise, "MIN_QUERY_BLOCK", 12)
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 8)


def mask_of(prefix: np.ndarray, **fields) -> Mask:
    arrays = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in fields.items()}
    return Mask(prefix=jnp.asarray(prefix, jnp.int32), **arrays)


MASKS = {
    "leading, documents": mask_of(LEADING, segment_ids=SEGMENTS),
    "leading, one document": mask_of(LEADING),
    "anywhere, documents": mask_of(SCATTERED, segment_ids=SEGMENTS),
    "in a window": mask_of(SCATTERED, segment_ids=SEGMENTS, window=6),
    "everything": mask_of(np.ones((BATCH, LENGTH))),
    "nothing": mask_of(np.zeros((BATCH, LENGTH))),
    "queries at places of a cache": mask_of(SCATTERED, query_places=PLACES),
}


def inputs(queries: int = LENGTH) -> tuple[jax.Array, ...]:
    """q, k, v and a random direction of the result."""
    rng = np.random.default_rng(0)
    q_shape, kv_shape = (BATCH, queries, HEADS, HEAD_DIM), (BATCH, KV_HEADS, LENGTH, HEAD_DIM)
    return tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in (q_shape, kv_shape, kv_shape, q_shape))


def allowed_by(mask: Mask) -> np.ndarray:
    """[B, T, S], one pair at a time."""
    places = np.tile(np.arange(LENGTH), (BATCH, 1)) if mask.query_places is None else np.asarray(mask.query_places)
    allowed = np.zeros((BATCH, places.shape[1], LENGTH), bool)
    for b, t, s in np.ndindex(allowed.shape):
        i = places[b, t]
        seen = s <= i or mask.prefix[b, s] == 1
        near = mask.window is None or abs(s - i) < mask.window
        together = mask.segment_ids is None or mask.segment_ids[b, i] == mask.segment_ids[b, s]
        allowed[b, t, s] = seen and near and together
    return allowed


@functools.partial(jax.jit, static_argnums=0)
def results(name: str, q, k, v, direction, mask: Mask):
    """The kernel's result, and its gradient in q, k and v along `direction`."""
    out, pull = jax.vjp(lambda q, k, v: kernels.KERNELS[name].run(q, k, v, mask, scale=SCALE), q, k, v)
    return out, *pull(direction)


@functools.partial(jax.jit, static_argnums=0)
def whole_and_block(queries: int, mask: Mask, query: int, key: int) -> tuple[jax.Array, jax.Array]:
    return mask.allowed(0, queries, 0, LENGTH), mask.allowed(query, 5, key, 20)


@pytest.mark.quick("leading, documents", "nothing", "queries at places of a cache")
@pytest.mark.parametrize("case", MASKS)
def test_who_sees_whom(case: str):
    mask = MASKS[case]
    expected = allowed_by(mask)
    found, block = whole_and_block(expected.shape[1], mask, 7, 11)
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)
    np.testing.assert_array_equal(np.broadcast_to(block, (BATCH, 5, 20)), expected[:, 7:12, 11:31])


@pytest.mark.quick("leading, documents", "queries at places of a cache")
@pytest.mark.parametrize("case", MASKS)
def test_blockwise_is_the_reference(case: str):
    mask = MASKS[case]
    arrays = inputs(LENGTH if mask.query_places is None else PLACES.shape[1])
    expected = results("reference", *arrays, mask)
    for found, wanted in zip(results("blockwise", *arrays, mask), expected, strict=True):
        assert float(jnp.abs(wanted).max()) > 0.1
        np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_a_prefix_of_nothing_is_causal():
    arrays = inputs()
    for found, wanted in zip(
        results("blockwise", *arrays, MASKS["nothing"]), results("blockwise", *arrays, Mask()), strict=True
    ):
        np.testing.assert_allclose(found, wanted, atol=5e-6)


@pytest.mark.parametrize("name", ["splash", "cudnn"])
def test_kernels_of_others_refuse_by_name(name: str, monkeypatch: pytest.MonkeyPatch):
    q, k, v = (jnp.zeros(shape, jnp.bfloat16) for shape in ((1, 128, 4, 8), (1, 2, 128, 8), (1, 2, 128, 8)))
    prefix = jnp.zeros((1, 128), jnp.int32)
    assert kernels.choose(q, k, context_of(kernel=name)) == name, "else the refusal below is of something else"
    with pytest.raises(UserError, match=f"'{name}' cannot do a prefix that is seen whole: take blockwise, or auto"):
        kernels.attend(q, k, v, context_of(kernel=name, prefix=prefix), scale=SCALE)
    monkeypatch.setattr(kernels, "platform", lambda: {"splash": "tpu", "cudnn": "gpu"}[name])
    assert kernels.choose(q, k, context_of()) == name
    assert kernels.choose(q, k, context_of(prefix=prefix)) == "blockwise"


@functools.partial(jax.jit, static_argnums=0)
def on_a_mesh(kernel: str, q, k, v, direction, mask: Mask):
    """`results` by `attend` on the current mesh, of arrays in the order of the text."""
    ctx = context_of(segment_ids=mask.segment_ids, prefix=mask.prefix, kernel=kernel)
    return attention_and_gradients(q, k, v, direction, ctx, scale=SCALE)


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [({"data": 2, "tensor": 2}, "blockwise"), ({"context": 4}, "auto"), ({"data": 2, "context": 2}, "reference")],
)
def test_on_a_mesh_it_is_the_same(mesh: dict[str, int], kernel: str):
    mask = MASKS["anywhere, documents"]
    expected = results("reference", *inputs(), mask)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
        arrays = [shard(x, *(None,) * 4) for x in inputs()]
        placed = jax.tree.map(lambda x: shard(x, None, None), mask)
        for found, wanted in zip(on_a_mesh(kernel, *arrays, placed), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=5e-6)


def test_a_split_sequence_takes_the_reference():
    q, k, v, _ = inputs()
    prefix = jnp.zeros((BATCH, LENGTH), jnp.int32)
    with jax.set_mesh(make_mesh({"context": 4}, jax.devices()[:4])):
        assert kernels.choose(q, k, context_of()) == "blockwise"
        assert kernels.choose(q, k, context_of(prefix=prefix)) == "reference"
        for name in ("blockwise", "splash"):
            sentence = f"'{name}' cannot do a prefix .* split over mesh.context: take reference, or auto"
            with pytest.raises(UserError, match=sentence):
                kernels.attend(q, k, v, context_of(kernel=name, prefix=prefix), scale=SCALE)
