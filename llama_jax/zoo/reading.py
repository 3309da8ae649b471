"""Reading and writing of Hugging Face's config.json, for all families."""

import dataclasses
import math
import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

from llama_jax.config import Json, UserError
from llama_jax.models import ModelConfig
from llama_jax.nn import Activation
from llama_jax.zoo.known_keys import is_off, origin

_MISSING: Any = object()
# Activations by their names; the first name of each is the one that is written.
ACTIVATIONS: dict[str, Activation] = {
    **dict.fromkeys(("gelu", "gelu_python"), "gelu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"), "gelu_tanh"),
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu_squared",
    **dict.fromkeys(("silu", "swish"), "silu"),
    "tanh": "tanh",
}
# Keys that are harmless in a model that is nothing but a decoder.
CAUSAL = frozenset({"is_decoder"})
# Sizes of which every unit has its own entry in a list, before any tensor is looked at.
_LISTED = re.compile("(layer|expert|dense)(?!.*_size)")
# Tools that quantize weights, by `quant_method`.
_QUANTIZERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mlx": "MLX"}


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json that is a field of a config, for reading and writing.

    `field` is the field, dotted (`attention.num_heads`); `kind` the type of the value, `Activation` for the name of
    one. `default` is the value where the key is null, `absent` where it is not there (by default `default`); without
    them it has to be there. `argument` is the name of the value for `Family.read`, by default the field's own.
    """

    key: str
    field: str
    kind: Any
    default: Any = _MISSING
    absent: Any = _MISSING
    argument: str = ""

    def __post_init__(self) -> None:
        if not self.argument:
            object.__setattr__(self, "argument", self.field.rpartition(".")[2])


# Keys that most families have.
SIZES = (
    Key("vocab_size", "vocab_size", int),
    Key("hidden_size", "hidden_size", int),
    Key("num_hidden_layers", "num_layers", int),
    Key("num_attention_heads", "attention.num_heads", int),
)


class ConfigReader:
    """A config.json that is read key by key; what may change a logit and nobody has read is refused by name.

    `label` is the name of such a model in sentences ("a Llama"). `architectures` are the classes whose weights it
    reads, the usual one first. `aliases` are other names of keys, as `{other: key}`; `harmless` keys may have any
    value, like those that are harmless in all families (`known_keys`). The file is `data`.
    """

    def __init__(
        self,
        data: Json,
        label: str,
        architectures: Collection[str],
        *,
        aliases: Mapping[str, str] | None = None,
        harmless: Collection[str] = (),
    ):
        self.label, self.data, self._harmless, self._aliases = label, data, harmless, aliases or {}
        self.taken = {"architectures", "model_type"}
        self.architecture = architecture(data, architectures, label)
        if not is_off(mlx := data.get("quantization")):
            raise UserError(f"config.json has quantization={mlx!r}: {_unquantized('MLX')}")
        if quantization := data.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            if (tool := _QUANTIZERS.get(str(method).lower())) is not None:
                raise UserError(f"config.json has quantization_config.quant_method={method!r}: {_unquantized(tool)}")

    def take(self, key: str, kind: Any, default: Any = _MISSING, *, absent: Any = _MISSING) -> Any:
        """Return the value of `key`; `default` where it is null, and where it is absent too, unless `absent` is given.

        Raises UserError for a value of another type, and where there is neither value nor default.
        """
        value, name = self.data.get(key), key
        self.taken.add(key)
        for alias, meant in self._aliases.items():
            if meant == key and (other := self.data.get(alias)) is not None:
                self.taken.add(alias)
                if value is not None and other != value:
                    raise UserError(f"config.json has {alias}={other!r} and {key}={value!r}, which are one setting")
                value, name = other, name if value is not None else alias
        if value is None:
            if absent is not _MISSING and key not in self.data:
                return absent
            if default is _MISSING:
                raise UserError(f"config.json lacks '{key}'")
            return default
        return typed(value, kind, f"config.json has {name}")

    def read(self, key: Key) -> Any:
        """Return the value of a declared key, as `take` does."""
        if key.kind is Activation:
            return self.activation(key.key, key.default)
        return self.take(key.key, key.kind, key.default, absent=key.absent)

    def activation(self, key: str, default: str, *, only: Activation | None = None) -> Activation:
        """Return the activation that `key` names. Raises UserError for others than this package has, or than `only`."""
        name = self.take(key, str, default)
        names = [known for known, activation in ACTIVATIONS.items() if only in (None, activation)]
        if name not in names:
            raise UserError(
                f"config.json has {key}={name!r}, which is not supported for {self.label}: {', '.join(names)} are"
            )
        return ACTIVATIONS[name]

    def only(self, **values: Any) -> None:
        """Raise UserError where one of these keys is there with another value: the family has no other."""
        for key, only in values.items():
            if (value := self.take(key, object, only)) != only:
                raise UserError(
                    f"config.json has {key}={value!r}, and {self.label} can only have {only!r}; where that makes no "
                    f"difference, pass --ignore-config-keys {key}"
                )

    def finish(self) -> None:
        """Raise UserError for a key that nobody took, and that may change a logit."""
        for key, value in self.data.items():
            if key in self.taken or key in self._harmless or is_off(value) or origin(key, value) is not None:
                continue
            if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
                continue
            raise UserError(
                f"config.json has {key}={value!r}, which is not supported for {self.label}; where it changes no "
                f"logit, pass --ignore-config-keys {key}"
            )


def write_keys(config: ModelConfig, keys: Collection[Key], samples: Collection[ModelConfig], label: str) -> Json:
    """Return the values of declared keys.

    Raises UserError where a piece that has such a field is not of just the types that it has in `samples`.
    """
    parts = [key.field.split(".")[:-1] for key in keys]
    pieces = dict.fromkeys(".".join(names[: i + 1]) for names in parts for i in range(len(names)))
    for field in pieces:
        piece = operator.attrgetter(field)
        expect(piece(config), *{type(piece(sample)): None for sample in samples}, label=label)
    data = {}
    for key in keys:
        value = operator.attrgetter(key.field)(config)
        data[key.key] = write_activation(value, label) if key.kind is Activation else value
    return data


def _unquantized(kind: str) -> str:
    return f"weights quantized by {kind} are not supported: take a release of these weights that is not quantized"


def without_keys(data: Json, ignored: Collection[str]) -> Json:
    """Return a config.json without these keys; `rope_scaling.KEY` is a key inside of another's value.

    Raises UserError for a key that is not there.
    """
    found = dict(data)
    for key in ignored:
        outer, _, inner = key.partition(".")
        if key in found:
            del found[key]
        elif inner and isinstance(found.get(outer), dict) and inner in found[outer]:
            found[outer] = {name: value for name, value in found[outer].items() if name != inner}
        else:
            raise UserError(f"ignore_config_keys names '{key}', which the config does not have")
    return found


def plain_name(architecture: str) -> str:
    """Return the name of a class in lower case, without the prefixes of TensorFlow's and Flax's."""
    name = architecture.lower()
    return name.removeprefix("tf").removeprefix("flax")


def architecture(data: Json, known: Collection[str], label: str) -> str:
    """Return the one of the classes `known` that the file's `architectures` name; the first where they name none.

    Raises UserError for other classes, whose head or whose code is not read here.
    """
    names = data.get("architectures") or [next(iter(known))]
    by_name = {plain_name(name): name for name in known}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.json has architectures={names!r}, which should be a list of names")
    for name in names:
        if plain_name(name) not in by_name:
            raise UserError(
                f"config.json has architectures={names!r}, and for {label} {', '.join(known)} are supported; where "
                "the weights are of one of these, pass --ignore-config-keys architectures"
            )
    return by_name[plain_name(names[0])]


def typed(value: Any, kind: Any, where: str) -> Any:
    """Return `value`. Raises UserError where it is not of type `kind`, or a number that no model has.

    Whole numbers count as float.
    """
    if (
        type(value) is int
        and kind in (int, float)
        and abs(value) >= (limit := 1 << (14 if _LISTED.search(where) else 31))
    ):
        raise UserError(f"{where}, a number beyond {limit}: it is damaged, or of another kind of model")
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r}, which should be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}={value}, which should be a finite number")
    return value


def write_activation(activation: str, label: str) -> str:
    """Return Hugging Face's name of an activation. Raises UserError where it has none."""
    for name, own in ACTIVATIONS.items():
        if own == activation:
            return name
    raise UserError(f"activation={activation} has no place in {label}")


def read_quantization(reader: ConfigReader) -> None:
    """Take `quantization_config` where there is one. Raises UserError unless it is fp8 with a scale for each block."""
    if (found := reader.take("quantization_config", dict, None)) is None:
        return
    for key, only in {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}.items():
        if (value := found.get(key, None if key == "quant_method" else only)) != only:
            raise UserError(
                f"config.json has quantization_config.{key}={value!r}, and only {only!r} is supported: take a release "
                "of these weights that is not quantized"
            )
    block = found.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise UserError(f"config.json has quantization_config.weight_block_size={block!r}: it must be two sizes")


def expect(piece: Any, *wanted: type, label: str) -> Any:
    """Return `piece`. Raises UserError where it is of none of just these types."""
    if type(piece) not in wanted:
        names = " or ".join(kind.__name__ for kind in wanted)
        raise UserError(f"{label} has {names}, and this model {type(piece).__name__}")
    return piece


def check_lossless(config: ModelConfig, again: ModelConfig, label: str) -> None:
    """Raise UserError where `again`, read from a written config.json, is not `config`, naming what was lost."""
    if type(again) is not type(config):
        raise UserError(f"{label} is made of {type(again).__name__}, and this model is a {type(config).__name__}")
    if again != config:
        raise UserError(f"{_difference(config, again)} has no place in {label}")


def _difference(config: Any, again: Any, field: str = "") -> str:
    """Return the innermost dotted field that differs between two configs, and its value in the first."""
    if type(config) is type(again) and dataclasses.is_dataclass(config):
        for f in dataclasses.fields(config):
            if getattr(config, f.name) != getattr(again, f.name):
                inner = f"{field}.{f.name}" if field else f.name
                return _difference(getattr(config, f.name), getattr(again, f.name), inner)
    return f"{field}={config}"
