"""An imported `router_aux_loss_coef` gives the routers the gradient that transformers gives them.

The golden is of `golden_makers/balance.py`: rows with padding, the balance loss alone.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo_table import GOLDENS

from llama_jax import zoo
from llama_jax.checkpoint import load_params, open_source
from llama_jax.config import field_docs, override
from llama_jax.models import Compute, abstract_params
from llama_jax.nn import Experts
from llama_jax.parallel import make_mesh
from llama_jax.run.training import to_devices
from llama_jax.training import AdamW, gradient, init_state, make_train_step

ROUTER = "layers.feed_forward.router.weight"


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDENS / "balance.npz") as arrays:
        return dict(arrays)


NAMES = sorted(name for name in golden() if name not in ("ids", "mask") and not name.endswith("_loss"))
HYPER = AdamW(learning_rate=0.01, warmup_steps=1, weight_decay=0.0, z_loss=0.0).hyper(2)


def batch() -> dict[str, np.ndarray]:
    """Without a target, so that nothing is left of the loss but what layers add to it."""
    ids, mask = golden()["ids"], golden()["mask"]
    empty = np.zeros(ids.shape, np.float32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    return {"tokens": ids, "targets": ids, "weights": empty, "segment_ids": mask, "positions": positions}


def on(mesh: dict[str, int], compute: Compute, name: str) -> jax.Array:
    """The routers' gradient [L, D, E]."""
    source = open_source(GOLDENS / name)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh else 1])):
        params = load_params(source, abstract_params(source.config))
        rows = to_devices(batch(), range(4), 4)
        found = jax.jit(lambda params, rows: gradient(params, rows, source.config, compute, HYPER))(params, rows)
        return np.asarray(found[ROUTER])


def assert_theirs(found: np.ndarray, name: str) -> None:
    expected = golden()[name].swapaxes(1, 2)
    assert len(expected) >= 2, "of one layer a sum would be the mean"
    scale = np.abs(expected).max((1, 2), keepdims=True)
    assert (scale > 1e-6).all()
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_imported_coefficient_gives_transformers_gradient(name: str):
    assert_theirs(on({}, Compute(), name), name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "compute"),
    [
        ({"data": 2, "expert": 2, "context": 2}, Compute()),
        ({"fsdp": 4, "tensor": 2}, Compute(remat="full")),
        ({}, Compute(scan_layers=False, remat="dots")),
    ],
    ids=["batch and sequence", "remat", "unrolled"],
)
def test_on_meshes_and_however_layers_are_computed(mesh: dict[str, int], compute: Compute):
    assert_theirs(on(mesh, compute, "mixtral"), "mixtral")


@pytest.mark.slow
def test_accumulation_takes_the_loss_of_each_part():
    """And their mean, as is said in the help: no sum over layers of a part is the whole's."""
    source = open_source(GOLDENS / "mixtral")
    params = load_params(source, abstract_params(source.config))

    def loss(rows: dict[str, np.ndarray], parts: int = 1) -> float:
        step = make_train_step(source.config, Compute(), accumulation_steps=parts)
        state = jax.jit(init_state)(jax.tree.map(jnp.array, params), HYPER)
        return float(step(state, jax.tree.map(jnp.asarray, rows), HYPER)[1]["load_balance_loss"])

    whole = batch()
    each = [loss({name: x[part::2] for name, x in whole.items()}) for part in range(2)]
    assert loss(whole) == pytest.approx(golden()["mixtral_loss"], rel=1e-5)
    assert loss(whole, parts=2) == pytest.approx(np.mean(each), rel=1e-5)
    assert loss(whole) != pytest.approx(np.mean(each), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_exported_coefficient_is_the_imported_one(name: str):
    """Also of a run that balanced otherwise, which config.json cannot say."""
    data = json.loads((GOLDENS / name / "config.json").read_text()) | {"router_aux_loss_coef": 0.375}
    family = zoo.family(data["model_type"])
    config: Any = family.from_hf(data)
    assert (config.feed_forward.load_balance_loss, config.feed_forward.balance_over) == (0.375, "layers")
    for over in ("layers", "row"):
        experts = dataclasses.replace(config.feed_forward, balance_over=over)
        written = family.to_hf(dataclasses.replace(config, feed_forward=experts))
        assert written["router_aux_loss_coef"] == 0.375
        assert family.from_hf(written) == config


@pytest.mark.parametrize(("seq_aux", "over"), [(True, "row"), (False, "batch")])
def test_deepseeks_loss_of_sequences_or_of_the_batch(seq_aux: bool, over: str):
    for name in ("deepseek_v2", "deepseek_v3"):
        family, data = zoo.family(name), json.loads((GOLDENS / name / "config.json").read_text())
        config = family.from_hf(data | {"seq_aux": seq_aux})
        assert config.feed_forward.balance_over == over
        assert family.to_hf(config)["seq_aux"] is seq_aux
        assert family.from_hf(family.to_hf(config)) == config
        joint = override(config, {"feed_forward.balance_over": "layers"})
        assert family.to_hf(joint)["seq_aux"] is False


def test_switch_transformers_are_balanced_over_the_batch():
    family, data = (
        zoo.family("switch_transformers"),
        json.loads((GOLDENS / "switch_transformers" / "config.json").read_text()),
    )
    config = family.from_hf(data)
    pieces = [override.piece for override in (*config.encoder_overrides, *config.overrides)]
    assert {(piece.balance_over, piece.load_balance_loss) for piece in pieces} == {("batch", 0.001)}
    [own] = config.overrides
    by_row = dataclasses.replace(own, piece=dataclasses.replace(own.piece, balance_over="row"))
    assert family.to_hf(dataclasses.replace(config, overrides=(by_row,))) == family.to_hf(config)


def test_the_help_says_what_is_computed():
    docs = field_docs(Experts)
    assert "added up" in docs["load_balance_loss"]
    for word in ("row:", "batch:", "layers:", "mean", "accumulated", "DeepSeek", "GShard", "Switch", "transformers"):
        assert word in docs["balance_over"], word
