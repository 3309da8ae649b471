"""Families of released models: the declaration of one, and the list of all."""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import ModelConfig
from llama_jax.zoo.reading import ConfigReader, Key, check_lossless, plain_name, write_keys
from llama_jax.zoo.weights import TensorNames


@dataclasses.dataclass(frozen=True, kw_only=True)
class Presets:
    """Configs of published models.

    `name` is their family's, `title` its name in tables, `objectives` the class names of what they are trained on.
    """

    name: str
    title: str
    presets: Mapping[str, ModelConfig]
    objectives: tuple[str, ...] = ("Causal",)


@dataclasses.dataclass(frozen=True)
class MetaFiles[C: ModelConfig]:
    """Files with Meta's names: the names, and the config from `params.json` and the shapes of tensors by name."""

    names: TensorNames
    from_meta: Callable[[Json, Mapping[str, tuple[int, ...]]], C]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family[C: ModelConfig](Presets):
    """Released models of one `model_type` on Hugging Face (`name`): their config.json and their weights.

    `label` is the name of such a model in messages ("a Llama"). `architectures` are the classes whose weights are read;
    the first is the usual one. `keys` are those of config.json that are fields of a config; the pieces that have these
    fields are of the types that they have in the presets. `read(reader, arguments)` makes a config of the values of
    `keys` (by argument) and of what else it takes from the reader; `write(config, label)` returns the other keys.
    `aliases` are other names of keys, as `{other: key}`; keys that are `harmless` may have any value. `released`
    returns a config without what no config.json can express. `with_tensors(config, tensors)` returns it with what
    only the files' tensors show. `names` may depend on the config. `meta` is for files with Meta's names.
    """

    label: str
    architectures: tuple[str, ...]
    keys: tuple[Key, ...]
    read: Callable[[ConfigReader, Json], C]
    write: Callable[[Any, str], Json]
    names: TensorNames | Callable[[C], TensorNames]
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    harmless: Collection[str] = ()
    released: Callable[[C], C] | None = None
    with_tensors: Callable[[C, Collection[str]], C] | None = None
    meta: MetaFiles[C] | None = None

    def from_hf(self, data: Json) -> C:
        """Return the model that a `config.json` describes.

        Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
        """
        reader = ConfigReader(data, self.label, self.architectures, aliases=self.aliases, harmless=self.harmless)
        config = self.read(reader, {key.argument: reader.read(key) for key in self.keys})
        reader.finish()
        return config

    def to_hf(self, config: ModelConfig) -> Json:
        """Return the `config.json` of a model, for the usual class of the family.

        Raises UserError for a model of another family, naming what a model of this one cannot have.
        """
        samples = tuple(self.presets.values())
        if not isinstance(config, type(samples[0])):
            raise UserError(f"{self.label} is not a {type(config).__name__}")
        data = {"architectures": [self.architectures[0]], "model_type": self.name}
        data |= write_keys(config, self.keys, samples, self.label) | self.write(config, self.label)
        released: Any = config if self.released is None else self.released(config)  # type: ignore[arg-type]
        check_lossless(released, self.from_hf(data), self.label)
        return data

    def names_of(self, config: C) -> TensorNames:
        """Return the names of the tensors of this model."""
        return self.names if isinstance(self.names, TensorNames) else self.names(config)


_registered: dict[str, Family[Any]] = {}


def register(family: Family[Any]) -> None:
    """Add a family from outside the package, or replace one of the same name: its models are loaded and exported."""
    _registered[family.name] = family


@functools.cache
def _package_presets() -> dict[str, Presets]:
    """Return every `Presets` and `Family` in the modules of this package, by name."""
    package = __name__.rpartition(".")[0]
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Presets)]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.name)}


def all_presets() -> dict[str, Presets]:
    """Return every family by name, those too whose weights were never released."""
    return _package_presets() | _registered


def families() -> tuple[str, ...]:
    """Return the `model_type` of every family with released weights."""
    return tuple(name for name, entry in all_presets().items() if isinstance(entry, Family))


def family(model_type: str) -> Family[Any]:
    """Return the family that Hugging Face calls `model_type`. Raises UserError when there is none."""
    found = all_presets().get(model_type)
    if not isinstance(found, Family):
        raise UserError(f"model_type '{model_type}' is not one of the families that are known: {', '.join(families())}")
    return found


def model_type_of(data: Json, where: object) -> str:
    """Return the `model_type` of a config.json, from its `architectures` where it has none.

    Raises UserError, naming the file `where`, for one that has neither.
    """
    if isinstance(data.get("model_type"), str) and data["model_type"]:
        return data["model_type"]
    names = data.get("architectures")
    for name in names if isinstance(names, list) else ():
        found = {}  # by model_type the place of the class: the usual one of a family is not another's
        for model_type in families() if isinstance(name, str) else ():
            known = [plain_name(architecture) for architecture in family(model_type).architectures]
            found |= {model_type: known.index(plain_name(name))} if plain_name(name) in known else {}
        if found:
            return min(found, key=lambda model_type: found[model_type])
    raise UserError(
        f"'{where}' has no model_type, and no architectures that are known: it is not a Hugging Face config"
    )


def model_type_of_params(params: Json) -> str:
    """Return the family of a `params.json`: Mistral's code writes `hidden_dim`, which Meta's has not."""
    if params.get("moe"):
        return "mixtral"
    if isinstance(params.get("sliding_window") or params.get("_sliding_window"), list):
        return "ministral"
    return "mistral" if "hidden_dim" in params else "llama"


def presets() -> dict[str, ModelConfig]:
    """Return the configs of published models by name: `llama2_7b`, `llama3_8b`, `stories15m`..."""
    return {name: config for entry in all_presets().values() for name, config in entry.presets.items()}
