"""A piece that sees what it must not, or returns something else than it should, is refused before the first step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, EncoderConfig, ModelConfig
from llama_jax.nn import (
    GRU,
    BidirectionalRNN,
    FeedForward,
    FeedForwardModule,
    GroupedQuery,
    Mamba2,
    Mixer,
    MixerModule,
    NGram,
    Norm,
    Projection,
    RMSNorm,
    child,
    parameter,
    unzigzag,
    zigzag,
)
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import check_pieces

MESHES = [{"data": 1}, {"fsdp": 2, "tensor": 2, "context": 2}]


def whole(function):
    """Apply a function of rows in the order of the text, on whatever mesh."""

    def run(x, ctx):
        y = function(shard(unzigzag(x), "batch", None, None), ctx)
        return zigzag(shard(y, "batch", "sequence", None))

    return run


def next_token(x):
    return jnp.concatenate([x[:, 1:], jnp.zeros_like(x[:, :1])], axis=1)


def segments(ctx):
    return shard(unzigzag(ctx.mask.segment_ids), "batch", None)


def fft(x):
    return jnp.fft.irfft(jnp.fft.rfft(x, axis=1) * jnp.exp(-jnp.arange(x.shape[1] // 2 + 1))[:, None], x.shape[1], 1)


def causal_by_fft(x, ctx):
    padded = jnp.pad(x, ((0, 0), (0, x.shape[1]), (0, 0)))
    kernel = jnp.fft.rfft(0.5 ** jnp.arange(2 * x.shape[1]))[:, None]
    return jnp.fft.irfft(jnp.fft.rfft(padded, axis=1) * kernel, axis=1)[:, : x.shape[1]]


def running_mean(x, ctx):
    """Of the document where there are any."""
    if ctx.mask.segment_ids is None:
        return jnp.cumsum(x, 1) / jnp.arange(1, x.shape[1] + 1)[:, None]
    same = (segments(ctx)[:, :, None] == segments(ctx)[:, None]) & np.tri(x.shape[1], dtype=bool)
    return jnp.einsum("bts,bsd->btd", same / same.sum(-1, keepdims=True), x)


def next_document(x, ctx):
    follows = segments(ctx)[:, None] == segments(ctx)[:, :, None] + 1
    return jnp.einsum("bts,bsd->btd", follows.astype(x.dtype), x)


CHEATS = {
    "the next token": whole(lambda x, ctx: next_token(x)),
    "the mean of the row": whole(lambda x, ctx: x + x.mean(1, keepdims=True)),
    "a Fourier transform": whole(lambda x, ctx: fft(x)),
    "a convolution to both sides": whole(lambda x, ctx: x + 0.1 * next_token(x) + jnp.roll(x, 1, 1)),
    "the next document": whole(next_document),
    "a choice by the next token": whole(lambda x, ctx: x * jnp.sign(jax.lax.stop_gradient(next_token(x)[..., :1]))),
    "chunks": whole(lambda x, ctx: jnp.repeat(x.reshape(len(x), -1, 4, x.shape[2]).mean(2), 4, 1)),
}
FAIR = {"the mean of the document so far": whole(running_mean)}
RESULTS = {
    "no tuple": (lambda x, c: x, r"returns a \w+: its module must return \(result, cache\)"),
    "four values": (lambda x, c: (x, c, {}, 1), "returns a tuple of 4"),
    "one token less": (lambda x, c: (x[:, 1:], c), r"returns \(8, 31, 32\) float32 for \(8, 32, 32\) float32: it"),
    "another type": (lambda x, c: (x.astype(jnp.bfloat16), c), r"returns \(8, 32, 32\) bfloat16 for"),
    "a list of arrays": (lambda x, c: (x, c, [x]), "returns auxiliary arrays as a list: use a dict"),
    "nothing": (lambda x, c: None, "returns a NoneType"),
    "an error": (
        lambda x, c: (x + jnp.ones(7), c),
        r"fails on .*: ValueError: .*piece_check.py, line \d+\)",
    ),
    "NaN": (lambda x, c: (x / 0.0 * 0.0, c), "returns NaN or infinity"),
}
CACHES = {
    "no batch": (lambda b, n: jnp.zeros((3, b)), lambda c: c, "whose first dimension is not the batch"),
    "another type": (lambda b, n: jnp.zeros((b, 1)), lambda c: c.astype(jnp.int32), "returns another cache"),
    "grows": (lambda b, n: jnp.zeros((b, n)), lambda c: jnp.concatenate([c, c], 1), "returns another cache"),
    "never written": (lambda b, n: jnp.zeros((b, 32)), lambda c: c, "decodes with its init_cache what it does not"),
}


@dataclasses.dataclass(frozen=True)
class Toy(Mixer):
    """A mixer of a function of the input, by name."""

    name: str
    gated: bool = False

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return ToyModule(self, width, rngs=rngs)


class ToyModule(MixerModule):
    def __init__(self, config: Toy, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.v_proj = Projection({"embed": width}, {"_out": width}, bias=False, rngs=child(rngs, "v_proj"))
        self.gate = parameter(rngs, "gate", (1,), (None,), std=0.0) if config.gated else None

    def __call__(self, x: jax.Array, *, positions: jax.Array, ctx: Any, cache: Any = None) -> Any:
        name = self.config.name
        if name in RESULTS:
            return RESULTS[name][0](x, cache)
        y = (CHEATS | FAIR | OTHERS)[name](self.v_proj(x), ctx)
        return (y if self.gate is None else x + self.gate[...] * y), cache


class CachedModule(ToyModule):
    """A sum of the inputs so far, with a cache that is wrong in one way."""

    def __call__(self, x: jax.Array, *, positions: jax.Array, ctx: Any, cache: Any = None) -> Any:
        return jnp.cumsum(x, 1), cache if cache is None else CACHES[self.config.name][1](cache)

    def init_cache(self, batch: int, length: int, dtype: Any) -> Any:
        return CACHES[self.config.name][0](batch, length)


@dataclasses.dataclass(frozen=True)
class Cached(Toy):
    """A mixer with a cache."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return CachedModule(self, width, rngs=rngs)


OTHERS = {
    "documents before": whole(lambda x, ctx: jnp.cumsum(x, 1)),
    "a causal convolution by a Fourier transform": whole(causal_by_fft),
    "other rows": whole(lambda x, ctx: x - x.mean(0, keepdims=True)),
}


@dataclasses.dataclass(frozen=True)
class SequenceNorm(Norm):
    """A norm over the sequence."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return SequenceNormModule()


class SequenceNormModule(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x * x).mean(1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Peeking(FeedForward):
    """A feed-forward that reads the next token."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        return PeekingModule()


class PeekingModule(FeedForwardModule):
    def __call__(self, x: jax.Array, *, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return CHEATS["the next token"](x, ctx), {}


@dataclasses.dataclass(frozen=True)
class OldSignature(Toy):
    """A mixer that takes no context."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> Any:
        return OldModule()


class OldModule(MixerModule):
    def __call__(self, x: jax.Array, *, positions: jax.Array, cache: Any = None) -> Any:  # type: ignore[override]
        return x, cache


def batch_of(rows: int = 8, length: int = 32, **more: Any) -> dict[str, jax.Array]:
    ones = jnp.ones((rows, length), jnp.int32)
    batch = {"tokens": ones, "segment_ids": ones, "positions": ones, "targets": ones, "weights": ones * 1.0, **more}
    return {name: shard(x, "batch", "sequence") for name, x in batch.items()}


def check(config: ModelConfig, mesh: dict[str, int] = MESHES[0], *, samples: bool = False, **more: Any) -> list[str]:
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    with jax.set_mesh(make_mesh(mesh, devices)):
        return check_pieces(config, Compute(), batch_of(**more), samples=samples)


@pytest.fixture
def with_mixer(tiny_config: DecoderConfig):
    return lambda mixer: dataclasses.replace(tiny_config, hidden_size=32, attention=mixer, feed_forward=None)


@pytest.mark.quick("the next token-one device", "the next document-one device", "a choice by the next token-mesh")
@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "mesh"])
@pytest.mark.parametrize("cheat", CHEATS)
def test_a_mixer_that_sees_later_tokens_is_refused(cheat: str, mesh: dict[str, int], with_mixer):
    with pytest.raises(UserError, match=r"attention=Toy lets a token see later tokens .* compute\.preflight=false"):
        check(with_mixer(Toy(cheat)), mesh)


def test_a_gate_of_0_hides_nothing(with_mixer):
    with pytest.raises(UserError, match="attention=Toy lets a token see later"):
        check(with_mixer(Toy("the next token", gated=True)))


def test_other_pieces_are_checked_too(with_mixer):
    config = with_mixer(Toy("the mean of the document so far"))
    for field, piece in (("norm", SequenceNorm()), ("embedding_norm", SequenceNorm()), ("feed_forward", Peeking())):
        with pytest.raises(UserError, match=f"{field}={type(piece).__name__} lets a token see later"):
            check(dataclasses.replace(config, **{field: piece}))


@pytest.mark.parametrize("mesh", MESHES, ids=["one device", "mesh"])
def test_fair_mixers_pass(mesh: dict[str, int], with_mixer):
    for fair in FAIR:
        assert check(with_mixer(Toy(fair)), mesh) == []


@pytest.mark.quick("GRU", "GroupedQuery")
@pytest.mark.parametrize(
    "mixer",
    [NGram(3, 8), GRU(8), Mamba2(4, 4, 8), GroupedQuery(4, 2, 8, None, True, True, window=4, softcap=5.0)],
    ids=lambda mixer: type(mixer).__name__,
)
def test_mixers_of_the_package_pass(mixer: Mixer, with_mixer):
    assert check(with_mixer(mixer)) == []


@pytest.mark.slow
def test_a_prefix_is_seen_whole(tiny_config: DecoderConfig):
    assert check(tiny_config, prefix=jnp.ones((8, 32), jnp.int32)) == []


@pytest.mark.slow
def test_an_encoder_sees_both_sides(tiny_config: DecoderConfig):
    fields = {f.name: getattr(tiny_config, f.name) for f in dataclasses.fields(tiny_config)}
    for mixer in (tiny_config.attention, BidirectionalRNN(GRU(8))):
        assert check(EncoderConfig(**fields | {"attention": mixer})) == []
    with pytest.raises(UserError, match="attention=Toy lets a token see other rows of the batch"):
        check(EncoderConfig(**fields | {"attention": Toy("other rows")}))


def test_documents_before_are_a_line_of_the_log(with_mixer):
    for name in ("documents before", "a causal convolution by a Fourier transform"):
        assert check(with_mixer(Toy(name))) == [
            "attention=Toy lets a token see other documents of its row: ctx.mask.segment_ids tells them apart"
        ]


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_another_form_are_refused(name: str, with_mixer):
    with pytest.raises(UserError, match="attention=Toy " + RESULTS[name][1]):
        check(with_mixer(Toy(name)))


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_another_form_is_refused(name: str, with_mixer):
    with pytest.raises(UserError, match="attention=Cached .*" + CACHES[name][2]):
        check(with_mixer(Cached(name)))


def test_a_mixer_without_a_cache_is_for_runs_without_samples(with_mixer):
    config = with_mixer(Toy("the mean of the document so far"))
    assert check(config) == []
    with pytest.raises(UserError, match=r"attention=Toy has no init_cache, .* logging\.sample_prompts"):
        check(config, samples=True)


def test_a_call_of_another_signature_is_refused(with_mixer):
    with pytest.raises(UserError, match=r"attention=OldSignature fails .*: TypeError: .* unexpected keyword .*'ctx'"):
        check(with_mixer(OldSignature("")))


@dataclasses.dataclass(frozen=True)
class Listed(Toy):
    """A mixer with a list."""

    sizes: Any = ()


def test_a_piece_has_to_be_hashable(with_mixer):
    with pytest.raises(UserError, match=r"attention=Listed cannot be hashed \(unhashable type: 'list'\)"):
        with_mixer(Listed("", sizes=[1, 2]))


def test_two_rows_of_one_token_are_no_reason_to_fail(tiny_config: DecoderConfig):
    assert check(dataclasses.replace(tiny_config, norm=RMSNorm(eps=1e-5)), rows=2, length=1) == []
