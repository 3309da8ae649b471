"""Machines: chips and how they are connected, as a mesh is laid over them."""

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from llama_jax.chips import CHIPS, Chip, chip_named, chip_of
from llama_jax.config import UserError
from llama_jax.parallel import over_slices
from llama_jax.values import near_names

SUMMING = ("data", "context")  # axes of which every device has gradients of the same weights


@dataclasses.dataclass(frozen=True)
class Network:
    """The links between the devices of one mesh axis, for each device.

    inner: devices of the axis within one slice or node.
    outer: slices or nodes that the axis spans.
    ici: bytes per second at which a device receives from the others of its slice; 0 where there are none.
    hop: the same from one neighbour alone.
    distance: mean number of links between two devices of a slice, all of which carry what one sends to the other.
    dcn: bytes per second between slices, all `inner` devices together; 0 where the axis spans one slice.
    scatters_by_sums: whether XLA sums whole arrays on every device, to cut them, where a reduce-scatter is enough.
    gathers_by_sums: whether it gathers by sums of arrays that are zero elsewhere.
    """

    inner: int
    outer: int
    ici: float
    hop: float
    distance: float
    dcn: float
    scatters_by_sums: bool = False
    gathers_by_sums: bool = False


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: a torus (TPU) or a node (GPU) of this shape, several times.

    chip: the kind.
    shape: of one slice.
    num_slices: slices or nodes.
    """

    chip: Chip
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def num_chips(self) -> int:
        """Return the number of chips in all slices or nodes."""
        return math.prod(self.shape) * self.num_slices

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        if self.chip.platform == "gpu":
            return f"{self.chip.name}:{self.num_slices}x{shape}"
        return (f"{self.num_slices}x " if self.num_slices > 1 else "") + f"{self.chip.name}:{shape}"

    @staticmethod
    def parse(text: str) -> "Topology":
        """Parse `v5p:4x4x8` (a TPU slice), `2x v5e:16x16` (two of them), `h100:4x8` (nodes x GPUs) or `h100:8`.

        Sizes count chips; a chip's name alone is one of it, and `4x h100` are four GPUs. Raises UserError, with the
        nearest name, for any other text.
        """
        found = re.fullmatch(r"(?:(\d+)(?:\s*x\s*|\s+))?([^:]*)(?::\s*(.*?))?\s*", text.strip())
        count, name, sizes = found.groups() if found else (None, text, None)
        times = None if count or sizes else re.fullmatch(r"(.+?)\s*x\s*(\d+)", name)
        if times and chip_named(times[1]):
            name, count = times.groups()  # h100x8
        chip, number = _chip(text, name, sizes), int(count or 1)
        if sizes is None and chip.platform == "gpu":
            node = chip.max_shape[0]
            sizes, number = (f"{node}", number // node) if number % node == 0 else (f"{number}", 1)
        slices, shape = number, tuple(map(int, (sizes or "x".join("1" * len(chip.max_shape))).split("x")))
        if chip.platform == "gpu" and len(shape) == 2:
            slices, shape = slices * shape[0], shape[1:]
        if len(shape) != len(chip.max_shape):
            raise UserError(
                f"topology={text!r} has {len(shape)} sizes and {chip.name} takes {len(chip.max_shape)}: {_form(chip)}"
            )
        if slices < 1 or min(shape) < 1:
            raise UserError(f"topology={text!r}: all numbers must be at least 1")
        # Which way round a torus is written makes no difference.
        if any(a > b for a, b in zip(sorted(shape), sorted(chip.max_shape), strict=True)):
            largest = "x".join(map(str, chip.max_shape))
            hint = "" if chip.wraps else f": write nodes x GPUs, {chip.name}:2x{largest}"
            raise UserError(
                f"topology={text!r}: one {'slice' if chip.wraps else 'node'} of {chip.name} has at most {largest}{hint}"
            )
        return Topology(chip, shape, slices)

    @staticmethod
    def of(devices: Sequence[Any]) -> "Topology | None":
        """Return the machine that these JAX devices are, or None for chips that are not planned for, such as CPUs."""
        chip = chip_of(devices[0].device_kind)
        if chip is None:
            return None
        if chip.platform == "gpu":
            # NVLink domains, where JAX knows them; there may be a process for each GPU.
            num_slices = len({getattr(device, "slice_index", device.process_index) for device in devices})
            shape: tuple[int, ...] = (len(devices) // num_slices,)
        else:
            num_slices = len({getattr(device, "slice_index", 0) for device in devices})
            coords = zip(*(device.coords for device in devices), strict=True)
            shape = tuple(len(set(along)) for along in coords)[: len(chip.max_shape)]
        found = Topology(chip, shape, num_slices)
        return found if found.num_chips == len(devices) else None

    def larger(self) -> "Topology":
        """Return the next size: the smallest torus axis doubled while it can be, then twice the slices or nodes."""
        order = sorted(range(len(self.shape)), key=lambda i: self.shape[i])
        for i in order:
            shape = tuple(size * (2 if i == j else 1) for j, size in enumerate(self.shape))
            if all(a <= b for a, b in zip(sorted(shape), sorted(self.chip.max_shape), strict=True)):
                return dataclasses.replace(self, shape=shape)
        return dataclasses.replace(self, num_slices=2 * self.num_slices)

    def networks(self, sizes: dict[str, int]) -> dict[str, Network]:
        """Return the links between the devices of each mesh axis larger than 1; `sizes` is in the order of the mesh.

        As `parallel.make_mesh` lays them out: pipeline and data, or else fsdp, span slices, the innermost axes get the
        torus axes first, and fill a node. Raises UserError for sizes that do not multiply to the slices or the torus.
        """
        missing = "network" if self.num_slices > 1 and not self.chip.network else "link" if not self.chip.link else ""
        if missing and self.num_chips > 1:
            raise UserError(
                f"topology {self}: the {missing} between several {self.chip.name} is not known: give it with --chip"
            )
        inner, outer = _split_slices(sizes, self) if self.chip.platform == "tpu" else _split_nodes(sizes, self)
        torus = self._torus(inner) if self.chip.platform == "tpu" else {}
        found = {}
        for axis, size in sizes.items():
            if size == 1:
                continue
            link = self.chip.link if inner[axis] > 1 else 0.0
            ici, hop, distance, sides = torus.get(axis, (link, link, 1.0, ()))
            dcn = self.chip.network * inner[axis] if outer[axis] > 1 else 0.0
            scatters, gathers = self._by_sums(sides)
            # Gradients that another axis sums, too, are summed over both at once, those of gathered keys also alone.
            together = axis == "fsdp" and any(inner.get(a, 1) > 1 for a in SUMMING)
            scatters = scatters or (bool(torus) and (together or axis == "context"))
            found[axis] = Network(inner[axis], outer[axis], ici, hop or dcn, distance, dcn, scatters, gathers)
        return found

    @staticmethod
    def _by_sums(sides: Sequence[int]) -> tuple[bool, bool]:
        """Return what libtpu 0.0.52 does by sums over these sides, as read in programs: (scatters, gathers).

        It scatters over 2x2, 2x4 and 4x8 and over parts of a side, and sums over squares and all three sides.
        """
        cube, square = len(sides) == 3, len(sides) == 2 and sides[0] == sides[1] > 2
        return cube or square, cube and min(sides) > 2

    def _closed(self, size: int) -> bool:
        if self.chip.max_shape == (16, 16):
            return size == self.chip.wraps
        return all(s % self.chip.wraps == 0 for s in self.shape)  # optical switches close whole cubes only

    def _torus(self, sizes: dict[str, int]) -> dict[str, tuple[float, float, float, tuple[int, ...]]]:
        """Return (bandwidth, that of a hop, distance, whole sides) of each mesh axis, by the torus axes below it."""
        whole = {i: size for i, size in enumerate(self.shape) if size > 1}
        left = dict(whole)
        found: dict[str, tuple[float, float, float, tuple[int, ...]]] = {}
        rest = []
        for axis, size in reversed([(axis, size) for axis, size in sizes.items() if size > 1]):
            free = [i for i in left if left[i] == whole[i]]
            subsets = [c for n in range(len(free), 0, -1) for c in itertools.combinations(free, n)]
            chosen = next((c for c in subsets if math.prod(whole[i] for i in c) == size), None)
            if chosen is None:
                rest.append((axis, size))
                continue
            bandwidth = sum(self._ring(whole[i], whole[i], 1) for i in chosen)
            sides = tuple(whole[i] for i in chosen)
            found[axis] = (bandwidth, self.chip.link, self._distance(sides), sides)
            left = {i: n for i, n in left.items() if i not in chosen}
        for axis, size in rest:  # a part of a torus axis, whose links it shares with the axes that have the other parts
            bandwidth, need, stride, parts = 0.0, size, 1, []
            for i in sorted(left, key=lambda i: -left[i]):
                part = math.gcd(need, left[i])
                if part > 1:
                    stride = whole[i] // left[i]
                    bandwidth += self._ring(whole[i], part, stride)
                    parts.append(part)
                    left[i] //= part
                    need //= part
            if need > 1:
                shape = "x".join(map(str, self.shape))
                raise UserError(
                    f"mesh.{axis}={size} cannot be laid along a torus of {shape}: take a divisor of its sizes"
                )
            found[axis] = (bandwidth, self.chip.link / stride, self._distance(parts), ())
        return found

    @staticmethod
    def _distance(sizes: Sequence[int]) -> float:
        # A quarter of a closed ring, whose links run both ways; on a line, with half of these, the middle has as much.
        return max(1.0, sum(sizes) / 4)

    def _ring(self, whole: int, part: int, stride: int) -> float:
        """Return the bandwidth of both directions of a closed ring, one of a line; `stride` rings share the links."""
        closed = part * stride == whole and self._closed(whole)
        return (2 if closed else 1) * self.chip.link / stride


def _chip(text: str, name: str, sizes: str | None) -> Chip:
    """Return the chip of a topology's text. Raises UserError where there is none, or where the sizes are no sizes."""
    chip = chip_named(name)
    known = chip or chip_named(re.split(r"[-\s]", name.strip())[0])
    if known is None:
        near = near_names(name, list(CHIPS))
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(CHIPS)}; --chip describes another"
        raise UserError(f"topology={text!r}: there is no chip '{name.strip().lower()}': {hint}")
    if chip is None or (sizes is not None and not re.fullmatch(r"\d+(x\d+)*", sizes)):
        counts = "" if known.platform == "gpu" else "; it counts chips, where cloud names may count cores"
        raise UserError(f"topology={text!r} is not of the form {_form(known)}{counts}")
    return chip


def _form(chip: Chip) -> str:
    """Return an example of a topology of this chip."""
    return f"{chip.name}:" + {1: "4x8 (nodes x GPUs)", 2: "8x8", 3: "4x4x8"}[len(chip.max_shape)]


def _split_slices(sizes: dict[str, int], topology: Topology) -> tuple[dict[str, int], dict[str, int]]:
    """Return (inner, outer) sizes of each axis: pipeline and data run across the slices, or else fsdp."""
    n = topology.num_slices
    outer = over_slices(sizes, n)
    if outer is None:
        raise UserError(
            f"topology {topology} has {n} slices: mesh.pipeline, mesh.data or mesh.fsdp has to be a multiple of {n}"
        )
    return {axis: size // outer[axis] for axis, size in sizes.items()}, outer


def _split_nodes(sizes: dict[str, int], topology: Topology) -> tuple[dict[str, int], dict[str, int]]:
    """Return (inner, outer) sizes of each axis: the innermost axes fill the node."""
    inner, left = dict.fromkeys(sizes, 1), math.prod(topology.shape)
    for axis, size in reversed(sizes.items()):
        inner[axis] = math.gcd(size, left)
        left //= inner[axis]
    return inner, {axis: size // inner[axis] for axis, size in sizes.items()}
