"""Training of every kind of model against torch: losses, gradients and parameters of forty steps.

Rows are packed, the two parts of a step have different numbers of targets. The goldens are from `make_goldens.py`
beside this file, the cases are in `trajectory_cases.py`.
"""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
import trajectory_cases as cases
from zoo_table import GOLDENS

from llama_jax.checkpoint import load_params, open_source
from llama_jax.checkpoint.exporting import _tensors, family_of
from llama_jax.models import Compute, abstract_params, frozen
from llama_jax.parallel import make_mesh
from llama_jax.training import AdamW, init_state, make_train_step

# Against float64; torch's own float32 is up to 4e-7 of the losses off. The changes are root mean squares of about 2e-2.
LOSSES, GRADIENTS, CHANGES = 1e-6, 2e-5, 3e-6
# No loss depends on the biases of keys: their gradient is rounding, which AdamW makes larger.
KEY_BIAS, OF_KEY_BIAS = re.compile(r".*(c_attn|query_key_value|key)\.bias"), 3e-5
EACH = [pytest.param(name, marks=() if name == "llama" else pytest.mark.slow) for name in cases.CASES]

type Tensors = dict[str, np.ndarray]


def plain(piece: Any) -> Any:
    """A config without dropout and without losses of layers, which the other side has not."""
    if isinstance(piece, tuple):
        return tuple(plain(x) for x in piece)
    if not dataclasses.is_dataclass(piece):
        return piece
    off = {"dropout", "final_dropout", "load_balance_loss"}
    values = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)}
    return dataclasses.replace(piece, **{key: 0.0 if key in off else plain(x) for key, x in values.items()})


def tensors(config: Any, params: dict[str, Any], model_type: str) -> Tensors:
    """Parameters under the names of the family's files."""
    family, _ = family_of(config, model_type)
    found = _tensors(config, params, family.names_of(config).weights)
    return {key: tensor.read().astype(np.float64) for key, tensor in found.items()}


def train(name: str) -> tuple[np.ndarray, np.ndarray, Tensors]:
    """The losses, the norms of the gradients, and the change of every tensor."""
    case, source = cases.CASES[name], open_source(GOLDENS / cases.CASES[name].golden)
    config, hyper = plain(source.config), AdamW(**case.optimizer).hyper(cases.STEPS)
    with jax.set_mesh(make_mesh({}, jax.devices()[:1])):
        params = load_params(source, abstract_params(config))
        start = tensors(config, params, source.model_type)
        step = make_train_step(config, Compute(dtype="float32", loss_chunk=10), accumulation_steps=cases.PARTS)
        state, found = init_state(params, hyper, frozen(config)), []
        for batch in cases.batches(name):
            state, metrics = step(state, batch, hyper)
            found.append((metrics["loss"], metrics["grad_norm"]))
        losses, norms = np.array(found, np.float64).T
        end = tensors(config, state.params | state.buffers, source.model_type)
    return losses, norms, {key: end[key] - x for key, x in start.items()}


@pytest.mark.parametrize("name", EACH)
def test_forty_steps(name: str):
    with np.load(GOLDENS / f"trajectory_{name}.npz") as golden:
        expected = dict(golden)
    losses, norms, changes = train(name)
    assert expected["losses"][0] - expected["losses"][-1] > 0.5, "it has to learn something"
    np.testing.assert_allclose(expected["losses_float32"], expected["losses"], rtol=LOSSES, err_msg="torch's own")
    np.testing.assert_allclose(losses, expected["losses"], rtol=LOSSES)
    np.testing.assert_allclose(norms, expected["grad_norms"], rtol=GRADIENTS)
    assert sorted(changes) == expected["tensors"].tolist()
    for key, distance, projection in zip(
        *(expected[of] for of in ("tensors", "distances", "projections")), strict=True
    ):
        change = changes[key]
        limit = (OF_KEY_BIAS if KEY_BIAS.fullmatch(key) else CHANGES) * change.size**0.5
        assert abs(np.linalg.norm(change) - distance) < limit, key
        assert abs((cases.direction(key, change.shape) * change).sum() - projection) < limit, key
