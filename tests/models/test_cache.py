"""Bytes of the caches: those that decoding allocates, and the figures that are known of released models."""

import dataclasses
from typing import Any

import jax
import pytest
from flax import nnx

from llama_jax import presets
from llama_jax.config import UserError, override
from llama_jax.models import Compute, DecoderConfig, abstract_params, assemble, cache_bytes, nbytes
from llama_jax.nn import LSTM, LatentAttention, Mamba2, Mixer, MixerModule, NGram, SparseLatentAttention
from llama_jax.parallel import make_mesh


@dataclasses.dataclass(frozen=True)
class NoCache(Mixer):
    """A mixer of a notebook's cell that only trains."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return MixerModule()


WINDOWED = {"attention.window": 8}


def allocated(config: DecoderConfig, length: int, rows: int, dtype: str) -> int:
    """Return the bytes of the cache that a module makes."""
    compute: Any = Compute(dtype=dtype)  # type: ignore[arg-type]
    make = lambda params: assemble(config, params, compute, scan=False).init_cache(rows, length, room=1)  # noqa: E731
    return nbytes(jax.eval_shape(make, abstract_params(config)))


@pytest.mark.parametrize("piece", [None, LSTM, NGram, Mamba2, LatentAttention, SparseLatentAttention])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_what_decoding_allocates(piece: type | None, dtype: str, two_layers: DecoderConfig):
    more = {"attention.order": 4} if piece is NGram else {}
    config = override(two_layers, WINDOWED if piece is None else {"attention": piece.__name__} | more)
    assert cache_bytes(config, 24, 4, dtype) == allocated(config, 24, 4, dtype) > 0
    grows = cache_bytes(config, 25, 4, dtype) > cache_bytes(config, 24, 4, dtype)
    assert grows == (piece not in (LSTM, NGram, Mamba2, None))  # None has a window


def test_is_of_all_devices_together(tiny_config: DecoderConfig):
    whole = cache_bytes(tiny_config, 24, 4, "float32")
    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        assert cache_bytes(tiny_config, 24, 4, "float32") == whole


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("llama2_7b", 512 * 1024),  # 2 x 32 layers x 4096 x 2 bytes
        ("llama3_8b", 128 * 1024),  # 2 x 32 x 8 heads of 128 x 2 bytes
        ("deepseek_v2", 576 * 60 * 2),  # (512 + 64) numbers in each layer ("DeepSeek-V2", 2024, table 1)
        ("t5_small", 2 * 6 * 512 * 2),  # the decoder's own tokens
    ],
)
def test_bytes_per_token_of_released_models(name: str, per_token: int):
    config = presets()[name]
    assert cache_bytes(config, 101) - cache_bytes(config, 100) == per_token


def test_refuses_what_has_no_cache(tiny_config: DecoderConfig):
    with pytest.raises(UserError, match="EncoderConfig keeps no cache"):
        cache_bytes(presets()["bert_base"], 8)
    with pytest.raises(UserError, match="length=0 must be at least 1"):
        cache_bytes(tiny_config, 0)

    with pytest.raises(UserError, match="attention=NoCache has no init_cache"):
        cache_bytes(dataclasses.replace(tiny_config, attention=NoCache()), 8)
