"""Weights of others: where each parameter lies in their files, and the one loader that streams it to its devices."""

import dataclasses
import gc
import math
import re
from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import zoo
from llama_jax.checkpoint.formats import Cut, Split, Stack, Tensor, Tensors
from llama_jax.checkpoint.formats.block_scaled import block_scaled
from llama_jax.checkpoint.formats.huggingface import has_weights, read_directory
from llama_jax.checkpoint.formats.llama2c import is_llama2c, read_llama2c
from llama_jax.checkpoint.formats.meta import is_meta, read_meta
from llama_jax.checkpoint.generation import generation_keys
from llama_jax.checkpoint.names import brought_to, refuse_adapter
from llama_jax.config import UserError, read_json
from llama_jax.models import ModelConfig, is_stacked, layers_with
from llama_jax.tokenizers import FILE_NAMES
from llama_jax.zoo import Weight, llama, without_keys

# Of a large matrix so much is read, permuted and cast at a time.
_BLOCK_BYTES = 1 << 24


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


def open_source(path: str | Path, ignore_config_keys: Collection[str] = ()) -> Source:
    """Opens a Hugging Face directory, a Meta directory or a llama2.c `.bin`, told apart by what is in them.

    `ignore_config_keys` are left out of the config that describes the model, as if they were not there. Raises
    UserError for anything else, for damaged files, for adapters and for a config that asks for what is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"'{path}' does not exist")
    if path.is_file():
        if not is_llama2c(path):
            raise UserError(f"'{path}' is no llama2.c .bin; other weights are given as the directory they are in")
        params, tensors = read_llama2c(path)
        config = llama.from_meta(without_keys(params, ignore_config_keys), _shapes(tensors))
        return _source(path, "llama2c", "llama", config, tensors, None)
    refuse_adapter(path)
    tokenizer = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
    has_config = (path / "config.json").is_file()
    if is_meta(path) and not (has_config and has_weights(path)):
        params, tensors = read_meta(path)
        model_type = "mixtral" if params.get("moe") else "llama"
        family = zoo.family(model_type)
        tensors = _brought(path, tensors, family, family.META_WEIGHTS, "META_")
        config = family.from_meta(without_keys(params, ignore_config_keys), _shapes(tensors))
        # Meta's download has the tokenizer beside the directories of the sizes.
        beside = path.parent / "tokenizer.model"
        return _source(path, "meta", model_type, config, tensors, tokenizer or (beside if beside.is_file() else None))
    if not has_config:
        raise UserError(
            f"'{path}' has neither config.json (Hugging Face) nor params.json and consolidated.*.pth (Meta)"
        )
    data = read_json(path / "config.json")
    if not isinstance(data, dict):
        raise UserError(f"'{path / 'config.json'}' has no model_type: it is not a Hugging Face config")
    elsewhere = generation_keys(path)
    data = without_keys(data, [key for key in ignore_config_keys if key in data or key not in elsewhere])
    model_type = zoo.model_type_of(data, path / "config.json")
    family = zoo.family(model_type)
    config, tensors = family.from_hf(data), read_directory(path)
    form = "huggingface"
    if "tok_embeddings.weight" in tensors and hasattr(family, "META_WEIGHTS"):  # Meta's names, in one file
        form, tensors = "meta", _brought(path, tensors, family, family.META_WEIGHTS, "META_")
    else:
        tensors = _brought(path, tensors, family, zoo.weights_of(family, config), "")
    if quantization := data.get("quantization_config"):  # of a kind that `from_hf` has found to be this one
        tensors = block_scaled(path, tensors, quantization["weight_block_size"])
    if hasattr(family, "with_tensors"):
        config = family.with_tensors(config, tensors)
    return _source(path, form, model_type, config, tensors, tokenizer)


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _brought(path: Path, tensors: Tensors, family: ModuleType, weights: Sequence[Weight], prefix: str) -> Tensors:
    """The tensors under the names of a family's table, or (`prefix`) of that of Meta's names."""
    ignored, tied = getattr(family, f"{prefix}IGNORED", ()), getattr(family, f"{prefix}TIED", {})
    renames = () if prefix else getattr(family, "RENAMES", ())
    return brought_to(path, tensors, weights, [*ignored, *map(re.escape, tied)], renames)


def _source(
    path: Path,
    form: Literal["huggingface", "meta", "llama2c"],
    model_type: str,
    config: ModelConfig,
    tensors: Tensors,
    tokenizer: Path | None,
) -> Source:
    family, prefix = zoo.family(model_type), "" if form == "huggingface" else "META_"
    weights = family.META_WEIGHTS if prefix else zoo.weights_of(family, config)
    ignored, tied = getattr(family, f"{prefix}IGNORED", ()), getattr(family, f"{prefix}TIED", {})
    return Source(path, form, model_type, config, tensors, weights, ignored, tied, tokenizer)


def load_params(source: Source, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of `source`, by name, in the shapes, dtypes and shardings of `abstract`.

    Streams: beyond what the devices hold, host memory is at most one shard of one stacked parameter. Raises UserError
    for missing, surplus and misshapen tensors before any is read.
    """
    places = _match(source, abstract)
    return {name: _load(*places[name], a) for name, a in abstract.items()}


def as_stored(source: Source, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """`abstract` with the dtypes of the source's own tensors, of several the widest; raises as `load_params`."""
    places = _match(source, abstract)
    return {
        name: jax.ShapeDtypeStruct(
            a.shape, jnp.result_type(*(tensor.dtype for tensor in places[name][1])), sharding=a.sharding
        )
        for name, a in abstract.items()
    }


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
            fused = sharing(weight, source.weights, abstract, owners, layer)
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


def sharing(
    weight: Weight,
    table: Sequence[Weight],
    names: Container[str],
    owners: Mapping[str, tuple[int, ...]],
    layer: int | None,
) -> list[Weight]:
    """Those of `names` that this layer stores in the same tensor as this weight, in order; `owners` says which layers
    have a name."""
    return [w for w in table if w.source == weight.source and w.name in names and layer in owners.get(w.name, (None,))]


def place_of(weight: Weight, config: ModelConfig, layer: int | None, expert: int | None = None) -> str:
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
    found = [place_of(weight, source.config, layer, expert) for expert in experts]
    for place in found:
        if place not in source.tensors:
            head = ": it is a model without a head that writes" if weight.name.startswith("lm_head.") else ""
            raise UserError(f"'{source.path}' lacks the tensor '{place}'{head}")
        tensor = source.tensors[place]
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise UserError(f"'{source.path}' has '{place}' in {tensor.dtype}: quantized weights are not supported")
    used |= set(found)
    parts = tuple(source.tensors[place] for place in found)
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"'{source.path}' has '{found[0]}' and its like in different shapes")
    whole = Stack(parts) if experts != (None,) else parts[0]
    sizes = [w.source_shape(shapes[w.name]) for w in fused]
    if weight.merged and whole.shape[0] % sizes[0][0] == 0:
        whole = Split(whole, sizes[0][0])
    dim = weight.joined
    expected = (*sizes[0][:dim], sum(size[dim] for size in sizes), *sizes[0][dim + 1 :])
    if whole.shape != expected:
        in_file = weight.in_file(expected)
        raise UserError(
            f"'{source.path}' has '{found[0]}' with shape {parts[0].shape}, and its config asks for "
            f"{in_file[len(in_file) - len(parts[0].shape) :]}"
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
