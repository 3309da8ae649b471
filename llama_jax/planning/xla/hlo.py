"""A compiled program as XLA writes it: computations, the loops and calls between them, the products in them.

`compiled.as_text()` is a list of computations, one instruction a line, in the order of the schedule. `Program.walk`
goes from the entry computation into loops, calls and fusions, with the number of executions of each instruction.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: `name = shape opcode(arguments), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    is_root: bool

    @property
    def operands(self) -> list[str]:
        """Return the names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, name: str) -> str:
        """Return an attribute that is a name or a number, or an empty text."""
        found = re.search(rf'\b{name}=["%]?([\w.\-]+)', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Return the target of a custom call."""
        return self.attribute("custom_call_target")

    @property
    def op_name(self) -> str:
        """Return its name in JAX; empty where XLA made it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Estimated cycles of a device, by the kind of instruction. Neither Pallas kernels nor collectives have any."""

    products: int = 0
    copies: int = 0
    others: int = 0


@dataclasses.dataclass(frozen=True)
class Site:
    """An instruction where it is executed.

    computation: the name of the computation that holds it.
    loops: iterations of the loops around it, outermost first; 0 where unknown.
    caller: where it is inside a fusion or an asynchronous call, the computation and the instruction of that.
    """

    instruction: Instruction
    computation: str
    loops: tuple[int, ...]
    caller: tuple[str, Instruction] | None

    @property
    def count(self) -> int:
        """Executions; a loop of unknown length counts once."""
        return math.prod(max(1, n) for n in self.loops)


class Program:
    """A parsed program. `computations` by name, each a dict from name to instruction in the order of the schedule."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif line.startswith("  ") and " = " in line:
                instruction = _parse_instruction(line.strip())
                current[instruction.name] = instruction

    def walk(self) -> Iterator[Site]:
        """Yield every instruction that is executed. All branches of a conditional count: which one runs is unknown."""
        yield from self._walk(self.entry, (), None)

    def _walk(self, name: str, loops: tuple[int, ...], caller: tuple[str, Instruction] | None) -> Iterator[Site]:
        for instruction in self.computations[name].values():
            yield Site(instruction, name, loops, caller)
            match instruction.opcode:
                case "while":
                    trips = self.trip_count(name, instruction)
                    yield from self._walk(instruction.attribute("body"), (*loops, trips), None)
                case "fusion" | "async-start":
                    yield from self._walk(instruction.attribute("calls"), loops, (name, instruction))
                case "call":
                    yield from self._walk(instruction.attribute("to_apply"), loops, None)
                case "conditional":
                    listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                    two = [instruction.attribute(f"{branch}_computation") for branch in ("true", "false")]
                    for branch in listed[1].replace("%", "").split(", ") if listed else two:
                        yield from self._walk(branch, loops, None)

    def trip_count(self, computation: str, loop: Instruction) -> int:
        """Return the iterations of a loop: as XLA notes it, or by `i < N` in its condition; 0 where unknown."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        compare = root = next(i for i in condition.values() if i.is_root)
        if root.opcode == "fusion":
            compare = next(i for i in self.computations[root.attribute("calls")].values() if i.is_root)
        start = self.computations[computation][loop.operands[0]]
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes or start.opcode != "tuple":
            return 0
        counter, limit = root.operands
        index = condition[counter].attribute("index")
        first = self._constant(computation, start.operands[int(index)]) if index else None
        last = self._constant(loop.attribute("condition"), limit)
        return 0 if first is None or last is None else last - first

    def _constant(self, computation: str, name: str) -> int | None:
        instruction = self.computations[computation][name]
        while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
            instruction = self.computations[computation][instruction.operands[0]]
        return int(instruction.arguments) if instruction.opcode == "constant" else None

    @functools.cache  # noqa: B019
    def multiplies(self, computation: str) -> bool:
        """Return whether there is a product of matrices in a computation, or in computations that it calls."""
        return any(self.is_product(i) for i in self.computations.get(computation, {}).values())

    def is_product(self, instruction: Instruction) -> bool:
        """Return whether an instruction is a product of matrices, a Pallas kernel, or calls one."""
        if instruction.target == "tpu_custom_call":
            return not instruction.name.startswith("ragged-dot-metadata")  # sizes of groups, before their products
        if instruction.opcode in ("dot", "convolution"):
            return True
        return self.multiplies(instruction.attribute("calls") or instruction.attribute("body"))

    def cycles(self) -> Cycles:
        """Return libtpu's own estimate of the cycles of one execution; zeros for other platforms."""
        found = Counter[str]()
        for site in self.walk():
            estimate = re.search(r'"estimated_cycles":"(\d+)"', site.instruction.attributes)
            if estimate and site.caller is None:
                is_copy = site.instruction.opcode.startswith("copy")
                kind = "products" if self.is_product(site.instruction) else "copies" if is_copy else "others"
                found[kind] += site.count * int(estimate[1])
        return Cycles(**found)

    def product_flops(self) -> int:
        """Return the FLOPs of all products of matrices of one execution, on one device."""
        return sum(
            site.count * _flops(site.instruction, self.computations[site.computation])
            for site in self.walk()
            if site.instruction.opcode in ("dot", "convolution")
        )


def _closing(text: str, start: int) -> int:
    """Return where the parenthesis that opens at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"an instruction of the program does not end: {text[:200]}")


def _parse_instruction(line: str) -> Instruction:
    head, _, rest = line.partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    name = head.removeprefix("ROOT ").removeprefix("%")
    arguments, attributes = rest[opening + 1 : closing], rest[closing + 1 :]
    return Instruction(name, shape, rest[:opening], arguments, attributes, head.startswith("ROOT "))


def arrays_of(shape: str) -> tuple[str, ...]:
    """Return element types and sizes in a shape: `(f32[], bf16[4,8]{1,0:T(8,128)})` -> `f32[]`, `bf16[4,8]`."""
    return tuple(re.findall(r"\b[a-z]+\d*\w*\[[\d,<=]*\]", shape))


def dimensions(array: str) -> list[int]:
    """Return the sizes of an array such as `bf16[4,8]`."""
    return [int(n.removeprefix("<=")) for n in array.partition("[")[2].rstrip("]").split(",") if n]


def bytes_of(array: str) -> int:
    """Return the bytes of an array such as `bf16[4,8]`."""
    bits = 8 if array.startswith("pred") else int((re.findall(r"^[a-z]+(\d+)", array) or ["0"])[0])
    return math.prod(dimensions(array)) * bits // 8


def _flops(product: Instruction, computation: Computation) -> int:
    out, left, right = (
        dimensions(arrays_of(shape)[0]) for shape in (product.shape, *(computation[o].shape for o in product.operands))
    )
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
        sizes = [left[int(i)] for i in contracted[1].split(",") if i] if contracted else []
        return 2 * math.prod(out) * math.prod(sizes)
    return _convolution_flops(product, out, left, right)


def _convolution_flops(product: Instruction, out: list[int], left: list[int], right: list[int]) -> int:
    """Return the FLOPs of a convolution, XLA:TPU's form of a product, in which batch dimensions are spatial ones.

    A position of the window counts where it meets an element of the (dilated, padded) left side, as XLA counts it.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    assert labels, product.attributes
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", product.attributes) or [""] * 2)[1])
    )
    spatial = sorted(label for label in labels[1] if label.isdigit())

    def numbers(key: str, default: int) -> list[int]:
        return [int(n) for n in window[key].split("x")] if key in window else [default] * len(spatial)

    pads = [int(p.split("_")[0]) for p in window["pad"].split("x")] if "pad" in window else [0] * len(spatial)
    strides, left_dilations, right_dilations = (numbers(k, 1) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    total = 2 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for i, label in enumerate(spatial):
        size, dilation = left[labels[1].index(label)], left_dilations[i]
        total *= sum(
            0 <= place < (size - 1) * dilation + 1 and place % dilation == 0
            for o in range(out[labels[3].index(label)])
            for k in range(right[labels[2].index(label)])
            for place in [o * strides[i] - pads[i] + k * right_dilations[i]]
        )
    return total
