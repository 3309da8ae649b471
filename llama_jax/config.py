"""Config machinery: typed dotted overrides, JSON both ways, finding a config by name or path.

A config is a tree of frozen dataclasses. A field annotated with a `Component` base class (`attention: Mixer`) holds
any subclass of it; the subclass is chosen by its class name, on the command line as in a saved file. There is no
registry: Python's own list of subclasses is used, so a class from a notebook cell is passed and chosen like any other.
"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A user's mistake: one sentence that says what to do. The command line prints it and exits with 2."""


def _is_config(value: object) -> bool:
    """Return whether `value` is a dataclass or an instance of one."""
    return dataclasses.is_dataclass(value)  # pyright would narrow the value to a type that it does not know


def _class_of(value: object) -> type:
    return type(value)


class Component:
    """Base of the base classes of pieces (`Mixer`, `FeedForward`, `Norm`...): fields so annotated take any subclass."""


def choices(base: type, components: Sequence[type] = ()) -> dict[str, type]:
    """Return the concrete classes that a field annotated with `base` may hold, by class name.

    Those of the package, and those of `components` that derive from `base`. The package's are found although packages
    are imported lazily: a subclass is in the package of its base, which imports it eagerly.
    """
    found: dict[str, type] = {}
    stack = [base]
    while stack:
        cls = stack.pop()
        stack += cls.__subclasses__()
        concrete = _is_config(cls) and not inspect.isabstract(cls)
        if concrete and cls.__module__.split(".")[0] == __package__:
            found[cls.__name__] = cls
    found |= {cls.__name__: cls for cls in components if issubclass(cls, base)}
    return dict(sorted(found.items()))


def outside_classes(config: Any) -> Iterator[type]:
    """Yield the classes in a config that are from outside the package."""
    if _is_config(config):
        if not type(config).__module__.startswith(f"{__package__}."):
            yield type(config)
        config = tuple(getattr(config, name) for name in field_types(_class_of(config)))
    if isinstance(config, tuple):
        for part in typing.cast("tuple[Any, ...]", config):
            yield from outside_classes(part)


def component_choices(annotation: Any, components: Sequence[type] = ()) -> dict[str, type]:
    """Return the classes that a field with this annotation may hold, by name; none where it holds no component."""
    found: dict[str, type] = {}
    for option in typing.get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, Component):
            found |= choices(option, components)
    return found


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of every dataclass field of `cls`, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_name(annotation: Any) -> str:
    """Return a type as `--help` and error messages write it: `int`, `str or none`, `list of str`, `Mixer`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin is tuple:
        return f"list of {type_name(_item_type(arguments))}"
    return getattr(annotation, "__name__", str(annotation))


def _item_type(arguments: tuple[Any, ...]) -> Any:
    """Return the type of a tuple's items: X of tuple[X, ...], else Any."""
    return arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any


class _Mismatch(Exception):
    """A value is not of the type of its field."""


def _none(value: object) -> None:
    if value is not None and value not in ("none", "None", "null"):
        raise _Mismatch


def _bool(value: object) -> bool:
    text = str(value).lower()
    if not isinstance(value, bool | str) or text not in ("true", "false"):
        raise _Mismatch
    return text == "true"


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise _Mismatch
    return int(value.replace("_", "")) if isinstance(value, str) else value


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise _Mismatch
    return float(value)


def _str(value: object) -> str:
    if not isinstance(value, str | Path):
        raise _Mismatch
    return str(value)


# Readers of a Python value, or of the text of a command line, by type.
_SCALARS: dict[Any, Callable[[object], Any]] = {
    type(None): _none,
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    Any: lambda value: value,
}


def _parse(annotation: Any, value: Any) -> Any:
    """Return `value`, a Python value or the text of a command line, as `annotation`. Raises _Mismatch."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        try:
            return _SCALARS[annotation](value)
        except ValueError:  # of int and float
            raise _Mismatch from None
    if origin in (typing.Union, types.UnionType):
        for option in sorted(arguments, key=lambda a: (a is not type(None), a is str)):  # `none` is None, str the last
            try:
                return _parse(option, value)
            except _Mismatch:
                continue
    elif origin is typing.Literal:
        for option in arguments:
            if (value == option and type(value) is type(option)) or value == str(option):
                return option
    elif origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value else []
        if isinstance(value, list | tuple):
            return tuple(_parse(_item_type(arguments), part) for part in typing.cast("Sequence[Any]", value))
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise _Mismatch


def override[C](config: C, changes: Mapping[str, Any], components: Sequence[type] = ()) -> C:
    """Return a copy of `config` with dotted keys changed: `override(config, {"model.attention.num_kv_heads": 2})`.

    Values are Python values or the text of a command line; both are checked against the field's type. A component is
    switched by its class name (`"model.attention": "Latent"`); the fields it shares with the old one are kept. All
    changes are applied before anything is validated, so their order does not matter. Raises UserError for an unknown
    key, a value of the wrong type and an impossible combination.
    """
    normal = {key.replace("-", "_"): value for key, value in changes.items()}
    return _changed(_class_of(config), config, normal, "", components)


def _changed(cls: type, old: Any, changes: Mapping[str, Any], prefix: str, components: Sequence[type]) -> Any:
    """Return a `cls` that keeps the fields it shares with `old`, with `changes` below `prefix` applied."""
    kept = {
        name: getattr(old, name)
        for name, hint in field_types(cls).items()
        if hasattr(old, name) and field_types(_class_of(old)).get(name) == hint
    }
    nested: dict[str, dict[str, Any]] = {}  # by field; the change of the field itself has the key ""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        nested.setdefault(name, {})[rest] = value
    if missing := [n for n in field_types(cls) if n not in {*kept, *nested, *_with_default(cls)}]:
        raise UserError(
            f"{prefix.rstrip('.')}={cls.__name__} also needs {', '.join(prefix + n for n in missing)}: give them too"
        )
    changed = {name: _field(cls, name, kept.get(name), change, prefix, components) for name, change in nested.items()}
    return _build(cls, kept | changed, prefix)


def _field(cls: type, name: str, old: Any, change: dict[str, Any], prefix: str, components: Sequence[type]) -> Any:
    """Return the new value of a field: another value, another component, or the old one with changes inside it."""
    key = prefix + name
    if name not in field_types(cls):
        raise _unknown(key, cls, components)
    annotation, new = field_types(cls)[name], old
    options = component_choices(annotation, components)
    inner = {rest: value for rest, value in change.items() if rest}
    if "" in change:
        value = change[""]
        if isinstance(value, str):
            # inverse_sqrt is InverseSqrt: the names that schedules had before they were classes.
            chosen = options.get(value) or options.get("".join(part.capitalize() for part in value.split("_")))
            if chosen is not None:
                return _changed(chosen, old, inner, key + ".", components)
        try:
            new = _parse(annotation, value)
        except _Mismatch:
            wanted = type_name(annotation) + (f" (one of {', '.join(options)})" if options else "")
            if any(map(_is_config, typing.get_args(annotation))) and not options:
                wanted += ": give it in a config file"
            raise UserError(f"{key}={value!r} is not of type {wanted}") from None
    if inner and not _is_config(new):
        hint = f": choose one first with --{key} ({', '.join(options)})" if options else ""
        raise UserError(
            f"unknown key '{key}.{next(iter(inner))}': {key} is {new!r} and has no '{next(iter(inner))}'{hint}"
        )
    return _changed(_class_of(new), new, inner, key + ".", components) if inner else new


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def _with_default(cls: type) -> set[str]:
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(cls) if not (f.default is missing and f.default_factory is missing)}


def _unknown(key: str, cls: type, components: Sequence[type]) -> UserError:
    prefix, _, name = key.rpartition(".")
    dotted = f"{prefix}." if prefix else ""
    near = difflib.get_close_matches(name, field_types(cls), n=1, cutoff=0.5)
    hint = f"Did you mean '{dotted}{near[0]}'?" if near else f"It has {', '.join(field_types(cls))}."
    bases = [base for base in cls.__mro__ if issubclass(base, Component) and base not in (cls, Component)]
    owners = [n for base in bases for n, c in choices(base, components).items() if name in field_types(c)]
    if owners:
        hint += f" ({owners[0]} has it: choose it with --{prefix} {owners[0]})"
    return UserError(f"unknown key '{key}': {cls.__name__} has no '{name}'. {hint}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, annotation, value) of every leaf; a component's own choice is a leaf before its fields."""
    for name, annotation in field_types(_class_of(config)).items():
        value = getattr(config, name)
        is_config = _is_config(value)
        if not is_config or component_choices(annotation):
            yield prefix + name, annotation, value
        if is_config:
            yield from leaves(value, prefix + name + ".")


def field_docs(cls: type) -> dict[str, str]:
    """Return the meaning of each field by the docstrings of a config and its bases.

    They are lines `name: meaning.`, which may go on indented.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__bases__):
        docs |= field_docs(base) if _is_config(base) else {}
    name = None
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in field_types(cls):
            name = head
            docs[name] = rest
        elif name is not None and line.startswith(" "):
            docs[name] += " " + line.strip()
        else:
            name = None
    return docs


def to_json(config: Any) -> Any:
    """Return plain JSON data; every dataclass has its class name under `type`."""
    if _is_config(config):
        fields = {name: to_json(getattr(config, name)) for name in field_types(_class_of(config))}
        return {"type": type(config).__name__} | fields
    if isinstance(config, tuple | list):
        return [to_json(value) for value in typing.cast("Sequence[Any]", config)]
    return config


def from_json[C](base: type[C], data: Any, components: Sequence[type] = (), prefix: str = "") -> C:
    """Return the config that `to_json` wrote; `components` are the classes from outside the package that it may name.

    Raises UserError for an unknown class or key, a missing key and a value of the wrong type.
    """
    return _from_json(base, data, components, prefix)


def _from_json(annotation: Any, data: Any, components: Sequence[type], key: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    where = key.rstrip(".") or "the config"
    if isinstance(data, dict):
        given = typing.cast("dict[str, Any]", data)
        known: dict[str, type] = {}
        for option in arguments or (annotation,):
            if isinstance(option, type):
                known |= choices(option, components)
        if (name := given.get("type")) not in known:
            raise UserError(
                f"{where} names the class {name!r}, which this package does not have: pass it with components=({name},)"
                ", or to train.py the config file that defines it"
            )
        cls = known[name]
        values = {name: value for name, value in given.items() if name != "type"}
        for unknown in values.keys() - field_types(cls).keys():
            raise _unknown(key + unknown, cls, components)
        # Fields that a newer version has added have their defaults, which mean what was done before.
        for missing in field_types(cls).keys() - values.keys() - _with_default(cls):
            raise UserError(f"{where} ({name}) lacks the key '{missing}'")
        parsed = {n: _from_json(field_types(cls)[n], v, components, f"{key}{n}.") for n, v in values.items()}
        return _build(cls, parsed, key)
    if origin is tuple and isinstance(data, list):
        items = typing.cast("list[Any]", data)
        return tuple(_from_json(_item_type(arguments), part, components, key) for part in items)
    try:
        return _parse(annotation, data)
    except _Mismatch:
        raise UserError(f"{where}={data!r} is not of type {type_name(annotation)}") from None


def config_directories() -> list[Path]:
    """Return where config names are looked up: next to the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    return [d for d in (package.parent / "configs", package / "_configs") if d.is_dir()]


def config_names() -> list[str]:
    """Return the names that `load_config` takes."""
    names = {f.relative_to(d).with_suffix("").as_posix() for d in config_directories() for f in d.rglob("*.py")}
    return sorted(name for name in names if "/_" not in f"/{name}")


def find_config(name: str | Path) -> Path:
    """Return the file of a config given by name (`tiny_python`) or by path. Raises UserError when there is none."""
    path = Path(name)
    if re.match("[a-zA-Z][a-zA-Z0-9+.-]+:/", str(name)):
        raise UserError(f"config file '{name}' must be a local file: it is a program, copy it here first")
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"config file '{name}' does not exist")
        return path
    for directory in config_directories():
        if (file := directory / f"{name}.py").is_file():
            return file
    near = difflib.get_close_matches(str(name), config_names(), n=1)
    hint = (
        f"did you mean '{near[0]}'?" if near else f"there are {', '.join(config_names())}, or give a path to a .py file"
    )
    raise UserError(f"there is no config '{name}': {hint}")


def load_config_module(name: str | Path) -> types.ModuleType:
    """Return the config's module, executed: its docstring has the command, `get_config()` returns the config."""
    file = find_config(name)
    spec = importlib.util.spec_from_file_location(f"llama_jax_config_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file '{file}' has no function get_config()")
    return module


def read_json(file: Path) -> Any:
    """Return the data of a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{file}' does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is not valid JSON ({error}): it is damaged or another kind of file") from None
