"""A small model, and a server of it."""

import dataclasses
from collections.abc import Callable, Iterator

import httpx
import pytest
from serving_app import KEY, serving

from llama_jax.checkpoint import LanguageModel
from llama_jax.models import Compute, DecoderConfig, from_params
from llama_jax.serving import Service
from llama_jax.tokenizers import train_tokenizer


@pytest.fixture(scope="session")
def lm(two_layers: DecoderConfig, random_params: Callable) -> LanguageModel:
    texts, special = ["one fish, two fish", "red fish, blue fish"] * 4, ("<|im_start|>", "<|im_end|>")
    tokenizer = train_tokenizer(texts, vocab_size=278, special_tokens=special)
    config = dataclasses.replace(two_layers, vocab_size=tokenizer.vocab_size, max_positions=128, tie_embeddings=True)
    params = {name: 3 * v if name.endswith("proj.weight") else v for name, v in random_params(config).items()}
    return LanguageModel(config, from_params(config, params, Compute(dtype="float32"), None), tokenizer)


# Of the module, not of the session: other tests set the clock, by which the server's event loop wakes up.
@pytest.fixture(scope="module")
def served(lm: LanguageModel) -> Iterator[tuple[str, Service]]:
    with serving(lm, rows=4, max_queue=64) as found:
        yield found


@pytest.fixture(scope="module")
def url(served: tuple[str, Service]) -> str:
    return served[0]


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=300) as found:
        yield found
