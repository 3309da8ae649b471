"""Collectives of a compiled program: kinds, mesh axes that they span, bytes.

Three things are particular to TPU programs. An asynchronous collective is a chain of fusions: `AsyncCollectiveStart`,
steps fused with the products that it hides behind, `AsyncCollectiveDone`. A reduce-scatter is a fusion of an all-reduce
with a slice. Data that crosses from slice to slice is sent to the host, with the devices to exchange it with.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from llama_jax.planning.xla.hlo import Instruction, Program, Site, arrays_of, bytes_of

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
# libtpu numbers the devices of slice s from 100000 (s + 1), and of a single slice from 0.
SLICE_IDS = 100_000
TRANSFER, RENDEZVOUS = "_xla_megascale_transfer_type", "_xla_host_transfer_rendezvous"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    kind: one of KINDS.
    axes: mesh axes that its groups of devices span; empty where it spans no axis larger than 1.
    group_size: devices that exchange data with one another.
    arrays: inputs on one device, or results of an all-gather, such as `bf16[512,1408]`.
    bytes: size of `arrays` together.
    loops: iterations of the loops around it, outermost first; 0 where unknown.
    asynchronous: True where other work may run meanwhile.
    overlapped: True where a product of matrices, or a loop with one, runs between its start and its end.
    across_slices: True where a group has devices of several slices: it runs over the data-center network.
    op_name: its name in JAX; of several that were combined, one of them.
    """

    kind: str
    axes: tuple[str, ...]
    group_size: int
    arrays: tuple[str, ...]
    bytes: int
    loops: tuple[int, ...]
    asynchronous: bool
    overlapped: bool
    across_slices: bool
    op_name: str

    @property
    def count(self) -> int:
        """Executions in one step; a loop of unknown length counts once."""
        return math.prod(max(1, n) for n in self.loops)

    @property
    def label(self) -> str:
        """Kind and place: `all-gather fsdp`, `all-reduce data across slices`."""
        return f"{self.kind} {'+'.join(self.axes)}{' across slices' if self.across_slices else ''}"

    @property
    def dtype(self) -> str:
        """Type of the largest array."""
        return max(self.arrays, key=bytes_of).partition("[")[0]

    @property
    def wire_bytes(self) -> int:
        """Bytes that one device sends in one execution by a ring algorithm: the least that any algorithm needs."""
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes if n > 1 else 0
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (n - 1) // n


def parse_groups(text: str, num_devices: int) -> list[list[int]]:
    """Return groups of devices, from any of the notations of `replica_groups`.

    `{}` (all), `{{0,1},{2,3}}`, `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)` and `mesh['a'=2,'b'=4] {'b'}`, where `'b':(2)2`
    takes a part of an axis and `device_ids=([4,2]T(1,0))` or `device_ids=(0,2,1,3)` orders the devices.
    """
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        found = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
        assert found, text
        return _iota(found[2], found[3]).reshape(_ints(found[1])).tolist()
    groups = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", text)]
    return groups or [list(range(num_devices))]


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(sizes: str, order: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return devices.transpose(_ints(order) if order else None).reshape(-1)


def _mesh_groups(text: str) -> list[list[int]]:
    found = re.fullmatch(r"mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}", text)
    assert found, text
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
    order = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", found[2] or "")
    if order:
        devices = _iota(order[1], order[2])
    else:
        devices = np.array(_ints(found[2])) if found[2] else np.arange(math.prod(sizes.values()))
    # An axis of which a part is taken is three: the part, and the sizes before and after it.
    dims: list[int] = []
    place: dict[str, int] = {}
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'([^']*)':\((\d+)\)(\d+)", found[3])}
    for name, size in sizes.items():
        before, part = parts.get(name, (1, size))
        place[name] = len(dims) + 1
        dims += [before, part, size // before // part]
    grouped = [place[name] for name in re.findall(r"'([^']*)'", found[3])]
    rest = [i for i in range(len(dims)) if i not in grouped]
    return devices.reshape(dims).transpose(rest + grouped).reshape(-1, math.prod(dims[i] for i in grouped)).tolist()


_GROUPS = re.compile(
    r"replica_groups=(mesh\[.*?\](?:, device_ids=\([^{]*\))? \{[^}]*\}"
    r"|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def read_collectives(
    program: Program, mesh_shape: Mapping[str, int], device_ids: Sequence[int] | None = None
) -> tuple[Collective, ...]:
    """Return the collectives of a compiled program, in the order of its schedule.

    `mesh_shape` is the mesh that it was compiled for, axis sizes in order; `device_ids` those of the mesh's devices, in
    its order, by default 0, 1, 2... Of a branch that may run, the collectives are counted as if it did.
    """
    ids = list(range(math.prod(mesh_shape.values())) if device_ids is None else device_ids)
    found = []
    for site in program.walk():
        kind = site.instruction.opcode.removesuffix("-start")
        if kind == "send" and site.instruction.attribute(TRANSFER):
            found.append(_read_transfer(program, site, mesh_shape, ids))
        elif kind in KINDS and not _continues(program, site):
            found.append(_read(program, site, kind, mesh_shape, ids))
    return tuple(found)


def _targets(program: Program, computation: str) -> list[str]:
    return [i.target for i in program.computations.get(computation, {}).values()]


def _continues(program: Program, site: Site) -> bool:
    """Return whether this is a later part of an asynchronous collective, which is counted where it starts."""
    is_step = site.computation.startswith("async_collective_fusion")
    return is_step or "AsyncCollectiveDone" in _targets(program, site.computation)


def _read(program: Program, site: Site, kind: str, mesh_shape: Mapping[str, int], ids: list[int]) -> Collective:
    op, computation = site.instruction, program.computations[site.computation]
    outer, start = site.caller or (site.computation, op)
    is_fused = "AsyncCollectiveStart" in _targets(program, site.computation)
    is_async = is_fused or start.opcode == "async-start" or op.opcode.endswith("-start")
    if kind == "all-reduce" and site.caller and any(i.opcode == "dynamic-slice" for i in computation.values()):
        kind = "reduce-scatter"
    # The further operands of a permutation are where the result is written.
    operands = op.operands[:1] if kind == "collective-permute" else op.operands
    arrays = [array for operand in operands for array in arrays_of(computation[operand].shape)]
    if kind == "ragged-all-to-all":  # from a part of the rows to a part of the places: no more than the fewer of them
        arrays = [min(arrays[:2], key=bytes_of)]
    if kind == "all-gather":  # results; the shape of a started one has the inputs, too
        arrays = list(arrays_of(op.shape))[len(arrays) if op.opcode.endswith("-start") else 0 :]
    if pairs := _PAIRS.search(op.attributes):
        groups = [_ints(pair) for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
    else:
        written = _GROUPS.search(op.attributes)
        groups = parse_groups(written[1] if written else "{}", len(ids))
    channel = op.attribute("channel_id")

    def ends(instruction: Instruction) -> bool:
        if instruction.opcode.endswith("-done"):
            return start.name in instruction.operands
        body = program.computations.get(instruction.attribute("calls"), {}).values()
        is_last = any(i.target == "AsyncCollectiveDone" for i in body)
        return is_last and any(i.attribute("channel_id") == channel for i in body)

    overlapped = is_async and _overlaps(program, outer, start, ends)
    return _collective(kind, groups, arrays, site, mesh_shape, ids, is_async, overlapped)


def _read_transfer(program: Program, site: Site, mesh_shape: Mapping[str, int], ids: list[int]) -> Collective:
    """Return a collective between slices: a `send` to the host and a `recv` of the result, paired by a key."""
    send, computation = site.instruction, program.computations[site.computation]
    key = send.attribute(RENDEZVOUS)
    recv = next(i for i in computation.values() if i.opcode == "recv" and i.attribute(RENDEZVOUS) == key)
    kind = send.attribute(TRANSFER).lower().replace("_", "-")
    kind = "collective-permute" if kind == "one-to-one" else kind
    arrays = arrays_of(recv.shape if kind == "all-gather" else computation[send.operands[0]].shape)[:1]
    target = re.search(r'_xla_megascale_target=("[^"]*"|\{.*?\}\})', send.attributes)
    assert target, send.attributes
    if block := re.fullmatch(r'"\{([\d,]+)\}x\{(\d+):(\d+)\}"', target[1]):
        local = range(int(block[2]), int(block[3]) + 1)
        written = [[SLICE_IDS * number + i for number in _ints(block[1])] for i in local]
    else:
        written = [_ints(group) for group in re.findall(r"\{([\d,]+)\}", target[1].replace("->", ","))]
    groups = [[ids.index(device) for device in group] for group in written]
    start = next(i for i in computation.values() if i in (send, recv))
    overlapped = _overlaps(
        program, site.computation, start, lambda i: i.opcode == "recv-done" and recv.name in i.operands
    )
    return _collective(kind, groups, arrays, site, mesh_shape, ids, True, overlapped)


def _collective(
    kind: str,
    groups: list[list[int]],
    arrays: Sequence[str],
    site: Site,
    mesh_shape: Mapping[str, int],
    ids: list[int],
    is_async: bool,
    overlapped: bool,
) -> Collective:
    places = [np.stack(np.unravel_index(group, tuple(mesh_shape.values()))) for group in groups]
    differ = np.any([np.any(p != p[:, :1], axis=1) for p in places], axis=0)
    caller = site.caller[1].op_name if site.caller else ""
    return Collective(
        kind=kind,
        axes=tuple(axis for axis, differs in zip(mesh_shape, differ, strict=True) if differs),
        group_size=len(groups[0]),
        arrays=tuple(arrays),
        bytes=sum(map(bytes_of, arrays)),
        loops=site.loops,
        asynchronous=is_async,
        overlapped=overlapped,
        across_slices=any(len({ids[d] // SLICE_IDS for d in group}) > 1 for group in groups),
        op_name=site.instruction.op_name or caller,
    )


def _overlaps(program: Program, computation: str, start: Instruction, ends: Callable[[Instruction], bool]) -> bool:
    """Return whether a product is between `start` and its end, in the order of the schedule."""
    instructions = list(program.computations[computation].values())
    for instruction in instructions[instructions.index(start) + 1 :]:
        if ends(instruction):
            return False
        if program.is_product(instruction):
            return True
    return False
