"""Adapters of a model, alone, in the format of PEFT."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llama_jax.checkpoint.exporting import family_of, fetched, new_directory
from llama_jax.checkpoint.formats import write_safetensors
from llama_jax.checkpoint.importing import tensor_name, weights_of_tensor
from llama_jax.checkpoint.loading import LanguageModel
from llama_jax.checkpoint.peft_reading import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llama_jax.config import Json, UserError
from llama_jax.models import ADAPTERS, ModelConfig, Params, layers_with, merge_adapters
from llama_jax.nn import LoRA
from llama_jax.zoo import WeightMapping


def save_adapters(lm: LanguageModel, directory: str | Path, *, base: str | os.PathLike[str] | None = None) -> None:
    """Write the adapters of a model alone, as PEFT reads them: adapter_config.json and adapter_model.safetensors.

    `base` is the path of the weights that they were trained on, where PEFT and `load` then find them. Where a file
    joins several projections (GPT-2's c_attn), their adapters become one of a larger rank, with the same product.
    Raises UserError for a model without adapters, for one that no family on Hugging Face has, for weights in other
    files than Hugging Face's, and where `directory` is not empty.
    """
    if lm.config.adapters is None:
        raise UserError("the model has no adapters: train it with model.adapters, or save all of it")
    if base is not None and Path(base).exists() and not (Path(base) / "config.json").is_file():
        raise UserError(
            f"base={base} is no Hugging Face directory, which an adapter is for: convert it (convert {base} DIRECTORY "
            "--to hf) and give that"
        )
    config, _ = merge_adapters(lm.config, {})
    table = family_of(config, lm.model_type or "llama")[0].names_of(config).weights
    params = lm.model.params()
    files, others, inputs_first = _modules(lm.config, params, table)
    data = _config(lm.config.adapters, {module: len(a) for module, (a, _) in files.items()}, others)
    data |= {
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "fan_in_fan_out": inputs_first,
        "task_type": "SEQ_2_SEQ_LM" if config.has_source else "CAUSAL_LM" if config.generates else None,
    }
    tensors = {
        f"base_model.model.{module}.lora_{side}.weight": value
        for module, pair in files.items()
        for side, value in zip("AB", pair, strict=True)
    }
    with new_directory(directory) as folder:
        write_safetensors(folder / f"{ADAPTER_WEIGHTS}.safetensors", tensors)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _config(adapters: LoRA, ranks: Mapping[str, int], others: set[str]) -> Json:
    """Return the `adapter_config.json` of modules with these ranks; `others` are the modules without an adapter."""
    short = {module: module.rpartition(".")[2] for module in ranks}
    taken = {module.rpartition(".")[2] for module in others}
    # The end of a name means all modules that it ends.
    names = {module: module if end in taken else end for module, end in short.items()}
    joined = {names[module]: rank for module, rank in ranks.items() if rank != adapters.rank}
    alphas = {}
    for name, rank in joined.items():  # the scale stays alpha / rank of one adapter
        times = rank / adapters.rank
        alphas[name] = adapters.alpha * (times**0.5 if adapters.rslora else times)
    return {
        "peft_type": "LORA",
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rslora,
        "target_modules": sorted(set(names.values())),
        "rank_pattern": joined,
        "alpha_pattern": alphas,
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


type _Pair = tuple[np.ndarray, np.ndarray]


def _modules(
    config: ModelConfig, params: Params, table: Sequence[WeightMapping]
) -> tuple[dict[str, _Pair], set[str], bool]:
    """Return ([R, in] and [out, R] by the module's name in the files, names of other modules, whether files store
    [inputs, outputs]).
    """
    owners, found, others, inputs_first = layers_with(config), dict[str, _Pair](), set[str](), False
    known = {weight.name for weight in table}
    for name in params:
        if name.endswith(ADAPTERS[0]) and f"{name.removesuffix(ADAPTERS[0])}.weight" not in known:
            raise UserError(f"the adapter '{name}' has no place in the files of this family: leave it out of targets")
    for weight in table:
        if not weight.name.endswith(".weight") or weight.name not in params:
            continue
        for layer in owners.get(weight.name, (None,)):
            module = tensor_name(weight, config, layer, 0).removesuffix(".weight")
            parts = weights_of_tensor(weight, table, params, owners, layer)
            if not any(_adapter_of(part) in params for part in parts):
                others.add(module)
            elif module not in found:
                assert layer is not None
                found[module] = _joined(parts, params, owners, layer)
                inputs_first = weight.inputs_first
    return found, others, inputs_first


def _adapter_of(weight: WeightMapping, side: str = ADAPTERS[0]) -> str:
    return weight.name.removesuffix(".weight") + side


def _joined(parts: Sequence[WeightMapping], params: Params, owners: Mapping[str, tuple[int, ...]], layer: int) -> _Pair:
    """Return the adapter of the tensor that joins these weights in a layer: A one below the other, B block by block."""
    pairs: dict[str, _Pair] = {}
    for weight in parts:
        if _adapter_of(weight) in params:
            a, b = (fetched(params[n], (owners[n].index(layer),)) for n in (_adapter_of(weight, s) for s in ADAPTERS))
            pairs[weight.name] = weight.adapter_to_source(a, b)
    total, blocks = sum(len(a) for a, _ in pairs.values()), []
    place = 0
    dims = next(iter(pairs.values()))[1].ndim - 1  # of the outputs
    for weight in parts:
        if (pair := pairs.get(weight.name)) is None:
            shape = weight.source_shape(params[weight.name].shape[1:])
            # One of the dimensions is the inputs', the first or the last.
            outputs = shape[-dims:] if weight.inputs_first else shape[:dims]
            blocks.append(np.zeros((*outputs, total), np.float32))
            continue
        rank = len(pair[0])
        block = np.zeros((*pair[1].shape[:-1], total), pair[1].dtype)
        block[..., place : place + rank] = pair[1]
        blocks.append(block)
        place += rank
    axis = parts[0].joined - (1 if parts[0].inputs_first else 0)
    b = np.concatenate(blocks, axis=axis) if len(blocks) > 1 else blocks[0]
    return np.concatenate([a for a, _ in pairs.values()]), b.reshape(-1, total)
