"""Encoder-decoders end to end: trained on span corruption, continued, asked; and the runs that cannot be."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import UserError, load_config_module, override
from llama_jax.data.objectives import Causal, SpanCorruption
from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import MLP, Experts, SigmoidTopK, SinusoidalPositions
from llama_jax.planning import plan
from llama_jax.run import Run, RunConfig, open_run, train
from llama_jax.sampling import generate_text
from llama_jax.zoo.t5 import t5

PROMPT = "the cat <extra_id_0> a mat"
RATE = 1e-2
# Experts in both stacks, not of as many layers, whose biases only the loads of their own stack may move.
V3 = Experts(4, 12, SigmoidTopK(2, True, 2.5, 2, 1, bias_update_rate=RATE), "relu", gated=False, load_balance_loss=1e-3)


@pytest.fixture(scope="module")
def config(run_config: RunConfig) -> RunConfig:
    """configs/t5_small.py, small enough for a test."""
    model = t5(
        vocab_size=384,
        hidden_size=32,
        num_encoder_layers=2,
        num_layers=1,
        num_heads=4,
        head_dim=8,
        feed_forward=MLP(48, "relu", bias=False, dropout=0.1),
        dropout=0.1,
        version_1_0=True,
        max_positions=64,
        num_buckets=8,
        max_distance=20,
        decoder_start_id=3,
        overrides=(LayerOverride((0,), V3),),
        encoder_overrides=(LayerOverride((0, 1), V3),),
    )
    objective = SpanCorruption(source_length=48, num_sentinels=16)
    config = load_config_module("t5_small").get_config()
    config = dataclasses.replace(
        config,
        model=model,
        tokenizer=dataclasses.replace(config.tokenizer, kind="bpe", vocab_size=380),
        data=dataclasses.replace(run_config.data, objective=objective, packing="best_fit"),
        logging=dataclasses.replace(run_config.logging, sample_prompts=(PROMPT,)),
        checkpoint=run_config.checkpoint,
        sequence_length=24,
    )
    return override(
        config,
        {
            "num_steps": 8,
            "global_batch_size": 8,
            "mesh.data": 2,
            "mesh.fsdp": 4,
            "optimizer.warmup_steps": 4,
            "optimizer.learning_rate": 1e-2,
            "compute.preflight": False,  # tests/run/test_translation.py has it
        },
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config, tmp_path_factory.mktemp("encoder_decoder") / "run")


@pytest.mark.slow
def test_it_learns_and_continues(run: Run, tmp_path: Path):
    lines = run.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    for line in lines:
        for name in ("experts_load", "encoder_experts_load"):
            assert np.sum(line[name]) == pytest.approx(1, abs=1e-5)
    shutil.copytree(run.directory, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "8")
    (tmp_path / "again" / "metrics.jsonl").unlink()
    again = train(run.config, tmp_path / "again")
    wanted = [(line["loss"], line["grad_norm"]) for line in lines[4:]]
    assert [(line["loss"], line["grad_norm"]) for line in again.metrics()] == wanted


@pytest.mark.slow
def test_each_stack_balances_its_own_experts(run: Run):
    params = run.load().model.params()
    biases = {name: np.asarray(value) for name, value in params.items() if name.endswith("choice_bias")}
    assert {name.partition(".")[0]: value.shape for name, value in biases.items()} == {
        "layers": (1, 4),
        "encoder_layers": (2, 4),
    }
    assert np.abs(biases["encoder_layers.feed_forward.router.choice_bias"]).max(1).min() > 0
    for value in biases.values():
        np.testing.assert_allclose(value / RATE, np.round(value / RATE), atol=1e-3)
    # The decoder has one layer of experts, so that what is logged is its load.
    loads = np.array([line["experts_load"] for line in run.metrics()])
    moved = RATE * np.sign(loads.mean(1, keepdims=True) - loads)
    assert moved.all()
    np.testing.assert_allclose(biases["layers.feed_forward.router.choice_bias"], [moved.sum(0)], atol=1e-6)


@pytest.mark.slow
def test_what_it_answers(run: Run):
    prompt, _, answer = (run.directory / "samples.txt").read_text().partition("\n")
    assert prompt == PROMPT
    assert answer.strip()
    asked = [PROMPT, "made such noise"]
    answers = generate_text(open_run(run.directory).load(), asked, max_new_tokens=12, temperature=2.0, seed=1)
    assert answers == generate_text(run.load(), asked, max_new_tokens=12, temperature=2.0, seed=1)
    assert all(answers)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.objective": Causal()}, "data.objective=Causal has no source for the encoder of EncoderDecoderConfig"),
        (
            {"sequence_length": 65, "model.positions": SinusoidalPositions()},
            "sequence_length=65 is longer than model.max_positions=64",
        ),
        (
            {"data.objective": SpanCorruption(source_length=65), "model.positions": SinusoidalPositions()},
            "data.objective.source_length=65 is longer than model.max_positions=64",
        ),
    ],
)
def test_impossible_runs(changes: dict, sentence: str, config: RunConfig):
    with pytest.raises(UserError, match=sentence):
        override(config, changes)


def test_source_and_target_are_as_long_as_positions_each(config: RunConfig):
    whole = {"sequence_length": 64, "data.objective": SpanCorruption(source_length=64, num_sentinels=16)}
    assert override(config, whole).row_length == 128
    # Distances alone have no end.
    longer = {"sequence_length": 65, "data.objective": SpanCorruption(source_length=600, num_sentinels=16)}
    assert override(config, longer).row_length == 665


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mesh.data": 1, "mesh.context": 2}, "mesh.context=2 cannot split the sequences of EncoderDecoderConfig"),
        (
            {"model.decoder_start_id": 2},
            "model.decoder_start_id=2 is not the token 3 that data.objective.start_token='pad' puts first",
        ),
        (
            {"model.positions": SinusoidalPositions(), "logging.sample_prompts": ("the cat " * 60,)},
            "a prompt of logging.sample_prompts has .* shorten it",
        ),
    ],
)
def test_runs_that_do_not_start(changes: dict, sentence: str, config: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match=sentence):
        train(override(config, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_it_is_not_planned(config: RunConfig):
    assert isinstance(config.model, EncoderDecoderConfig)
    with pytest.raises(UserError, match="an encoder-decoder cannot be planned"):
        plan(config, "v5e:2x4")
