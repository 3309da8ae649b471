"""Meta's shards joined, llama2.c's header believed only when the size agrees."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.checkpoint.formats import is_llama2c, joined, read_llama2c, read_meta, read_torch, stored
from llama_jax.config import UserError

GOLDENS = Path(__file__).parents[2] / "parity" / "goldens"


def _tiny(file: Path, *, tied: bool = True) -> tuple[Path, int]:
    dim, hidden, layers, heads, kv_heads, vocab, length = 8, 12, 2, 2, 1, 10, 16
    layer = 8 + 64 + 32 + 32 + 64 + 8 + 3 * 96
    numbers = vocab * dim + layers * layer + dim + length * (dim // heads) + (0 if tied else vocab * dim)
    header = struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab if tied else -vocab, length)
    file.write_bytes(header + np.arange(numbers, dtype="<f4").tobytes())
    return file, numbers


@pytest.mark.parametrize("tied", [True, False])
def test_llama2c_layout(tmp_path, tied):
    file, numbers = _tiny(tmp_path / "tiny.bin", tied=tied)
    params, tensors = read_llama2c(file)
    assert (params["dim"], params["n_kv_heads"], params["vocab_size"], params["max_seq_len"]) == (8, 1, 10, 16)
    assert ("output.weight" in tensors) is not tied
    # In the file all layers' norms come first, then all layers' wq, and so on.
    assert tensors["layers.0.attention_norm.weight"].read()[0] == 80
    assert tensors["layers.1.attention_norm.weight"].read()[0] == 88
    assert tensors["layers.0.attention.wq.weight"].read()[0, 0] == 96
    if not tied:
        assert tensors["output.weight"].read()[-1, -1] == numbers - 1


def test_llama2c_damage(tmp_path):
    file, _ = _tiny(tmp_path / "tiny.bin")
    whole = file.read_bytes()
    for content in (whole[:-4], whole + bytes(4), whole[:40]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"bytes where its header promises"):
            read_llama2c(file)
    for content in (b"", whole[:20], b"PK\x03\x04" + whole, b"\0" * 200):
        file.write_bytes(content)
        assert not is_llama2c(file)
        with pytest.raises(UserError, match=r"not a llama2\.c file"):
            read_llama2c(file)


@given(data=st.data())
def test_a_part_of_joined_pieces(tmp_path_factory, data):
    whole = np.arange(60, dtype=np.float32).reshape(6, 10)
    file = tmp_path_factory.mktemp("joined") / "x"
    dim = data.draw(st.integers(0, 1))
    pieces = np.split(whole, data.draw(st.sampled_from([1, 2])), axis=dim)
    file.write_bytes(b"".join(np.ascontiguousarray(piece).tobytes() for piece in pieces))
    offsets = np.cumsum([0, *(piece.nbytes for piece in pieces)])
    parts = [stored(file, int(o), p.dtype, p.shape) for o, p in zip(offsets, pieces, strict=False)]
    tensor = joined(parts, dim)
    assert tensor.shape == whole.shape
    bounds = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in whole.shape]
    slices = tuple(slice(*bound) for bound in bounds)
    np.testing.assert_array_equal(tensor.read(slices), whole[slices])
    np.testing.assert_array_equal(tensor.read(slices[:1]), whole[slices[0]])


def test_both_ways_to_split_hold_the_same_model():
    _, two = read_meta(GOLDENS / "meta_llama2_2_shards")
    _, four = read_meta(GOLDENS / "meta_llama3_4_shards")  # more shards than kv heads
    whole = two["tok_embeddings.weight"].shape
    shards = [
        read_torch(GOLDENS / name / "consolidated.00.pth") for name in ("meta_llama2_2_shards", "meta_llama3_4_shards")
    ]
    parts = [shard["tok_embeddings.weight"].shape for shard in shards]
    assert parts == [(whole[0], whole[1] // 2), (whole[0] // 4, whole[1])]
    assert two.keys() == four.keys()
    for name, tensor in two.items():
        np.testing.assert_array_equal(tensor.read(), four[name].read(), err_msg=name)


def test_meta_damage(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDENS / "meta_llama3_4_shards", folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"lacks consolidated\.01\.pth"):
        read_meta(folder)
    shutil.copy(GOLDENS / "torch.pth", folder / "consolidated.01.pth")
    with pytest.raises(UserError, match=r"consolidated\.01\.pth' lacks"):
        read_meta(folder)
    (folder / "params.json").write_text('{"dim": 24}')
    with pytest.raises(UserError, match="'n_layers'"):
        read_meta(folder)
    (folder / "params.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_meta(folder)
