"""Mixtures of experts end to end: trained, logged, continued, sampled from."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import override
from llama_jax.nn import Experts, SigmoidTopK, SoftmaxTopK
from llama_jax.run import Run, RunConfig, open_run, train
from llama_jax.sampling import generate_text

MIXTRAL = Experts(4, 24, SoftmaxTopK(2, normalize=True), "silu", gated=True, load_balance_loss=0.02, router_z_loss=1e-3)
V3 = Experts(
    8,
    12,
    SigmoidTopK(2, normalize=True, scaling=2.5, num_groups=4, top_groups=2, bias_update_rate=1e-2),
    "silu",
    gated=True,
    num_shared=1,
    capacity_factor=1.25,
    load_balance_loss=1e-3,
)
BIAS = "layers.feed_forward.router.choice_bias"


def config_with(run_config: RunConfig, **changes) -> RunConfig:
    config = dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, **changes))
    return override(
        config,
        {"num_steps": 8, "checkpoint.every_steps": 4, "mesh.fsdp": 2, "mesh.expert": 4, "logging.sample_prompts": ()},
    )


def continued(run: Run, directory: Path) -> Run:
    """The run as it was after half its steps, gone on with."""
    shutil.copytree(run.directory, directory)
    shutil.rmtree(directory / "checkpoints" / "8")
    (directory / "metrics.jsonl").unlink()
    return train(run.config, directory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "v3"])
def test_train_continue_and_sample(name: str, run_config: RunConfig, tmp_path: Path):
    layers, experts = (2, MIXTRAL) if name == "mixtral" else (1, V3)
    config = config_with(run_config, feed_forward=experts, num_layers=layers)
    run = train(config, tmp_path / "run")
    lines = run.metrics()
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    for line in lines:
        assert np.sum(line["experts_load"]) == pytest.approx(1, abs=1e-5)
        assert len(line["experts_load"]) == experts.num_experts
        least = layers * experts.load_balance_loss
        assert least * 0.9 < line["load_balance_loss"] < least * 4
    shares = [line["dropped_share"] for line in lines]
    assert (max(shares) == 0) == (name == "mixtral")
    assert all(0 <= share < 0.7 for share in shares)
    if name == "mixtral":
        assert all(line["router_z_loss"] > 0 for line in lines)
    again = continued(run, tmp_path / "again")
    for a, b in zip(again.metrics(), lines[4:], strict=True):
        assert {key: a[key] for key in ("loss", "grad_norm", "experts_load")} == {
            key: b[key] for key in ("loss", "grad_norm", "experts_load")
        }
    if name == "mixtral":
        lm = open_run(run.directory).load()
        assert all(generate_text(lm, ["the cat", "made such"], max_new_tokens=6, temperature=0.0))
    else:
        biases = [np.asarray(open_run(run.directory).load(step).model.params()[BIAS]) for step in (4, 8)]
        assert biases[0].shape == (1, 8)
        # Each of the steps has moved each bias by the rate, or left it.
        assert np.abs(biases[1]).max() > 0
        np.testing.assert_allclose(biases[1] / 1e-2, np.round(biases[1] / 1e-2), atol=1e-3)
        assert np.abs(biases[1] - biases[0]).max() <= 4.01e-2
