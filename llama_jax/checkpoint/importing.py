"""Weights of other projects: find what a directory holds, and stream it to the devices of a mesh."""

import dataclasses
import gc
import math
import re
from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import zoo
from llama_jax.checkpoint.formats import (
    BLOCK_BYTES,
    Tensor,
    Tensors,
    architecture_of,
    config_json,
    cut,
    dequantized,
    equal,
    from_mxfp4,
    has_weights,
    is_llama2c,
    is_meta,
    item,
    read_directory,
    read_gguf,
    read_llama2c,
    read_meta,
    read_quantization,
    split,
    stack,
    with_scales,
)
from llama_jax.checkpoint.generation import generation_keys
from llama_jax.config import Json, UserError, read_json
from llama_jax.gguf_header import gguf_file, is_gguf, read_header
from llama_jax.models import ModelConfig, is_stacked, layers_with
from llama_jax.tokenizers import FILE_NAMES
from llama_jax.zoo import TensorNames, WeightMapping, without_keys

type Form = Literal["huggingface", "meta", "llama2c", "gguf"]

# Prefixes of training tools, anywhere in a name.
_WRAPPER = re.compile(r"(?<![^.])(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Computed, not trained: tables of rotary positions, and the numbers of positions.
_COMPUTED = re.compile(r"(.*\.)?(rotary(_pos)?_emb\..*|rope\.freqs|position_ids)")
_EXPERTS = re.compile(r"(?P<place>.*\.experts)\.(?P<name>gate_up_proj|down_proj)(\.weight)?(?P<scale>_scale_inv)?")
# Suffixes of the names of quantized weights, and the tool that writes them.
_QUANTIZED = {
    ".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".absmax": "bitsandbytes", ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes", ".scales": "MLX",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Weights of another project, opened: no tensor is read yet.

    `tensors` have the names of the table `names`; `tokenizer` is the path of the tokenizer's file, None without one.
    """

    path: Path
    form: Form
    model_type: str
    config: ModelConfig
    tensors: Tensors
    names: TensorNames
    tokenizer: Path | None = None


def open_source(path: str | Path, ignore_config_keys: Collection[str] = ()) -> WeightSource:
    """Open a Hugging Face or Meta directory, a GGUF file or a llama2.c `.bin`, recognized by their content.

    A directory without other weights may have one GGUF model.
    `ignore_config_keys` are left out of the config that describes the model. Raises UserError for anything else, for
    damaged files, for adapters and for a config that asks for what is not supported.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"'{path}' does not exist")
    has_other = path.is_file() or has_weights(path) or is_meta(path)
    model = path if has_other else gguf_file(path)
    if model is not None and is_gguf(model):
        return _open_gguf(model, ignore_config_keys)
    if path.is_file():
        if not is_llama2c(path):
            raise UserError(f"'{path}' is no GGUF file and no llama2.c .bin; others are given as their directory")
        return _open_meta(path, "llama2c", *read_llama2c(path), ignore_config_keys)
    _refuse_adapter(path)
    tokenizer = next((path / name for name in FILE_NAMES if (path / name).is_file()), None)
    has_config = (path / "config.json").is_file()
    if is_meta(path) and not (has_config and has_weights(path)):
        # Meta's download has the tokenizer next to the directories of the sizes.
        if tokenizer is None and (path.parent / "tokenizer.model").is_file():
            tokenizer = path.parent / "tokenizer.model"
        return _open_meta(path, "meta", *read_meta(path), ignore_config_keys, tokenizer)
    if not has_config:
        raise UserError(
            f"'{path}' has neither config.json (Hugging Face) nor params.json and consolidated.* (Meta, Mistral): give "
            "the directory of a run or of a model"
        )
    return _open_huggingface(path, ignore_config_keys, tokenizer)


def _open_meta(
    path: Path,
    form: Form,
    params: Json,
    tensors: Tensors,
    ignore_config_keys: Collection[str],
    tokenizer: Path | None = None,
) -> WeightSource:
    """Return the source of a `params.json` and tensors with Meta's names."""
    model_type = zoo.model_type_of_params(params)
    meta = zoo.family(model_type).meta
    assert meta is not None
    tensors = rename_tensors(path, tensors, meta.names)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = meta.from_meta(without_keys(params, ignore_config_keys), shapes)
    return WeightSource(path, form, model_type, config, tensors, meta.names, tokenizer)


def _open_gguf(path: Path, ignore_config_keys: Collection[str]) -> WeightSource:
    """Return the source of a GGUF file."""
    header = read_header(path)
    header = dataclasses.replace(header, metadata=without_keys(header.metadata, ignore_config_keys))
    family, data = zoo.family(architecture_of(path, header).model_type), config_json(path, header)
    try:
        config = family.from_hf(data)
    except UserError as error:
        raise UserError(str(error).replace("config.json", f"'{path}', read as config.json,")) from None
    names = family.names_of(config) if family.meta is None else family.meta.names
    tensors = rename_tensors(path, read_gguf(path, header, data), names)
    tokenizer = path if "tokenizer.ggml.tokens" in header.metadata else None
    return WeightSource(path, "gguf", family.name, config, tensors, names, tokenizer)


def _open_huggingface(path: Path, ignore_config_keys: Collection[str], tokenizer: Path | None) -> WeightSource:
    """Return the source of a directory with a `config.json`."""
    data = read_json(path / "config.json")
    if not isinstance(data, dict):
        raise UserError(f"'{path / 'config.json'}' has no model_type: it is not a Hugging Face config")
    elsewhere = generation_keys(path)
    data = without_keys(data, [key for key in ignore_config_keys if key in data or key not in elsewhere])
    model_type = zoo.model_type_of(data, path / "config.json")
    family, zeros = zoo.family(model_type), []
    if (quantized := read_quantization(path, data)) is not None:
        data.pop("quantization_config", None)
    config, tensors = family.from_hf(data), from_mxfp4(path, read_directory(path))
    if quantized is not None:
        tensors, zeros = dequantized(path, tensors, quantized, inputs_first=model_type == "gpt2")
    form, names = "huggingface", family.names_of(config)
    if family.meta is not None and "tok_embeddings.weight" in tensors:  # Meta's names, in one file
        form, names = "meta", family.meta.names
    tensors = rename_tensors(path, tensors, names)
    if block := (data.get("quantization_config") or {}).get("weight_block_size"):  # of fp8 alone
        tensors = with_scales(path, tensors, block)
    if family.with_tensors is not None:
        config = family.with_tensors(config, tensors)
        names = family.names_of(config) if form == "huggingface" else names
    if zeros:  # biases of zeros that the model may lack
        names = dataclasses.replace(names, ignored=(*names.ignored, *map(re.escape, zeros)))
    return WeightSource(path, form, model_type, config, tensors, names, tokenizer)


def _refuse_adapter(directory: Path) -> None:
    """Raise UserError where a directory has an adapter (LoRA and the like), which changes its weights."""
    for file in (directory / "adapter_config.json", *sorted(directory.glob("adapter_model.*"))):
        if file.is_file():
            raise UserError(
                f"'{directory}' has {file.name}: adapters are not merged here, so merge it with PEFT "
                "(merge_and_unload), save the whole model and load that"
            )


def rename_tensors(path: Path, tensors: Tensors, names: TensorNames) -> Tensors:
    """Return the tensors of `path` under the names of a family's table, without those that are computed.

    Training tools wrap models and so prefix names, a trunk is saved without the prefix that it has in the whole model,
    and experts are stored one by one or as one tensor. Names that the table does not have stay, to be refused by name.
    Raises UserError for weights that are quantized or of an adapter, and for two tensors of one name.
    """
    sources = [weight.source for weight in names.weights]
    patterns = [re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(source)) for source in sources]
    is_known = re.compile("|".join([*patterns, *names.ignored, *map(re.escape, names.tied)]))
    prefixes = dict.fromkeys(f"{source.partition('.')[0]}." for source in sources if "." in source)
    found: Tensors = {}
    for old, tensor in _separate_experts(tensors, is_known).items():
        name = _WRAPPER.sub("", old)
        if "lora_" in name:
            raise UserError(f"'{path}' has '{old}' of an adapter: merge it with PEFT (merge_and_unload) first")
        if tool := next((tool for end, tool in _QUANTIZED.items() if name.endswith(end)), None):
            raise UserError(
                f"'{path}' has '{old}', of weights that {tool} quantized: take a release of these weights that is "
                "not quantized"
            )
        if _COMPUTED.fullmatch(name):
            continue
        for pattern, replacement in names.renames:
            name = re.sub(pattern, replacement, name)
        if not is_known.fullmatch(name):
            name = next((prefix + name for prefix in prefixes if is_known.fullmatch(prefix + name)), name)
        if name in found:
            raise UserError(f"'{path}' has '{old}' and another tensor of the name '{name}'")
        found[name] = tensor
    return found


def _separate_experts(tensors: Tensors, is_known: re.Pattern[str]) -> Tensors:
    """Return the tensors with one for each expert where a layer has one for all, and the table has not (`is_known`):

    gate and up projection [E, 2F, D], and down projection [E, D, F].
    """
    found: Tensors = {}
    for name, tensor in tensors.items():
        match = None if is_known.search(name) else _EXPERTS.fullmatch(name)
        if match is None or len(tensor.shape) != 3:
            found[name] = tensor
            continue
        for i in range(tensor.shape[0]):
            expert = item(tensor, i)
            parts = {"down_proj": expert}
            if match["name"] == "gate_up_proj":
                rows = expert.shape[0]
                parts = {"gate_proj": cut(expert, 0, 0, rows // 2), "up_proj": cut(expert, 0, rows // 2, rows)}
            suffix = f"weight{match['scale'] or ''}"
            found |= {f"{match['place']}.{i}.{part}.{suffix}": value for part, value in parts.items()}
    return found


def load_params(source: WeightSource, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return the parameters of `source`, by name, in the shapes, dtypes and shardings of `abstract`.

    Streams: beyond what the devices hold, host memory is at most one shard of one stacked parameter. Raises UserError
    for missing, surplus and misshapen tensors before any is read.
    """
    places = _match(source, abstract)
    return {name: _load(*places[name], a) for name, a in abstract.items()}


def stored_dtypes(
    source: WeightSource, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return `abstract` with the dtypes of the source's tensors, of several the widest; raises as `load_params`."""
    places = _match(source, abstract)
    dtypes = {name: jnp.result_type(*(tensor.dtype for tensor in tensors)) for name, (_, tensors) in places.items()}
    return {n: jax.ShapeDtypeStruct(a.shape, dtypes[n], sharding=a.sharding) for n, a in abstract.items()}


def _match(
    source: WeightSource, abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, tuple[WeightMapping, list[Tensor]]]:
    """Return for each parameter its table entry and its tensors, one for each layer that has it."""
    weights, tied = source.names.weights, source.names.tied
    table = {weight.name: weight for weight in weights}
    for name in abstract:
        if name not in table:
            raise UserError(f"'{source.path}' can have no parameter '{name}': its format has no name for it")
    owners = layers_with(source.config)
    shapes = {name: a.shape[1:] if name in owners else a.shape for name, a in abstract.items()}
    places: dict[str, tuple[WeightMapping, list[Tensor]]] = {}
    used: set[str] = set()
    for name in abstract:
        weight, tensors = table[name], []
        for layer in owners.get(name, (None,)):
            fused = weights_of_tensor(weight, weights, abstract, owners, layer)
            experts = range(shapes[name][0]) if "{expert}" in weight.source else (None,)
            found = [tensor_name(weight, source.config, layer, expert) for expert in experts]
            tensors.append(_layer_tensor(source, weight, fused, shapes, found))
            used |= set(found)
        places[name] = (weight, tensors)
    for name in source.tensors.keys() - used:
        if any(re.fullmatch(pattern, name) for pattern in source.names.ignored):
            continue
        if (original := tied.get(name)) in source.tensors:
            # Files of tied models may repeat a tensor.
            if equal(source.tensors[name], source.tensors[original]):
                continue
            raise UserError(f"'{source.path}' has a separate '{name}', which is tied in its config")
        raise UserError(f"'{source.path}' has the tensor '{name}', for which its config has no place")
    return places


def weights_of_tensor(
    weight: WeightMapping,
    table: Sequence[WeightMapping],
    names: Container[str],
    owners: Mapping[str, tuple[int, ...]],
    layer: int | None,
) -> list[WeightMapping]:
    """Return those of `names` that this layer stores in one tensor with this weight, in the order of the table.

    `owners` are the layers that have a parameter, by its name.
    """
    return [w for w in table if w.source == weight.source and w.name in names and layer in owners.get(w.name, (None,))]


def tensor_name(weight: WeightMapping, config: ModelConfig, layer: int | None, expert: int | None = None) -> str:
    """Return the name of the tensor of one layer (and one expert)."""
    after = None if layer is None else len(config.stacks()["layers"]) + layer
    return weight.source.format(layer=layer, after=after, expert=expert)


def _layer_tensor(
    source: WeightSource,
    weight: WeightMapping,
    fused: Sequence[WeightMapping],
    shapes: Mapping[str, tuple[int, ...]],
    names: Sequence[str],
) -> Tensor:
    """Return the tensor of a weight in one layer: `names` are of its experts, or one name; `fused` share the tensor.

    Raises UserError where it is missing, quantized or of another shape.
    """
    for name in names:
        if name not in source.tensors:
            head = ": it is a model without a head that writes" if weight.name.startswith("lm_head.") else ""
            raise UserError(f"'{source.path}' lacks the tensor '{name}'{head}")
        tensor = source.tensors[name]
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise UserError(f"'{source.path}' has '{name}' in {tensor.dtype}: quantized weights are not supported")
    parts = [source.tensors[name] for name in names]
    if len({part.shape for part in parts}) > 1:
        raise UserError(f"'{source.path}' has '{names[0]}' and its like in different shapes")
    whole = stack(parts) if "{expert}" in weight.source else parts[0]
    sizes = [w.source_shape(shapes[w.name]) for w in fused]
    dim = weight.joined
    if weight.merged and len(whole.shape) >= dim and whole.shape[dim - 1] % sizes[0][dim - 1] == 0:
        whole = split(whole, dim - 1, sizes[0][dim - 1])
    expected = (*sizes[0][:dim], sum(size[dim] for size in sizes), *sizes[0][dim + 1 :])
    if whole.shape != expected:
        in_file = weight.in_file(expected)
        raise UserError(
            f"'{source.path}' has '{names[0]}' with shape {parts[0].shape}, and its config asks for "
            f"{in_file[len(in_file) - len(parts[0].shape) :]}"
        )
    if len(fused) == 1:
        return whole
    index = fused.index(weight)
    start = sum(size[dim] for size in sizes[:index])
    return cut(whole, dim, start, start + sizes[index][dim])


def _load(weight: WeightMapping, tensors: Sequence[Tensor], a: jax.ShapeDtypeStruct) -> jax.Array:
    """Return the parameter `a` (shape, dtype, sharding), read shard by shard from the tensors of its layers."""
    sharding = a.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    # Devices that hold the same part: it is read once for all of them.
    devices: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(a.shape).items():
        assert index is not None
        bounds = tuple(s.indices(size)[:2] for s, size in zip(index, a.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, holders in devices.items():
        slices = tuple(slice(*bound) for bound in bounds)
        shard = _host_buffer([stop - start for start, stop in bounds], a.dtype)
        if is_stacked(weight.name):
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
    """Return uninitialised memory, aligned so that a CPU device takes it over instead of copying it."""
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : raw.size - 64 + start].view(dtype).reshape(shape)


def _fill(
    out: np.ndarray, weight: WeightMapping, tensor: Tensor, slices: tuple[slice, ...], shape: tuple[int, ...]
) -> None:
    """Write the part `slices` of one layer of a parameter of `shape` into `out`, block by block."""
    dim = weight.contiguous_dim()
    start, stop = slices[dim].start, slices[dim].stop
    step = max(1, (stop - start) * BLOCK_BYTES // max(1, 4 * out.size))
    for begin in range(start, stop, step):
        block = slice(begin, min(begin + step, stop))
        wanted = (*slices[:dim], block, *slices[dim + 1 :])
        part = tensor.read(weight.source_slices(wanted, shape))
        place = (*(slice(None),) * dim, slice(block.start - start, block.stop - start))
        out[place] = weight.to_canonical(part, wanted, shape)
