"""Variants of equal size: within 1 % in every quantity and family, with few counts; and what cannot be."""

import dataclasses
import re

import pytest

import llama_jax
from llama_jax import UserError
from llama_jax.ablation import matching
from llama_jax.ablation.matching import QUANTITIES, asked_match, matched
from llama_jax.ablation.variants import make_variants
from llama_jax.config import override
from llama_jax.run import RunConfig

HEADS = "model.attention.num_kv_heads"


@pytest.fixture(scope="module")
def wide(sweep_base: RunConfig) -> RunConfig:
    """A model whose widths can be adjusted finely enough; nothing of it is allocated."""
    sizes = {"model.hidden_size": 128, "model.num_layers": 4, "model.attention.head_dim": 32}
    return override(sweep_base, {**sizes, "model.feed_forward.intermediate_size": 344})


@pytest.mark.quick("1-parameters", "4-flops", "MLP-parameters", "LatentAttention-flops", "3-parameters", "LSTM-flops")
@pytest.mark.parametrize("quantity", ["parameters", "flops"])
@pytest.mark.parametrize(
    "changes",
    [
        {HEADS: 1},
        {HEADS: 4},
        {"model.feed_forward": "MLP"},
        {"model.attention": "LatentAttention"},
        {"model.num_layers": 3},
        {"model.attention": "LSTM"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_within_one_percent_in_few_counts(
    wide: RunConfig, changes: dict[str, object], quantity: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[RunConfig] = []
    real = QUANTITIES[quantity]
    monkeypatch.setitem(QUANTITIES, quantity, lambda config: calls.append(config) or real(config))
    (variant,) = make_variants(wide, {"other": changes})
    target = real(wide)
    assert target is not None
    found, fit = matched(variant, target, quantity, None)
    got = real(found.config)
    assert fit["got"] == got == pytest.approx(target, rel=0.01)
    assert fit["key"] == "model.feed_forward.intermediate_size"
    assert override(variant.config, {fit["key"]: fit["value"]}) == found.config
    for other in (fit["value"] - 1, fit["value"] + 1):  # none is nearer
        assert abs((real(override(variant.config, {fit["key"]: other})) or 0) - target) >= abs(fit["got"] - target)
    assert len(calls) <= 12


def test_experts_and_cache_bytes(wide: RunConfig):
    experts = {"model.feed_forward": "Experts", "model.feed_forward.num_experts": 4}
    (variant,) = make_variants(wide, {"experts": {**experts, "model.feed_forward.router": "SwitchRouter"}})
    _, fit = matched(variant, llama_jax.num_parameters(wide.model), "parameters", None)
    assert fit["got"] == pytest.approx(fit["target"], rel=0.01)
    (variant,) = make_variants(wide, {"MHA": {HEADS: 4}})
    found, fit = matched(variant, QUANTITIES["cache_bytes"](wide) or 0, "cache_bytes", None)
    assert (fit["key"], fit["value"], fit["got"]) == ("model.attention.head_dim", 16, fit["target"])
    assert llama_jax.models.cache_bytes(found.config.model, 64) == llama_jax.models.cache_bytes(wide.model, 64)


def test_what_cannot_be_matched(wide: RunConfig):
    (variant,) = make_variants(wide, {"deep": {"model.num_layers": 40}})
    with pytest.raises(UserError, match=r"variant 'deep' cannot have .* parameters within 1 %: the nearest is .* at "):
        matched(variant, llama_jax.num_parameters(wide.model), "parameters", None)
    with pytest.raises(UserError, match=r"has no whole number 'model\.width': give match="):
        matched(variant, 1e6, "parameters", "model.width")
    (variant,) = make_variants(wide, {"wide": {"model.feed_forward.intermediate_size": 99}})
    with pytest.raises(UserError, match=r"changes model\.feed_forward\.intermediate_size, which match='flops' adjusts"):
        matched(variant, 1e6, "flops", None)
    for wrong in ("size", {"size": "a", "b": "c"}, 3):
        with pytest.raises(UserError, match=re.escape("must be one of parameters, flops, cache_bytes")):
            asked_match(wrong)
    assert asked_match({"flops": "model.hidden_size"}) == asked_match(("flops", "model.hidden_size"))


def test_only_some_widths_are_allowed():
    """Such as even ones: the nearest of them is found."""
    for target in range(1, 90):
        found = matching._nearest(lambda value: None if value % 4 else float(value), 40, float(target))
        assert abs(found[1] - target) == min(abs(value - target) for value in range(4, 200, 4))


def test_the_baseline_is_what_it_was(wide: RunConfig):
    (variant,) = make_variants(wide, {"rate": {"optimizer.learning_rate": 1e-3}})
    found, fit = matched(variant, llama_jax.num_parameters(wide.model), "parameters", None)
    assert found == dataclasses.replace(variant)
    assert fit["value"] == 344
