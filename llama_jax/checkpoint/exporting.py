"""Export of a model as a Hugging Face directory that transformers reads."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import zoo
from llama_jax.checkpoint.formats import Slices, Tensor, Tensors, write_safetensors
from llama_jax.checkpoint.generation import GenerationSettings, completed, special_tokens, write_generation
from llama_jax.checkpoint.importing import WeightSource, open_source, tensor_name, weights_of_tensor
from llama_jax.checkpoint.manifest import write_manifest
from llama_jax.checkpoint.verifying import check_conversion, params_logits, source_logits, write_report
from llama_jax.config import Json, UserError
from llama_jax.data import ChatTemplate, turn_ends
from llama_jax.files import replacing, write_files
from llama_jax.models import ModelConfig, layers_with
from llama_jax.remote import as_local, check_destination, uploaded
from llama_jax.tokenizers import TEMPLATE_FILE, Tokenizer
from llama_jax.zoo import Family, WeightMapping

MAX_SHARD_BYTES = 5 * 10**9

type Params = Mapping[str, jax.Array | np.ndarray]


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes `directory`, with a manifest, when all went well, or else vanishes.

    `directory` may be a URL, to which the folder is uploaded. Raises UserError where it exists and is not empty.
    """
    if (local := as_local(directory)) is None:
        with uploaded(directory, last=("config.json",)) as folder:
            yield folder
            write_manifest(folder)
        return
    directory = local
    check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as partial:
        partial.mkdir()
        yield partial
        write_manifest(partial)


def export_hf(
    config: ModelConfig,
    params: Params,
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    source: WeightSource | None = None,
    model_type: str | None = None,
    generation: GenerationSettings | None = None,
    chat_template: ChatTemplate | None = None,
    dtype: np.dtype | None = None,
) -> Json:
    """Write config.json, generation_config.json, safetensors (with an index above 5 GB), tokenizer with chat template
    and conversion report; return the report.

    The family is `model_type` where it can express the model, else the first that can. `generation` None leaves the
    stops to the tokenizer. `chat_template` is that of a run's conversations: the export has it as jinja, and its ends
    of a turn as stops. The weights keep their dtype. Where `params` were imported from `source` (as `dtype`, unless
    None), the files are compared with that too, so that the report covers the whole conversion. Raises UserError for a
    model that no family on Hugging Face has, and for a `directory` that is not empty; ConversionError, leaving nothing
    behind, where the files, read again, compute other logits.
    """
    family, data = family_of(config, model_type or (source.model_type if source is not None else "llama"))
    sizes = {str(value.dtype): value.size for value in params.values()}
    data["torch_dtype"] = max(sizes, key=lambda name: sizes[name])
    generation = completed(generation or GenerationSettings(), config, tokenizer)
    files = dict(tokenizer.export_files()) if tokenizer is not None else {}
    if tokenizer is not None and chat_template is not None and chat_template.JINJA is not None:
        files[TEMPLATE_FILE] = chat_template.JINJA.encode()
        ends = dict.fromkeys((*generation.eos_ids, *turn_ends(chat_template, tokenizer)))
        generation = dataclasses.replace(generation, eos_ids=tuple(ends))
    data |= special_tokens(generation)
    tensors = _tensors(config, params, family.names_of(config).weights)
    with new_directory(directory) as folder:
        _write_weights(folder, tensors)
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        write_generation(folder, generation)
        write_files(folder, files)
        written = open_source(folder)
        jax_params = {name: jnp.asarray(value) for name, value in params.items()}
        report = check_conversion(written, params_logits(config, jax_params))
        report |= {"source": "llama_jax", "form": "native"}
        if source is not None:
            report = check_conversion(source, lambda inputs: source_logits(written, inputs)[0], dtype=dtype)
        write_report(folder, report)
    return report


def family_of(config: ModelConfig, preferred: str) -> tuple[Family, Json]:
    """Return a family that can express `config`, the preferred one before others, and its config.json."""
    refusals = []
    for model_type in sorted(zoo.families(), key=lambda name: name != preferred):
        family = zoo.family(model_type)
        try:
            return family, family.to_hf(config)
        except UserError as error:
            refusals.append(str(error))
    raise UserError(f"this model cannot be exported: {'; '.join(dict.fromkeys(refusals))}")


def _tensors(config: ModelConfig, params: Params, weights: Sequence[WeightMapping]) -> Tensors:
    """Return every tensor of the export, in the layout of its files; a value is fetched only when it is read."""
    table = {weight.name: weight for weight in weights}
    owners = layers_with(config)
    tensors: Tensors = {}
    for name, value in params.items():
        if name not in table:
            raise UserError(f"parameter '{name}' has no place in the exported format")
        for layer in owners.get(name, (None,)):
            # All weights of this tensor, each with the array it is in and its index there.
            parts = [
                (w, params[w.name], () if layer is None else (owners[w.name].index(layer),))
                for w in weights_of_tensor(table[name], weights, params, owners, layer)
            ]
            depth = 0 if layer is None else 1
            experts = range(value.shape[depth]) if "{expert}" in table[name].source else (None,)
            for expert in experts:
                place = tensor_name(table[name], config, layer, expert)
                if place not in tensors:
                    tensors[place] = _tensor(parts, expert)
    return tensors


def _tensor(
    parts: Sequence[tuple[WeightMapping, jax.Array | np.ndarray, tuple[int, ...]]], expert: int | None
) -> Tensor:
    """Return the tensor that joins these weights, each of them with the array it is in and its index there."""
    first, dim = parts[0][0], parts[0][0].joined

    def fetch(slices: Slices) -> np.ndarray:
        found = []
        for weight, value, index in parts:
            if expert is None:
                found.append(weight.to_source(fetched(value, index)))
            else:
                found.append(weight.to_source(fetched(value, (*index, expert))[None]))
        whole = found[0] if len(found) == 1 else np.concatenate(found, axis=dim)
        return (whole.reshape(first.in_file(whole.shape)) if expert is None else whole[0])[slices]

    shapes = [weight.source_shape(value.shape[len(index) :]) for weight, value, index in parts]
    shape = first.in_file((*shapes[0][:dim], sum(own[dim] for own in shapes), *shapes[0][dim + 1 :]))
    return Tensor(shape if expert is None else shape[1:], np.dtype(parts[0][1].dtype), fetch)


def fetched(value: jax.Array | np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    """Return the part of a parameter at these first indices (layer, expert) on the host, without gathering the rest."""
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


def _write_weights(folder: Path, tensors: Tensors) -> None:
    """Write the tensors into one file, or into shards of at most `MAX_SHARD_BYTES` with an index."""
    nbytes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    files: list[Tensors] = [{}]
    for name, tensor in tensors.items():
        if files[-1] and sum(nbytes[other] for other in files[-1]) + nbytes[name] > MAX_SHARD_BYTES:
            files.append({})
        files[-1][name] = tensor
    places = {}
    for i, content in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(folder / file, content)
        places |= dict.fromkeys(content, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(nbytes.values())}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
