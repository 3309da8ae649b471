"""Every component of the package can be chosen by its name alone, or an error names the value that has to be given."""

import dataclasses
from typing import Any

import pytest

from llama_jax.config import Component, UserError, choices, component_choices, leaves, override
from llama_jax.data import DataConfig
from llama_jax.models import ModelConfig, abstract_params
from llama_jax.nn import GRU, Experts, GroupedQuery, LatentAttention, LayerNorm, LearnedPositions, RelativeBias, Rope
from llama_jax.run import load_config
from llama_jax.training import Optimizer

# What no config around can tell, with a value to try.
NEEDS: dict[str, tuple[str, Any]] = {
    "Experts": ("num_experts", 4),
    "NGram": ("order", 3),
    "Classification": ("labels", ("yes", "no")),
    "EncoderDecoderConfig": ("decoder_start_id", 0),
    "LinearScaling": ("factor", 2.0),
    "NTKScaling": ("factor", 2.0),
    "YarnScaling": ("factor", 2.0),
    "Llama3Scaling": ("factor", 2.0),
}


@dataclasses.dataclass(frozen=True)
class Parts:
    """Of a run, without its checks of which objective goes with which model."""

    model: ModelConfig
    data: DataConfig
    optimizer: Optimizer


def parts(name: str) -> Parts:
    run = load_config(name, {"model.num_layers": 1})
    return Parts(run.model, run.data, run.optimizer)


CONFIGS = {name: parts(name) for name in ("tiny_python", "tiny_gru", "bert_base", "transformer_base", "mixtral_8x7b")}
EACH = {
    choice: (name, key)  # the last of the configs that has a place for it
    for name, config in CONFIGS.items()
    for key, annotation, _ in leaves(config)
    for choice in component_choices(annotation)
}


def chosen(config: Parts, key: str, choice: str, old: Any) -> Parts:
    """The config with a piece chosen by its name, and the one value that it needs if it has not replaced its like."""
    changes: dict[str, Any] = {key: choice}
    if choice in NEEDS and type(old).__name__ != choice:
        field, value = NEEDS[choice]
        if not hasattr(old, field):
            with pytest.raises(UserError) as error:
                override(config, changes)
            assert str(error.value) == f"{key}={choice} also needs {key}.{field}: give it too"
        changes[f"{key}.{field}"] = value
    if choice == "Experts" and getattr(old, "activation", None) == "gelu":
        changes[f"{key}.activation"] = "gelu_tanh"  # experts have no exact one, as the error says
    changed = override(config, changes)
    assert type({key: value for key, _, value in leaves(changed)}[key]).__name__ == choice
    return changed


@pytest.mark.parametrize("name", CONFIGS)
def test_by_its_name_alone(name: str):
    for key, annotation, old in leaves(CONFIGS[name]):
        for choice in component_choices(annotation):
            if name == "tiny_gru" and key == "model.position_bias":
                with pytest.raises(UserError, match="position_bias is for the scores of attention, and GRU has none"):
                    override(CONFIGS[name], {key: choice})
            else:
                chosen(CONFIGS[name], key, choice, old)


@pytest.mark.parametrize("choice", [choice for choice, (_, key) in EACH.items() if key.startswith("model")])
def test_the_model_can_be_built(choice: str):
    name, key = EACH[choice]
    old = {key: value for key, _, value in leaves(CONFIGS[name])}[key]
    assert abstract_params(chosen(CONFIGS[name], key, choice, old).model)


def test_all_of_the_package_are_tried():
    everything = {name for base in Component.__subclasses__() for name in choices(base)}
    assert set(EACH) == everything


def test_what_is_taken_over():
    python, bert = CONFIGS["tiny_python"], CONFIGS["bert_base"]
    attention: Any = python.model.attention
    norm: Any = python.model.norm
    assert override(python, {"model.norm": "LayerNorm"}).model.norm == LayerNorm(norm.eps, bias=False)  # as everywhere
    none = override(python, {"model.norm": None, "model.feed_forward": None})
    assert override(none, {"model.norm": "LayerNorm"}).model.norm == LayerNorm(1e-5, bias=True)
    changed = override(python, {"model.positions": "LearnedPositions", "model.max_positions": 77})
    assert changed.model.positions == LearnedPositions(77)
    assert override(python, {"model.attention": "GRU", "model.hidden_size": 48}).model.attention == GRU(48)
    for model, both in ((python, False), (bert, True)):
        bias: Any = override(model, {"model.position_bias": "RelativeBias"}).model.position_bias
        assert bias == RelativeBias(model.model.attention.num_heads, 32, 128, both)
    latent: Any = override(python, {"model.attention": "LatentAttention", "model.attention.num_heads": 2}).model
    assert (latent.attention.num_heads, latent.attention.rope) == (2, attention.rope)
    experts: Any = override(python, {"model.feed_forward": "Experts", "model.feed_forward.num_experts": 4}).model
    assert isinstance(experts.feed_forward, Experts)
    assert experts.feed_forward.intermediate_size == python.model.feed_forward.intermediate_size
    assert experts.feed_forward.gated, "as SwiGLU is, whatever fields attention has"
    back: Any = override(CONFIGS["tiny_gru"], {"model.attention": "GroupedQuery"}).model.attention
    assert isinstance(back, GroupedQuery)
    assert back.rope == Rope(theta=10000.0, scaling=None)
    assert back.num_heads * back.head_dim == CONFIGS["tiny_gru"].model.hidden_size


def test_a_class_from_outside_takes_fields_of_the_same_name():
    @dataclasses.dataclass(frozen=True)
    class Shifted(type(CONFIGS["tiny_python"].model.attention).__mro__[1]):
        """A mixer of a notebook."""

        num_heads: int
        hidden_size: int
        shift: int

    with pytest.raises(UserError, match=r"attention=Shifted also needs model.attention.shift: give it too"):
        override(CONFIGS["tiny_python"], {"model.attention": "Shifted"}, (Shifted,))
    changes = {"model.attention": "Shifted", "model.attention.shift": 2}
    python = CONFIGS["tiny_python"].model
    changed = override(CONFIGS["tiny_python"], changes, (Shifted,)).model.attention
    assert changed == Shifted(python.attention.num_heads, python.hidden_size, 2)


def test_a_class_is_chosen_as_its_name_is():
    python = CONFIGS["tiny_python"]

    @dataclasses.dataclass(frozen=True)
    class Halved(LatentAttention):
        """A piece of a notebook's cell."""

    keys = {"model.attention.num_heads": 2}
    named = override(python, {"model.attention": "LatentAttention"} | keys)
    assert override(python, {"model.attention": LatentAttention} | keys) == named
    assert isinstance(override(python, {"model.attention": Halved} | keys).model.attention, Halved)
    with pytest.raises(UserError, match="num_layers='int'"):
        override(python, {"model.num_layers": int})


def test_a_key_inside_a_piece_that_follows():
    python = CONFIGS["tiny_python"]
    experts = {"model.feed_forward": "Experts", "model.feed_forward.num_experts": 4}
    followed: Any = override(python, experts).model.feed_forward
    given: Any = override(python, experts | {"model.feed_forward.router.top_k": 3}).model.feed_forward
    assert given == dataclasses.replace(followed, router=dataclasses.replace(followed.router, top_k=3))
