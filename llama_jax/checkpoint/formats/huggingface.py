"""Weights of a Hugging Face directory: safetensors or `pytorch_model*.bin`, in one file or in shards with an index.

Format: https://github.com/huggingface/safetensors#format. Headers are read and written here, not by its library: a
tensor by its place in a file is read in the same way whatever the file, its pages leave memory with the result, and
files are written tensor after tensor, where the library takes all of them at once.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llama_jax.checkpoint.formats.tensors import BFLOAT16, MAX_DIMS, Tensor, Tensors, stored
from llama_jax.checkpoint.formats.torch_pickle import read_torch
from llama_jax.config import Json, UserError, read_json

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}

MAX_HEADER = 100_000_000  # bytes, by the format

# Weights that other frameworks and tools wrote.
_UNREAD = ("*.h5", "*.msgpack", "*.ckpt*", "*.onnx", "*.npz", "*.ot")


def read_safetensors(file: Path) -> Tensors:
    """Return the tensors of a safetensors file by name, none of them read yet.

    Raises UserError for a missing, damaged or truncated file and for a dtype that numpy has no name for.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            if header_size > min(size - 8, MAX_HEADER):
                raise ValueError("its header is cut off, or longer than the format allows")
            header = json.loads(stream.read(header_size), object_pairs_hook=_once)
        header.pop("__metadata__", None)
        tensors: Tensors = {}
        places = []
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise UserError(f"'{file}' has '{name}' in {entry['dtype']}, which is not supported")
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, begin, end)):
                raise ValueError(f"the shape or the place of '{name}' cannot be")
            if end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the size of '{name}' is wrong")
            tensors[name] = stored(file, 8 + header_size + begin, dtype, shape)
            places.append((begin, end, name))
        at = 0
        for begin, end, name in sorted(places):
            if begin != at:
                raise ValueError(f"'{name}' begins at {begin} where the tensor before it ends at {at}")
            at = end
        if 8 + header_size + at != size:
            raise ValueError(f"it has {size} bytes where its header says {8 + header_size + at}")
        return tensors
    except FileNotFoundError:
        raise UserError(f"'{file}' does not exist") from None
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"'{file}' is truncated or no safetensors file ({error}): download it again") from None


def _once(pairs: list[tuple[str, Any]]) -> Json:
    """Return the object of these names and values. Raises ValueError where a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name in its header is there twice")
    return found


_FORMS: dict[str, Callable[[Path], Tensors]] = {
    "model.safetensors": read_safetensors,
    "pytorch_model.bin": read_torch,
    "consolidated.safetensors": read_safetensors,
}


def read_directory(directory: Path) -> Tensors:
    """Return the tensors of a Hugging Face model directory, in whichever of the forms they are.

    Raises UserError where there are none, a file is missing or damaged, or an index names a file outside `directory`.
    """
    for name, read in _FORMS.items():
        if (file := directory / name).is_file():
            return read(file)
        if (index := directory / f"{name}.index.json").is_file():
            return _read_shards(index, read)
    if len(named := [*directory.glob("gptq_model*.safetensors")]) == 1:  # AutoGPTQ's first name for it
        return read_safetensors(named[0])
    others = sorted(file.name for pattern in _UNREAD for file in directory.glob(pattern))
    but = f"; it has {others[0]}, which is not read: get or save these weights as safetensors" if others else ""
    raise UserError(f"'{directory}' has neither model.safetensors nor pytorch_model.bin nor an index of shards{but}")


def has_weights(directory: Path) -> bool:
    """Return whether a directory has weights under Hugging Face's names."""
    names = ("model.safetensors", "pytorch_model.bin")
    return any((directory / f"{name}{end}").is_file() for name in names for end in ("", ".index.json"))


def _read_shards(index: Path, read: Callable[[Path], Tensors]) -> Tensors:
    """Return the tensors of all files that an index names."""
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise UserError(f"'{index}' has no 'weight_map' from tensor to file: it is damaged")
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        # By name, not by resolved path: in Hugging Face's own cache the files are links to elsewhere.
        if Path(shard).name != shard or shard in ("", ".", ".."):
            raise UserError(f"'{index}' names '{shard}', a file outside its folder: it must name files beside it")
        for name, tensor in read(index.parent / shard).items():
            if name in tensors:
                raise UserError(f"'{name}' is in two of the files that '{index}' names")
            tensors[name] = tensor
    for name, shard in places.items():
        if name not in tensors:
            raise UserError(f"'{index}' says that '{name}' is in '{shard}', but it is not: download it again")
    return tensors


def write_safetensors(file: Path, tensors: Mapping[str, Tensor | np.ndarray]) -> None:
    """Write one safetensors file, tensor after tensor: each is read only when it is written."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            value = tensor.read() if isinstance(tensor, Tensor) else tensor
            assert (value.dtype, value.shape) == (tensor.dtype, tensor.shape), name
            stream.write(np.ascontiguousarray(value).view(np.uint8).reshape(-1).data)
