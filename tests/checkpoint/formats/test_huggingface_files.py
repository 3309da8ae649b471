"""Hugging Face directories: equal to the library's own reading and writing, damage told in a sentence."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from llama_jax.checkpoint.formats import read_directory, read_safetensors, write_safetensors
from llama_jax.config import UserError


def _tensors():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(4, 6)).astype(np.float32),
        "b": rng.normal(size=(3,)).astype(np.float16),
        "c": np.arange(6).reshape(2, 3),
        "empty": np.zeros((0, 2), np.float32),
    }


def _write(file, tensors):
    write_safetensors(file, tensors)


def test_reads_what_the_library_writes_and_the_other_way_round(tmp_path):
    tensors = _tensors()
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    _write(tmp_path / "ours.safetensors", tensors)
    theirs = read_safetensors(tmp_path / "theirs.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "ours.safetensors")
    for name, expected in tensors.items():
        np.testing.assert_array_equal(theirs[name].read(), expected)
        np.testing.assert_array_equal(ours[name], expected)
    np.testing.assert_array_equal(theirs["a"].read((slice(1, 3),)), tensors["a"][1:3])


def test_bfloat16(tmp_path):
    value = np.arange(8).reshape(2, 4).astype(ml_dtypes.bfloat16)
    _write(tmp_path / "model.safetensors", {"x": value})
    tensor = read_directory(tmp_path)["x"]
    assert tensor.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tensor.read((slice(None), slice(1, 3))), value[:, 1:3])


@pytest.mark.parametrize("keep", [0, 4, 20, 100, -1])
def test_truncated(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    _write(file, _tensors())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors.*download"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}).encode(),
        json.dumps({"x": {"dtype": "F32", "shape": [1]}}).encode(),
    ],
)
def test_damaged_headers(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match="truncated or no safetensors"):
        read_safetensors(file)


def test_unknown_dtype(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(1))
    with pytest.raises(UserError, match="'x' in F4"):
        read_safetensors(tmp_path / "x.safetensors")


def _index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(tmp_path):
    tensors = _tensors()
    _write(tmp_path / "1.safetensors", {"a": tensors["a"]})
    _write(tmp_path / "2.safetensors", {"b": tensors["b"]})
    _index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    read = read_directory(tmp_path)
    assert set(read) == {"a", "b"}
    np.testing.assert_array_equal(read["b"].read(), tensors["b"])


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ""])
def test_an_index_cannot_leave_its_folder(tmp_path, place):
    folder = tmp_path / "model"
    folder.mkdir()
    _write(tmp_path / "outside.safetensors", _tensors())
    _index(folder, {"a": place})
    with pytest.raises(UserError, match="outside its folder"):
        read_directory(folder)


def test_wrong_indexes(tmp_path):
    with pytest.raises(UserError, match="neither"):
        read_directory(tmp_path)
    _write(tmp_path / "1.safetensors", _tensors())
    _index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(UserError, match=r"2\.safetensors' does not exist"):
        read_directory(tmp_path)
    _index(tmp_path, {"lost": "1.safetensors"})
    with pytest.raises(UserError, match="'lost'"):
        read_directory(tmp_path)
    _write(tmp_path / "2.safetensors", _tensors())
    _index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(UserError, match="in two of the files"):
        read_directory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        read_directory(tmp_path)
