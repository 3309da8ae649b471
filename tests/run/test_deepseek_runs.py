"""DeepSeek's families train on their own objectives: a batch by heart, a run that is sampled from and continued."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import llama_jax
from llama_jax import zoo
from llama_jax.config import load_config_module
from llama_jax.models import Compute, DecoderConfig, buffers, initialize
from llama_jax.run import Run, RunConfig, train
from llama_jax.training import AdamW, init_state, make_train_step

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens"
# What a run logs of each beside the loss.
METRICS = {
    "deepseek_v2": {"load_balance_loss"},
    "deepseek_v3": {"load_balance_loss", "mtp_1_loss"},
    "deepseek_v32": {"load_balance_loss", "mtp_1_loss", "indexer_loss"},
}
# V3.2 has all that the others have but their attention, which has tests of its own.
QUICKLY = [pytest.param(name, marks=() if name == "deepseek_v32" else pytest.mark.slow) for name in METRICS]


def model_of(name: str, **changes: Any) -> DecoderConfig:
    """The family's golden, which is tiny, in two layers, with everything that its training has."""
    data = json.loads((GOLDENS / name / "config.json").read_text()) | {"num_hidden_layers": 2}
    if name != "deepseek_v2":
        data["num_nextn_predict_layers"] = 1
    config = zoo.family(name).from_hf(data)
    if name == "deepseek_v32":
        attention = dataclasses.replace(config.attention, index_loss_weight=1.0)
        config = dataclasses.replace(config, attention=attention)
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("name", QUICKLY)
def test_it_learns_a_batch_by_heart(name: str):
    config = model_of(name)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(4, 17)).astype(np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((4, 16), np.float32),
        "segment_ids": np.ones((4, 16), np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16)),
    }
    batch = {key: jnp.asarray(value) for key, value in batch.items()}
    hyper = AdamW(learning_rate=1e-2, warmup_steps=5).hyper(60)
    state = init_state(initialize(config, 0), hyper, frozenset(buffers(config)))
    step = make_train_step(config, Compute(dtype="float32"))
    history = []
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        history.append({key: np.asarray(value) for key, value in metrics.items()})
    first, last = history[0], history[-1]
    assert set(first) >= METRICS[name] | {"experts_load", "dropped_share"}
    assert first["loss"] == pytest.approx(np.log(config.vocab_size), abs=0.3)
    assert last["loss"] < 0.1
    if "mtp_1_loss" in METRICS[name]:
        assert last["mtp_1_loss"] < 0.3
    if "indexer_loss" in METRICS[name]:
        assert 0 < last["indexer_loss"] < first["indexer_loss"] * 2
    assert last["experts_load"].sum() == pytest.approx(1)
    assert last["dropped_share"] == 0


@pytest.mark.slow
def test_a_run_is_sampled_from_and_continued(run_config: RunConfig, tmp_path: Path):
    model = model_of("deepseek_v32", vocab_size=run_config.model.vocab_size)
    config = dataclasses.replace(
        run_config,
        model=model,
        num_steps=4,
        checkpoint=dataclasses.replace(run_config.checkpoint, every_steps=2),
        logging=dataclasses.replace(run_config.logging, validate_every_steps=4),
    )
    whole = train(config, tmp_path / "whole")
    lines = [line for line in whole.metrics() if "loss" in line]
    assert len(lines) == 4
    assert METRICS["deepseek_v32"] <= set(lines[-1])
    assert "the cat" in (tmp_path / "whole" / "samples.txt").read_text()
    stopped = tmp_path / "stopped"
    (stopped / "checkpoints").mkdir(parents=True)
    for file in ("config.json", "data.json"):
        (stopped / file).write_text((tmp_path / "whole" / file).read_text())
    for folder in ("tokenizer", "checkpoints/2"):
        (stopped / folder).symlink_to(tmp_path / "whole" / folder)
    train(config, stopped)
    again = [line for line in Run(stopped, config).metrics() if "loss" in line]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines[2:]]
    # Biases that no gradient trains are in the checkpoint too.
    ours, theirs = (llama_jax.load(folder).model.params() for folder in (tmp_path / "whole", stopped))
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
        assert not key.endswith("choice_bias") or jnp.abs(value).max() > 0


def test_the_config_of_v2_lite_is_the_recipe_of_its_paper():
    config = load_config_module("deepseek_v2_lite").get_config()
    assert llama_jax.num_parameters(config.model) == 15_706_484_224
    tokens = config.num_steps * config.global_batch_size * config.sequence_length
    assert tokens == pytest.approx(5.7e12, rel=1e-5)
    doc = load_config_module("deepseek_v2_lite").__doc__ or ""
    flops = llama_jax.training.train_flops_per_token(config.model, config.sequence_length) * tokens
    assert f"{config.num_steps:,} steps, {flops:.2e}".replace("e+", "e") in doc.replace("\n", " ")
