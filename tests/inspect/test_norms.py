"""Norms and expert loads of a run are those of its metrics, its checkpoints and its model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llama_jax import UserError, inspect, override
from llama_jax.models import Compute, DecoderConfig, LayerOverride, from_params
from llama_jax.nn import Experts, SoftmaxTopK
from llama_jax.parallel import make_mesh
from llama_jax.run import Run, RunConfig, train

STEPS = 4
EXPERTS = Experts(4, 24, SoftmaxTopK(2, normalize=True), "silu", gated=True, load_balance_loss=0.02)


@pytest.fixture(scope="module")
def run(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A checkpoint of every step, and the norms of updates logged."""
    keys = {"num_steps": STEPS, "checkpoint.every_steps": 1, "checkpoint.keep_last": 20, "logging.sample_prompts": ()}
    config = override(run_config, keys | {"logging.validate_every_steps": 100})
    return train(config, tmp_path_factory.mktemp("inspect") / "run", callbacks=(inspect.log_updates(),))


def params_of(run: Run, step: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in run.load(step).model.params().items()}


def test_gradient_is_that_of_the_step(finished_run: Run):
    logged = {line["step"]: line["grad_norm"] for line in finished_run.metrics()}
    norms = inspect.gradient_norms(finished_run.load(8), finished_run.batch(8))
    assert norms.total == pytest.approx(logged[9], rel=1e-4)
    assert norms.by_layer.shape == (2,)
    assert np.sqrt((norms.by_layer**2).sum()) == pytest.approx(norms.total)


@pytest.mark.slow
def test_gradient_is_the_same_on_a_mesh(finished_run: Run):
    batch, lm = finished_run.batch(8), finished_run.load(8, mesh={"fsdp": 2, "tensor": 2, "context": 2})
    logged = {line["step"]: line["grad_norm"] for line in finished_run.metrics()}
    assert inspect.gradient_norms(lm, batch).total == pytest.approx(logged[9], rel=1e-4)


def changes(run: Run, first: int, last: int) -> dict[str, np.ndarray]:
    """The norm of the difference of two checkpoints by parameter, of a stacked one by layer."""
    before, after = params_of(run, first), params_of(run, last)
    axes = {name: tuple(range(int(name.startswith("layers.")), x.ndim)) for name, x in before.items()}
    return {name: np.sqrt(((after[name] - x) ** 2).sum(axes[name])) for name, x in before.items()}


def check_update(norms: inspect.UpdateNorms, wanted: dict[str, np.ndarray]) -> None:
    for name, change in wanted.items():
        kind = name.removeprefix("layers.")
        found = norms.update.layers[kind] if kind != name else norms.update.others[name]
        np.testing.assert_allclose(found, change, rtol=1e-4, err_msg=name)


def test_update_is_the_difference_of_two_checkpoints(finished_run: Run):
    norms = inspect.update_norms(finished_run, 8, until=12)
    check_update(norms, changes(finished_run, 8, 12))
    whole = np.linalg.norm(params_of(finished_run, 8)["norm.weight"])
    assert norms.ratio.others["norm.weight"] == pytest.approx(norms.update.others["norm.weight"] / whole, rel=1e-4)


@pytest.mark.slow
def test_update_of_a_step_taken_again_or_logged(run: Run):
    norms = inspect.update_norms(run, 2)
    assert norms.steps == (2, 3)
    check_update(norms, changes(run, 2, 3))
    history = inspect.update_history(run)
    assert history.steps.tolist() == [2, 3, 4]  # the first has nothing before it
    np.testing.assert_allclose(history.update[1], norms.update.by_layer, rtol=1e-4)
    np.testing.assert_allclose(history.parameter[1], norms.parameter.by_layer, rtol=1e-4)


def test_expert_load_over_steps(finished_run: Run, tmp_path: Path):
    lines = [{"step": i, "experts_load": [0.7, 0.1, 0.1, 0.1], "dropped_share": 0.25} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    load = inspect.expert_load(Run(tmp_path, finished_run.config))
    assert (load.axis, load.places.tolist(), load.dropped.tolist()) == ("step", [1, 2], [0.25, 0.25])
    assert load.entropy[0] == pytest.approx(scipy.stats.entropy(lines[0]["experts_load"], base=4))


def test_expert_load_of_layers(two_layers: DecoderConfig, random_params: Any):
    """Each layer's load is the share of the choices that its router makes for the tokens."""
    config = override(two_layers, {"feed_forward": EXPERTS})
    config = dataclasses.replace(config, overrides=(LayerOverride((0,), two_layers.feed_forward),))
    model = from_params(config, random_params(config), Compute(dtype="float32"))
    load = inspect.expert_load(model, np.arange(24).reshape(2, 12))
    assert load.places.tolist() == [1]  # layer 0 is dense
    assert load.load.sum() == pytest.approx(1)
    assert (load.load * 48 == np.round(load.load * 48)).all()  # of 24 tokens, each with 2 experts
    assert load.dropped.tolist() == [0]


def test_activations_are_those_of_the_layers(two_layers: DecoderConfig, random_params: Any):
    tokens = np.arange(24).reshape(2, 12)
    params = random_params(two_layers)
    model = from_params(two_layers, params, Compute(dtype="float32"))
    hidden = [np.asarray(x) for x in model.hidden_states(tokens)["layers"]]
    norms = inspect.activation_norms(model, tokens)
    np.testing.assert_allclose(norms.residual[1:], [np.sqrt((x**2).mean()) for x in hidden], rtol=1e-5)
    embedded = np.asarray(params["embedding.weight"])[tokens]
    assert norms.residual[0] == pytest.approx(np.sqrt((embedded**2).mean()), rel=1e-5)
    places = inspect.activation_norms(model, tokens, by_position=True)
    np.testing.assert_allclose(np.sqrt((places.residual**2).mean((1, 2))), norms.residual, rtol=1e-5)
    mesh = make_mesh({"fsdp": 2, "tensor": 2, "context": 2})
    on_mesh = inspect.activation_norms(
        from_params(two_layers, params, Compute(dtype="float32"), mesh), tokens, by_position=True
    )
    for name, values in places.sublayers.items():
        np.testing.assert_allclose(on_mesh.sublayers[name], values, rtol=1e-3, atol=1e-5)
    # What joins the stream is what the two sublayers give.
    assert set(places.sublayers) == {"attention", "feed_forward"}


def test_mistakes_are_sentences(finished_run: Run, tiny_config: DecoderConfig, random_params: Any, tmp_path: Path):
    model = from_params(tiny_config, random_params(tiny_config), Compute(dtype="float32"))
    for call, message in (
        (lambda: inspect.expert_load(model), "give a text for a loaded model, or a run"),
        (lambda: inspect.expert_load(model, [1, 2]), "the model has no experts"),
        (lambda: inspect.gradient_norms(model, [1]), "needs 2 tokens"),
        (lambda: inspect.gradient_norms(model, {"branch": np.zeros((1, 2))}), "pairs of answers"),
        (lambda: inspect.update_norms(finished_run, 17), "no checkpoint of step 17"),
        (
            lambda: inspect.update_history(Run(tmp_path, finished_run.config)),
            "has no update_norm: train with callbacks=",
        ),
        (lambda: inspect.expert_load(finished_run), "has no experts_load among its metrics"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    assert jnp.isfinite(inspect.gradient_norms(model, [1, 2, 3]).total)
