"""Import and export of weights, each ending with a comparison of logits whose result is kept with the weights."""

import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax import zoo
from llama_jax.checkpoint.formats import Tensor, Tensors
from llama_jax.checkpoint.formats.huggingface import write_safetensors
from llama_jax.checkpoint.generation import GenerationSettings, completed, special_tokens, write_generation
from llama_jax.checkpoint.reference import llama_logits
from llama_jax.checkpoint.sources import Source, load_params, open_source, place_of, sharing
from llama_jax.config import UserError
from llama_jax.data import ChatTemplate, turn_ends
from llama_jax.files import replacing
from llama_jax.models import (
    Compute,
    DecoderConfig,
    Model,
    ModelConfig,
    abstract_params,
    assemble,
    layers_with,
)
from llama_jax.remote import as_local, check_destination, uploaded
from llama_jax.tokenizers import TEMPLATE_FILE, Tokenizer
from llama_jax.zoo import Weight

RECEIPT = "conversion.json"
MAX_SHARD_BYTES = 5 * 10**9


class ConversionError(RuntimeError):
    """The converted weights do not compute what the original ones do."""


Logits = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def params_logits(config: ModelConfig, params: Mapping[str, jax.Array]) -> Logits:
    """The package's own model of these parameters as a function from its inputs by name to float32 logits."""
    model = Model(assemble(config, dict(params), Compute(dtype="float32"), scan=True), _mesh(params))

    def logits(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            arrays = {name: jnp.asarray(x, jnp.int32) for name, x in inputs.items()}
            return np.asarray(model.run(_main_logits, arrays))

    return logits


def _main_logits(module: Any, inputs: dict[str, jax.Array]) -> jax.Array:
    return module.main_logits(**inputs)


def _mesh(params: Mapping[str, jax.Array]) -> jax.sharding.Mesh | None:
    sharding = next(iter(params.values())).sharding
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """A tensor that is read as another type."""

    whole: Tensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def read(self, slices: tuple[slice, ...] = (), /) -> np.ndarray:
        return self.whole.read(slices).astype(self.dtype)


def source_logits(source: Source, inputs: Mapping[str, np.ndarray], dtype: Any = None) -> tuple[np.ndarray, str]:
    """float32 logits [B, T, V] of the source itself (its weights rounded to `dtype`, unless None), and whose they are.

    A Llama's are those of a plain `numpy` model that reads the tensors in their own layout; other families' are those
    of `llama_jax`'s own model of them, which the parity tests hold against the original code.
    """
    if source.model_type == "llama":
        assert isinstance(source.config, DecoderConfig)
        interleaved = source.form != "huggingface"
        tensors: Tensors = dict(source.tensors)
        if dtype is not None:
            tensors = {name: _Rounded(tensor, np.dtype(dtype)) for name, tensor in tensors.items()}
        return llama_logits(source.config, tensors, inputs["tokens"], interleaved=interleaved), "numpy"
    params = load_params(source, abstract_params(source.config, dtype or jnp.float32))
    return params_logits(source.config, params)(inputs), "llama_jax"


def check_conversion(source: Source, logits: Logits, *, dtype: Any = None) -> dict[str, Any]:
    """Compares the logits of `source` (as `source_logits` says) with those of the converted weights.

    Returns the receipt. `dtype` is the type that all weights were converted to; None: they have kept theirs. Raises
    ConversionError on disagreement.
    """
    inputs = source.config.example(np.random.default_rng(0))
    expected, witness = source_logits(source, inputs, dtype)
    difference = float(np.abs(expected - np.asarray(logits(inputs), np.float32)).max())
    std = float(expected.std())
    tolerance = std * 1e-3
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
        "witness": witness,
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

    Raises UserError where `directory` exists and is not empty. It may be a URL, to which the folder is uploaded.
    """
    if (local := as_local(directory)) is None:
        with uploaded(directory, last=("config.json",)) as folder:
            yield folder
        return
    directory = local
    check_destination(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with replacing(directory) as partial:
        partial.mkdir()
        yield partial


def export_hf(
    config: ModelConfig,
    params: Mapping[str, jax.Array | np.ndarray],
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    *,
    source: Source | None = None,
    model_type: str | None = None,
    generation: GenerationSettings | None = None,
    chat_template: ChatTemplate | None = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Write config.json, generation_config.json, safetensors (with an index above 5 GB), tokenizer with chat template
    and receipt; return the receipt.

    The family is `model_type` where it can express the model, else the first that can. `generation` None says nothing:
    the tokenizer's own stops are written. `chat_template` is that of a run's conversations: the export has it as jinja,
    and its ends of a turn as stops. The weights keep their dtype. Where `params` were imported from `source` (as
    `dtype`, unless None), what was written is compared with that too, so that the receipt covers the whole way. Raises
    UserError for a model that no family on Hugging Face has, and for a `directory` that is not empty; ConversionError,
    leaving nothing behind, where what was written and read again computes other logits.
    """
    family, data = _family_of(config, model_type or (source.model_type if source is not None else "llama"))
    params_dtypes = {str(value.dtype): value.size for value in params.values()}
    data["torch_dtype"] = max(params_dtypes, key=lambda name: params_dtypes[name])
    generation = completed(generation or GenerationSettings(), config, tokenizer)
    files = dict(tokenizer.export_files()) if tokenizer is not None else {}
    if tokenizer is not None and chat_template is not None and chat_template.JINJA is not None:
        files[TEMPLATE_FILE] = chat_template.JINJA.encode()
        ends = dict.fromkeys((*generation.eos_ids, *turn_ends(chat_template, tokenizer)))
        generation = dataclasses.replace(generation, eos_ids=tuple(ends))
    data |= special_tokens(generation)
    pieces = _pieces(config, params, zoo.weights_of(family, config))
    with new_directory(directory) as folder:
        _write_weights(folder, pieces)
        (folder / "config.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        write_generation(folder, generation)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        written = open_source(folder)
        jax_params = {name: jnp.asarray(value) for name, value in params.items()}
        receipt = check_conversion(written, params_logits(config, jax_params))
        receipt |= {"source": "llama_jax", "form": "native"}
        if source is not None:
            receipt = check_conversion(source, lambda inputs: source_logits(written, inputs)[0], dtype=dtype)
        write_receipt(folder, receipt)
    return receipt


def _family_of(config: ModelConfig, preferred: str) -> tuple[Any, dict[str, Any]]:
    """A family that can express `config`, the preferred one before others, and its config.json."""
    refusals = []
    for model_type in sorted(zoo.families(), key=lambda name: name != preferred):
        family = zoo.family(model_type)
        if not isinstance(config, typing.get_type_hints(family.to_hf)["config"]):
            refusals.append(f"{model_type} is no {type(config).__name__}")
            continue
        try:
            return family, family.to_hf(config)
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
            fused = [
                (w, params[w.name], () if layer is None else (owners[w.name].index(layer),))
                for w in sharing(table[name], weights, params, owners, layer)
            ]
            experts = range(value.shape[len(own)]) if "{expert}" in table[name].source else (None,)
            for expert in experts:
                place = place_of(table[name], config, layer, expert)
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
        return whole.reshape(parts[0][0].in_file(whole.shape)) if expert is None else whole[0]

    shapes = [weight.source_shape(value.shape[len(index) :]) for weight, value, index in parts]
    shape = parts[0][0].in_file((*shapes[0][:dim], sum(own[dim] for own in shapes), *shapes[0][dim + 1 :]))
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
