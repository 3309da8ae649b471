"""Config machinery: typed dotted overrides, JSON both ways, finding a config by name or path.

A config is a tree of frozen dataclasses. A field annotated with a `Component` base class (`attention: Mixer`) holds
any subclass of it; the subclass is chosen by its class name, on the command line as in a saved file. There is no
registry: the subclasses Python knows of are the choices, so a class from a notebook cell is one of them.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A user's mistake, told in one sentence with what to do. The command line prints it and exits with 2."""


class Component:
    """Base of the base classes of pieces (`Mixer`, `FeedForward`, `Norm`...): fields so annotated take any subclass."""


def choices(base: type, components: Sequence[type] = ()) -> dict[str, type]:
    """Concrete classes that may stand in a field annotated with `base`, by class name.

    Those of the package, and those of `components` that derive from `base`.
    """
    found: dict[str, type] = {}
    stack = [base]
    while stack:
        cls = stack.pop()
        stack += cls.__subclasses__()
        concrete = dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)
        if concrete and cls.__module__.split(".")[0] == __package__:
            found[cls.__name__] = cls
    found |= {cls.__name__: cls for cls in components if issubclass(cls, base)}
    return dict(sorted(found.items()))


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Resolved annotation of every dataclass field of `cls`, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def type_name(annotation: Any) -> str:
    """How `--help` and error messages write a type: `int`, `str or none`, `list of str`, `Mixer`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "none"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin is tuple:
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any
        return f"list of {type_name(inner)}"
    return getattr(annotation, "__name__", str(annotation))


class _Mismatch(Exception):
    pass


def _parse(annotation: Any, value: Any, components: Sequence[type]) -> Any:
    """`value` (a Python value or the text of a command line) as `annotation`, or _Mismatch."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for option in sorted(arguments, key=lambda a: (a is not type(None), a is str)):
            try:
                return _parse(option, value, components)
            except _Mismatch:
                continue
        raise _Mismatch
    if origin is typing.Literal:
        for option in arguments:
            if (value == option and type(value) is type(option)) or value == str(option):
                return option
        raise _Mismatch
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value else []
        if not isinstance(value, list | tuple):
            raise _Mismatch
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any
        return tuple(_parse(inner, part, components) for part in value)
    if annotation is type(None):
        if value is None or value in ("none", "None", "null"):
            return None
    elif annotation is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif annotation is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, str):
            try:
                return int(value.replace("_", ""))
            except ValueError:
                pass
    elif annotation is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _finite(float(value))
        if isinstance(value, str):
            try:
                return _finite(float(value))
            except ValueError:
                pass
    elif annotation is str:
        if isinstance(value, str | Path):
            return str(value)
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise _Mismatch


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise _Mismatch
    return value


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


def _switch(cls: type, old: Any, changes: Mapping[str, Any], prefix: str, components: Sequence[type]) -> Any:
    """A `cls` that keeps what it shares with `old`, with `changes` applied."""
    kept = {
        name: getattr(old, name)
        for name, hint in field_types(cls).items()
        if hasattr(old, name) and field_types(type(old)).get(name) == hint
    }
    known = {*kept, *_heads(changes), *_with_default(cls)}
    missing = [n for n in field_types(cls) if n not in known]
    if missing:
        raise UserError(
            f"{prefix.rstrip('.')}={cls.__name__} also needs {', '.join(prefix + n for n in missing)}: give them too"
        )
    nested = _nest(changes)
    values = dict(kept)
    for name, change in nested.items():
        values[name] = _apply_field(cls, name, kept.get(name), change, prefix, components)
    return _build(cls, values, prefix)


def _with_default(cls: type) -> set[str]:
    return {
        f.name for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING or
        f.default_factory is not dataclasses.MISSING
    }  # fmt: skip


def _heads(changes: Mapping[str, Any]) -> set[str]:
    return {key.split(".")[0] for key in changes}


def _nest(changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        nested.setdefault(head, {})[rest] = value
    return nested


def _unknown(key: str, cls: type, config: Any, components: Sequence[type]) -> UserError:
    prefix, _, name = key.rpartition(".")
    dotted = f"{prefix}." if prefix else ""
    near = difflib.get_close_matches(name, field_types(cls), n=1, cutoff=0.5)
    hint = f"Did you mean '{dotted}{near[0]}'?" if near else f"It has {', '.join(field_types(cls))}."
    bases = [base for base in cls.__mro__ if issubclass(base, Component) and base not in (cls, Component)]
    owners = [n for base in bases for n, c in choices(base, components).items() if name in field_types(c)]
    if owners:
        hint += f" ({owners[0]} has it: choose it with --{prefix} {owners[0]})"
    return UserError(f"unknown key '{key}': {cls.__name__} has no '{name}'. {hint}")


def _apply_field(
    cls: type, name: str, old: Any, change: dict[str, Any], prefix: str, components: Sequence[type]
) -> Any:
    key = prefix + name
    if name not in field_types(cls):
        raise _unknown(key, cls, old, components)
    annotation = field_types(cls)[name]
    change = dict(change)
    new = old
    if "" in change:
        value = change.pop("")
        options = component_choices(annotation, components)
        if isinstance(value, str):
            # inverse_sqrt is InverseSqrt: the names that schedules had before they were classes.
            chosen = options.get(value) or options.get("".join(part.capitalize() for part in value.split("_")))
            if chosen is not None:
                return _switch(chosen, old, change, key + ".", components)
        try:
            new = _parse(annotation, value, components)
        except _Mismatch:
            wanted = type_name(annotation) + (f" (one of {', '.join(options)})" if options else "")
            if any(map(dataclasses.is_dataclass, typing.get_args(annotation))) and not options:
                wanted += ": give it in a config file"
            raise UserError(f"{key}={value!r} is not of type {wanted}") from None
    if change:
        if not dataclasses.is_dataclass(new):
            first = next(iter(change))
            options = ", ".join(component_choices(annotation, components))
            hint = f": choose one first with --{key} ({options})" if options else ""
            raise UserError(f"unknown key '{key}.{first}': {key} is {new!r} and has no '{first}'{hint}")
        new = _override(new, change, key + ".", components)
    return new


def component_choices(annotation: Any, components: Sequence[type] = ()) -> dict[str, type]:
    """Classes that a field with this annotation may hold, by name; none where it is no component's."""
    found: dict[str, type] = {}
    for option in typing.get_args(annotation) or (annotation,):
        if isinstance(option, type) and issubclass(option, Component):
            found |= choices(option, components)
    return found


def _override(config: Any, changes: Mapping[str, Any], prefix: str, components: Sequence[type]) -> Any:
    values = {name: getattr(config, name) for name in field_types(type(config))}
    for name, change in _nest(changes).items():
        values[name] = _apply_field(type(config), name, values.get(name), change, prefix, components)
    return _build(type(config), values, prefix)


def override[C](config: C, changes: Mapping[str, Any], components: Sequence[type] = ()) -> C:
    """A copy of `config` with dotted keys changed: `override(config, {"model.attention.num_kv_heads": 2})`.

    Values are Python values or the text of a command line; both are checked against the field's type. A component is
    switched by its class name (`"model.attention": "Latent"`); the fields it shares with the old one are kept. All
    changes are applied before anything is validated, so their order does not matter. Raises UserError for an unknown
    key, a value of the wrong type and an impossible combination.
    """
    normal = {key.replace("-", "_"): value for key, value in changes.items()}
    return _override(config, normal, "", components)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, annotation, value) of every leaf; a component's own choice comes as a leaf before its fields."""
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        is_config = dataclasses.is_dataclass(value)
        if not is_config or component_choices(annotation, ()):
            yield prefix + name, annotation, value
        if is_config:
            yield from leaves(value, prefix + name + ".")


def field_docs(cls: type) -> dict[str, str]:
    """What the docstring of a config, or of a base of it, says of each field: lines `name: meaning.`, which may go on
    indented."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__bases__):
        docs |= field_docs(base) if dataclasses.is_dataclass(base) else {}
    lines = inspect.cleandoc(cls.__doc__ or "").splitlines()
    name = None
    for line in lines:
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
    """Plain JSON data; every dataclass says its class name under `type`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {name: to_json(getattr(config, name)) for name in field_types(type(config))}
        return {"type": type(config).__name__} | fields
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config


def from_json[C](base: type[C], data: Any, components: Sequence[type] = (), prefix: str = "") -> C:
    """The config that `to_json` wrote; `components` are the classes from outside the package that it may name.

    Raises UserError for an unknown class or key, a missing key and a value of the wrong type.
    """
    return _from_json(base, data, components, prefix)


def _from_json(annotation: Any, data: Any, components: Sequence[type], key: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    where = key.rstrip(".") or "the config"
    if isinstance(data, dict):
        known = {}
        for option in arguments or (annotation,):
            if isinstance(option, type):
                known |= choices(option, components)
        name = data.get("type")
        if name not in known:
            raise UserError(
                f"{where} names the class {name!r}, which this package does not have: pass it with components=({name},)"
            )
        cls = known[name]
        types_of = field_types(cls)
        given = {k: v for k, v in data.items() if k != "type"}
        for unknown in given.keys() - types_of.keys():
            raise _unknown(key + unknown, cls, None, components)
        # What a newer version has added is as it was before.
        for missing in types_of.keys() - given.keys() - _with_default(cls):
            raise UserError(f"{where} ({name}) lacks the key '{missing}'")
        values = {n: _from_json(types_of[n], v, components, f"{key}{n}.") for n, v in given.items()}
        return _build(cls, values, key)
    if origin is tuple and isinstance(data, list):
        inner = arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any
        return tuple(_from_json(inner, part, components, key) for part in data)
    try:
        return _parse(annotation, data, components)
    except _Mismatch:
        raise UserError(f"{where}={data!r} is not of type {type_name(annotation)}") from None


def config_directories() -> list[Path]:
    """Where config names are looked up: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).resolve().parent
    return [d for d in (package.parent / "configs", package / "_configs") if d.is_dir()]


def config_names() -> list[str]:
    """Names that `load_config` knows."""
    names = {f.relative_to(d).with_suffix("").as_posix() for d in config_directories() for f in d.rglob("*.py")}
    return sorted(name for name in names if "/_" not in f"/{name}")


def find_config(name: str | Path) -> Path:
    """The file of a config given by name (`tiny_python`) or by path. Raises UserError when there is none."""
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
    """The config's module, executed: its docstring gives the command, `get_config()` the config."""
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
    """The data of a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{file}' does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"'{file}' is not valid JSON ({error}): it is damaged or not what it should be") from None
