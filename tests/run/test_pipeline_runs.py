"""Runs on a mesh with a pipeline: the losses of one device, checkpoints that any mesh continues, samples."""

from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import UserError, override
from llama_jax.run import RunConfig, open_run, train

pytestmark = pytest.mark.slow

PIPELINE = {"mesh.pipeline": 2, "mesh.data": 2, "mesh.fsdp": 2}


def losses(directory: Path, name: str = "loss") -> list[float]:
    return [row[name] for row in open_run(directory).metrics() if name in row]


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_a_pipeline_run_is_that_of_another_mesh(optimizer: str, run_config: RunConfig, tmp_path: Path):
    changes = {"model.num_layers": 4, "num_steps": 8, "optimizer": optimizer, "global_batch_size": 16}
    config = override(run_config, changes | {"logging.sample_every_steps": 4})
    other = train(config, tmp_path / "other", quiet=True)
    piped = override(config, PIPELINE | {"compute.pipeline_repeats": 2, "compute.preflight": True})
    run = train(piped, tmp_path / "piped", quiet=True)
    for name in ("loss", "val_loss", "grad_norm"):
        np.testing.assert_allclose(losses(run.directory, name), losses(other.directory, name), rtol=2e-4)
    for step in (4, 8):
        one, same = (found.load(step).model.params() for found in (run, other))
        for key, value in same.items():
            np.testing.assert_allclose(np.asarray(one[key]), np.asarray(value), atol=2e-3, err_msg=key)
    assert (run.directory / "samples" / "4.txt").read_text()
    assert "the cat" in (run.directory / "samples.txt").read_text()


def test_a_checkpoint_continues_on_any_mesh(run_config: RunConfig, tmp_path: Path):
    config = override(run_config, {"model.num_layers": 2})
    whole = train(config, tmp_path / "whole", quiet=True)

    def stop(event):
        if event.step == 4:
            event.stop()

    began = train(override(config, PIPELINE), tmp_path / "run", callbacks=(stop,), quiet=True)
    assert len(losses(began.directory)) == 4
    train(override(config, {"mesh.fsdp": 4, "mesh.tensor": 2}), tmp_path / "run", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole.directory), rtol=2e-4)


def test_what_cannot_be_is_refused_before_anything_is_written(run_config: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match="needs equal layers"):
        train(override(run_config, PIPELINE), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"mesh\.pipeline x mesh\.data x mesh\.fsdp=8: take a multiple of 8"):
        train(override(run_config, PIPELINE | {"model.num_layers": 2, "global_batch_size": 12}), tmp_path / "run")
