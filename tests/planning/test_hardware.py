"""Topologies: what their names mean, and what connects the devices of a mesh axis."""

import json
import math
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies as st

from llama_jax.chips import CHIPS, Chip, described, peak_of
from llama_jax.config import UserError
from llama_jax.parallel import MESH_AXES
from llama_jax.planning import Topology, estimate, plan
from llama_jax.planning.search import meshes
from llama_jax.planning.xla.compiled import gpu_target
from llama_jax.run_config import load_config


def test_every_gpu_is_described_to_its_compiler():
    described = [chip for chip in CHIPS.values() if chip.platform == "gpu" and chip.kinds]
    assert {chip.name for chip in described} == {"h100", "h200", "b200"}
    assert all((chip.target is not None) == (chip in described) for chip in CHIPS.values())


def test_a_chip_of_one_s_own_is_one_entry(monkeypatch: pytest.MonkeyPatch):
    chip = Chip("x1", ("X1 accelerator",), 1e15, 1e11, 1e12, 1e11, 1e10, (4,))
    monkeypatch.setitem(CHIPS, chip.name, chip)
    machine = Topology.parse("x1:2x4")
    assert (machine.num_chips, str(machine)) == (8, "x1:2x4")
    devices = [SimpleNamespace(device_kind="X1 accelerator", process_index=i) for i in range(2) for _ in range(4)]
    assert Topology.of(devices) == machine
    assert peak_of("X1 accelerator") == 1e15
    report = plan(load_config("tiny_python", {"mesh.fsdp": 8}), "x1:2x4")
    assert report.fits
    with pytest.raises(UserError, match="leave out --compile, or give its Chip a target"):
        gpu_target("x1:2x4")


@pytest.mark.parametrize(
    ("text", "chips", "written"),
    [
        ("v5e:8x8", 64, "v5e:8x8"),
        ("v5p:4x4x8", 128, "v5p:4x4x8"),
        ("2x v5e:16x16", 512, "2x v5e:16x16"),
        ("h100:4x8", 32, "h100:4x8"),
        ("H100:8", 8, "h100:1x8"),
        ("b200:16x8", 128, "b200:16x8"),
        ("v5p:20x28x16", 8960, "v5p:20x28x16"),
        ("h100", 1, "h100:1x1"),
        ("v5p", 1, "v5p:1x1x1"),
        ("4x h100", 4, "h100:1x4"),
        ("16xH100", 16, "h100:2x8"),
        ("h100x8", 8, "h100:1x8"),
        ("A100 80GB", 1, "a100:1x1"),
        ("a100-40gb:2x8", 16, "a100-40gb:2x8"),
        ("RTX 4090", 1, "rtx4090:1x1"),
        ("2x 4090", 2, "rtx4090:1x2"),
        ("NVIDIA GeForce RTX 3090", 1, "rtx3090:1x1"),
        ("Tesla V100 32GB:8", 8, "v100:1x8"),
        ("l40s:8", 8, "l40s:1x8"),
    ],
)
def test_names_of_topologies(text: str, chips: int, written: str):
    topology = Topology.parse(text)
    assert (topology.num_chips, str(topology)) == (chips, written)
    assert Topology.parse(written) == topology


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("v5x:8x8", "there is no chip 'v5x': did you mean 'v5"),
        ("a1000:8", "there is no chip 'a1000': did you mean 'h100'"),
        ("rtx6000", "there is no chip 'rtx6000': did you mean 'a6000'"),
        ("", "there is no chip '': there are v4"),
        ("cerebras:2x2", "there is no chip 'cerebras': there are v4, v5e"),
        ("v5p-128", "is not of the form v5p:4x4x8; it counts chips, where cloud names may count cores"),
        ("v5e:8", "has 1 sizes and v5e takes 2: v5e:8x8"),
        ("v5e:8x32", "one slice of v5e has at most 16x16"),
        ("h100:2x16", "one node of h100 has at most 8: write nodes x GPUs, h100:2x8"),
        ("v5p:0x4x4", "all numbers must be at least 1"),
        ("0x h100", "all numbers must be at least 1"),
        ("h100:8x", "is not of the form h100:4x8"),
        ("h100 pcie", "is not of the form h100:4x8"),
    ],
)
def test_names_that_are_none(text: str, sentence: str):
    with pytest.raises(UserError, match=sentence) as found:
        Topology.parse(text)
    assert repr(text) in str(found.value)
    assert "\n" not in str(found.value)


def test_every_kind_of_chip_is_planned_for_alone_and_in_a_node():
    """By formulas; and what is not known between nodes is refused, and not suggested."""
    config = load_config("llama3_2_1b", {"global_batch_size": 8, "sequence_length": 128})
    for chip in CHIPS.values():
        alone = estimate(config, Topology.parse(chip.name))
        assert 0 < alone.mfu < 1
        assert alone.total_bytes > 0
        if chip.platform == "gpu":
            assert estimate(config, Topology.parse(f"{chip.name}:8")).total_bytes < alone.total_bytes
    with pytest.raises(UserError, match="the network between several rtx4090 is not known: give it with --chip"):
        estimate(config, Topology.parse("rtx4090:2x4"))
    large = load_config("llama2_70b", {"global_batch_size": 8})  # no change on one node is enough: the next is several
    report = plan(large, "rtx4090:8").to_json()
    assert (report["fits"], report["remedy"]) == (False, None)


def test_a_chip_by_its_description():
    """As pairs and as JSON; a missing or impossible value is named."""
    text = "name=mine,peak_flops=1e15,memory=80e9,bandwidth=3e12"
    chip = described(text)
    assert chip == Chip("mine", (), 1e15, 80e9, 3e12)
    fields = {"name": "mine", "peak_flops": 1e15, "memory": 80e9, "bandwidth": 3e12}
    assert described(json.dumps(fields)) == chip
    for wrong, sentence in (
        ("name=mine,memory=80e9", "must give peak_flops"),
        ("", "must give peak_flops"),
        ("chip.json", "must give peak_flops"),
        ("{", "not valid JSON"),
        (text.replace("80e9", "80"), r"memory=80 is in bytes, such as 80e9"),
        (text.replace("80e9", "80GB"), r"memory='80GB' is not of type float"),
        (f"{text},lnik=3e11", r"unknown key 'lnik'.*Did you mean 'link'"),
        (text.replace("mine", "My GPU"), "must be of lower-case letters"),
    ):
        with pytest.raises(UserError, match=sentence) as found:
            described(wrong)
        assert "\n" not in str(found.value)


def sizes(**given: int) -> dict[str, int]:
    return dict.fromkeys(MESH_AXES, 1) | given


def test_axes_share_the_links_of_a_torus():
    link = CHIPS["v5e"].link
    whole = Topology.parse("v5e:16x16").networks(sizes(fsdp=16, tensor=16))
    assert whole["fsdp"].ici == whole["tensor"].ici == 2 * link, "a closed ring each, in both directions"
    assert Topology.parse("v5e:16x16").networks(sizes(fsdp=256))["fsdp"].ici == 4 * link
    assert Topology.parse("v5e:8x8").networks(sizes(fsdp=64))["fsdp"].ici == 2 * link, "no ring closes below 16"
    cubes = Topology.parse("v5p:4x4x8").networks(sizes(fsdp=128))["fsdp"]
    assert cubes.ici == 6 * CHIPS["v5p"].link
    assert Topology.parse("v5p:2x2x4").networks(sizes(fsdp=16))["fsdp"].ici == 3 * CHIPS["v5p"].link, "no whole cube"


@given(st.sampled_from(["v5e:8x8", "v5e:16x16", "v5p:4x4x8", "2x v6e:8x16", "h100:8x8", "h200:8"]), st.data())
def test_no_mesh_has_more_bandwidth_than_the_chip(text: str, data: st.DataObject):
    topology = Topology.parse(text)
    mesh = data.draw(st.sampled_from(list(meshes(topology.num_chips))))
    try:
        networks = topology.networks(mesh)
    except UserError:
        assert topology.num_slices > 1, "every shape of powers of two can be laid along one slice"
        return
    assert networks.keys() == {axis for axis, size in mesh.items() if size > 1}
    for axis, network in networks.items():
        assert network.inner * network.outer == mesh[axis]
        assert (network.ici > 0) == (network.inner > 1)
        assert (network.dcn > 0) == (network.outer > 1)
    assert math.prod(n.outer for n in networks.values()) == topology.num_slices
    if topology.chip.platform == "tpu":
        links = 2 * len(topology.shape) * topology.chip.link
        assert sum(n.ici for n in networks.values()) <= links * (1 + 1e-9)


def test_one_axis_crosses_slices():
    topology = Topology.parse("2x v5e:8x8")
    data = topology.networks(sizes(data=2, fsdp=64))
    assert (data["data"].outer, data["fsdp"].outer) == (2, 1)
    assert data["data"].dcn == CHIPS["v5e"].network
    stages = topology.networks(sizes(pipeline=2, data=2, fsdp=32))
    assert (stages["pipeline"].inner, stages["pipeline"].outer, stages["data"].outer) == (1, 2, 1)
    fsdp = topology.networks(sizes(fsdp=64, tensor=2))["fsdp"]
    assert (fsdp.inner, fsdp.outer, fsdp.dcn) == (32, 2, 32 * CHIPS["v5e"].network)
    with pytest.raises(UserError, match=r"2x v5e:8x8 has 2 slices: mesh.pipeline, mesh.data or mesh.fsdp has to be"):
        topology.networks(sizes(tensor=128))


def test_a_node_is_filled_from_the_innermost_axis():
    networks = Topology.parse("h100:4x8").networks(sizes(fsdp=16, tensor=2))
    assert (networks["tensor"].inner, networks["tensor"].dcn) == (2, 0)
    assert (networks["fsdp"].inner, networks["fsdp"].outer) == (4, 4)
    assert networks["fsdp"].dcn == 4 * CHIPS["h100"].network


def test_larger_machines_grow():
    topology = Topology.parse("v5e:4x8")
    names = []
    for _ in range(4):
        topology = topology.larger()
        names.append(str(topology))
    assert names == ["v5e:8x8", "v5e:16x8", "v5e:16x16", "2x v5e:16x16"]
    assert str(Topology.parse("h100:2x8").larger()) == "h100:4x8"
