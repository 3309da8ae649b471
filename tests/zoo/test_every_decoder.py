"""What every released decoder has to do beside its own formulas: train on a mesh, pack, adapt, quantize, be planned.

What is compiled for long is done with the decoders of which some choice is not in another."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from piece_matrix import cover
from zoo_table import GOLDENS, expected, model_types

import llama_jax
from llama_jax.checkpoint.loading import config_of
from llama_jax.config import override
from llama_jax.models import Compute, DecoderConfig, abstract_params, from_params, init_params
from llama_jax.nn import LoRA, parameters, rope
from llama_jax.parallel import make_mesh
from llama_jax.planning import Topology, estimate
from llama_jax.run.training import to_devices
from llama_jax.run_config import load_config
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.zoo import all_presets

ROWS, LENGTH = 8, 16
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
# One golden of each family that is a decoder.
NAMES = {
    model_type: name
    for name, model_type in sorted(model_types().items(), reverse=True)
    if isinstance(next(iter(all_presets()[model_type].presets.values())), DecoderConfig)
}
pytestmark = pytest.mark.slow


def choices(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what a config chooses, by name: types of pieces and options; of a number only whether it is 0 or 1."""
    if dataclasses.is_dataclass(value):
        yield path, type(value)
        for field in dataclasses.fields(value):
            yield from choices(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple):
        yield path, bool(value)
        for part in value:
            yield from choices(part, f"{path}[]")
    else:
        yield path, value if isinstance(value, bool | str | None) or value in (0, 1) else "number"


# Decoders that make, together, every choice that one of them makes: another compiles the same pieces again.
DIFFERENT = cover({name: set(choices(config_of(GOLDENS / golden))) for name, golden in NAMES.items()})


@functools.cache
def loaded(model_type: str) -> llama_jax.LanguageModel:
    return llama_jax.load(GOLDENS / NAMES[model_type], dtype="float32")


def packed(vocab_size: int) -> dict[str, np.ndarray]:
    """Rows of two documents each, of eight tokens."""
    ids = np.random.default_rng(0).integers(4, vocab_size, (ROWS, LENGTH + 1), dtype=np.int32)
    columns = np.arange(LENGTH) * np.ones((ROWS, 1), np.int32)
    second = columns >= LENGTH // 2
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones((ROWS, LENGTH), np.float32),
        "segment_ids": (1 + second).astype(np.int32),
        "positions": (columns % (LENGTH // 2)).astype(np.int32),
    }


@pytest.mark.parametrize("model_type", DIFFERENT)
def test_logits_in_the_form_for_tpus_are_the_same(model_type: str, monkeypatch: pytest.MonkeyPatch):
    lm = loaded(model_type)
    tokens = packed(lm.config.vocab_size)["tokens"]
    wanted = jax.jit(lambda: lm.model(tokens))()
    for module in (parameters, rope):
        monkeypatch.setattr(module, "platform", lambda: "tpu")
    jax.clear_caches()  # else what was traced for a CPU is taken
    found = jax.jit(lambda: lm.model(tokens))()
    jax.clear_caches()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(abs(wanted).max()))


def step(config: Any, params: dict[str, np.ndarray], mesh: dict[str, int]) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of a step on the mesh, and the first moments that it leaves."""
    hyper = AdamW(learning_rate=1e-2, warmup_steps=0).hyper(10)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
        on_mesh = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
        state = jax.jit(init_state)(on_mesh, hyper)
        batch = to_devices(packed(config.vocab_size), range(ROWS), ROWS)
        state, metrics = make_train_step(config, Compute(loss_chunk=4))(state, batch, hyper)
        return float(metrics["loss"]), {name: np.asarray(value) for name, value in state.opt_state[1].mu.items()}


@pytest.mark.parametrize("model_type", DIFFERENT, scope="module")
def test_a_step_of_packed_rows_on_eight_devices_is_that_of_one(model_type: str):
    lm = loaded(model_type)
    params = {name: np.asarray(value) for name, value in lm.model.params().items()}
    (loss, found), (wanted_loss, wanted) = step(lm.config, params, MESH), step(lm.config, params, {})
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6 + 1e-4 * np.abs(value).max(), err_msg=name)
        # A router's bias for the choice is no weight; what is added to all keys alike does not change who is seen.
        idle = name.endswith(("choice_bias", "k_proj.bias")) or "indexer" in name
        assert idle or np.abs(value).max() > 0, f"{name} has no gradient"


@pytest.mark.parametrize("model_type", NAMES, scope="module")
def test_a_document_of_a_packed_row_is_as_alone(model_type: str):
    batch = packed(loaded(model_type).config.vocab_size)
    half, model = LENGTH // 2, loaded(model_type).model
    whole = model(batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    for part in (slice(0, half), slice(half, None)):
        np.testing.assert_allclose(whole[:, part], model(batch["tokens"][:, part]), atol=1e-4)


@pytest.mark.parametrize("model_type", DIFFERENT, scope="module")
def test_adapters_begin_as_the_model(model_type: str):
    lm, ids = loaded(model_type), expected(NAMES[model_type])["ids"][:, :8]
    config = dataclasses.replace(lm.config, adapters=LoRA(rank=2, targets=("all-linear",)))
    params = init_params(config, 0) | dict(lm.model.params())
    adapted = from_params(config, params, Compute(dtype="float32"))
    assert len(params) > len(lm.model.params())
    np.testing.assert_allclose(adapted(ids), lm.model(ids), atol=1e-5)


@pytest.mark.parametrize("model_type", DIFFERENT, scope="module")
def test_in_eight_bits_it_is_nearly_the_same(model_type: str):
    ids = expected(NAMES[model_type])["ids"]
    quantized = llama_jax.load(GOLDENS / NAMES[model_type], dtype="float32", quantize="int8")
    found, wanted = np.asarray(quantized.model(ids)), np.asarray(loaded(model_type).model(ids))
    correlation = np.corrcoef(found.ravel(), wanted.ravel())[0, 1]
    assert 0.95 < correlation < 1.0
    tokens = llama_jax.generate(quantized.model, ids[:, :5], max_new_tokens=4)
    assert tokens.shape[1] >= 4


@pytest.mark.parametrize("model_type", NAMES, scope="module")
def test_its_presets_are_planned(model_type: str):
    for name, preset in all_presets()[model_type].presets.items():
        sizes = {"sequence_length": min(1024, preset.max_positions), "tokenizer.vocab_size": 300}
        run = dataclasses.replace(override(load_config("llama3_8b"), sizes), model=preset)
        plan = estimate(run, Topology.parse("v5p:8x8x8"))
        assert plan.step_seconds > 0, name
