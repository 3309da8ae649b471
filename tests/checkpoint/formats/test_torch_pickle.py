"""The allow-list reader: every value right, nothing executed, damage told in a sentence."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llama_jax.checkpoint.formats import read_torch
from llama_jax.config import UserError

GOLDENS = Path(__file__).parents[2] / "parity" / "goldens"


def _write(file: Path, state: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", state)
        archive.writestr("archive/data/0", bytes(64))
    return file


@pytest.mark.parametrize("file", ["torch.pth", "torch_before_1_6.pth", "torch_before_1_6_protocol_4.pth"])
def test_every_dtype_and_layout_that_torch_writes(file):
    tensors = read_torch(GOLDENS / file)
    expected = np.load(GOLDENS / "torch_expected.npz")
    assert set(tensors) == set(expected.files)
    for name, tensor in tensors.items():
        assert tensor.shape == expected[name].shape
        np.testing.assert_array_equal(tensor.read().astype(expected[name].dtype), expected[name], err_msg=name)
    assert tensors["bfloat16"].dtype.name == "bfloat16"
    part = tensors["transposed"].read((slice(2, 5), slice(1, 3)))
    np.testing.assert_array_equal(part, expected["transposed"][2:5, 1:3])
    assert not part.flags.writeable


class _Evil:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_executed(tmp_path, protocol):
    marker = tmp_path / "executed"
    state = pickle.dumps({"weight": _Evil(os.mkdir, str(marker))}, protocol)
    with pytest.raises(UserError, match=r"mkdir" if protocol else r"damaged"):  # torch never writes protocol 0
        read_torch(_write(tmp_path / "evil.pth", state))
    assert not marker.exists()
    pickle.loads(state)  # the same bytes, unguarded, do what they say
    assert marker.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "torch load", "collections Counter", "numpy load"])
def test_only_the_allowed_names(tmp_path, name):
    module, function = name.split()
    state = f"c{module}\n{function}\n.".encode()
    with pytest.raises(UserError, match=rf"{module}\.{function}"):
        read_torch(_write(tmp_path / "evil.pth", state))


def test_dotted_names_are_no_way_around(tmp_path):
    state = b"\x80\x04\x8c\x0bcollections\x8c\x20OrderedDict.__init__.__globals__\x93."
    with pytest.raises(UserError, match="__globals__"):
        read_torch(_write(tmp_path / "evil.pth", state))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["torch.pth", "torch_before_1_6.pth"])
def test_truncated(tmp_path, name, share):
    whole = (GOLDENS / name).read_bytes()
    file = tmp_path / "cut.pth"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"(truncated|damaged).*download"):
        read_torch(file)


def _sequence(state: bytes, keys: list[str], storages: bytes = b"") -> bytes:
    """A file as PyTorch before 1.6 wrote it."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    first = [pickle.dumps(x, protocol=2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    return b"".join([*first, state, pickle.dumps(keys, protocol=2), storages])


def test_nothing_in_an_old_file_is_executed(tmp_path):
    file, called = tmp_path / "old.bin", tmp_path / "called"
    file.write_bytes(_sequence(pickle.dumps(_Evil(os.mkdir, str(called)), protocol=2), []))
    with pytest.raises(UserError, match="mkdir"):
        read_torch(file)
    assert not called.exists()
    # Nor in what stands around the tensors.
    parts = _sequence(pickle.dumps({}, protocol=2), [])
    version = pickle.dumps(1001, protocol=2)
    file.write_bytes(parts.replace(version, pickle.dumps(_Evil(os.mkdir, str(called)), protocol=2), 1))
    with pytest.raises(UserError, match="mkdir"):
        read_torch(file)
    assert not called.exists()


def test_damaged_old_files_are_refused(tmp_path):
    file = tmp_path / "old.bin"
    for content, named in (
        (_sequence(pickle.dumps({}, protocol=2), ["0"]), "its list of storages"),
        (_sequence(pickle.dumps(3, protocol=2), []), "int, not tensors"),
        (_sequence(pickle.dumps({"step": 3}, protocol=2), []), "'step'"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=named):
            read_torch(file)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_torch(tmp_path / "absent.pth")
    plain = tmp_path / "plain.zip"
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(UserError, match=r"data\.pkl"):
        read_torch(plain)
    with pytest.raises(UserError, match="int, not tensors"):
        read_torch(_write(tmp_path / "number.pth", pickle.dumps(3)))
    with pytest.raises(UserError, match="'step'"):
        read_torch(_write(tmp_path / "entry.pth", pickle.dumps({"step": 3})))
    with pytest.raises(UserError, match=r"at 'archive/data\.pkl'"):
        read_torch(_write(tmp_path / "deflated.pth", pickle.dumps({}), compression=zipfile.ZIP_DEFLATED))


def _tensor(offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A pickle as torch writes it, of one float32 tensor over the 64 bytes of storage 0."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return obj if isinstance(obj, tuple) and obj[:1] == ("storage",) else None

        def save_global(self, obj, name=None):
            self.write(b"ctorch._utils\n_rebuild_tensor_v2\n" if obj is np.empty else b"ctorch\nFloatStorage\n")

        dispatch = pickle._Pickler.dispatch | {type: save_global, type(np.empty): save_global, type(len): save_global}

    stream = io.BytesIO()
    storage = ("storage", Storage, "0", "cpu", 16)
    Pickler(stream, 2).dump({"weight": _Evil(np.empty, storage, offset, shape, strides, False, None)})
    return stream.getvalue()


def test_tensors_stay_within_their_storage(tmp_path):
    good = read_torch(_write(tmp_path / "good.pth", _tensor(4, (3, 4), (4, 1))))
    assert good["weight"].read().shape == (3, 4)
    for bad in (_tensor(5, (3, 4), (4, 1)), _tensor(0, (3, 4), (8, 1)), _tensor(-1, (3, 4), (4, 1))):
        with pytest.raises(UserError, match="damaged"):
            read_torch(_write(tmp_path / "bad.pth", bad))
