"""What can be asked for as variants, what they are called, and what is refused."""

import dataclasses
import re
import types
from typing import Any

import pytest

from llama_jax import UserError
from llama_jax.ablation.variants import code_digest, make_variants
from llama_jax.config import override
from llama_jax.nn import LatentAttention, LayerNorm, RMSNorm, SwiGLU
from llama_jax.run import RunConfig
from llama_jax.training import SGD

HEADS = "model.attention.num_kv_heads"


@dataclasses.dataclass(frozen=True)
class Doubled(SwiGLU):
    """A feed-forward from outside the package.

    factor: of the result.
    """

    factor: float = 2.0


def named(base: RunConfig, asked: Any) -> dict[str, RunConfig]:
    return {variant.name: variant.config for variant in make_variants(base, asked)}


def test_a_grid_is_every_combination(sweep_base: RunConfig):
    found = named(sweep_base, {HEADS: [1, 4], "optimizer.learning_rate": (1e-3, 3e-4), "optimizer.clip_norm": 2.0})
    assert list(found) == [f"num_kv_heads={h}, learning_rate={r}" for h in (1, 4) for r in ("0.001", "0.0003")]
    changes = {HEADS: 4, "optimizer.learning_rate": 3e-4, "optimizer.clip_norm": 2.0}
    assert found["num_kv_heads=4, learning_rate=0.0003"] == override(sweep_base, changes)


def test_names_are_short_and_unique(sweep_base: RunConfig):
    asked = [
        {},
        {"model.attention": "LatentAttention", "model.attention.kv_lora_rank": 8},
        {"model.attention": "LatentAttention", "model.attention.kv_lora_rank": 4},
        {"model.norm": RMSNorm(eps=1e-3)},
        LayerNorm,
        Doubled,
        SGD(learning_rate=0.1, warmup_steps=0),
        ("by name", {"seed": 0} and {"num_steps": 9}),
        override(sweep_base, {"model.hidden_size": 16, "model.num_layers": 2}),
    ]
    found = named(sweep_base, asked)
    assert list(found) == [
        "base", "LatentAttention, kv_lora_rank=8", "LatentAttention, kv_lora_rank=4", "eps=0.001", "LayerNorm",
        "Doubled", "SGD", "by name", "hidden_size=16, num_layers=2",
    ]  # fmt: skip
    assert found["base"] == sweep_base
    assert isinstance(found["LatentAttention, kv_lora_rank=4"].model.layer_pieces()[0][1], LatentAttention)


def test_a_class_takes_its_values_from_the_config_around(sweep_base: RunConfig):
    (variant,) = make_variants(sweep_base, {"mine": {"model.feed_forward": Doubled, "model.feed_forward.factor": 3.0}})
    assert variant.config.model.feed_forward == Doubled(intermediate_size=48, bias=False, factor=3.0)  # type: ignore[attr-defined]
    assert variant.components == (Doubled,)
    assert variant.changes == {"model.feed_forward": "Doubled", "model.feed_forward.factor": 3.0}


REFUSED: list[tuple[Any, str]] = [
    ({}, "variants is empty: give {key: [values...]}"),
    ("MQA", "variants='MQA' must be {key: [values...]}"),
    ({"MQA": {HEADS: 3}}, "variant 'MQA': model.attention.num_kv_heads=3 does not divide num_heads=4"),
    ({"model.attention.kv_heads": [1, 2]}, "variant 'model.attention.kv_heads=1': unknown key"),
    ({"a": {HEADS: 1}, HEADS: [2]}, f"variants has changes by the name 'a', but '{HEADS}' has 2"),
    ({"a": {HEADS: 1}, "b": {HEADS: "1"}}, "variants 'a' and 'b' have one config"),
    ([("a", {HEADS: 1}), ("a", {HEADS: 4})], "variants 1 and 2 have one name"),
    ({"seed": [1, 2]}, "variant 'seed=1' changes seed: give seeds=[...]"),
    ([3], "variant 3 is no piece of the base config: give {key: value}"),
]


@pytest.mark.parametrize(("asked", "sentence"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(sweep_base: RunConfig, asked: Any, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        make_variants(sweep_base, asked)


SOURCE = """
SCALE = 2.0
def inner(x):
    return x * SCALE
def other(x):
    return x
class Own:
    def build(self, x):
        return [inner(y) for y in x]
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("# a comment", True),
        ("def other(x):\n    return x + 1", True),
        (SOURCE, True),
        ("SCALE = 3.0", False),
        ("def inner(x):\n    return x + 1", False),
        ("class Own:\n    def build(self, x):\n        return x", False),
    ],
)
def test_code_of_a_cell(change: str, same: bool):
    module = types.ModuleType("cells")
    exec(compile(SOURCE, "<cell 1>", "exec"), module.__dict__)
    before = code_digest([module.Own])
    exec(compile("\n\n" + change, "<cell 2>", "exec"), module.__dict__)
    assert (code_digest([module.Own]) == before) == same
    assert code_digest([]) == ""
