"""Config machinery: typed dotted overrides, JSON both ways, finding a config by name or path.

A config is a tree of frozen dataclasses. A field annotated with a `Component` base class (`attention: Mixer`) holds
any subclass of it; the subclass is chosen by its class name, on the command line as in a saved file. There is no
registry: Python's own list of subclasses is used, so a class from a notebook cell is passed and chosen like any other.
"""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.values import Mismatch, item_type, near_keys, near_names, parse, type_name, value_hint

Json = dict[str, Any]  # an object of a JSON file


class UserError(ValueError):
    """A user's mistake: one sentence that says what to do. The command line prints it and exits with 2."""


def _is_config(value: object) -> bool:
    """Return whether `value` is a dataclass or an instance of one."""
    return dataclasses.is_dataclass(value)  # pyright would narrow the value to a type that it does not know


def _class_of(value: object) -> type:
    return type(value)


class Component:
    """Base of the base classes of pieces (`Mixer`, `FeedForward`, `Norm`...): fields so annotated take any subclass."""

    @classmethod
    def follow(cls, known: "Known") -> dict[str, Any]:
        """Return values for fields without a default, for a choice by name alone, where none around has the name."""
        return {}


@dataclasses.dataclass(frozen=True)
class Known:
    """The config around a component that is chosen by its name alone.

    values: fields by name: of the replaced piece, of the components that hold it, and of their other pieces.
    old: the replaced piece, or None.
    owner: class of the config that holds it.
    field: name of its field there.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    old: Any = None
    owner: type[Any] = object
    field: str = ""

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of the field `name` around, or `default` where there is none or it is None."""
        value = self.values.get(name)
        return default if value is None else value

    def make(self, cls: type) -> Any:
        """Return a component of this class, of values that follow."""
        return cls(**_following(cls, {}, self))


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
    for base in _bases(annotation):
        found |= choices(base, components)
    return found


def _bases(annotation: Any) -> list[type]:
    options = typing.get_args(annotation) or (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Component)]


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of every dataclass field of `cls`, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def override[C](config: C, changes: Mapping[str, Any], components: Sequence[type] = ()) -> C:
    """Return a copy of `config` with dotted keys changed: `override(config, {"model.attention.num_kv_heads": 2})`.

    Values are Python values or the text of a command line; both are checked against the field's type. A component is
    switched by its class or the class's name (`"model.attention": "LatentAttention"`); the fields it shares with the
    old one are kept, others follow from the config around (`Component.follow`). All changes are applied before any is
    validated, so their order does not matter. Raises UserError for an unknown key, a value of the wrong type and an
    impossible combination.
    """
    classes = tuple(value for value in changes.values() if isinstance(value, type))
    normal = {k.replace("-", "_"): v.__name__ if isinstance(v, type) else v for k, v in changes.items()}
    return _changed(_class_of(config), config, normal, "", _Given((*components, *classes), config), Known())


@dataclasses.dataclass(frozen=True)
class _Given:
    """Classes from outside the package that may be chosen, and the whole config that is changed."""

    components: Sequence[type] = ()
    config: Any = None


def _changed(cls: type[Any], old: Any, changes: Mapping[str, Any], prefix: str, given: _Given, known: Known) -> Any:
    """Return a `cls` that keeps the fields it shares with `old`, with `changes` below `prefix` applied."""
    hints, olds = field_types(cls), field_types(_class_of(old)) if _is_config(old) else {}
    values = {name: getattr(old, name) for name, hint in hints.items() if olds.get(name) == hint}
    nested: dict[str, dict[str, Any]] = {}  # by field; the change of the field itself has the key ""
    for key, value in changes.items():
        name, _, rest = key.partition(".")
        if name not in hints:
            raise _unknown(prefix, key, cls, given)
        nested.setdefault(name, {})[rest] = value
    # Pieces come last: what they take from the fields around them has been changed by then.
    for name in sorted(nested, key=lambda name: bool(_bases(hints[name]))):
        if name not in values and "" not in nested[name]:  # a key inside a piece that follows from the config around
            values |= {n: value for n, value in _following(cls, values, known).items() if n == name}
        around = known.values | (_by_name(values) if issubclass(cls, Component) else {})
        near = Known(around, values.get(name), cls, name)
        values[name] = _field(hints[name], prefix + name, nested[name], given, near)
    values = _following(cls, values, known)
    if missing := [prefix + n for n in hints if n not in {*values, *_with_default(cls)}]:
        them = "it" if len(missing) == 1 else "them"
        raise UserError(f"{prefix.rstrip('.')}={cls.__name__} also needs {', '.join(missing)}: give {them} too")
    return _build(cls, values, prefix)


def _by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return these fields and those of the configs among them, by name; outer ones and first ones win."""
    inner: dict[str, Any] = {}
    for value in values.values():
        if _is_config(value):
            inner = _by_name({name: getattr(value, name) for name in field_types(_class_of(value))}) | inner
    return inner | dict(values)


def _following(cls: type, values: dict[str, Any], known: Known) -> dict[str, Any]:
    """Return `values`, with what follows from the config around for required fields of `cls` that they lack."""
    lacking = [n for n in field_types(cls) if n not in values and n not in _with_default(cls)]
    if not lacking or not issubclass(cls, Component):
        return values
    old = {} if known.old is None else _by_name({"": known.old})
    known = dataclasses.replace(known, values=known.values | old | values)
    found = cls.follow(known)
    for name in lacking:
        if known.get(name) is not None:
            with contextlib.suppress(Mismatch):  # another field of this name
                found[name] = parse(field_types(cls)[name], known.get(name))
    return {name: found[name] for name in lacking if name in found} | values


def _field(annotation: Any, key: str, change: dict[str, Any], given: _Given, known: Known) -> Any:
    """Return the new value of a field: another value, another component, or the old one with changes inside it."""
    new = known.old
    options = component_choices(annotation, given.components)
    inner = {rest: value for rest, value in change.items() if rest}
    if "" in change:
        value = change[""]
        if isinstance(value, str):
            # inverse_sqrt is InverseSqrt: the names that schedules had before they were classes.
            chosen = options.get(value) or options.get("".join(part.capitalize() for part in value.split("_")))
            if chosen is not None:
                return _changed(chosen, known.old, inner, key + ".", given, known)
        try:
            new = parse(annotation, value)
        except Mismatch:
            raise _mismatch(key, value, annotation, options) from None
    if inner and not _is_config(new):
        hint = f": choose one first with --{key} ({', '.join(options)})" if options else ""
        raise UserError(
            f"unknown key '{key}.{next(iter(inner))}': {key} is {new!r} and has no '{next(iter(inner))}'{hint}"
        )
    return _changed(_class_of(new), new, inner, key + ".", given, known) if inner else new


def _mismatch(key: str, value: Any, annotation: Any, options: Mapping[str, type]) -> UserError:
    """Return the error for a value of another type than its field's, with the nearest value that it takes."""
    wanted, hint = type_name(annotation) + (f" (one of {', '.join(options)})" if options else ""), ""
    if isinstance(value, str):
        near = near_names(value, list(options))
        hint = f": did you mean {' or '.join(map(repr, near))}?" if near else value_hint(annotation, value)
    if _is_config(annotation) and isinstance(value, str) and not options:
        hint = f": change its keys, such as {key}.{next(iter(field_types(annotation)))}"
    elif any(map(_is_config, typing.get_args(annotation))) and not options:
        hint = ": give it in a config file"
    return UserError(f"{key}={value!r} is not of type {wanted}{hint}")


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from None


@functools.cache
def _with_default(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(cls) if f.default is not f.default_factory)  # else both MISSING


def _unknown(prefix: str, key: str, cls: type, given: _Given) -> UserError:
    """Return the error for a key of which `prefix` is right and the next name is no field of `cls`."""
    name = key.partition(".")[0]
    bases = [base for base in cls.__mro__ if issubclass(base, Component) and base not in (cls, Component)]
    owners = [n for base in bases for n, c in choices(base, given.components).items() if name in field_types(c)]
    keys = [] if given.config is None or owners else [key for key, *_ in leaves(given.config)]
    near = near_keys(prefix, key, list(field_types(cls)), keys)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"It has {', '.join(field_types(cls))}."
    if owners:
        hint += f" ({owners[0]} has it: choose it with --{prefix.rstrip('.')} {owners[0]})"
    return UserError(f"unknown key '{prefix}{key}': {cls.__name__} has no '{name}'. {hint}")


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
    name, names = None, {field.name for field in dataclasses.fields(cls)} if _is_config(cls) else ()
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in names:
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
            raise _unknown(key, unknown, cls, _Given(components))
        # Fields that a newer version has added have their defaults, which mean what was done before.
        for missing in field_types(cls).keys() - values.keys() - _with_default(cls):
            raise UserError(f"{where} ({name}) lacks the key '{missing}'")
        parsed = {n: _from_json(field_types(cls)[n], v, components, f"{key}{n}.") for n, v in values.items()}
        return _build(cls, parsed, key)
    if origin is tuple and isinstance(data, list):
        items = typing.cast("list[Any]", data)
        return tuple(_from_json(item_type(arguments), part, components, key) for part in items)
    try:
        return parse(annotation, data)
    except Mismatch:
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
            known = [n for n in config_names() if path.with_suffix("").as_posix().endswith(n)]
            hint = f": did you mean '{known[-1]}'?" if known else ""
            raise UserError(f"config file '{name}' does not exist{hint}")
        return path
    if path.is_file():
        raise UserError(f"'{name}' is not a config: give the name of one, a path to a .py file, or a run directory")
    for directory in config_directories():
        if (file := directory / f"{name}.py").is_file():
            return file
    near = [f"{name}.py"] if Path(f"{name}.py").is_file() else []
    near = near or [n for text in (str(name), path.name) for n in difflib.get_close_matches(text, config_names(), n=1)]
    hint = (
        f"did you mean '{near[0]}'?" if near else f"there are {', '.join(config_names())}, or give a path to a .py file"
    )
    raise UserError(f"there is no config '{name}': {hint}")


def load_config_module(name: str | Path) -> types.ModuleType:
    """Return the config's module, executed: its docstring has the command, `get_config()` returns the config."""
    file = find_config(name)
    module = types.ModuleType(f"llama_jax_config_{file.stem}")
    module.__file__ = str(file)
    try:  # from its text: a compiled file beside it would be left, and taken for the next text of its second and size
        exec(compile(file.read_bytes(), file, "exec"), vars(module))
    except SyntaxError as error:
        raise UserError(f"config file '{error.filename}' is not Python: line {error.lineno}: {error.msg}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"config file '{file}' imports '{error.name}', which is not installed") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"config file '{file}' has no function get_config()")
    return module


def read_json(file: Path) -> Any:
    """Return the data of a JSON file. Raises UserError when it is missing or damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{file}' does not exist") from None
    except OSError as error:
        raise UserError(f"'{file}' cannot be read ({error.strerror}): give a JSON file") from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, deep nesting
        raise UserError(f"'{file}' is not valid JSON ({error}): it is damaged or another kind of file") from None
