"""Attention maps: those of transformers, of what `attend` computed, on every mesh, for every family or refused."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import UserError, override
from llama_jax.inspect import attention_maps
from llama_jax.inspect.recorded import Inputs, Pass
from llama_jax.models import Compute, DecoderConfig, LayerOverride, Model, abstract_params, assemble, from_params
from llama_jax.nn import Mixer, MixerModule, attention_weights
from llama_jax.run import load_config
from llama_jax.zoo.gpt2 import gpt3

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "parity" / "goldens"
EXPECTED = dict(np.load(HERE / "attentions.npz"))
IDS = EXPECTED.pop("ids")
TEXT = np.array([[5, 9, 3, 9, 5, 7, 8, 2, 1, 6, 6, 4]])


def golden_maps(name: str, mesh: dict[str, int] | None = None) -> Any:
    folder, _, kind = name.partition("_v1_1_")
    lm = llama_jax.load(GOLDENS / (f"{folder}_v1_1" if kind else name), mesh=mesh, dtype="float32")
    if kind:
        return attention_maps(lm, {"source": IDS[:, :10], "target": IDS[:, 10:17]}, kind=kind)
    return attention_maps(lm, IDS[:, : EXPECTED[name].shape[3]])


@pytest.mark.quick("llama_gqa")
@pytest.mark.parametrize("name", EXPECTED)
def test_are_those_of_transformers(name: str):
    maps = golden_maps(name)
    assert maps.layers == tuple(range(len(EXPECTED[name])))
    np.testing.assert_allclose(maps.weights, EXPECTED[name], atol=2e-6)
    np.testing.assert_allclose(maps.weights.sum(-1), 1, atol=1e-5)
    if name not in ("bert_mlm", "t5_v1_1_cross", "t5_v1_1_encoder"):
        assert (np.triu(maps.weights, 1) == 0).all()


@pytest.mark.parametrize("name", ["llama_gqa", pytest.param("deepseek_v32", marks=pytest.mark.slow)])
def test_are_the_same_on_a_mesh(name: str):
    maps = golden_maps(name, {"fsdp": 4, "tensor": 2} if name == "llama_gqa" else {"context": 2, "tensor": 4})
    np.testing.assert_allclose(maps.weights, EXPECTED[name], atol=2e-6)


def _read_values(of: Pass) -> list[tuple[jax.Array, jax.Array]]:
    """Return for each layer what its weights read of its values, and what its attention returned."""
    found = []
    for i, layer in enumerate(of.layers):
        (call,) = layer.calls["attention"]
        v = jnp.repeat(call.v, call.q.shape[2] // call.v.shape[1], axis=1)
        y = jnp.einsum("bnts,bnsv->btnv", attention_weights(call), v)
        found.append((of.module.layers[i].attention.o_proj(y), layer.results["attention"]))
    return found


@pytest.mark.parametrize(
    "keys",
    [
        {"attention.window": 3, "attention.softcap": 2.0, "attention.scale": 0.7},
        {"attention.rope": None, "position_bias": "Alibi"},
    ],
    ids=["window, soft cap and scale", "ALiBi"],
)
def test_are_what_attention_reads_with(keys: dict[str, Any], two_layers: DecoderConfig, random_params: Any):
    """Weights times values is the result of the model's own attention, whatever is in the scores."""
    config = override(two_layers, keys)
    model = from_params(config, random_params(config), Compute(dtype="float32"))
    for ours, result in Inputs.of(model, TEXT).look(_read_values):
        np.testing.assert_allclose(ours, result, atol=1e-4, rtol=1e-4)
    if "attention.window" in keys:
        assert (np.tril(attention_maps(model, TEXT).weights, -3) == 0).all()


def test_scanned_or_recomputed_layers_give_the_same(two_layers: DecoderConfig, random_params: Any):
    params = random_params(two_layers)
    plain = attention_maps(from_params(two_layers, params, Compute(dtype="float32")), TEXT)
    other = Model(assemble(two_layers, params, Compute(dtype="float32", remat="full"), scan=True))
    np.testing.assert_allclose(attention_maps(other, TEXT).weights, plain.weights, atol=1e-6)
    last = attention_maps(other, TEXT[0].tolist(), layers=-1)
    assert last.layers == (1,)
    np.testing.assert_allclose(last.weights[0], plain.weights[1], atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Mean(Mixer):
    """A mixer of a notebook's cell without `attend`."""

    def build(self, width: int, *, rngs: Any) -> MixerModule:
        return MeanModule()


class MeanModule(MixerModule):
    def __call__(self, x: jax.Array, *, positions: Any, ctx: Any, cache: Any = None) -> Any:
        return jnp.cumsum(x, axis=1), cache


def empty(config: DecoderConfig) -> Model:
    """A model of zeros, which takes no time to make."""
    params = {name: jnp.zeros(a.shape, a.dtype) for name, a in abstract_params(config).items()}
    return from_params(config, params, Compute(dtype="float32"))


@pytest.mark.parametrize(
    "name", ["tiny_lstm", *(pytest.param(f"tiny_{kind}", marks=pytest.mark.slow) for kind in ("ngram", "rnn", "gru"))]
)
def test_recurrent_layers_have_none(name: str):
    size = {"attention.hidden_size": 16} if name == "tiny_ngram" else {"attention.state_size": 16}
    config = override(load_config(name).model, size | {"vocab_size": 40, "hidden_size": 16})
    kind = type(config.attention).__name__
    with pytest.raises(UserError, match=f"layer 0 has no attention weights: {kind} does not call"):
        attention_maps(empty(config), TEXT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm2", "gpt3"])
def test_other_families_see_what_they_may(name: str):
    """Rows of weights that sum to 1 and see nothing later; every second layer of GPT-3 sees a few keys only."""
    if name == "gpt3":
        model = empty(gpt3(2, 32, 8, window=4, max_positions=64, vocab_size=40))  # equal weights
    else:
        model = llama_jax.load(GOLDENS / name, dtype="float32").model
    weights = attention_maps(model, TEXT).weights
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert (np.triu(weights, 1) == 0).all()
    if name == "gpt3":
        assert [bool(np.tril(layer, -4).any()) for layer in weights] == [True, False]


def test_says_where_there_are_none(two_layers: DecoderConfig):
    mixed = LayerOverride((0,), Mean())
    model = empty(dataclasses.replace(two_layers, overrides=(mixed,)))
    assert attention_maps(model, TEXT).layers == (1,)  # those that have some
    with pytest.raises(UserError, match="layer 0 has no attention weights: Mean"):
        attention_maps(model, TEXT, layers=[0, 1])
    for arguments, message in (
        ({"layers": 2}, "layers=2 must be numbers from 0 to 1"),
        ({"kind": "cross"}, "kind='cross' is for encoder-decoders"),
    ):
        with pytest.raises(UserError, match=message):
            attention_maps(model, TEXT, **arguments)
    with pytest.raises(UserError, match="needs a tokenizer"):
        attention_maps(model, "a text")
    with pytest.raises(UserError, match="outside the model's vocabulary"):
        attention_maps(model, [99])
