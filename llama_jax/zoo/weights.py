"""Where each parameter lies in the files of a family, declared once for reading and writing."""

import dataclasses
import math
import re
from collections.abc import Mapping

import einops
import numpy as np

_PAIRS = ("two", "half")  # axes of two entries

type _Sides = tuple[list[list[str]], list[list[str]]]


@dataclasses.dataclass(frozen=True)
class WeightMapping:
    """The tensor of a parameter in the files of a family, and its layout there.

    `source` is the tensor's name, with `{layer}` for parameters that every layer has; `{after}` counts on from the last
    layer of the stack `layers`. With `{expert}` in it, our first dimension is a stack of such tensors, `e` in the
    pattern. Several weights of one source are its parts, in the table's order, joined along its dimension `joined`.
    `pattern` is einops from their layout to ours without the layer dimension: `(n h) d -> d n h`. Axes called
    `two` and `half` have two entries: the first is how interleaved rotary pairs become halves,
    `(n h two) d -> d n (two h)`, and both together how those of half a head do, `(n half h two) d -> d n (half two h)`.
    An axis `x4` has four entries, and so for other numbers: with `(n x4 h two) d -> d n (x4 two h)` the rotary pairs of
    every quarter of a head become halves. Parts that are joined in every head have `n h d -> d n h` and `merged`: the
    file has the dimension `joined` and the one before it as one. Two that take turns have `e d f 1 -> e d f`, joined 3.
    """

    name: str
    source: str
    pattern: str
    joined: int = 0
    merged: bool = False

    def _sides(self) -> _Sides:
        """Return the axes of every dimension, theirs and ours."""
        left, right = (
            [part.strip("()").split() for part in re.findall(r"\([^)]*\)|\w+", side)]
            for side in self.pattern.split("->")
        )
        return left, right

    def _sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Return the size of every axis for a parameter of `shape`."""
        fixed = {axis: 2 for axis in _PAIRS if axis in self.pattern} | {"1": 1}
        fixed |= {axis: int(axis[1:]) for axis in re.findall(r"\bx\d+\b", self.pattern)}
        sizes = dict(fixed)
        for group, size in zip(self._sides()[1], shape, strict=True):
            for axis in set(group).difference(fixed):  # at most one of a dimension
                sizes[axis] = size // math.prod(fixed.get(other, 1) for other in group)
        return sizes

    def _rearrange(self, value: np.ndarray, pattern: str, sizes: Mapping[str, int]) -> np.ndarray:
        return einops.rearrange(value, pattern, **{axis: size for axis, size in sizes.items() if axis != "1"})

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a parameter of `shape` (one layer of it) has in the source."""
        sizes = self._sizes(shape)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self._sides()[0])

    def source_slices(self, slices: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the least that must be read in the source for the part `slices` of a parameter of `shape`.

        Along axes that the source merges into others, that is everything: `to_canonical` cuts the rest away.
        """
        left, right = self._sides()
        sizes = self._sizes(shape)
        wanted = {group[0]: s for group, s in zip(right, slices, strict=True) if len(group) == 1}
        found = []
        for group in left:
            start, stop, _ = wanted.get(group[0], slice(None)).indices(sizes[group[0]])
            step = math.prod(sizes[axis] for axis in group[1:])
            found.append(slice(start * step, stop * step))
        return tuple(found)

    def to_canonical(self, part: np.ndarray, slices: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
        """Return the part `slices` of a parameter of `shape`, from the part `source_slices` of the source."""
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

    def to_source(self, value: np.ndarray) -> np.ndarray:
        """Return one layer of a parameter in the source's layout."""
        left, _, right = self.pattern.partition("->")
        return self._rearrange(value, f"{right} -> {left}", self._sizes(value.shape))

    @property
    def inputs_first(self) -> bool:
        """True where the source of a projection is [inputs, outputs], and not [outputs, inputs]."""
        left, right = self._sides()
        return right[int("{expert}" in self.source)][0] in left[int("{expert}" in self.source)]

    def adapter_to_source(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the low-rank matrices [*in, R] and [R, *out] of one layer as [R, in] and [*out, R].

        The outputs have the dimensions that they have in the pattern.
        """
        left, right = self._sides()
        inputs, outputs = right[: a.ndim - 1], right[a.ndim - 1 :]
        inner = {axis for group in inputs for axis in group}
        sizes = self._sizes(a.shape[:-1] + b.shape[1:])

        def rearranged(value: np.ndarray, old: str, new: str) -> np.ndarray:
            return self._rearrange(
                value, f"{old} -> {new}", {axis: n for axis, n in sizes.items() if axis in old.split()}
            )

        def text(groups: list[list[str]]) -> str:
            return " ".join(f"( {' '.join(group)} )" for group in groups)

        into, out = ([g for g in left if (g[0] in inner) is inside] for inside in (True, False))
        a = rearranged(a, f"{text(inputs)} rank", f"rank {text(into)}")
        return a, rearranged(b, f"rank {text(outputs)}", f"{text(out)} rank")

    def in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in the file of a tensor that has `shape` in the pattern."""
        dim = self.joined
        return (*shape[: dim - 1], shape[dim - 1] * shape[dim], *shape[dim + 1 :]) if self.merged else shape

    def contiguous_dim(self) -> int:
        """Return our dimension along which blocks of the parameter are blocks in the source, of rows if possible."""
        left, right = self._sides()
        return next(right.index(group[:1]) for group in left if group[:1] in right)


@dataclasses.dataclass(frozen=True)
class TensorNames:
    """Names of the tensors in a family's files.

    `weights` is the table of parameters. `tied` are tensors that files may repeat, with the name of the original;
    `ignored` are patterns of tensors that are computed, not trained; `renames` are pairs of a pattern and its
    replacement, for names of other releases.
    """

    weights: tuple[WeightMapping, ...]
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()


def mappings(
    rows: Mapping[str, tuple[str, ...]], ours: str = "", theirs: str = "", *, joined: int = 0, merged: bool = False
) -> tuple[WeightMapping, ...]:
    """Return the table of `rows`: from our name to their name, the pattern of the weight and that of the bias, if any.

    `ours` and `theirs` are prefixes of the names; `.weight` and `.bias` follow them. `joined` is for the weights alone,
    unless they are `merged`.
    """
    found = []
    for name, (source, weight, *bias) in rows.items():
        found.append(WeightMapping(f"{ours}{name}.weight", f"{theirs}{source}.weight", weight, joined, merged))
        of_bias = joined if merged else 0
        found += [
            WeightMapping(f"{ours}{name}.bias", f"{theirs}{source}.bias", pattern, of_bias, merged) for pattern in bias
        ]
    return tuple(found)
