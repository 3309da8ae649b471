"""LoRA adapters in the format of PEFT, merged into the weights of their base while these are read."""

import dataclasses
import os
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.formats import Slices, Tensor, Tensors, has_weights, read_safetensors, read_torch
from llama_jax.checkpoint.importing import WeightSource, open_source, rename_tensors
from llama_jax.config import Json, UserError, read_json
from llama_jax.remote import is_remote, local_copy
from llama_jax.tokenizers import FILE_NAMES
from llama_jax.zoo import TensorNames

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model"

# Options that change what an adapter computes, beyond A and B, or the weights of its base.
_REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "target_parameters", "trainable_token_indices",
    "layer_replication", "megatron_config", "alora_invocation_tokens", "arrow_config", "kasa_config",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MATRIX = re.compile(r"(?P<module>.*)\.lora_(?P<table>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?")


@dataclasses.dataclass(frozen=True)
class _LowRank(Tensor):
    """scale B A, [outputs, inputs], of which only the rows and columns that are asked for are computed."""

    a: Tensor
    b: Tensor
    scale: float


def is_adapter(path: Path) -> bool:
    """Return whether a directory has an adapter alone, without the weights of its base."""
    return (path / ADAPTER_CONFIG).is_file() and not has_weights(path)


def open_adapter(path: Path, base: str | Path | None = None, ignore_config_keys: Collection[str] = ()) -> WeightSource:
    """Open an adapter's directory as the weights of its base with the adapter in them; none is read yet.

    `base` is the path or URL of a Hugging Face directory; None takes the adapter's `base_model_name_or_path`. Raises
    UserError for other adapters than LoRA, and where the base is not here or does not fit.
    """
    data = read_json(path / ADAPTER_CONFIG)
    if not isinstance(data, dict) or not isinstance(data.get("peft_type"), str):
        raise UserError(f"'{path / ADAPTER_CONFIG}' has no peft_type: it is not the config of an adapter")
    _check_kind(path, data)
    place = _base_of(path, data, base)
    if (place / "checkpoints").is_dir():
        raise UserError(
            f"the base of the adapter '{path}', '{place}', is a run: export it (convert {place} DIRECTORY --to hf) and "
            "give that as base"
        )
    source = open_source(place, ignore_config_keys)
    if source.form != "huggingface":
        raise UserError(f"the adapter '{path}' has Hugging Face's names, and its base '{source.path}' has others")
    own = next((path / name for name in FILE_NAMES if (path / name).is_file()), source.tokenizer)
    return dataclasses.replace(source, tensors=_merged(path, data, source), tokenizer=own)


def _check_kind(path: Path, data: Json) -> None:
    """Raise UserError for an adapter that is more than the product of two matrices."""
    advice = "merge it with PEFT (merge_and_unload), save the whole model and load that"
    if data["peft_type"] != "LORA":
        raise UserError(f"'{path}' has peft_type={data['peft_type']}, and only LORA is read: {advice}")
    for key in _REFUSED:
        if data.get(key):
            raise UserError(f"'{path}' has {key}={data[key]}, which is not supported: {advice}")
    first = data.get("init_lora_weights")
    if isinstance(first, str) and first.lower().startswith(_CHANGES_BASE):
        raise UserError(f"'{path}' has init_lora_weights={first}, which changes the weights of the base: {advice}")


def _base_of(path: Path, data: Json, base: str | Path | None) -> Path:
    """Return the local path of an adapter's base."""
    if base is not None:
        return local_copy(base) if is_remote(base) else Path(base)
    name = data.get("base_model_name_or_path")
    for place in (path / name, Path(name)) if isinstance(name, str) and name else ():
        if os.path.isdir(place):  # False for a name that no disk can have
            return place
    raise UserError(f"the base of the adapter '{path}', '{name}', is no directory here: give its path as base")


def _merged(path: Path, data: Json, source: WeightSource) -> Tensors:
    """Return the tensors of the base with the adapter's in them or in their place."""
    found = rename_tensors(path, _adapter_tensors(path, data), source.names)
    tensors = dict(source.tensors)
    for name, tensor in found.items():
        if not isinstance(tensor, _LowRank):
            tensors[name] = tensor
            continue
        if (old := tensors.get(name)) is None:
            raise UserError(f"'{path}' adapts '{name}', which its base '{source.path}' does not have")
        new = _sum(old, tensor, inputs_first=_inputs_first(source.names, name))
        if new is None:
            raise UserError(
                f"'{path}' adapts '{name}' with matrices for {tensor.shape}, and its base '{source.path}' has "
                f"{old.shape}"
            )
        tied = {*source.names.tied, *source.names.tied.values()} if getattr(source.config, "tie_embeddings", 0) else ()
        if name in tied:
            raise UserError(f"'{path}' adapts '{name}', which the base shares with its head: it cannot be merged")
        tensors[name] = new
    return tensors


def _adapter_tensors(path: Path, data: Json) -> Tensors:
    """Return the products of an adapter's matrices and its whole tensors, by the names of the tensors of the base."""
    pairs: dict[str, dict[str, Tensor]] = {}
    found: Tensors = {}
    for key, tensor in _read(path).items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        name = re.sub(r"\.modules_to_save(\.default)?\.", ".", name)
        if match := _MATRIX.fullmatch(name):
            pairs.setdefault(match["module"], {})[match["side"]] = tensor
        elif "lora_" in name:
            raise UserError(f"'{path}' has '{key}', of a kind of LoRA that is not supported: merge it with PEFT")
        else:
            found[name] = tensor
    for module, pair in pairs.items():
        if pair.keys() != {"A", "B"} or any(len(tensor.shape) != 2 for tensor in pair.values()):
            raise UserError(f"'{path}' lacks one of the two matrices of '{module}', or they are not matrices")
        a, b = pair["A"], pair["B"]
        shape = b.shape[0], a.shape[1]
        found[f"{module}.weight"] = _LowRank(shape, b.dtype, lambda _: np.empty(0), a, b, _scale(data, module, a))
    return found


def _read(path: Path) -> Tensors:
    for end, read in ((".safetensors", read_safetensors), (".bin", read_torch)):
        if (file := path / f"{ADAPTER_WEIGHTS}{end}").is_file():
            return read(file)
    raise UserError(f"'{path}' has {ADAPTER_CONFIG} and neither {ADAPTER_WEIGHTS}.safetensors nor .bin")


def _scale(data: Json, module: str, a: Tensor) -> float:
    """Return the factor of a module's product; a key of `alpha_pattern` is the end of its name, or a pattern for it."""
    alphas = data.get("alpha_pattern") or {}
    # Repeated groups of an expression can take for ever.
    if not isinstance(alphas, dict) or not all(re.fullmatch(r"[\w.\\^$|*-]{0,200}", key) for key in alphas):
        raise UserError(f"alpha_pattern={alphas} must be factors by the names of modules: mend {ADAPTER_CONFIG}")
    alpha = next((alphas[key] for key in alphas if re.match(rf"(.*\.)?({key})$", module)), data.get("lora_alpha", 8))
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise UserError(f"lora_alpha={alpha} must be a finite number: mend {ADAPTER_CONFIG}")
    rank = max(1, a.shape[0])
    return alpha / (rank**0.5 if data.get("use_rslora") else rank)


def _inputs_first(names: TensorNames, name: str) -> bool:
    """Return whether a tensor of the base is [inputs, outputs], as GPT-2's are, and not [outputs, inputs]."""
    for weight in names.weights:
        if re.fullmatch(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(weight.source)), name):
            return weight.inputs_first
    return False


def _sum(base: Tensor, low: _LowRank, *, inputs_first: bool) -> Tensor | None:
    """Return the sum of a weight and a product, or None where they differ in shape."""
    if base.shape != (low.shape[::-1] if inputs_first else low.shape):
        return None

    def fetch(slices: Slices) -> np.ndarray:
        rows, columns = slices[::-1] if inputs_first else slices
        a, b = low.a.read((slice(None), columns)), low.b.read((rows,))
        product = low.scale * (b.astype(np.float32) @ a.astype(np.float32))
        # Float32 whatever the stored type: what reads it rounds once, to the type that the weights are kept in.
        return base.read(slices).astype(np.float32) + (product.T if inputs_first else product)

    return Tensor(base.shape, base.dtype, fetch)
