"""Values of config fields, read by annotation from Python values or text; names that a wrong one may mean."""

import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
        return f"list of {type_name(item_type(arguments))}"
    return getattr(annotation, "__name__", str(annotation))


def item_type(arguments: tuple[Any, ...]) -> Any:
    """Return the type of a tuple's items: X of tuple[X, ...], else Any."""
    return arguments[0] if len(arguments) == 2 and arguments[1] is ... else Any


class Mismatch(Exception):
    """A value is not of the type of its field."""


def _none(value: object) -> None:
    if value is not None and value not in ("none", "None", "null"):
        raise Mismatch


def _bool(value: object) -> bool:
    text = str(value).lower()
    if not isinstance(value, bool | str) or text not in ("true", "false"):
        raise Mismatch
    return text == "true"


def _int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise Mismatch
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        number = float(value)  # 1e6
        if not number.is_integer() or abs(number) >= 2**53:
            raise Mismatch from None
        return int(number)


def _float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or not math.isfinite(float(value)):
        raise Mismatch
    return float(value)


def _str(value: object) -> str:
    if not isinstance(value, str | Path):
        raise Mismatch
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


def value_hint(annotation: Any, text: str) -> str:
    """Return how to write what `text` seems to mean, for the end of an error; "" where it is not clear."""
    wanted = {annotation, *(() if typing.get_origin(annotation) is tuple else typing.get_args(annotation))}
    if bool in wanted and text.lower() in ("yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"):
        return ": give true or false"
    if wanted & {int, float} and re.fullmatch(r"[+-]?[\d_,.]*\d[_,.]* ?([kmbgt%]?|million|billion)", text.lower()):
        example = "a whole number such as 1000 or 1e3" if int in wanted else "a number such as 0.1 or 1e-4"
        return f": give {example}"
    return ""


def parse(annotation: Any, value: Any) -> Any:
    """Return `value`, a Python value or the text of a command line, as `annotation`. Raises Mismatch."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _SCALARS:
        try:
            return _SCALARS[annotation](value)
        except ValueError:  # of int and float
            raise Mismatch from None
    if origin in (typing.Union, types.UnionType):
        for option in sorted(arguments, key=lambda a: (a is not type(None), a is str)):  # `none` is None, str the last
            try:
                return parse(option, value)
            except Mismatch:
                continue
    elif origin is typing.Literal:
        for option in arguments:
            if (value == option and type(value) is type(option)) or value == str(option):
                return option
    elif origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value else []
        if isinstance(value, list | tuple):
            return tuple(parse(item_type(arguments), part) for part in typing.cast("Sequence[Any]", value))
    elif isinstance(annotation, type) and isinstance(value, annotation):
        return value
    raise Mismatch


def printable(text: str, keep: str = "") -> str:
    """Return the text with escapes for its control characters but those of `keep`: they may come from a file."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def near_names(name: str, names: Sequence[str]) -> list[str]:
    """Return those of `names` that a wrong one may mean: parts of it, letter case and dashes aside, or near it."""
    plain = {n: re.sub(r"[\W_]", "", n).lower() for n in (name, *names)}
    parts = [n for n in names if plain[name] and plain[name] in plain[n]]
    return parts or [n for n in names if difflib.get_close_matches(plain[name], [plain[n]])]


def near_keys(prefix: str, key: str, fields: Sequence[str], keys: Sequence[str]) -> list[str]:
    """Return the keys that a wrong one may mean: `fields` after `prefix`, or all `keys` by their last name."""
    name, dot, rest = key.partition(".")
    close = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    own = [f"{prefix}{n}{dot}{rest}" for n in close if not rest or f"{prefix}{n}{dot}{rest}" in keys]
    if rest and own:
        return own
    last = key.rpartition(".")[2]
    names = {k.rpartition(".")[2] for k in keys}
    initials = {n for n in names if "_" in n and "".join(part[0] for part in n.split("_")) == last}
    words = [f"{prefix}{n}" for n in fields if last in n.split("_")]
    meant = {last} & names or initials or {n for n in names if last in n.split("_")}
    if words and not {last, *initials} & names:
        return words
    if not meant:
        best = difflib.get_close_matches(last, [*close, *names], n=1, cutoff=0.7)
        meant = set(best) & names if best != close and not prefix else set[str]()
    return [k for k in keys if k.rpartition(".")[2] in meant] or own
