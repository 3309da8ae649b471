"""A language model and its way to and from disk: `load` and `save`."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoint.convert import (
    check_conversion,
    export_hf,
    new_directory,
    params_logits,
    write_receipt,
)
from llama_jax.checkpoint.formats.meta import is_meta
from llama_jax.checkpoint.generation import GenerationSettings, read_generation, write_generation
from llama_jax.checkpoint.sources import Source, as_stored, load_params, open_source
from llama_jax.checkpoint.store import CheckpointConfig, CheckpointStore
from llama_jax.checkpoint.stored import model_files
from llama_jax.config import UserError, from_json, read_json, to_json
from llama_jax.data import ChatTemplate
from llama_jax.models import Compute, Model, ModelConfig, abstract_params, from_params
from llama_jax.parallel import make_mesh
from llama_jax.remote import check_destination, fetch_beside, is_remote, local_copy
from llama_jax.tokenizers import Tokenizer, load_saved_tokenizer, load_tokenizer
from llama_jax.training import TrainState

CONFIG_FILE = "config.json"
TOKENIZER_DIRECTORY = "tokenizer"
CHECKPOINTS_DIRECTORY = "checkpoints"
ORIGIN_FILE = "origin.json"  # of a saved model: the family and the chat template of `LanguageModel`

MeshLike = Mesh | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Config, model and tokenizer together; `tokenizer` is None when the source has none.

    `model_type` is the family on Hugging Face whose files it came from: an export goes back there. `generation` is what
    its files say of the tokens that it writes: what ends a text, what is forced and forbidden. `chat_template` is that
    of the conversations it was trained on by a run of ours.
    """

    config: ModelConfig
    model: Model
    tokenizer: Tokenizer | None
    model_type: str | None = None
    generation: GenerationSettings = GenerationSettings()
    chat_template: ChatTemplate | None = None


def load(
    path: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    components: Sequence[type] = (),
    step: int | None = None,
    ignore_config_keys: Collection[str] = (),
) -> LanguageModel:
    """The language model at `path`: a run directory, a saved native one, a Hugging Face or Meta directory, a `.bin`.

    `path` and `tokenizer` may be URLs (`s3://`, `gs://`, `hf://`); what they hold is kept in the cache directory.

    `mesh`, as `{"fsdp": 2, "tensor": 4}` or a jax Mesh, is where the weights stream to; `dtype` ("float32" or
    "bfloat16") is the type they are kept and computed in: by default bfloat16 on TPU and GPU, float32 on CPU.
    `components` are classes from outside the package that the saved config may name; `step` picks a checkpoint of a
    run (default: the latest); `ignore_config_keys` are keys of a released config to take as if they were not there.
    Raises UserError for anything missing, damaged or unsupported.
    """
    path = _existing(path, step)
    if dtype is not None:
        _dtype(dtype)
    compute = Compute(dtype=dtype or "auto")  # type: ignore[arg-type]
    native, template = (path / CHECKPOINTS_DIRECTORY).is_dir(), None
    with _entered(mesh) as jax_mesh:
        if native:
            config, params = _load_native(path, compute.jax_dtype, components, step)
            found, (model_type, template) = path / TOKENIZER_DIRECTORY, _origin(path, components)
            generation = read_generation(path, ignore_config_keys, config_file=None)
        else:
            source = open_source(path, ignore_config_keys)
            config, found, model_type = source.config, source.tokenizer, source.model_type
            params = load_params(source, abstract_params(config, compute.jax_dtype))
        model = from_params(config, params, compute, jax_mesh)
    if tokenizer is None and found is not None and found.exists():
        tokenizer = _tokenizer(found, config if native else None)
    elif tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if not native:
        generation = _generation(source, tokenizer, ignore_config_keys)
    return LanguageModel(config, model, tokenizer, model_type, generation, template)


def _origin(path: Path, components: Sequence[type]) -> tuple[str | None, ChatTemplate | None]:
    """Family and chat template of a saved model or a run."""
    saved = path / ORIGIN_FILE
    data = read_json(saved) if saved.is_file() else read_json(path / CONFIG_FILE).get("data", {})
    template = data.get("chat_template")
    found = None if template is None else from_json(ChatTemplate, template, components, "chat_template.")
    return data.get("model_type"), found


def _tokenizer(path: Path, own: ModelConfig | None) -> Tokenizer:
    """The tokenizer at `path`; `own` is the config where it is that of a model of ours."""
    if own is None:
        return load_tokenizer(path)
    return load_saved_tokenizer(path, of_sources=own.has_source)


def _generation(source: Source, tokenizer: Tokenizer | None, ignore: Collection[str]) -> GenerationSettings:
    """What the files of a source say; where a Hugging Face directory names no end of a text, its tokenizer does."""
    if source.form != "huggingface":
        return GenerationSettings()
    found = read_generation(source.path, ignore)
    if found.eos_ids or tokenizer is None:
        return found
    return dataclasses.replace(found, eos_ids=tokenizer.eos_ids)


def config_of(path: str | Path, components: Sequence[type] = ()) -> ModelConfig:
    """The config of the model at `path`; no weights are read. Raises UserError as `load` does."""
    path = _existing(path)
    if not (path / CHECKPOINTS_DIRECTORY).is_dir():
        return open_source(path).config
    data = read_json(path / CONFIG_FILE)
    # A run's config has the model as a section; a saved model is just that.
    return from_json(ModelConfig, data.get("model", data), components)


def _existing(path: str | Path, step: int | None = None) -> Path:
    """The model's local path; of what a store has, a copy."""
    given, path = path, local_copy(path, functools.partial(model_files, step=step))
    if is_remote(given) and (path / "data.json").is_file():  # of a run: a store has no empty directories
        (path / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
    if is_remote(given) and is_meta(path):
        fetch_beside(given, ("tokenizer.model",))  # Meta's downloads have it beside the directories of the sizes
    if not path.exists():
        raise UserError(
            f"'{path}' does not exist: give a run directory, a Hugging Face or Meta directory, or a .bin file"
        )
    return path


@contextlib.contextmanager
def _entered(mesh: MeshLike):
    if mesh is None:
        current = jax.sharding.get_mesh()
        yield None if current.empty else current
        return
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(dict(mesh))
    with jax.set_mesh(mesh):
        yield mesh


def _load_native(path: Path, dtype: Any, components: Sequence[type], step: int | None):
    """Config and parameters; `dtype` None: as they are stored."""
    config = config_of(path, components)
    with contextlib.closing(CheckpointStore(path / CHECKPOINTS_DIRECTORY)) as store:
        steps = store.steps()
        if not steps:
            raise UserError(f"'{path}' has no finished checkpoint yet: let the run reach its first one")
        step = steps[-1] if step is None else step
        abstract = abstract_params(config, dtype or jnp.float32)
        if dtype is None:
            stored = store.dtypes(step)
            abstract = {n: jax.ShapeDtypeStruct(a.shape, stored[n], sharding=a.sharding) for n, a in abstract.items()}
        params = store.load_params(step, abstract)
    return config, params


def save(lm: LanguageModel, directory: str | Path, *, format: Literal["hf", "native"] = "native") -> dict[str, Any]:
    """Write config, weights, tokenizer and generation settings; of an export, return the receipt stored with it.

    The receipt is that of the comparison of logits; a native copy converts nothing and returns {}. Raises UserError
    where `directory` is not empty or the format cannot express the model.
    """
    check_destination(directory)
    params = lm.model.params()
    if format == "hf":
        return export_hf(
            lm.config,
            params,
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
        _write_native(folder, lm.config, params, lm.tokenizer, lm.generation, origin)
    return {}


def _write_native(
    folder: Path,
    config: ModelConfig,
    params: Mapping[str, jax.Array],
    tokenizer: Tokenizer | None,
    generation: GenerationSettings,
    origin: Mapping[str, Any],
) -> None:
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


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Literal["hf", "native"],
    components: Sequence[type] = (),
    dtype: str | None = None,
    ignore_config_keys: Collection[str] = (),
) -> dict[str, Any]:
    """Converts weights between forms; ends with the logit comparison and returns its receipt.

    The weights keep their types, or get `dtype` ("float32" or "bfloat16"); tokenizer, chat template and generation
    settings come along. Importing compares with a plain numpy model that reads the source's own tensors; exporting
    reads back what was written. Nothing is kept where they disagree.
    """
    check_destination(destination)
    path, kept = _existing(source), None if dtype is None else _dtype(dtype)
    opened, model_type, template = None, None, None
    if to == "hf" and (path / CHECKPOINTS_DIRECTORY).is_dir():
        config, params = _load_native(path, kept, components, None)
        found, (model_type, template) = path / TOKENIZER_DIRECTORY, _origin(path, components)
        tokenizer = _tokenizer(found, config) if found.exists() else None
        generation = read_generation(path, ignore_config_keys, config_file=None)
    else:
        opened = open_source(path, ignore_config_keys)
        config, abstract = opened.config, abstract_params(opened.config, kept or jnp.float32)
        params = load_params(opened, as_stored(opened, abstract) if kept is None else abstract)
        tokenizer = load_tokenizer(opened.tokenizer) if opened.tokenizer else None
        generation = _generation(opened, tokenizer, ignore_config_keys)
    if to == "hf":
        return export_hf(
            config,
            params,
            destination,
            tokenizer,
            source=opened,
            model_type=model_type,
            generation=generation,
            chat_template=template,
            dtype=kept,
        )
    assert opened is not None
    with new_directory(destination) as folder:
        _write_native(folder, config, params, tokenizer, generation, {"model_type": opened.model_type})
        del params
        _, read_again = _load_native(folder, None, components, None)
        receipt = check_conversion(opened, params_logits(config, read_again), dtype=kept)
        write_receipt(folder, receipt)
    return receipt


def _dtype(name: str) -> Any:
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={name!r} must be float32 or bfloat16")
    return jnp.dtype(name)
