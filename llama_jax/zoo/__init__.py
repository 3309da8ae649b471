"""Families of released models, one file each: presets, the mapping of Hugging Face's config, the weight-name table.

In: a `model_type` or a preset's name. Out: a model config, and a table that says where each parameter comes from. A new
family is one new module here, named after its `model_type`, with `PRESETS`, `ARCHITECTURES`, `from_hf`, `to_hf` and
`WEIGHTS` (a table, or a function that makes it from the config), and where it needs them `TIED`, `IGNORED`, `RENAMES`,
`with_tensors`, `META_WEIGHTS` and `from_meta`; one whose weights nobody has released has only `PRESETS`. Nothing lists
the families.
"""

import dataclasses
import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import einops
import numpy as np

from llama_jax.config import UserError
from llama_jax.models import ModelConfig
from llama_jax.zoo import reading
from llama_jax.zoo.reading import without_keys as without_keys

_PAIRS = ("two", "half")  # axes of two entries


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where a parameter lies in a checkpoint of other people, and in which layout: one declaration for both ways.

    `source` is the name there, with `{layer}` for parameters that every layer has; `{after}` counts on from the last
    layer of the stack `layers`. With `{expert}` in it, our first dimension is a stack of such tensors, `e` in the
    pattern. Several weights of one source are its parts, in the table's order, joined along its dimension `joined`.
    `pattern` is einops from their layout to ours without the layer dimension: `(n h) d -> d n h`. Axes called
    `two` and `half` have two entries: the first is how interleaved rotary pairs become halves,
    `(n h two) d -> d n (two h)`, and both together how those of half a head do, `(n half h two) d -> d n (half two h)`.
    Parts that are joined in every head have `n h d -> d n h` and `merged`: the file has the pattern's first two
    dimensions as one.
    """

    name: str
    source: str
    pattern: str
    joined: int = 0
    merged: bool = False

    def _sides(self) -> tuple[list[list[str]], list[list[str]]]:
        left, right = (
            [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\w+", side)]
            for side in self.pattern.split("->")
        )
        return left, right

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        _, right = self._sides()
        sizes = {axis: 2 for axis in _PAIRS if axis in self.pattern}
        for group, size in zip(right, shape, strict=True):
            free = [axis for axis in group if axis not in _PAIRS]
            for axis in free:
                sizes[axis] = size // 2 ** (len(group) - len(free))
        return sizes | {"1": 1}

    def _rearrange(self, value: np.ndarray, pattern: str, sizes: dict[str, int]) -> np.ndarray:
        return einops.rearrange(value, pattern, **{axis: size for axis, size in sizes.items() if axis != "1"})

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a parameter of `shape` (one layer of it) has in the source."""
        sizes = self._sizes(shape)
        return tuple(int(np.prod([sizes[axis] for axis in group])) for group in self._sides()[0])

    def source_slices(self, slices: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """The least that must be read in the source for the part `slices` of a parameter of `shape`.

        Along axes that the source merges into others, that is everything: `to_canonical` cuts the rest away.
        """
        left, right = self._sides()
        sizes = self._sizes(shape)
        wanted = {group[0]: s for group, s in zip(right, slices, strict=True) if len(group) == 1}
        found = []
        for group in left:
            start, stop, _ = wanted.get(group[0], slice(None)).indices(sizes[group[0]])
            step = int(np.prod([sizes[axis] for axis in group[1:]]))
            found.append(slice(start * step, stop * step))
        return tuple(found)

    def to_canonical(self, part: np.ndarray, slices: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The part `slices` of a parameter of `shape`, from what `source_slices` said to read."""
        left, right = self._sides()
        sizes = self._sizes(shape)
        first = {group[0] for group in left}
        cuts = []
        for group, cut in zip(right, slices, strict=True):
            if len(group) == 1 and group[0] in first:  # already cut when it was read
                start, stop, _ = cut.indices(sizes[group[0]])
                sizes[group[0]] = stop - start
                cut = slice(None)
            cuts.append(cut)
        return self._rearrange(part, self.pattern, sizes)[tuple(cuts)]

    def in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the tensor in the file that the pattern sees as of `shape`."""
        return (shape[0] * shape[1], *shape[2:]) if self.merged else shape

    def contiguous_dim(self) -> int:
        """Our dimension along which blocks of the parameter are blocks in the source, of rows if possible."""
        left, right = self._sides()
        return next(right.index(group[:1]) for group in left if group[:1] in right)

    def to_source(self, value: np.ndarray) -> np.ndarray:
        """One layer of a parameter in the source's layout."""
        left, _, right = self.pattern.partition("->")
        return self._rearrange(value, f"{right} -> {left}", self._sizes(value.shape))


def family(model_type: str) -> ModuleType:
    """The module of the family that Hugging Face calls `model_type`. Raises UserError when there is none."""
    if model_type not in families():
        raise UserError(f"model_type '{model_type}' is not one of the families that are known: {', '.join(families())}")
    return _modules()[model_type]


def model_type_of(data: Mapping[str, Any], where: object) -> str:
    """The `model_type` of a config.json, from its `architectures` where it has none.

    Raises UserError, naming the file `where`, for one that has neither.
    """
    if isinstance(data.get("model_type"), str) and data["model_type"]:
        return data["model_type"]
    names = data.get("architectures")
    for name in names if isinstance(names, list) else ():
        for model_type in families():
            known = {reading.plain_name(own) for own in _modules()[model_type].ARCHITECTURES}
            if isinstance(name, str) and reading.plain_name(name) in known:
                return model_type
    raise UserError(
        f"'{where}' has no model_type, and no architectures that are known: it is not a Hugging Face config"
    )


def weights_of(family: ModuleType, config: ModelConfig) -> tuple[Weight, ...]:
    """A family's table for this model."""
    return family.WEIGHTS if isinstance(family.WEIGHTS, tuple) else family.WEIGHTS(config)


@functools.cache
def families() -> tuple[str, ...]:
    """The `model_type` of every family with released weights, from the files of this folder."""
    return tuple(name for name, module in _modules().items() if hasattr(module, "from_hf"))


@functools.cache
def _modules() -> dict[str, ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def presets() -> dict[str, ModelConfig]:
    """Model configs of published models, by name: `llama2_7b`, `llama3_8b`, `stories15m`..."""
    return {name: config for module in _modules().values() for name, config in getattr(module, "PRESETS", {}).items()}
