"""What the families share in reading and writing Hugging Face's config.json."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from llama_jax.config import UserError
from llama_jax.models import ModelConfig
from llama_jax.nn import Activation, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from llama_jax.zoo.known_keys import is_off, origin

_MISSING: Any = object()
# Of each activation the usual name first; several compute the same.
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
# Of a model that is nothing but a decoder.
CAUSAL = frozenset({"is_decoder"})
# What quantizes weights, by the name that `quant_method` has for it.
_QUANTIZERS = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes", "mlx": "MLX"}


class ConfigReader:
    """A config.json that is read key by key; what may change a logit and nobody has read is refused by name.

    `family` is what sentences call such a model ("a Llama"). `architectures` are the classes whose weights it reads,
    the usual one first. `aliases` are other names of keys, as `{other: key}`; `harmless` keys may have any value,
    beside those that are harmless in all families (`known_keys`).
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        family: str,
        architectures: Collection[str],
        *,
        aliases: Mapping[str, str] | None = None,
        harmless: Collection[str] = (),
    ):
        self.family, self._data, self._harmless, self._aliases = family, data, harmless, aliases or {}
        self.taken = {"architectures", "model_type"}
        self.architecture = architecture(data, architectures, family)
        if quantization := data.get("quantization") or data.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            if "quantization" in data and not is_off(data["quantization"]):
                raise UserError(f"config.json has quantization={quantization!r}: {_unquantized('MLX')}")
            if str(method).lower() in _QUANTIZERS:
                raise UserError(
                    f"config.json has quantization_config.quant_method={method!r}: "
                    f"{_unquantized(_QUANTIZERS[str(method).lower()])}"
                )

    def take(self, key: str, kind: Any, default: Any = _MISSING, *, absent: Any = _MISSING) -> Any:
        """The value of `key`; `default` where it is null, and where it is not there too, unless `absent` is given.

        Raises UserError for a value of another type, and where there is neither value nor default.
        """
        value, name = self._data.get(key), key
        self.taken.add(key)
        for alias, meant in self._aliases.items():
            if meant == key and (other := self._data.get(alias)) is not None:
                self.taken.add(alias)
                if value is not None and other != value:
                    raise UserError(f"config.json has {alias}={other!r} and {key}={value!r}, which are one setting")
                value, name = other, name if value is not None else alias
        if value is None:
            if absent is not _MISSING and key not in self._data:
                return absent
            if default is _MISSING:
                raise UserError(f"config.json lacks '{key}'")
            return default
        return typed(value, kind, f"config.json has {name}")

    def only(self, **values: Any) -> None:
        """Raises UserError where one of these keys is there with another value: what the family cannot do otherwise."""
        for key, only in values.items():
            if (value := self.take(key, object, only)) != only:
                raise UserError(
                    f"config.json has {key}={value!r}, and {self.family} can only have {only!r}; where that makes no "
                    f"difference, pass --ignore-config-keys {key}"
                )

    def finish(self) -> None:
        """Raise UserError for a key that nobody took, and that may change a logit."""
        for key, value in self._data.items():
            if key in self.taken or key in self._harmless or is_off(value) or origin(key, value) is not None:
                continue
            if key == "layer_types" and isinstance(value, list) and set(value) == {"full_attention"}:
                continue
            raise UserError(
                f"config.json has {key}={value!r}, which is not supported for {self.family}; where it changes no "
                f"logit, pass --ignore-config-keys {key}"
            )


def _unquantized(kind: str) -> str:
    return f"weights quantized by {kind} are not supported: take a release of these weights that is not quantized"


def without_keys(data: Mapping[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """A config.json without these keys; `rope_scaling.KEY` is a key inside of another's value.

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
    """The name of a class as families know it: that of TensorFlow's and Flax's too, whatever is written large."""
    name = architecture.lower()
    return name.removeprefix("tf").removeprefix("flax")


def architecture(data: Mapping[str, Any], known: Collection[str], family: str) -> str:
    """Which of the classes `known` the file's `architectures` name; the first where they name none.

    Raises UserError for others, whose head or whose code is not read here.
    """
    names = data.get("architectures") or [next(iter(known))]
    by_name = {plain_name(name): name for name in known}
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"config.json has architectures={names!r}, which should be a list of names")
    for name in names:
        if plain_name(name) not in by_name:
            raise UserError(
                f"config.json has architectures={names!r}, and for {family} {', '.join(known)} are supported; where "
                "the weights are of one of these, pass --ignore-config-keys architectures"
            )
    return by_name[plain_name(names[0])]


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, or UserError where it is not of type `kind`; whole numbers count as float."""
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r}, which should be of type {kind.__name__}")
    return value


def read_activation(reader: ConfigReader, key: str, default: str, *, only: Activation | None = None) -> Activation:
    """The activation that `key` names. Raises UserError for others than this package has, or than `only`."""
    name = reader.take(key, str, default)
    names = [known for known, own in ACTIVATIONS.items() if only in (None, own)]
    if name not in names:
        raise UserError(
            f"config.json has {key}={name!r}, which is not supported for {reader.family}: {', '.join(names)} are"
        )
    return ACTIVATIONS[name]


def write_activation(activation: str, family: str) -> str:
    """Hugging Face's name of an activation. Raises UserError where it has none."""
    for name, own in ACTIVATIONS.items():
        if own == activation:
            return name
    raise UserError(f"activation={activation} has no place in {family}")


def read_rope(
    reader: ConfigReader, max_positions: int, theta: float = 10_000.0, *, partial: float = 1.0
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) of both spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`.

    `partial` is the share of a head that the family rotates, and the only one that may be asked for. Of dynamic NTK,
    which changes nothing up to `max_positions`, nothing is left. Raises UserError for a kind that is not supported and
    for keys that are not known.
    """
    theta, before = reader.take("rope_theta", float, theta), reader.take("original_max_position_embeddings", int, None)
    reader.only(partial_rotary_factor=partial)
    old, new = reader.take("rope_scaling", dict, {}), reader.take("rope_parameters", dict, {})
    if old and new and old != new:
        raise UserError("config.json has both rope_scaling and rope_parameters, and they differ")
    rest = {key: value for key, value in (old | new).items() if not is_off(value) or key == "truncate"}
    kind = rest.pop("rope_type", rest.pop("type", "default"))
    rest.pop("type", None)
    rest.pop("finetuned", None)  # whether the weights were trained with it
    if before is not None and kind in ("llama3", "yarn"):
        rest["original_max_position_embeddings"] = before
    if kind in ("default", "linear", "dynamic"):
        rest.pop("original_max_position_embeddings", None)  # of the weights before; these kinds do not read it

    def take(key: str, type_: Any = float, default: Any = _MISSING) -> Any:
        if key not in rest and default is _MISSING:
            raise UserError(f"config.json has rope_type={kind!r} without '{key}'")
        return typed(rest.pop(key, default), type_, f"config.json has rope_scaling.{key}")

    theta = take("rope_theta", float, theta)
    scaling: RopeScaling | None
    if kind == "default":
        scaling = None
    elif kind == "dynamic":
        # Frequencies change where a text is longer than max_positions, and no text here becomes that long.
        take("factor", float, 1.0)
        scaling = None
    elif kind == "linear":
        scaling = LinearScaling(take("factor"))
    elif kind == "llama3":
        scaling = Llama3Scaling(
            factor=take("factor"),
            low_freq_factor=take("low_freq_factor"),
            high_freq_factor=take("high_freq_factor"),
            original_max_positions=take("original_max_position_embeddings", int, max_positions),
        )
    elif kind == "yarn":
        scaling = YarnScaling(
            factor=take("factor"),
            original_max_positions=take("original_max_position_embeddings", int, max_positions),
            beta_fast=take("beta_fast", float, 32.0),
            beta_slow=take("beta_slow", float, 1.0),
            mscale=take("mscale", float, 0.0),
            mscale_all_dim=take("mscale_all_dim", float, 0.0),
        )
        # What Hugging Face computes itself where it is not given; a value of its own would be another model.
        if abs(take("attention_factor", float, scaling.magnitude()) - scaling.magnitude()) > 1e-6:
            raise UserError("config.json has its own rope_scaling.attention_factor, which is not supported")
        if not take("truncate", bool, True):
            raise UserError("config.json has rope_scaling.truncate=False, which is not supported")
    else:
        raise UserError(
            f"config.json has rope_type={kind!r}, which is not supported: linear, dynamic, yarn and llama3 are"
        )
    if (asked := take("partial_rotary_factor", float, partial)) != partial:
        raise UserError(f"config.json has partial_rotary_factor={asked}, and {reader.family} can only have {partial}")
    if rest:
        raise UserError(
            f"config.json has rope_scaling.{next(iter(rest))}, which is not supported with {kind!r}; where it changes "
            f"no logit, pass --ignore-config-keys rope_scaling.{next(iter(rest))}"
        )
    return theta, scaling


def write_rope(scaling: RopeScaling | None, family: str) -> dict[str, Any] | None:
    """`rope_scaling` of a config.json. Raises UserError where it has no place there."""
    match scaling:
        case None:
            return None
        case LinearScaling(factor):
            return {"rope_type": "linear", "factor": factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        case YarnScaling():
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_positions,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "mscale": scaling.mscale,
                "mscale_all_dim": scaling.mscale_all_dim,
            }
    raise UserError(f"{type(scaling).__name__} has no place in {family}")


def read_quantization(reader: ConfigReader) -> None:
    """Takes `quantization_config` where there is one. Raises UserError unless it is fp8 with a scale for each block."""
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


def expect(piece: Any, wanted: type, family: str) -> Any:
    """`piece`, or UserError where it is not of just this type."""
    if type(piece) is not wanted:
        raise UserError(f"{family} has {wanted.__name__}, and this model {type(piece).__name__}")
    return piece


def checked(
    data: dict[str, Any], config: ModelConfig, from_hf: Callable[[Mapping[str, Any]], ModelConfig], family: str
) -> dict[str, Any]:
    """`data`, a config.json; UserError where reading it gives another model than `config`, naming what is lost."""
    again = from_hf(data)
    if again == config:
        return data
    if type(again) is not type(config):
        raise UserError(f"{family} is made of {type(again).__name__}, and this model is a {type(config).__name__}")
    changed = [f.name for f in dataclasses.fields(config) if getattr(again, f.name) != getattr(config, f.name)]  # type: ignore[arg-type]
    raise UserError(f"{changed[0]}={getattr(config, changed[0])} has no place in {family}")
