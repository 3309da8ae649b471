"""A language model, saved or converted from one form of files to another."""

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.checkpoint.exporting import export_hf, new_directory
from llama_jax.checkpoint.generation import GenerationSettings, write_generation
from llama_jax.checkpoint.loading import (
    CONFIG_FILE,
    ORIGIN_FILE,
    TOKENIZER_DIRECTORY,
    LanguageModel,
    dtype_named,
    load,
    load_native,
    local_model,
    locate,
    read_contents,
)
from llama_jax.checkpoint.peft_writing import save_adapters
from llama_jax.checkpoint.steps import CHECKPOINTS_DIRECTORY
from llama_jax.checkpoint.store import CheckpointConfig, CheckpointStore
from llama_jax.checkpoint.verifying import check_conversion, params_logits, write_report
from llama_jax.config import Json, UserError, read_json, to_json
from llama_jax.models import ModelConfig, from_params, merge_adapters
from llama_jax.remote import check_destination
from llama_jax.tokenizers import Tokenizer
from llama_jax.training import TrainState


def save(lm: LanguageModel, directory: str | Path, *, format: Literal["hf", "native"] = "native") -> Json:
    """Write config, weights, tokenizer and generation settings; return the conversion report of an export.

    The report is that of the comparison of logits; a native copy converts nothing and returns {}. An export has the
    adapters in its weights, a native copy has both. Raises UserError
    where `directory` is not empty or the format cannot express the model.
    """
    check_destination(directory)
    if format == "hf":
        lm = merge(lm)
        return export_hf(
            lm.config,
            lm.model.params(),
            directory,
            lm.tokenizer,
            model_type=lm.model_type,
            generation=lm.generation,
            chat_template=lm.chat_template,
        )
    if format != "native":
        raise UserError(f"format={format!r} must be hf or native")
    with new_directory(directory) as folder:
        origin = {"model_type": lm.model_type, "chat_template": to_json(lm.chat_template)}
        _write_native(folder, lm.config, lm.model.params(), lm.tokenizer, lm.generation, origin)
    return {}


def merge(lm: LanguageModel) -> LanguageModel:
    """Return the model with its adapters in the weights that they adapt, so that it computes the same without them."""
    with lm.model.on_mesh():
        config, params = merge_adapters(lm.config, lm.model.params())
        model = from_params(config, params, lm.model.module.compute, lm.model.mesh)
    return dataclasses.replace(lm, config=config, model=model)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["hf", "native", "peft"],
    components: Sequence[type] = (),
    dtype: str | None = None,
    ignore_config_keys: Collection[str] = (),
    base: str | Path | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
) -> Json:
    """Convert weights between forms, compare the logits of both, and return the conversion report.

    The weights keep their types, or get `dtype` ("float32" or "bfloat16"); tokenizer, chat template and generation
    settings come along. `base` and `tokenizer` are as in `load`; adapters are merged into the weights of their base. An
    import is
    compared with a plain numpy model that reads the source's tensors; of an export, the files are read again. Nothing
    is kept where they disagree. To `peft` go the adapters alone, as by `save_adapters`, with the weights that the run
    began with as their base; that converts nothing, and the report is {}.
    """
    check_destination(destination)
    root, step = locate(source)
    path, kept = local_model(root, step), None if dtype is None else dtype_named(dtype)
    if to == "native" and (path / CHECKPOINTS_DIRECTORY).is_dir():
        raise UserError(f"'{path}' is a run or a native copy already: give other weights, or convert it to hf")
    if to == "peft":
        if tokenizer is not None:
            raise UserError(f"tokenizer={tokenizer} has no place among adapters alone: leave it out")
        lm = load(path, dtype=dtype, components=components, step=step)
        began = read_json(path / CONFIG_FILE).get("init_from")
        save_adapters(lm, destination, base=began if base is None else os.fspath(base))
        return {}
    found = read_contents(
        path, kept, tokenizer, components=components, step=step, ignore_config_keys=ignore_config_keys, base=base
    )
    if to == "hf":
        config, params = merge_adapters(found.config, found.params)
        return export_hf(
            config,
            params,
            destination,
            found.tokenizer,
            source=found.source,
            model_type=found.model_type,
            generation=found.generation,
            chat_template=found.chat_template,
            dtype=kept,
        )
    assert found.source is not None
    config, opened = found.config, found.source
    with new_directory(destination) as folder:
        origin = {"model_type": found.model_type}
        _write_native(folder, config, found.params, found.tokenizer, found.generation, origin)
        del found  # the parameters, which are read again
        _, params = load_native(folder, None)
        report = check_conversion(opened, params_logits(config, params), dtype=kept)
        write_report(folder, report)
    return report


def _write_native(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    tokenizer: Tokenizer | None,
    generation: GenerationSettings,
    origin: Json,
) -> None:
    """Write a native copy, which has the layout of a run directory."""
    if origin := {key: value for key, value in origin.items() if value is not None}:
        (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
    (folder / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")
    write_generation(folder, generation)
    if tokenizer is not None:
        tokenizer.with_rule(tokenizer.prefix_ids, tokenizer.suffix_ids).save(folder / TOKENIZER_DIRECTORY)
    store = CheckpointStore(folder / CHECKPOINTS_DIRECTORY, CheckpointConfig())
    store.save(TrainState(step=jnp.int32(0), params=dict(params), opt_state={}))
    store.wait()
    store.close()
