"""The variants of a sweep: configs and short names, from a grid of keys, named changes, pieces or whole configs."""

import collections
import dataclasses
import functools
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llama_jax.config import UserError, component_choices, leaves, outside_classes, override, to_json
from llama_jax.run_config import RunConfig, load_config

type Variants = Mapping[str, Any] | Sequence[Any]

NAMED_KEYS = 3  # differences that the name of a whole config has


@dataclasses.dataclass(frozen=True)
class Variant:
    """A variant of a base config.

    name: unique among the variants.
    changes: value of each dotted key that it changes, as JSON.
    config: the run's config, of which only the seed is missing.
    components: classes from outside the package that the config has.
    """

    name: str
    changes: dict[str, Any]
    config: RunConfig
    components: tuple[type, ...] = ()


def make_variants(base: RunConfig, asked: Variants, components: Sequence[type] = ()) -> list[Variant]:
    """Return the variants that are `asked` for.

    That is a grid (`{key: [values...], ...}`, of which every combination is one), named changes (`{name: {key:
    value}}`), or a list of changes, of (name, changes), of pieces and of configs. Values may be classes, which take
    their fields from the config around. Raises UserError for a wrong key or value, and for two variants with one name
    or config.
    """
    given = [(name, _changes(base, change)) for name, change in _entries(asked or [])]
    if not given:
        raise UserError("variants is empty: give {key: [values...]}, {name: {key: value}} or a list of changes")
    made: list[Variant] = []
    for name, change in given:
        label = name or ", ".join(f"{key}={_shown(value)}" for key, value in change.items())
        made.append(_variant(base, label, change, components))
    names = _names(base, made, [name for name, _ in given])
    made = [dataclasses.replace(variant, name=name) for variant, name in zip(made, names, strict=True)]
    for what, values in (("name", names), ("config", [variant.config for variant in made])):
        for one, other in itertools.combinations(range(len(made)), 2):
            if values[one] == values[other]:
                both = f"'{names[one]}' and '{names[other]}'" if what == "config" else f"{one + 1} and {other + 1}"
                raise UserError(f"variants {both} have one {what}: leave one out or give it another {what}")
    return made


def config_of_base(base: RunConfig | str, steps: int | None) -> RunConfig:
    """Return the config that variants change: `base`, or the one of that name or path, with `steps` updates."""
    config = base if isinstance(base, RunConfig) else load_config(base)
    return config if steps is None else override(config, {"num_steps": steps})


def _entries(asked: Any) -> Iterator[tuple[str | None, Any]]:
    """Yield (name or None, changes) of each variant."""
    if isinstance(asked, Mapping):
        named = [name for name, value in asked.items() if isinstance(value, Mapping | RunConfig)]
        if named and len(named) < len(asked):
            other = next(name for name in asked if name not in named)
            raise UserError(
                f"variants has changes by the name '{named[0]}', but '{other}' has {_shown(asked[other])}: give each "
                "name a dict of changes, or each key a list of values"
            )
        if named:
            yield from asked.items()
            return
        values = [list(value) if isinstance(value, list | tuple | range) else [value] for value in asked.values()]
        yield from ((None, dict(zip(asked, chosen, strict=True))) for chosen in itertools.product(*values))
        return
    if isinstance(asked, str) or not isinstance(asked, Sequence):
        raise UserError(
            f"variants={asked!r} must be {{key: [values...]}}, {{name: {{key: value}}}} or a list of changes"
        )
    for entry in asked:
        pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)
        yield entry if pair else (None, entry)


def _changes(base: RunConfig, change: Any) -> dict[str, Any]:
    """Return a variant's changes by dotted key."""
    if isinstance(change, Mapping):
        return dict(change)
    if isinstance(change, RunConfig):
        top = {field.name: getattr(change, field.name) for field in dataclasses.fields(change)}
        return {name: value for name, value in top.items() if value != getattr(base, name)}
    kind = change if isinstance(change, type) else type(change)
    fits = [(k, v) for k, annotation, v in leaves(base) if kind in component_choices(annotation, (kind,)).values()]
    keys = [key for key, value in fits if value is not None] or [key for key, _ in fits]
    depth = min((key.count(".") for key in keys), default=0)
    keys = [key for key in keys if key.count(".") == depth]
    if len(keys) != 1:
        found = f"fits {' and '.join(keys)}" if keys else "is no piece of the base config"
        raise UserError(f"variant {_shown(change)} {found}: give {{key: value}} with the key that it changes")
    return {keys[0]: change}


def _variant(base: RunConfig, name: str, changes: Mapping[str, Any], components: Sequence[type]) -> Variant:
    """Return the variant of these changes. Raises UserError as `override` does, with the variant's name."""
    if "seed" in changes:
        raise UserError(f"variant '{name}' changes seed: give seeds=[...], which every variant is run with")
    pieces = tuple(value for value in changes.values() if not isinstance(value, type))
    found = (*components, *outside_classes(base), *outside_classes(pieces))
    try:
        config = override(base, changes, tuple(dict.fromkeys(found)))
    except UserError as error:
        raise UserError(f"variant '{name}': {error}") from None
    values = {key: value.__name__ if isinstance(value, type) else to_json(value) for key, value in changes.items()}
    return Variant(name, values, config, tuple(outside_classes(config)))


def _names(base: RunConfig, made: Sequence[Variant], given: Sequence[str | None]) -> list[str]:
    """Return the given names, and for variants without one names of their differences from the base."""
    keys = [key for variant in made for key in variant.changes]
    everywhere = {
        key for key in keys if len({repr(variant.changes.get(key, made)) for variant in made}) == 1 < len(made)
    }
    keys = {*keys} - everywhere
    names = [name or _name(base, variant, keys) for name, variant in zip(given, made, strict=True)]
    values = [{key: _shown(value) for key, _, value in leaves(variant.config)} for variant in made]
    for name, count in collections.Counter(names).items():
        alike = [i for i, other in enumerate(names) if other == name and given[i] is None]
        if count > 1:
            differing = [k for k in values[alike[0]] if len({values[i].get(k) for i in alike}) > 1] if alike else []
            for i in alike:
                more = [f"{_short(k, differing)}={values[i][k]}" for k in differing if k in values[i]]
                names[i] = ", ".join([name, *more])
    return names


def _name(base: RunConfig, variant: Variant, keys: set[str]) -> str:
    """Return a short name: values of the keys that it changes, components by their class or what differs in them."""
    parts: list[str] = []
    for key in [key for key in variant.changes if key in keys]:
        new, old = _at(variant.config, key), _at(base, key)
        if not dataclasses.is_dataclass(new):
            parts.append(f"{_short(key, keys)}={_shown(new)}")
        elif type(new) is not type(old):
            parts.append(_shown(new))
        else:
            was = {k: value for k, _, value in leaves(old)}
            inner = {k: v for k, _, v in leaves(new) if not dataclasses.is_dataclass(v) and was.get(k) != v}
            parts += [f"{_short(k, inner)}={_shown(v)}" for k, v in [*inner.items()][:NAMED_KEYS]] or [_shown(new)]
    return ", ".join(parts) or "base"


def _at(config: Any, key: str) -> Any:
    """Return the value of a dotted key; None where the config lacks a part of it."""
    names = key.replace("-", "_").split(".")
    return functools.reduce(lambda part, name: getattr(part, name, None), names, config)


def _short(key: str, keys: Any) -> str:
    """Return the shortest end of a dotted key that is unique among `keys`."""
    words = key.split(".")
    for count in range(1, len(words)):
        end = ".".join(words[-count:])
        if not any(other != key and f".{other}".endswith(f".{end}") for other in keys):
            return end
    return key


def _shown(value: Any) -> str:
    """Return a value as short text."""
    if isinstance(value, type):
        return value.__name__
    if dataclasses.is_dataclass(value):
        return type(value).__name__
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(_shown, value)) if isinstance(value, tuple | list) else str(value)


def code_digest(classes: Sequence[type]) -> str:
    """Return a digest of the code of classes and of what it calls in their modules, "" where there are none.

    The same source gives the same digest in another process, wherever in a notebook it is.
    """
    import hashlib

    found: dict[str, str] = {}
    queue: list[tuple[str, Any, dict[str, Any]]] = [(kind.__name__, kind, {}) for kind in classes]
    while queue:
        name, value, scope = queue.pop()
        if name in found:
            continue
        functions = vars(value).values() if isinstance(value, type) else (value,)
        found[name] = ""
        for part in functions:
            function = getattr(part, "__func__", getattr(part, "fget", part))
            if not isinstance(function, types.FunctionType):
                continue
            texts, names = _code_text(function.__code__)
            found[name] += texts
            scope = function.__globals__
            for used in names & scope.keys():
                target = scope[used]
                if isinstance(target, type | types.FunctionType):
                    if target.__module__ == scope.get("__name__"):
                        queue.append((used, target, scope))
                elif isinstance(target, str | int | float):
                    found[used] = repr(target)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16] if found else ""


def _code_text(code: types.CodeType) -> tuple[str, set[str]]:
    """Return what a function does as text, and the names that it uses."""
    inner = [_code_text(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    constants = [const for const in code.co_consts if not isinstance(const, types.CodeType)]
    text = repr((code.co_code, code.co_names, constants, [text for text, _ in inner]))
    return text, set(code.co_names).union(*(names for _, names in inner))
