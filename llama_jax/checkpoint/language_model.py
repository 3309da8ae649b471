"""A language model and its way to and from disk: `load` and `save`."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoint.convert import (
    check_conversion,
    export_hf,
    load_params,
    new_directory,
    open_source,
    params_logits,
    write_receipt,
)
from llama_jax.checkpoint.formats.meta import is_meta
from llama_jax.checkpoint.store import CheckpointConfig, CheckpointStore
from llama_jax.checkpoint.stored import model_files
from llama_jax.config import UserError, from_json, read_json, to_json
from llama_jax.models import Compute, Model, ModelConfig, abstract_params, from_params
from llama_jax.parallel import make_mesh
from llama_jax.remote import check_destination, fetch_beside, is_remote, local_copy
from llama_jax.tokenizers import Tokenizer, load_tokenizer
from llama_jax.training import TrainState

CONFIG_FILE = "config.json"
TOKENIZER_DIRECTORY = "tokenizer"
CHECKPOINTS_DIRECTORY = "checkpoints"

MeshLike = Mesh | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Config, model and tokenizer together; `tokenizer` is None when the source has none.

    `model_type` is the family on Hugging Face whose files it came from: an export goes back there.
    """

    config: ModelConfig
    model: Model
    tokenizer: Tokenizer | None
    model_type: str | None = None


def load(
    path: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    components: Sequence[type] = (),
    step: int | None = None,
) -> LanguageModel:
    """The language model at `path`: a run directory, a saved native one, a Hugging Face or Meta directory, a `.bin`.

    `path` and `tokenizer` may be URLs (`s3://`, `gs://`, `hf://`); what they hold is kept in the cache directory.

    `mesh`, as `{"fsdp": 2, "tensor": 4}` or a jax Mesh, is where the weights stream to; `dtype` ("float32" or
    "bfloat16") is the type they are kept and computed in: by default bfloat16 on TPU and GPU, float32 on CPU.
    `components` are classes from outside the package that the saved config may name; `step` picks a checkpoint of a
    run (default: the latest). Raises UserError for anything missing, damaged or unsupported.
    """
    path = _existing(path, step)
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype={dtype!r} must be float32 or bfloat16")
    compute = Compute(dtype=dtype or "auto")  # type: ignore[arg-type]
    model_type = None
    with _entered(mesh) as jax_mesh:
        if (path / CHECKPOINTS_DIRECTORY).is_dir():
            config, params = _load_native(path, compute, components, step)
            found = path / TOKENIZER_DIRECTORY
        else:
            source = open_source(path)
            config, found, model_type = source.config, source.tokenizer, source.model_type
            params = load_params(source, abstract_params(config, compute.jax_dtype))
        model = from_params(config, params, compute, jax_mesh)
    if tokenizer is None and found is not None and found.exists():
        tokenizer = found
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab_size}: it is not this model's"
        )
    return LanguageModel(config, model, tokenizer, model_type)


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


def _load_native(path: Path, compute: Compute, components: Sequence[type], step: int | None):
    config = config_of(path, components)
    with contextlib.closing(CheckpointStore(path / CHECKPOINTS_DIRECTORY)) as store:
        steps = store.steps()
        if not steps:
            raise UserError(f"'{path}' has no finished checkpoint yet: let the run reach its first one")
        params = store.load_params(steps[-1] if step is None else step, abstract_params(config, compute.jax_dtype))
    return config, params


def save(lm: LanguageModel, directory: str | Path, *, format: Literal["hf", "native"] = "native") -> dict[str, Any]:
    """Writes config, weights and tokenizer; of an export, returns the receipt of the logit comparison stored with it.

    A native copy converts nothing and returns {}. Raises UserError where `directory` is not empty or the format cannot
    express the model.
    """
    check_destination(directory)
    params = lm.model.params()
    if format == "hf":
        return export_hf(lm.config, params, directory, lm.tokenizer, model_type=lm.model_type)
    if format != "native":
        raise UserError(f"format={format!r} must be hf or native")
    with new_directory(directory) as folder:
        _write_native(folder, lm.config, params, lm.tokenizer)
    return {}


def _write_native(folder: Path, config: ModelConfig, params: Mapping[str, jax.Array], tokenizer: Tokenizer | None):
    (folder / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER_DIRECTORY)
    store = CheckpointStore(folder / CHECKPOINTS_DIRECTORY, CheckpointConfig())
    store.save(TrainState(step=jnp.int32(0), params=dict(params), opt_state={}))
    store.wait()
    store.close()


def convert(
    source: str | Path, destination: str | Path, *, to: Literal["hf", "native"], components: Sequence[type] = ()
) -> dict[str, Any]:
    """Converts weights between forms; ends with the logit comparison and returns its receipt.

    Importing compares with a plain numpy model that reads the source's own tensors; exporting reads back what was
    written. Nothing is kept where they disagree.
    """
    check_destination(destination)
    source = _existing(source)
    if to == "hf":
        lm = load(source, dtype="float32", components=components)
        original = None if (source / CHECKPOINTS_DIRECTORY).is_dir() else open_source(source)
        return export_hf(lm.config, lm.model.params(), destination, lm.tokenizer, source=original)
    opened = open_source(source)
    abstract = abstract_params(opened.config)
    params = load_params(opened, abstract)
    tokenizer = load_tokenizer(opened.tokenizer) if opened.tokenizer else None
    with new_directory(destination) as folder:
        _write_native(folder, opened.config, params, tokenizer)
        del params
        _, read_again = _load_native(folder, Compute(dtype="float32"), components, None)
        receipt = check_conversion(opened, params_logits(opened.config, read_again))
        write_receipt(folder, receipt)
    return receipt
