"""A language model, loaded from a run, a saved copy, or another project's files."""

import contextlib
import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint.formats import is_meta, rounded
from llama_jax.checkpoint.generation import GenerationSettings, read_generation
from llama_jax.checkpoint.importing import WeightSource, load_params, open_source, stored_dtypes
from llama_jax.checkpoint.manifest import MANIFEST_FILE, check_manifest
from llama_jax.checkpoint.peft_reading import is_adapter, open_adapter
from llama_jax.checkpoint.steps import CHECKPOINTS_DIRECTORY, damage, model_files, reading
from llama_jax.checkpoint.store import CheckpointStore
from llama_jax.config import UserError, from_json, read_json
from llama_jax.data import ChatTemplate
from llama_jax.models import Compute, Model, ModelConfig, abstract_params, from_params, is_stacked
from llama_jax.parallel import distributed, make_mesh, platform
from llama_jax.remote import fetch_beside, is_remote, local_copy
from llama_jax.tokenizers import Tokenizer, load_saved_tokenizer, load_tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_DIRECTORY = "tokenizer"
ORIGIN_FILE = "origin.json"  # of a saved model: the family and the chat template of `LanguageModel`

# A path in a run, with the run's directory and the step of a checkpoint.
_INSIDE = re.compile(
    r"(?:(.*)/)?(?:checkpoints(?:/(\d+)(?:/.*)?)?|(?:config|data|run)\.json|metrics\.jsonl|samples\.txt)/*", re.DOTALL
)

MeshLike = Mesh | Mapping[str, int] | None


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Config, model and tokenizer together; `tokenizer` is None when the source has none.

    `model_type` is the family on Hugging Face whose files it came from: an export goes back there. `generation` has
    the settings of its files for sampling: tokens that end a text, that are forced and forbidden. `chat_template` is
    that of the conversations it was trained on by a run of this package.
    """

    config: ModelConfig
    model: Model
    tokenizer: Tokenizer | None
    model_type: str | None = None
    generation: GenerationSettings = GenerationSettings()
    chat_template: ChatTemplate | None = None

    def chat(self, **options: Any) -> Any:
        """Return a `Conversation` of `llama_jax.sampling` with this model, made with `options`."""
        sampling = importlib.import_module("llama_jax.sampling")  # a package after this one: only when it is called
        return sampling.Conversation(self, **options)


@dataclasses.dataclass(frozen=True)
class Contents:
    """All of a `LanguageModel` but the model: its parameters by name, and where they come from.

    `source` is None for a run or a native copy.
    """

    config: ModelConfig
    params: dict[str, jax.Array]
    tokenizer: Tokenizer | None
    model_type: str | None
    generation: GenerationSettings
    chat_template: ChatTemplate | None = None
    source: WeightSource | None = None


def load(
    path: str | Path,
    *,
    mesh: MeshLike = None,
    dtype: str | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    components: Sequence[type] = (),
    step: int | None = None,
    ignore_config_keys: Collection[str] = (),
    base: str | Path | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Return the language model at `path`: a run, a saved native one, a Hugging Face or Meta directory, a GGUF file,
    a `.bin`, or a LoRA adapter.

    A path in a directory means the directory: `RUN/config.json`, or `RUN/checkpoints/350`, the run at step 350.
    `path` and `tokenizer` may be URLs (`s3://`, `gs://`, `hf://`), of which a copy is kept in the cache directory.

    `mesh`, as `{"fsdp": 2, "tensor": 4}` or a jax Mesh, is where the weights stream to; `dtype` ("float32" or
    "bfloat16") is the type they are kept and computed in: by default bfloat16 on TPU and GPU, float32 on CPU.
    `components` are classes from outside the package that the saved config may name; `step` picks a checkpoint of a
    run (default: the latest); `ignore_config_keys` are keys of a released config to take as if they were not there.
    An adapter of PEFT is merged into the weights of its base: `base`, or where None, the directory that it names.
    `quantize` keeps matrices, embedding and head with them, in "int8" (a scale for every output), "int4" (a scale for
    every output and group of at most 128 inputs) or on a GPU that has it "fp8"; such a model cannot be saved.
    Raises UserError for anything missing, damaged or unsupported.
    """
    path, inside = locate(path)
    step = inside if step is None else step
    path = local_model(path, step)
    if dtype is not None:
        dtype_named(dtype)
    compute = Compute(dtype=dtype or "auto")  # type: ignore[arg-type]
    with _entered(mesh) as jax_mesh:
        found = read_contents(
            path,
            compute.jax_dtype,
            tokenizer,
            components=components,
            step=step,
            ignore_config_keys=ignore_config_keys,
            base=base,
        )
        model = from_params(found.config, found.params, compute, jax_mesh)
        if quantize is not None:
            model = model.quantized(quantize)
    return LanguageModel(found.config, model, found.tokenizer, found.model_type, found.generation, found.chat_template)


def read_contents(
    path: Path,
    dtype: np.dtype | None,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    components: Sequence[type] = (),
    step: int | None = None,
    ignore_config_keys: Collection[str] = (),
    base: str | Path | None = None,
) -> Contents:
    """Return everything that a model's local path holds; parameters as `dtype`, None as they are stored.

    The other arguments are those of `load`.
    """
    native = (path / CHECKPOINTS_DIRECTORY).is_dir()
    if base is not None and not is_adapter(path):
        raise UserError(f"base={base} is for an adapter, and '{path}' is none: leave it out")
    if not native:
        _check_weights(path)
    source = None if native else _opened(path, base, ignore_config_keys)
    if source is not None and dtype is None and is_adapter(path):  # its sums are in float32, whatever is stored
        tensors = {name: rounded(tensor, tensor.dtype) for name, tensor in source.tensors.items()}
        source = dataclasses.replace(source, tensors=tensors)
    if source is None:
        config, params = load_native(path, dtype, components, step)
        tokenizer_path: Path | None = path / TOKENIZER_DIRECTORY
    else:
        config, tokenizer_path = source.config, source.tokenizer
        abstract = abstract_params(config, dtype or jnp.float32)
        params = load_params(source, stored_dtypes(source, abstract) if dtype is None else abstract)
    _check_finite(path, params)
    if tokenizer is None and tokenizer_path is not None and tokenizer_path.exists():
        of_sources = config.has_source
        tokenizer = kept_tokenizer(tokenizer_path, of_sources=of_sources) if native else load_tokenizer(tokenizer_path)
    elif tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if source is None:
        generation = read_generation(path, ignore_config_keys, config_file=None)
        model_type, chat_template = _origin(path, components)
        return Contents(config, params, tokenizer, model_type, generation, chat_template)
    generation = GenerationSettings()
    if source.form == "huggingface":
        generation = read_generation(source.path, ignore_config_keys)
    # ChatGLM3's code, and not its files, ends answers at the marks of turns too.
    by_code = source.model_type == "chatglm"
    if source.form in ("huggingface", "gguf") and tokenizer is not None and (by_code or not generation.eos_ids):
        ends = dict.fromkeys((*generation.eos_ids, *tokenizer.eos_ids))
        generation = dataclasses.replace(generation, eos_ids=tuple(ends))
    return Contents(config, params, tokenizer, source.model_type, generation, source=source)


def _check_weights(path: Path) -> None:
    """Raise UserError where the weights of an export are not what was written; its other files may be changed."""
    with reading(path):
        problems = (check_manifest(path, only="*.safetensors") or []) if path.is_dir() else []
    if problems and MANIFEST_FILE not in problems[0]:  # which may be another project's file
        raise UserError(
            f"'{path}' is damaged ({problems[0]}): export it again, or remove its {MANIFEST_FILE} where you changed it"
        )


def kept_tokenizer(directory: Path, *, of_sources: bool) -> Tokenizer:
    """Return the tokenizer that a run or a saved model keeps in `directory`. Raises UserError where it is damaged."""
    if (problem := damage(directory)) is not None:
        raise UserError(f"the tokenizer in {problem}: put a good copy in its place")
    return load_saved_tokenizer(directory, of_sources=of_sources)


def _check_finite(path: Path, params: Mapping[str, jax.Array]) -> None:
    """Raise UserError for a parameter that has NaN or an infinity, in the words of the first such layer."""

    def finite(values: Mapping[str, Any], isfinite: Callable[..., Any]) -> dict[str, Any]:
        return {n: isfinite(x).all(tuple(range(int(is_stacked(n)), x.ndim))) for n, x in values.items()}

    if platform() == "cpu" and not distributed.several():  # in place, and nothing is compiled
        found = finite({name: np.asarray(x) for name, x in params.items()}, np.isfinite)
    else:
        found = jax.jit(functools.partial(finite, isfinite=jnp.isfinite))(dict(params))
    for name, is_finite in found.items():
        if not (good := np.asarray(is_finite)).all():
            layer = f" of its layer {good.argmin()} of {good.size}" if is_stacked(name) else ""
            raise UserError(f"'{path}' has NaN or infinity in '{name}'{layer}: take another step, or download it again")


def _opened(path: Path, base: str | Path | None = None, ignore_config_keys: Collection[str] = ()) -> WeightSource:
    """Return the weights of another project's files; of an adapter's directory, those of its base with it in them."""
    if is_adapter(path):
        return open_adapter(path, base, ignore_config_keys)
    return open_source(path, ignore_config_keys)


def _origin(path: Path, components: Sequence[type]) -> tuple[str | None, ChatTemplate | None]:
    """Return family and chat template of a saved model or a run."""
    saved = path / ORIGIN_FILE
    data = read_json(saved) if saved.is_file() else read_json(path / CONFIG_FILE).get("data", {})
    template = data.get("chat_template")
    found = None if template is None else from_json(ChatTemplate, template, components, "chat_template.")
    return data.get("model_type"), found


def config_of(path: str | Path, components: Sequence[type] = ()) -> ModelConfig:
    """Return the config of the model at `path`, without reading weights. Raises UserError as `load` does."""
    path = local_model(locate(path)[0])
    if not (path / CHECKPOINTS_DIRECTORY).is_dir():
        return _opened(path).config
    data = read_json(path / CONFIG_FILE)
    # A run's config has the model as a section; a saved model is just that.
    return from_json(ModelConfig, data.get("model", data), components)


def locate(path: str | Path) -> tuple[str | Path, int | None]:
    """Return (directory of the run or model that `path` is or is in, step of the checkpoint that it is in or None)."""
    text = os.fspath(path) if is_remote(path) else os.path.abspath(path)
    if (match := _INSIDE.fullmatch(text)) is None:
        return path, None
    root = match[1] or "/"
    if not is_remote(path) and (Path(path, CONFIG_FILE).is_file() or not Path(root, CONFIG_FILE).is_file()):
        return path, None
    return root, None if match[2] is None else int(match[2])


def local_model(path: str | Path, step: int | None = None) -> Path:
    """Return the model's local path, of a URL a copy. Raises UserError where nothing is there."""
    given, path = path, local_copy(path, functools.partial(model_files, step=step))
    if is_remote(given) and (path / "data.json").is_file():  # of a run: a store has no empty directories
        (path / CHECKPOINTS_DIRECTORY).mkdir(exist_ok=True)
    if is_remote(given) and is_meta(path):
        fetch_beside(given, ("tokenizer.model",))  # Meta's downloads have it next to the directories of the sizes
    if not path.exists():
        raise UserError(
            f"'{path}' does not exist: give a run directory, a Hugging Face or Meta directory, a .gguf or a .bin file"
        )
    return path


@contextlib.contextmanager
def _entered(mesh: MeshLike) -> Iterator[Mesh | None]:
    """Enter `mesh` and yield it; where it is None, yield the mesh that is entered already."""
    if mesh is None:
        current = jax.sharding.get_mesh()
        yield None if current.empty else current
        return
    mesh = mesh if isinstance(mesh, Mesh) else make_mesh(dict(mesh))
    with jax.set_mesh(mesh):
        yield mesh


def load_native(
    path: Path, dtype: np.dtype | None, components: Sequence[type] = (), step: int | None = None
) -> tuple[ModelConfig, dict[str, jax.Array]]:
    """Return config and parameters of a run or a saved model; `dtype` None keeps the dtypes that are stored."""
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
        return config, store.load_params(step, abstract)


def dtype_named(name: str) -> np.dtype:
    """Return the dtype of weights named `name`. Raises UserError for others than float32 and bfloat16."""
    if name not in ("float32", "bfloat16"):
        raise UserError(f"dtype={name!r} must be float32 or bfloat16")
    return jnp.dtype(name)
