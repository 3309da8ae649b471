"""Import and export of weights, each ending with a comparison of logits whose result is kept with the weights."""

import contextlib
import dataclasses
import gc
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import zoo
from llama_jax.checkpoint.formats import Cut, Stack, Tensor, Tensors
from llama_jax.checkpoint.formats.huggingface import read_directory, write_safetensors
from llama_jax.checkpoint.formats.llama2c import is_llama2c, read_llama2c
from llama_jax.checkpoint.formats.meta import is_meta, read_meta
from llama_jax.checkpoint.reference import llama_logits
from llama_jax.config import UserError, read_json
from llama_jax.models import (
    Compute,
    DecoderConfig,
    Model,
    ModelConfig,
    abstract_params,
    assemble,
    is_stacked,
    layers_with,
)
from llama_jax.tokenizers import Tokenizer
from llama_jax.tokenizers.loading import FILE_NAMES
from llama_jax.zoo import Weight, llama

RECEIPT = "conversion.json"
MAX_SHARD_BYTES = 5 * 10**9
# Of a large matrix so much is read, permuted and cast at a time.
_BLOCK_BYTES = 1 << 24


class ConversionError(RuntimeError):
    """The converted weights do not compute what the original ones do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Somebody else's weights, opened: nothing of the tensors is read yet."""

    path: Path
    form: Literal["huggingface", "meta", "llama2c"]
    model_type: str
    config: ModelConfig
    tensors: Tensors
    weights: tuple[Weight, ...]
    ignored: tuple[str, ...]
    tied: Mapping[str, str]
    tokenizer: Path | None

    @property
    def witness(self) -> str:
        """What `logits` are computed by."""
        return "numpy" if self.model_type == "llama" else "llama_jax"

    def logits(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 [B, T, V]: of a Llama by the plain numpy model, which reads the tensors in their own layout; of other
        families by the package's own model of them, which the parity tests hold against the original code."""
        if self.witness == "numpy":
            assert isinstance(self.config, DecoderConfig)
            interleaved = self.form != "huggingface"
            return llama_logits(self.config, self.tensors, inputs["tokens"], interleaved=interleaved)
        return params_logits(self.config, load_params(self, abstract_params(self.config)))(inputs)


def open_source(path: str | Path) -> Source:
    """Opens a Hugging Face directory, a Meta directory or a llama2.c `.bin`, told apart by what is in them.

    Raises UserError for anything else, for damaged files and for a config that asks for what is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"'{path}' does not exist")
    tokenizer = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
    if path.is_file():
        if not is_llama2c(path):
            raise UserError(f"'{path}' is no llama2.c .bin; other weights are given as the directory they are in")
        params, tensors = read_llama2c(path)
    elif is_meta(path):
        params, tensors = read_meta(path)
        # Meta's download has the tokenizer beside the directories of the sizes.
        beside = path.parent / FILE_NAMES[0]
        tokenizer = tokenizer or (beside if beside.is_file() else None)
    elif (path / "config.json").is_file():
        data = read_json(path / "config.json")
        if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
            raise UserError(f"'{path / 'config.json'}' has no model_type: it is not a Hugging Face config")
        family = zoo.family(data["model_type"])
        config, tensors = family.from_hf(data), _renamed(path, read_directory(path), getattr(family, "RENAMES", ()))
        if hasattr(family, "read_tensors"):
            tensors = family.read_tensors(data, tensors)
        if hasattr(family, "with_tensors"):
            config = family.with_tensors(config, tensors)
        weights, tied = zoo.weights_of(family, config), getattr(family, "TIED", {})
        model_type = data["model_type"]
        return Source(path, "huggingface", model_type, config, tensors, weights, family.IGNORED, tied, tokenizer)
    else:
        raise UserError(
            f"'{path}' has neither config.json (Hugging Face) nor params.json and consolidated.*.pth (Meta)"
        )
    config = llama.from_meta(params, {name: tensor.shape for name, tensor in tensors.items()})
    form = "llama2c" if path.is_file() else "meta"
    weights, ignored, tied = llama.META_WEIGHTS, llama.META_IGNORED, llama.META_TIED
    return Source(path, form, "llama", config, tensors, weights, ignored, tied, tokenizer)


def _renamed(path: Path, tensors: Tensors, renames: Sequence[tuple[str, str]]) -> Tensors:
    """The tensors under the names of the family's table, where other releases have others."""
    found: Tensors = {}
    for old, tensor in tensors.items():
        name = old
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in found:
            raise UserError(f"'{path}' has '{old}' and another tensor that stands for '{name}'")
        found[name] = tensor
    return found


def load_params(source: Source, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of `source`, by name, in the shapes, dtypes and shardings of `abstract`.

    Streams: beyond what the devices hold, host memory is at most one shard of one stacked parameter. Raises UserError
    for missing, surplus and misshapen tensors before any is read.
    """
    places = _match(source, abstract)
    return {name: _load(*places[name], a) for name, a in abstract.items()}


def _match(source: Source, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, tuple[Weight, list[Tensor]]]:
    """For each parameter its table entry and its tensors, one for each layer that has it."""
    table = {weight.name: weight for weight in source.weights}
    for name in abstract:
        if name not in table:
            raise UserError(f"'{source.path}' can have no parameter '{name}': its format has no name for it")
    owners = layers_with(source.config)
    shapes = {name: a.shape[1:] if name in owners else a.shape for name, a in abstract.items()}
    places: dict[str, tuple[Weight, list[Tensor]]] = {}
    used: set[str] = set()
    for name in abstract:
        weight, tensors = table[name], []
        for layer in owners.get(name, (None,)):
            fused = [
                w
                for w in _sharing(weight, source.weights)
                if w.name in abstract and layer in owners.get(w.name, (None,))
            ]
            tensors.append(_find(source, weight, fused, shapes, layer, used))
        places[name] = (weight, tensors)
    for place in source.tensors.keys() - used:
        if any(re.fullmatch(pattern, place) for pattern in source.ignored):
            continue
        if (original := source.tied.get(place)) in source.tensors:
            # Files of tied models may repeat a tensor.
            if _equal(source.tensors[place], source.tensors[original]):
                continue
            raise UserError(f"'{source.path}' has a '{place}' of its own, and its config says that it is tied")
        raise UserError(f"'{source.path}' has the tensor '{place}', for which its config has no place")
    return places


def _sharing(weight: Weight, table: Sequence[Weight]) -> list[Weight]:
    """All weights that are stored in the same tensor as this one, in order."""
    return [other for other in table if other.source == weight.source]


def _place(weight: Weight, config: ModelConfig, layer: int | None, expert: int | None = None) -> str:
    """The name of the tensor of one layer (and one expert)."""
    after = None if layer is None else len(config.stacks()["layers"]) + layer
    return weight.source.format(layer=layer, after=after, expert=expert)


def _find(
    source: Source,
    weight: Weight,
    fused: list[Weight],
    shapes: Mapping[str, tuple[int, ...]],
    layer: int | None,
    used: set[str],
) -> Tensor:
    """The tensor of a weight in one layer, noted in `used`. Raises UserError where it is not there or wrong."""
    shape = shapes[weight.name]
    experts = range(shape[0]) if "{expert}" in weight.source else (None,)
    found = [_place(weight, source.config, layer, expert) for expert in experts]
    for place in found:
        if place not in source.tensors:
            raise UserError(f"'{source.path}' lacks the tensor '{place}'")
        tensor = source.tensors[place]
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise UserError(f"'{source.path}' has '{place}' in {tensor.dtype}: quantized weights are not supported")
    used |= set(found)
    parts = tuple(source.tensors[place] for place in found)
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"'{source.path}' has '{found[0]}' and its like in different shapes")
    whole = Stack(parts) if experts != (None,) else parts[0]
    sizes = [w.source_shape(shapes[w.name]) for w in fused]
    dim = weight.joined
    expected = (*sizes[0][:dim], sum(size[dim] for size in sizes), *sizes[0][dim + 1 :])
    if whole.shape != expected:
        raise UserError(
            f"'{source.path}' has '{found[0]}' with shape {parts[0].shape}, and its config asks for "
            f"{expected[len(whole.shape) - len(parts[0].shape) :]}"
        )
    if len(fused) == 1:
        return whole
    index = fused.index(weight)
    start = sum(size[dim] for size in sizes[:index])
    return Cut(whole, dim, start, start + sizes[index][dim])


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    rows = max(1, _BLOCK_BYTES // (4 * math.prod(a.shape[1:])))
    blocks = (slice(i, i + rows) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read((block,)), b.read((block,))) for block in blocks)


def _load(weight: Weight, tensors: list[Tensor], a: jax.ShapeDtypeStruct) -> jax.Array:
    sharding = a.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stacked = is_stacked(weight.name)
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(a.shape).items():
        assert index is not None
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, a.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        slices = tuple(slice(*bound) for bound in bounds)
        shard = _host_buffer([stop - start for start, stop in bounds], a.dtype)
        if stacked:
            for row, layer in enumerate(range(*bounds[0])):
                _fill(shard[row], weight, tensors[layer], slices[1:], a.shape[1:])
        else:
            _fill(shard, weight, tensors[0], slices, a.shape)
        arrays += [jax.device_put(shard, device) for device in holders]
        jax.block_until_ready(arrays)
        del shard
        gc.collect(0)  # JAX lets go of what it has copied only at the next collection
    return jax.make_array_from_single_device_arrays(a.shape, sharding, arrays)


def _host_buffer(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory, aligned so that a CPU device takes it over instead of copying it."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype).reshape(shape)


def _fill(out: np.ndarray, weight: Weight, tensor: Tensor, slices: tuple[slice, ...], shape: tuple[int, ...]) -> None:
    """Writes the part `slices` of one layer of a parameter into `out`, block by block."""
    dim = weight.contiguous_dim()
    start, stop = slices[dim].start, slices[dim].stop
    step = max(1, (stop - start) * _BLOCK_BYTES // max(1, 4 * out.size))
    for begin in range(start, stop, step):
        block = slice(begin, min(begin + step, stop))
        wanted = (*slices[:dim], block, *slices[dim + 1 :])
        part = tensor.read(weight.source_slices(wanted, shape))
        place = (*(slice(None),) * dim, slice(block.start - start, block.stop - start))
        out[place] = weight.to_canonical(part, wanted, shape)


Logits = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def params_logits(config: ModelConfig, params: Mapping[str, jax.Array]) -> Logits:
    """The package's own model of these parameters as a function from its inputs by name to float32 logits."""
    model = Model(assemble(config, dict(params), Compute(dtype="float32"), scan=True), _mesh(params))

    def logits(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(model(**{name: jnp.asarray(x, jnp.int32) for name, x in inputs.items()}))

    return logits


def _mesh(params: Mapping[str, jax.Array]) -> jax.sharding.Mesh | None:
    sharding = next(iter(params.values())).sharding
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None  # type: ignore[return-value]


def check_conversion(source: Source, logits: Logits, *, dtype: Any = np.float32) -> dict[str, Any]:
    """Compares the logits of `source` (as `Source.logits` says) with those of the converted weights.

    Returns the receipt. `dtype` is what the converted weights are stored in: where it is narrower than the source's,
    rounding is allowed for. Raises ConversionError on disagreement.
    """
    inputs = source.config.example(np.random.default_rng(0))
    expected = source.logits(inputs)
    difference = float(np.abs(expected - np.asarray(logits(inputs), np.float32)).max())
    std = float(expected.std())
    stored = max(tensor.dtype.itemsize for tensor in source.tensors.values())
    tolerance = std * (1e-3 if np.dtype(dtype).itemsize >= min(stored, 4) else 5e-2)
    if not difference <= tolerance:
        raise ConversionError(
            f"the converted weights differ from '{source.path}': logits by up to {difference:.3g} where "
            f"{tolerance:.3g} is rounding; nothing was kept"
        )
    return {
        "source": source.path.name,
        "form": source.form,
        "tensors": len(source.tensors),
        "model_type": source.model_type,
        "witness": source.witness,
        "tokens_compared": math.prod(expected.shape[:-1]),
        "max_abs_logit_difference": difference,
        "logit_std": std,
        "tolerance": tolerance,
        "versions": {name: version(name) for name in ("llama_jax", "jax", "numpy")},
    }


def write_receipt(directory: Path, receipt: Mapping[str, Any]) -> None:
    """Keeps a receipt beside the weights it is about."""
    (directory / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A folder to write into that becomes `directory` when all went well, and vanishes otherwise.

    Raises UserError where `directory` exists and is not empty.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"'{directory}' exists already: give a new path, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def export_hf(
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    source: Source | None = None,
    model_type: str | None = None,
) -> dict[str, Any]:
    """Writes config.json, safetensors (with an index above 5 GB), tokenizer and receipt; returns the receipt.

    The family is `model_type` where it can express the model, else the first that can.

    The weights keep their dtype. Where `params` were imported from `source`, what was written is compared with that
    too, so that the receipt covers the whole way. Raises UserError for a model that no family on Hugging Face has, and
    for a `directory` that is not empty; ConversionError, leaving nothing behind, where what was written and read again
    computes other logits.
    """
    family, data = _family_of(config, model_type or (source.model_type if source is not None else "llama"))
    data["torch_dtype"] = str(next(iter(params.values())).dtype)
    if tokenizer is not None:
        data["bos_token_id"] = tokenizer.bos_id
        data["eos_token_id"] = (
            list(tokenizer.eos_ids) if len(tokenizer.eos_ids) > 1 else next(iter(tokenizer.eos_ids), None)
        )
    pieces = _pieces(config, params, zoo.weights_of(family, config))
    with new_directory(directory) as folder:
        _write_weights(folder, pieces)
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)
        written = open_source(folder)
        jax_params = {name: jnp.asarray(value) for name, value in params.items()}
        receipt = check_conversion(written, params_logits(config, jax_params))
        receipt |= {"source": "llama_jax", "form": "native"}
        if source is not None:
            receipt = check_conversion(source, written.logits, dtype=next(iter(jax_params.values())).dtype)
        write_receipt(folder, receipt)
    return receipt


def _family_of(config: ModelConfig, preferred: str) -> tuple[Any, dict[str, Any]]:
    """A family that can express `config`, the preferred one before others, and its config.json."""
    refusals = []
    for model_type in sorted(zoo.families(), key=lambda name: name != preferred):
        try:
            return zoo.family(model_type), zoo.family(model_type).to_hf(config)
        except UserError as error:
            refusals.append(str(error))
    raise UserError(f"this model cannot be exported: {'; '.join(dict.fromkeys(refusals))}")


@dataclasses.dataclass(frozen=True)
class _Piece:
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _pieces(
    config: ModelConfig, params: Mapping[str, jax.Array | np.ndarray], weights: tuple[Weight, ...]
) -> list[_Piece]:
    """Every tensor of the export, in the source's layout, its value fetched only when it is written."""
    table = {weight.name: weight for weight in weights}
    owners = layers_with(config)
    pieces: dict[str, _Piece] = {}
    for name, value in params.items():
        if name not in table:
            raise UserError(f"parameter '{name}' has no place in the exported format")
        for row, layer in enumerate(owners.get(name, (None,))):
            own = () if layer is None else (row,)
            fused = []
            for w in _sharing(table[name], weights):
                if w.name in params and layer in (own_layers := owners.get(w.name, (None,))):
                    fused.append((w, params[w.name], () if layer is None else (own_layers.index(layer),)))
            experts = range(value.shape[len(own)]) if "{expert}" in table[name].source else (None,)
            for expert in experts:
                place = _place(table[name], config, layer, expert)
                if place not in pieces:
                    pieces[place] = _piece(place, fused, expert)
    return list(pieces.values())


def _piece(place: str, parts: list[tuple[Weight, Any, tuple[int, ...]]], expert: int | None) -> _Piece:
    """The tensor that joins these weights, each of them with the array it is in and its index there."""
    dim = parts[0][0].joined

    def fetch() -> np.ndarray:
        found = []
        for weight, value, index in parts:
            if expert is None:
                found.append(weight.to_source(_fetch(value, index)))
            else:
                found.append(weight.to_source(_fetch(value, (*index, expert))[None]))
        whole = found[0] if len(found) == 1 else np.concatenate(found, axis=dim)
        return whole if expert is None else whole[0]

    shapes = [weight.source_shape(value.shape[len(index) :]) for weight, value, index in parts]
    shape = (*shapes[0][:dim], sum(own[dim] for own in shapes), *shapes[0][dim + 1 :])
    return _Piece(place, np.dtype(parts[0][1].dtype), shape if expert is None else shape[1:], fetch)


def _fetch(value: jax.Array | np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """The part of a parameter at these first indices (layer, expert) on the host, without gathering the others."""
    if not isinstance(value, jax.Array):
        return np.asarray(value[index])
    if not value.is_fully_addressable:
        raise UserError(
            "exporting needs all weights on one host: load the checkpoint in a single process and export there"
        )
    depth = len(index)
    out = np.empty(value.shape[depth:], value.dtype)
    for shard in value.addressable_shards:
        if shard.replica_id:
            continue
        starts = [own.indices(size)[:2] for own, size in zip(shard.index, value.shape, strict=True)][:depth]
        if all(start <= i < stop for i, (start, stop) in zip(index, starts, strict=True)):
            with jax.set_mesh(None):  # a caller's mesh would claim the slicing for all of its devices
                local = tuple(i - start for i, (start, _) in zip(index, starts, strict=True))
                out[shard.index[depth:]] = np.asarray(shard.data[local])
    return out


def _write_weights(folder: Path, pieces: list[_Piece]) -> None:
    files: list[list[_Piece]] = [[]]
    for piece in pieces:
        if files[-1] and sum(p.nbytes for p in files[-1]) + piece.nbytes > MAX_SHARD_BYTES:
            files.append([])
        files[-1].append(piece)
    places = {}
    for i, content in enumerate(files):
        name = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / name, [(p.name, p.dtype, p.shape) for p in content], (p.value() for p in content))
        places |= {piece.name: name for piece in content}
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(p.nbytes for p in pieces)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
