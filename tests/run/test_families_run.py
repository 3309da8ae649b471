"""The contract of decoder families: a run of each is logged, sampled from and continued with the same bits, and its
model learns one batch by heart. Quickly of a few; encoders, encoder-decoders and Mixtral have files of their own."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import zoo
from llama_jax.config import override
from llama_jax.data.objectives import BlankFilling, Causal, Document, Vocabulary
from llama_jax.data.rows.packing import pack
from llama_jax.models import Compute, DecoderConfig, buffers, initialize
from llama_jax.nn import RMSNorm
from llama_jax.run import RunConfig, load_config, train
from llama_jax.training import AdamW, init_state, make_train_step
from llama_jax.zoo.glm import glm
from llama_jax.zoo.gpt2 import gpt, gpt3

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens"
VOCAB = 304
WIDTH = 48
# What a run logs of each in addition to the loss.
DEEPSEEK = {
    "deepseek_v2": {"load_balance_loss"},
    "deepseek_v3": {"load_balance_loss", "mtp_1_loss"},
    "deepseek_v32": {"load_balance_loss", "mtp_1_loss", "indexer_loss"},
}
BASELINES = ("tiny_ngram", "tiny_rnn", "tiny_lstm", "tiny_gru")
GPTS = ("gpt2", "gpt3_125m", "chatglm2_6b")
NAMES = (*DEEPSEEK, *BASELINES, *GPTS)
# All that a run saves of these, and more, is in another: DeepSeek-V3.2 is V3 with an indexer, an LSTM has two states.
CONTAINED = {"deepseek_v3", "tiny_rnn", "tiny_gru"}


def model_of(name: str) -> DecoderConfig:
    """A model of the family, tiny: two layers, with everything that its training has, and no dropout but GPT-2's."""
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "vocab_size": VOCAB, "max_positions": 64}
    if name == "gpt2":
        return gpt(num_heads=4, dropout=0.1, attention_dropout=0.1, **sizes)
    if name == "gpt3_125m":
        return gpt3(2, 32, 8, window=4, max_positions=64, vocab_size=VOCAB)
    if name == "chatglm2_6b":
        norm = RMSNorm(eps=1e-5, cast_last=True)
        return glm(num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48, norm=norm, **sizes)
    if name in BASELINES:
        state = {"attention.hidden_size": 40} if name == "tiny_ngram" else {"attention.state_size": WIDTH}
        return override(
            load_config(name).model, state | {"vocab_size": VOCAB, "hidden_size": WIDTH, "max_positions": 64}
        )
    data = json.loads((GOLDENS / name / "config.json").read_text()) | {"num_hidden_layers": 2, "vocab_size": VOCAB}
    if name != "deepseek_v2":
        data["num_nextn_predict_layers"] = 1
    config = zoo.family(name).from_hf(data)
    return override(config, {"attention.index_loss_weight": 1.0} if name == "deepseek_v32" else {})


def run_of(name: str, run_config: RunConfig) -> RunConfig:
    """Four steps with the family's own recipe where there is one, and a checkpoint after two."""
    config = run_config
    if name not in DEEPSEEK:
        config = load_config(name)
        data = dataclasses.replace(run_config.data, objective=config.data.objective, packing=config.data.packing)
        tokenizer = dataclasses.replace(config.tokenizer, vocab_size=300)
        config = dataclasses.replace(config, data=data, tokenizer=tokenizer, sequence_length=32, global_batch_size=8)
    config = dataclasses.replace(config, model=model_of(name), num_steps=4)
    steps = {"checkpoint.every_steps": 2, "optimizer.warmup_steps": 1, "logging.every_steps": 1}
    steps |= {"logging.validate_every_steps": 4, "logging.sample_prompts": ("the cat",), "compute.preflight": True}
    return override(config, steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in CONTAINED])
def test_trains_samples_and_continues(name: str, run_config: RunConfig, tmp_path: Path):
    """Two steps after those of a checkpoint are those of the run that was never stopped."""
    config = run_of(name, run_config)
    whole = train(config, tmp_path / "run")
    assert (tmp_path / "run" / "samples.txt").read_text().startswith("the cat")
    assert ("prefix" in whole.batch(0)) == (name == "chatglm2_6b")
    lines, params = [line for line in whole.metrics() if "loss" in line], whole.load().model.params()
    assert len(lines) == 4
    assert DEEPSEEK.get(name, set()) <= set(lines[-1])
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    again = train(config, tmp_path / "run")
    assert [line["loss"] for line in again.metrics() if "loss" in line] == [line["loss"] for line in lines[2:]]
    # Biases that no gradient trains are in the checkpoint too.
    for key, value in again.load().model.params().items():
        np.testing.assert_array_equal(value, params[key], err_msg=key)
        assert not key.endswith("choice_bias") or jnp.abs(value).max() > 0


def batch_of(name: str) -> dict[str, np.ndarray]:
    """Eight rows of two documents each, as the family's objective has them."""
    rng = np.random.default_rng(0)
    vocabulary = Vocabulary(VOCAB, 1, 2, None, special={"[MASK]": 3, "<sop>": 4, "<eop>": 5}, start_ids=(1,))
    objective = BlankFilling(two_dimensional=False) if name == "chatglm2_6b" else Causal()
    texts = [[rng.integers(6, VOCAB, size=n) for n in (9, 14)] for _ in range(8)]
    rows = [pack([objective.example(Document(text), rng, vocabulary) for text in row], 40, None) for row in texts]
    batch = {field: np.stack([row[field] for row in rows]) for field in rows[0]}
    if name != "chatglm2_6b":
        # Nothing says which documents these are until the first tokens have been read: more than a 4-gram reads.
        batch["weights"] = batch["weights"] * (batch["positions"] >= 4)
    return batch


@pytest.mark.quick("tiny_ngram")
@pytest.mark.parametrize("name", NAMES)
def test_learns_one_batch_by_heart(name: str):
    dropout = {"dropout": 0.0, "attention.dropout": 0.0} if name == "gpt2" else {}
    config, batch = override(model_of(name), dropout), batch_of(name)
    rate = 4e-2 if name in BASELINES else 2e-2 if name in GPTS else 1e-2
    hyper = AdamW(learning_rate=rate, warmup_steps=5, weight_decay=0.0).hyper(60)
    step = make_train_step(config, Compute(dtype="float32"))
    state = jax.jit(init_state, static_argnums=2)(initialize(config, 0), hyper, frozenset(buffers(config)))
    history = []
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        history.append({key: np.asarray(value) for key, value in metrics.items()})
    first, last = history[0], history[-1]
    assert first["loss"] == pytest.approx(np.log(VOCAB), rel=0.15)
    assert last["loss"] < 0.1, [float(line["loss"]) for line in history[::10]]
    for key in DEEPSEEK.get(name, set()) - {"load_balance_loss"}:
        assert 0 < last[key] < (0.3 if key == "mtp_1_loss" else 2 * first[key]), key
    if name in DEEPSEEK:
        assert set(first) >= DEEPSEEK[name]
        assert last["experts_load"].sum() == pytest.approx(1)
        assert last["dropped_share"] == 0
