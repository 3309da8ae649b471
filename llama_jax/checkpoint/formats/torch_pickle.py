"""PyTorch's checkpoints (`.pth`, `.bin`) without PyTorch, and without executing anything they contain.

A checkpoint is a zip of `data.pkl`, a pickle of the tensors' shapes and strides, and one stored entry `data/N` for
each storage. Before PyTorch 1.6 it was five pickles one after another (a magic number, a version, the sizes of the
machine's numbers, the tensors, the storages' keys) and behind them each storage: an int64 count, then its elements. A
pickle can call whatever it can name and change whatever it was given; this reader gives it the names in `_ALLOWED` and
the opcodes in `_OPCODES` and no others.
"""

import collections
import dataclasses
import io
import math
import mmap
import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoint.formats.tensors import BFLOAT16, MAX_DIMS, Tensor, Tensors, extent, stored
from llama_jax.config import UserError

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": BFLOAT16,
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_SMALL = 1 << 20  # bytes of a tensor that may be larger than its storage
# First bytes of files from before PyTorch 1.6: a pickled long of ten bytes, in protocol 2 (PyTorch's default) or a
# later one, which has frames.
_MAGIC = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _StorageType:
    """A class of torch's storages, as pickles name it."""

    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    """A storage's place in its file, in bytes."""

    file: Path
    offset: int
    nbytes: int
    dtype: np.dtype


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage) or not len(shape) == len(strides) <= MAX_DIMS:
        raise pickle.UnpicklingError("a tensor without a storage")
    if not all(isinstance(n, int) and 0 <= n < 1 << 63 for n in (offset, *shape, *strides)):
        raise pickle.UnpicklingError("a tensor with impossible sizes")
    itemsize = storage.dtype.itemsize
    repeats = math.prod(shape) * itemsize > max(storage.nbytes, _SMALL)  # of what has a stride of 0
    if (offset + extent(shape, strides)) * itemsize > storage.nbytes or repeats:
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return stored(storage.file, storage.offset + offset * itemsize, storage.dtype, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _ordered(*items: Any) -> dict[Any, Any]:
    if items not in ((), ([],)):  # one long list could be given to many of them
        raise pickle.UnpicklingError("a dictionary made of a list")
    return collections.OrderedDict()


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
} | {("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()}


# What torch.save writes, in any protocol from 2 on. Without the others nothing is allocated before it is read, and no
# key of a dictionary is a tuple before `_set` has seen it: one that is nested deep ends the process when it is hashed.
_OPCODES = b"\x80\x95.(N\x88\x89JKM\x8a\x8bGXTU\x8c\x8dBC})\x85\x86\x87t]aecsu\x93RbQqrjh\x940"  # from PROTO to POP
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]  # Python's own: its memo is a dictionary, C's an array


class _Unpickler(_Base):
    """Unpickler of tensors in `file`: `storages` has (offset, nbytes) of each storage by its key.

    Where it is None, `found` collects the storages that the pickle names: dtype and number of elements by key.
    """

    dispatch = {code: _Base.dispatch[code] for code in _OPCODES}  # noqa: RUF012

    def __init__(self, stream: mmap.mmap | io.BytesIO, storages: dict[str, tuple[int, int]] | None, file: Path):
        super().__init__(stream, encoding="utf-8")
        self._storages, self._file = storages, file
        self.found: dict[str, tuple[np.dtype, int]] = {}

    def _set(self) -> None:
        values = self.pop_mark()
        if any(isinstance(key, tuple) for key in values[::2]):
            raise pickle.UnpicklingError("a key that is no name")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _set_one(self) -> None:
        self.metastack.append(self.stack[:-2])
        self.stack = self.stack[-2:]
        self._set()

    def _build(self) -> None:
        self.stack.pop()  # the state of an OrderedDict, which nobody needs: no object is changed

    dispatch |= {pickle.SETITEMS[0]: _set, pickle.SETITEM[0]: _set_one, pickle.BUILD[0]: _build}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (found := _ALLOWED.get((module_name, global_name))) is None:
            raise UserError(
                f"'{self._file}' wants to call '{module_name}.{global_name}', which a weight file has no need of: "
                "get a safetensors version of it"
            )
        return found

    def persistent_load(self, pid: Any, /) -> Any:
        kind, storage_type, key = pid[:3]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"an unknown storage {pid!r}")
        if self._storages is None:
            size = pid[4]
            if pid[5:] != (None,):
                raise pickle.UnpicklingError("a storage that is a part of another")
            if (
                not isinstance(size, int)
                or size < 0
                or self.found.setdefault(key, (storage_type.dtype, size))[1] != size
            ):
                raise pickle.UnpicklingError(f"a storage of {size!r} elements")
            return _Storage(self._file, 0, size * storage_type.dtype.itemsize, storage_type.dtype)
        if key not in self._storages:
            raise pickle.UnpicklingError(f"an unknown storage {pid!r}")
        return _Storage(self._file, *self._storages[key], storage_type.dtype)


def read_torch(file: Path) -> Tensors:
    """Return the tensors of a `.pth` or `.bin` file by name, none of them read yet.

    Raises UserError for a missing, damaged or truncated file, and for a pickle that names anything but tensors.
    """
    try:
        if file.is_file() and (tensors := _read_sequence(file)) is not None:
            return tensors
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, file)
    except FileNotFoundError:
        raise UserError(f"'{file}' does not exist") from None
    except OSError as error:
        raise UserError(f"'{file.name}' cannot be read ({error.strerror})") from None
    except zipfile.BadZipFile:
        raise UserError(f"'{file}' is not a PyTorch checkpoint, or it is truncated: download it again") from None
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"'{file}' is damaged ({str(error)[:200]}): download it again") from None


def _read_archive(archive: zipfile.ZipFile, file: Path) -> Tensors:
    """Return the tensors of PyTorch's zip format."""
    pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise UserError(f"'{file}' is a zip file but no PyTorch checkpoint: it lacks data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    for entry in archive.infolist():  # no member is larger than the file
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(f"'{file}' is damaged at '{entry.filename}': download it again")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise UserError(f"'{file}' was written on a big-endian machine: convert it to safetensors there")
    storages = {}
    size = file.stat().st_size
    with open(file, "rb") as stream:
        for entry in archive.infolist():
            if not entry.filename.startswith(f"{root}data/"):
                continue
            # The local header's extra field may be longer than the directory's: PyTorch pads with it.
            stream.seek(entry.header_offset)
            name_length, extra_length = struct.unpack("<26xHH", stream.read(30))
            begin = entry.header_offset + 30 + name_length + extra_length
            if begin + entry.file_size > size:
                raise UserError(f"'{file}' is damaged at '{entry.filename}': download it again")
            storages[entry.filename.removeprefix(f"{root}data/")] = (begin, entry.file_size)
    return _tensors(_Unpickler(io.BytesIO(archive.read(pickles[0])), storages, file).load(), file)


def _read_sequence(file: Path) -> Tensors | None:
    """Return the tensors of a file of PyTorch before 1.6, or None for any other file."""
    with open(file, "rb") as opened:
        if _MAGIC.match(opened.read(32)) is None:
            return None
        # A map is not read beyond its end, whatever length a pickle asks for.
        stream = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

        def load(storages: dict[str, tuple[int, int]] | None) -> tuple[Any, _Unpickler]:
            unpickler = _Unpickler(stream, storages, file)
            return unpickler.load(), unpickler

        load({})
        version, machine = load({})[0], load({})[0]
        if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UserError(f"'{file}' is of another version or machine: convert it to safetensors with PyTorch")
        # The places of storages are known only behind the pickle that cuts tensors out of them: it is read twice.
        begin = stream.tell()
        _, first = load(None)
        keys = load({})[0]
        end, size = stream.tell(), file.stat().st_size
        if not isinstance(keys, list) or sorted(keys) != sorted(first.found):
            raise pickle.UnpicklingError("its list of storages is not that of its tensors")
        storages = {}
        for key in keys:
            dtype, count = first.found[key]
            stream.seek(end)
            if stream.read(8) != struct.pack("<q", count) or end + 8 + count * dtype.itemsize > size:
                raise UserError(f"'{file}' is truncated at storage '{key}': download it again")
            storages[key] = (end + 8, count * dtype.itemsize)
            end += 8 + count * dtype.itemsize
        stream.seek(begin)
        return _tensors(load(storages)[0], file)


def _tensors(state: Any, file: Path) -> Tensors:
    """Return `state`, what a file's pickle holds, checked to be tensors by name."""
    if not isinstance(state, dict):
        raise UserError(f"'{file}' holds a {type(state).__name__}, not tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"'{file}' holds a {type(tensor).__name__} under '{name}' where a tensor should be")
    return dict(state)
