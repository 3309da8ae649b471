"""Overrides and files of configs: what is changed, what is kept, and what a mistake is told."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, strategies as st

from llama_jax import config as machinery
from llama_jax.config import UserError, choices, find_config, from_json, leaves, load_config_module, override, to_json
from llama_jax.models import DecoderConfig, LayerOverride
from llama_jax.nn import FeedForward, GroupedQuery, LinearScaling, Llama3Scaling, Mixer, RMSNorm, Rope, SwiGLU
from llama_jax.parallel import MeshConfig


@dataclasses.dataclass(frozen=True)
class Section:
    """Every kind of leaf."""

    count: int = 1
    rate: float = 0.5
    flag: bool = False
    name: str = "a"
    path: str | None = None
    limit: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2, "auto"] = 1
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ("x",)


@dataclasses.dataclass(frozen=True)
class Run:
    model: DecoderConfig
    section: Section = Section()
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < self.section.count:
            raise UserError(f"steps={self.steps} must be at least section.count={self.section.count}")


@dataclasses.dataclass(frozen=True)
class Bottleneck(FeedForward):
    """What a notebook cell would define."""

    intermediate_size: int
    depth: int


@pytest.fixture(scope="module")
def run(two_layers) -> Run:
    return Run(model=two_layers)


VALUES: list[tuple[str, Any, str]] = [
    ("count", -3, "-3"),
    ("count", 10, "1_0"),
    ("rate", 3e-4, "3e-4"),
    ("rate", 2.0, "2"),
    ("flag", True, "true"),
    ("flag", False, "False"),
    ("name", "none", "none"),
    ("name", "", ""),
    ("name", "7", "7"),
    ("path", None, "none"),
    ("path", "out", "out"),
    ("limit", None, "none"),
    ("limit", 5, "5"),
    ("mode", "slow", "slow"),
    ("level", 2, "2"),
    ("level", "auto", "auto"),
    ("sizes", (), ""),
    ("sizes", (4,), "4"),
    ("sizes", (1, 2), "1, 2"),
    ("names", ("a", "b"), "a,b"),
]


@pytest.mark.parametrize(("name", "value", "text"), VALUES, ids=lambda v: repr(v))
def test_python_value_and_command_line_text_mean_the_same(run: Run, name: str, value: Any, text: str):
    for given_value in (value, text):
        changed = override(run, {f"section.{name}": given_value})
        found = getattr(changed.section, name)
        assert found == value
        assert type(found) is type(value)
        assert dataclasses.replace(changed, section=run.section) == run


def test_lists_and_paths_and_integers_for_floats(run: Run):
    changed = override(run, {"section.sizes": [3, 4], "section.path": Path("a") / "b", "section.rate": 3})
    assert changed.section.sizes == (3, 4)
    assert changed.section.path == str(Path("a") / "b")
    assert (changed.section.rate, type(changed.section.rate)) == (3.0, float)


def test_a_key_may_be_written_with_dashes(run: Run):
    assert override(run, {"model.num-layers": "3"}) == override(run, {"model.num_layers": 3})


def test_nothing_changed_is_the_same(run: Run):
    assert override(run, {}) == run


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"model.attention.num_kv_head": 2},
            "unknown key 'model.attention.num_kv_head': GroupedQuery has no 'num_kv_head'. "
            "Did you mean 'model.attention.num_kv_heads'?",
        ),
        ({"stepps": 2}, "unknown key 'stepps': Run has no 'stepps'. Did you mean 'steps'?"),
        ({"zzz": 2}, "unknown key 'zzz': Run has no 'zzz'. It has model, section, mesh, steps."),
        ({"steps.more": 2}, "unknown key 'steps.more': steps is 10 and has no 'more'"),
        ({"section.count": "ten"}, "section.count='ten' is not of type int"),
        ({"section.count": True}, "section.count=True is not of type int"),
        ({"section.count": 1.0}, "section.count=1.0 is not of type int"),
        ({"section.flag": 1}, "section.flag=1 is not of type bool"),
        ({"section.rate": "nan"}, "section.rate='nan' is not of type float"),
        ({"section.rate": float("inf")}, "section.rate=inf is not of type float"),
        ({"section.mode": "medium"}, "section.mode='medium' is not of type fast|slow"),
        ({"section.level": 3}, "section.level=3 is not of type 1|2|auto"),
        ({"section.level": True}, "section.level=True is not of type 1|2|auto"),
        ({"section.limit": "x"}, "section.limit='x' is not of type int or none"),
        ({"section.sizes": "1,b"}, "section.sizes='1,b' is not of type list of int"),
        ({"section": 3}, "section=3 is not of type Section"),
        (
            {"model.feed_forward": "Swiglu"},
            "model.feed_forward='Swiglu' is not of type FeedForward or none "
            f"(one of {', '.join(choices(FeedForward))}): did you mean 'SwiGLU'?",
        ),
        (
            {"model.attention": None},
            f"model.attention=None is not of type Mixer (one of {', '.join(choices(Mixer))})",
        ),
        (
            {"model.attention.num_kv_heads": 3},
            "model.attention.num_kv_heads=3 does not divide num_heads=4: take one of 1, 2, 4",
        ),
        ({"model.norm.eps": 0}, "model.norm.eps=0.0 must be above 0"),
        ({"mesh.tensor": 0}, "mesh.tensor=0 must be at least 1, or -1 for the devices that are left"),
        ({"steps": 5, "section.count": 6}, "steps=5 must be at least section.count=6"),
        (
            {"model.attention.rope.scaling.factor": 2.0},
            "unknown key 'model.attention.rope.scaling.factor': model.attention.rope.scaling is None and has no "
            "'factor': choose one first with --model.attention.rope.scaling "
            "(LinearScaling, Llama3Scaling, LongRopeScaling, NTKScaling, YarnScaling)",
        ),
        (
            {"model.attention.rope.scaling": "Llama3Scaling"},
            "model.attention.rope.scaling=Llama3Scaling also needs model.attention.rope.scaling.factor: give it too",
        ),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, dict) else "",
)
def test_a_mistake_is_one_sentence(run: Run, changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as error:
        override(run, changes)
    assert str(error.value) == sentence


def test_changes_that_are_right_only_together_need_no_order(run: Run):
    changes = {"model.attention.num_heads": 6, "model.attention.num_kv_heads": 3, "steps": 3, "section.count": 2}
    for order in (list(changes), list(reversed(changes))):
        changed = override(run, {key: changes[key] for key in order})
        assert (changed.model.attention.num_heads, changed.model.attention.num_kv_heads) == (6, 3)
    with pytest.raises(UserError):
        override(run, {"model.attention.num_heads": 3})


def test_a_component_is_switched_by_name_and_keeps_what_it_shares(run: Run):
    key = "model.attention.rope.scaling"
    linear = override(run, {f"{key}.factor": 4.0, key: "LinearScaling"})
    assert linear.model.attention.rope == Rope(theta=10000.0, scaling=LinearScaling(factor=4.0))
    rest = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 32}
    llama = override(linear, {key: "Llama3Scaling"} | {f"{key}.{name}": value for name, value in rest.items()})
    assert llama.model.attention.rope.scaling == Llama3Scaling(factor=4.0, **rest)
    assert override(llama, {key: "none"}) == run
    assert override(run, {"model.attention.rope": None}).model.attention.rope is None


def test_a_component_may_be_given_whole(run: Run):
    piece = SwiGLU(intermediate_size=8, bias=True)
    assert override(run, {"model.feed_forward": piece}).model.feed_forward == piece
    changed = override(run, {"model.feed_forward": piece, "model.feed_forward.intermediate_size": 9})
    assert changed.model.feed_forward == SwiGLU(intermediate_size=9, bias=True)


def test_a_class_of_a_notebook(run: Run):
    changes = {"model.feed_forward": "Bottleneck", "model.feed_forward.depth": "2"}
    with pytest.raises(UserError, match="'Bottleneck' is not of type FeedForward"):
        override(run, changes)
    changed = override(run, changes, components=(Bottleneck,))
    assert changed.model.feed_forward == Bottleneck(intermediate_size=24, depth=2)
    whole = override(run, {"model.feed_forward": Bottleneck(3, 4)})
    assert override(whole, {"model.feed_forward.depth": 5}).model.feed_forward == Bottleneck(3, 5)
    assert from_json(DecoderConfig, to_json(whole.model), components=(Bottleneck,)) == whole.model
    with pytest.raises(UserError, match=r"feed_forward names the class 'Bottleneck'.*components=\(Bottleneck,\)"):
        from_json(DecoderConfig, to_json(whole.model))


def test_unknown_key_names_the_component_that_has_it(run: Run):
    changed = override(run, {"model.feed_forward": Bottleneck(3, 4)})
    with pytest.raises(UserError, match=r"\((\w+) has it: choose it with --model.feed_forward \1\)"):
        override(changed, {"model.feed_forward.bias": True})


def test_leaves_name_every_key_that_can_be_changed(run: Run):
    found = {key: value for key, _, value in leaves(run)}
    assert found["model.attention"] == run.model.attention
    assert found["model.attention.num_kv_heads"] == 2
    assert found["section.names"] == ("x",)
    assert "section" not in found
    for key, value in found.items():
        assert override(run, {key: value}) == run


finite = st.floats(allow_nan=False, allow_infinity=False)
sections = st.builds(
    Section,
    count=st.integers(max_value=10),
    rate=finite,
    flag=st.booleans(),
    name=st.text(),
    path=st.none() | st.text(),
    limit=st.none() | st.integers(),
    mode=st.sampled_from(["fast", "slow"]),
    level=st.sampled_from([1, 2, "auto"]),
    sizes=st.lists(st.integers()).map(tuple),
    names=st.lists(st.text()).map(tuple),
)
sizes = st.integers(1, 5)
scalings = st.none() | st.builds(LinearScaling, factor=st.floats(1, 100))
scalings |= st.builds(
    Llama3Scaling,
    factor=st.floats(1, 100),
    low_freq_factor=st.floats(0.5, 1),
    high_freq_factor=st.floats(2, 4),
    original_max_positions=sizes,
)
mixers = st.builds(
    GroupedQuery,
    num_heads=st.sampled_from([2, 4]),
    num_kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([2, 4]),
    rope=st.none() | st.builds(Rope, theta=st.floats(2, 1e6), scaling=scalings),
    qkv_bias=st.booleans(),
    out_bias=st.booleans(),
)
feed_forwards = st.builds(SwiGLU, intermediate_size=sizes, bias=st.booleans())
overrides = st.lists(st.builds(LayerOverride, layers=st.just((0,)), piece=mixers | feed_forwards), max_size=2)
models = st.builds(
    DecoderConfig,
    vocab_size=sizes,
    hidden_size=sizes,
    num_layers=sizes,
    max_positions=sizes,
    attention=mixers,
    feed_forward=feed_forwards,
    norm=st.builds(RMSNorm, eps=st.floats(1e-8, 1)),
    tie_embeddings=st.booleans(),
    overrides=overrides.map(tuple),
)
runs = st.builds(Run, model=models, section=sections, steps=st.integers(10, 20))


def reread(config: Run) -> Run:
    # `Run` and `Section` are classes of this test, so they are handed over as a notebook's would be.
    return from_json(Run, json.loads(json.dumps(to_json(config), allow_nan=False)), components=(Run, Section))


@given(runs)
def test_json_round_trip(config: Run):
    again = reread(config)
    assert again == config
    assert hash(again) == hash(config)


@given(runs)
def test_every_leaf_survives_the_command_line(config: Run):
    """A config is rebuilt from any other by the text of its leaves, where text can say them."""
    for key, _, value in leaves(config):
        if isinstance(value, int | float | bool | None) or value in ("fast", "slow", "auto"):
            assert override(config, {key: str(value)}) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.pop("model"), "the config (Run) lacks the key 'model'"),
        (lambda d: d["section"].update(cuont=1), "unknown key 'section.cuont': Section has no 'cuont'. "
         "Did you mean 'section.count'?"),
        (lambda d: d["model"]["norm"].update(eps="big"), "model.norm.eps='big' is not of type float"),
        (lambda d: d["model"]["norm"].update(eps=-1.0), "model.norm.eps=-1.0 must be above 0"),
        (lambda d: d.update(model=3), "model=3 is not of type DecoderConfig"),
        (lambda d: d["section"].update(sizes=["a"]), "section.sizes='a' is not of type int"),
        (lambda d: d["model"]["norm"].update(type="LayerNrom"), "model.norm names the class 'LayerNrom', which this "
         "package does not have: pass it with components=(LayerNrom,), or to train.py the config file that defines it"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_sentence(run: Run, change: Any, sentence: str):
    data = to_json(run)
    change(data)
    with pytest.raises(UserError) as error:
        from_json(Run, data, components=(Run, Section))
    assert str(error.value) == sentence


@pytest.mark.parametrize("data", [None, [], "x", 3, {}])
def test_a_file_that_is_no_config(data: Any):
    with pytest.raises(UserError, match="the config"):
        from_json(Run, data, components=(Run, Section))


def test_read_json(tmp_path: Path):
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match="does not exist"):
        machinery.read_json(file)
    file.write_bytes(b'{"a": \xff')
    with pytest.raises(UserError, match="is not valid JSON"):
        machinery.read_json(file)
    file.write_text("[1, 2]")
    assert machinery.read_json(file) == [1, 2]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a folder of configs beside it, and another inside as in a wheel."""
    beside, inside = tmp_path / "configs", tmp_path / "llama_jax" / "_configs"
    for folder in (beside, inside):
        folder.mkdir(parents=True)
    (beside / "tiny_one.py").write_text('"""One."""\ndef get_config():\n    return 1\n')
    (beside / "_shared.py").write_text("")
    (inside / "tiny_two.py").write_text("def get_config():\n    return 2\n")
    monkeypatch.setattr(machinery, "__file__", str(tmp_path / "llama_jax" / "config.py"))
    return tmp_path


def test_configs_are_found_beside_the_package_and_inside(configs: Path):
    assert machinery.config_names() == ["tiny_one", "tiny_two"]
    module = load_config_module("tiny_one")
    assert isinstance(module, types.ModuleType)
    assert (module.__doc__, module.get_config()) == ("One.", 1)
    assert load_config_module("tiny_two").get_config() == 2
    assert find_config(configs / "llama_jax" / "_configs" / "tiny_two.py").name == "tiny_two.py"


def test_a_config_is_read_from_its_text(configs: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is left beside it, and a text of the same size in the same second is not taken for the one before."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = configs / "mine.py"
    for value in (1, 2):
        file.write_text(f"def get_config():\n    return {value}\n")
        os.utime(file, (1, 1))
        assert load_config_module(file).get_config() == value
    assert not list(configs.rglob("__pycache__"))


def test_a_config_that_is_not_there(configs: Path):
    with pytest.raises(UserError, match="there is no config 'tinyone': did you mean 'tiny_one'"):
        find_config("tinyone")
    with pytest.raises(UserError, match="there are tiny_one, tiny_two, or give a path"):
        find_config("zzz")
    with pytest.raises(UserError, match=r"config file 'zzz.py' does not exist"):
        find_config("zzz.py")
    (configs / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"has no function get_config\(\)"):
        load_config_module(configs / "empty.py")


def test_choices_are_complete_although_imports_are_lazy():
    """In a process that has imported one module, and another that imports it, as in one that has imported all."""
    code = """
import importlib, pkgutil, llama_jax.data.config, llama_jax
from llama_jax.config import Component, choices
found = [(base, choices(base)) for base in Component.__subclasses__()]
import llama_jax.run_config
found += [(base, choices(base)) for base in Component.__subclasses__()]
for other in pkgutil.walk_packages(llama_jax.__path__, "llama_jax."):
    importlib.import_module(other.name)
assert found and all(choices(base) == names for base, names in found)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
