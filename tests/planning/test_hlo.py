"""Reading programs: the notations of groups, and small TPU programs whose collectives `make_goldens` wrote out."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax.config import from_json, to_json
from llama_jax.planning import Collective, Program, read_collectives
from llama_jax.planning.xla.collectives import parse_groups
from llama_jax.planning.xla.hlo import Cycles, arrays_of, bytes_of

PROGRAMS = Path(__file__).parent / "programs"
MIB = 2**20


def sets(groups: list[list[int]]) -> set[frozenset[int]]:
    return {frozenset(group) for group in groups}


def commas(numbers) -> str:
    return ",".join(map(str, numbers))


@st.composite
def meshes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Axis sizes, and the axes that are grouped."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    grouped = draw(st.lists(st.sampled_from(range(len(sizes))), min_size=1, unique=True))
    return sizes, grouped


@given(meshes())
def test_all_notations_mean_what_numpy_says(mesh: tuple[list[int], list[int]]):
    sizes, grouped = mesh
    rest = [axis for axis in range(len(sizes)) if axis not in grouped]
    devices = math.prod(sizes)
    size = math.prod(sizes[axis] for axis in grouped)
    expected = np.arange(devices).reshape(sizes).transpose(rest + grouped).reshape(-1, size).tolist()
    iota = f"[{devices // size},{size}]<=[{commas(sizes)}]T({commas(rest + grouped)})"
    assert parse_groups(iota, devices) == expected
    explicit = "{" + ",".join("{" + commas(group) + "}" for group in expected) + "}"
    assert parse_groups(explicit, devices) == expected
    named = ",".join(f"'x{i}'={n}" for i, n in enumerate(sizes))
    axes = ",".join(f"'x{i}'" for i in grouped)
    assert parse_groups(f"mesh[{named}] {{{axes}}}", devices) == expected
    order = np.random.default_rng(0).permutation(devices)
    reordered = parse_groups(f"mesh[{named}], device_ids=({commas(order)}) {{{axes}}}", devices)
    assert reordered == order[np.array(expected)].tolist()


def test_the_other_notations():
    assert parse_groups("{}", 3) == [[0, 1, 2]]
    assert parse_groups("[2,4]<=[8]", 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    # A part of an axis of eight: its two halves are four apart.
    assert sets(parse_groups("mesh['x'=8] {'x':(1)2}", 8)) == sets([[0, 4], [1, 5], [2, 6], [3, 7]])
    assert sets(parse_groups("mesh['x'=8] {'x':(4)2}", 8)) == sets([[0, 1], [2, 3], [4, 5], [6, 7]])
    two_by_two = parse_groups("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", 4)
    assert sets(two_by_two) == sets([[0, 2], [1, 3]])


def test_sizes_of_arrays():
    shape = "(f32[], bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/pred[3]{0}, s4[6], f8e4m3fn[<=5,2], token[])"
    assert arrays_of(shape) == ("f32[]", "bf16[4,8]", "pred[3]", "s4[6]", "f8e4m3fn[<=5,2]", "token[]")
    assert [bytes_of(array) for array in arrays_of(shape)] == [4, 64, 3, 3, 10, 0]


def read(name: str, mesh: dict[str, int], device_ids: list[int] | None = None) -> tuple[Collective, ...]:
    return read_collectives(Program((PROGRAMS / f"{name}.txt").read_text()), mesh, device_ids)


def facts(collectives: tuple[Collective, ...]) -> set[tuple]:
    return {(c.kind, c.axes, c.bytes / MIB, c.wire_bytes / MIB, c.count) for c in collectives}


def test_kinds():
    """Each takes float32 [512, 1024] on a device of the mesh (a: 2, b: 4)."""
    assert facts(read("kinds", {"a": 2, "b": 4})) == {
        ("all-reduce", ("a",), 2, 2, 1),
        ("all-gather", ("b",), 8, 6, 1),
        ("reduce-scatter", ("a", "b"), 2, 2 * 7 / 8, 1),
        ("all-to-all", ("b",), 2, 1.5, 1),
        ("collective-permute", ("b",), 2, 2, 1),
    }


def test_loops_and_what_runs_behind_products():
    found = read("layers", {"fsdp": 8})
    gathers = [c for c in found if c.kind == "all-gather"]
    assert {(c.arrays, c.loops, c.axes) for c in gathers} == {(("bf16[1,1024,1024]",), (6,), ("fsdp",))}
    assert len(gathers) == 4  # two weights, forward and backward
    # The first of a layer has nothing to run behind, the second runs behind the product with the first.
    assert [c.asynchronous for c in gathers] == [c.overlapped for c in gathers] == [False, True] * 2
    assert sum(c.bytes * c.count for c in found if c.kind != "all-gather") == 12 * 2 * MIB
    # A layer's two products, again for remat, and two gradients of each.
    program = Program((PROGRAMS / "layers.txt").read_text())
    assert program.product_flops() == 6 * 8 * 2 * 1024**3


def test_a_ring():
    (ring,) = read("ring", {"other": 1, "context": 8})
    assert (ring.kind, ring.axes, ring.arrays, ring.loops) == (
        "collective-permute",
        ("context",),
        ("bf16[512,1024]",),
        (7,),
    )
    assert ring.asynchronous
    assert ring.overlapped
    assert Program((PROGRAMS / "ring.txt").read_text()).product_flops() == 7 * 2 * 512 * 512 * 1024


def test_cycles_count_as_often_as_their_loop_runs():
    text = (PROGRAMS / "layers.txt").read_text()
    assert Program(text).cycles() == Cycles(), "the golden programs have none"
    # A product and an update in the loop over six layers, and a conversion inside of a fusion.
    for name, cycles in (("fusion.73", 100), ("bitcast_dynamic-update-slice_fusion.2", 10), ("fusion.95", 1)):
        estimate = f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
        text = re.sub(rf"^  %{re.escape(name)} = .*$", rf"\g<0>, {estimate}", text, flags=re.M)
    assert Program(text).cycles() == Cycles(products=600, others=60)


def test_slices():
    """Each takes float32 [1024, 1024] on a device of four slices (a: 2, b: 2) of four chips (c)."""
    ids = [100_000 * (s + 1) + i for s in range(4) for i in range(4)]
    found = read("slices", {"a": 2, "b": 2, "c": 4}, ids)
    assert facts(found) == {
        ("all-reduce", ("a",), 4, 4, 1),
        ("all-reduce", ("a", "b"), 4, 6, 1),
        ("all-gather", ("b",), 8, 4, 1),
        ("reduce-scatter", ("b",), 4, 2, 1),
        ("collective-permute", ("a",), 4, 4, 1),
        ("all-gather", ("c",), 16, 12, 1),
    }
    assert {c.axes for c in found if not c.across_slices} == {("c",)}
    assert all(c.asynchronous for c in found if c.across_slices)
    assert not any(c.overlapped for c in found)  # there is no product to run behind


@pytest.mark.parametrize("length", [1, 5])
def test_a_cpu_program(length: int):
    """XLA:CPU notes how often a loop runs; the products in it count that often."""
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    weight = jax.device_put(jnp.ones((length, 8, 8)), jax.sharding.NamedSharding(mesh, jax.P(None, "b")))

    def apply(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ jax.sharding.reshard(w, jax.P(None, None))), None), x, weights)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(apply).lower(weight, jnp.ones((4, 8))).compile().as_text()
    program = Program(text or "")
    found = read_collectives(program, {"a": 2, "b": 4})
    assert {(c.kind, c.axes, c.bytes * c.count) for c in found} == {("all-gather", ("b",), length * 8 * 8 * 4)}
    assert program.product_flops() == length * 2 * 4 * 8 * 8


def test_a_loop_of_unknown_length_says_so():
    text = jax.jit(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)).lower(jnp.ones((2, 2)))
    program = Program(text.compile().as_text() or "")
    products = [site for site in program.walk() if site.instruction.opcode == "dot"]
    assert [(site.loops, site.count) for site in products] == [((0,), 1)]


def test_collectives_are_json():
    for collective in read("ring", {"context": 8}):
        assert from_json(Collective, json.loads(json.dumps(to_json(collective)))) == collective
