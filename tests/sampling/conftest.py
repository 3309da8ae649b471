"""A small model whose every parameter is random and not small, with a tokenizer of its own."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import LanguageModel
from llama_jax.models import Compute, DecoderConfig, Model, abstract_params, from_params
from llama_jax.tokenizers import train_tokenizer

MakeModel = Callable[..., Model]


@pytest.fixture(scope="session")
def make_model(random_params: Callable) -> MakeModel:
    """A float32 model of random parameters, on a mesh if one is given."""

    def make(config: DecoderConfig, mesh: jax.sharding.Mesh | None = None) -> Model:
        # Layers that count for more than the embedding: otherwise greedy texts are one token again and again.
        params = {
            name: jnp.asarray(3 * np.asarray(v)) if name.endswith("proj.weight") else v
            for name, v in random_params(config).items()
        }
        if mesh is not None:
            with jax.set_mesh(mesh):
                params = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
        return from_params(config, params, Compute(dtype="float32"), mesh)

    return make


@pytest.fixture(scope="session")
def model(two_layers: DecoderConfig, make_model: MakeModel) -> Model:
    return make_model(two_layers)


@pytest.fixture(scope="session")
def lm(two_layers: DecoderConfig, make_model: MakeModel) -> LanguageModel:
    tokenizer = train_tokenizer(["one fish, two fish", "red fish, blue fish"] * 4, vocab_size=276)
    config = dataclasses.replace(two_layers, vocab_size=tokenizer.vocab_size, tie_embeddings=True)
    return LanguageModel(config, make_model(config), tokenizer)
