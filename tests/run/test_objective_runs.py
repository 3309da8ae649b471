"""Every objective and packing trains, is logged, continues where it stopped, and gives its batches back."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from llama_jax.config import UserError, override
from llama_jax.data import Source
from llama_jax.data.objectives import BlankFilling, Causal, Denoising, MaskedLM, Prefix, SpanCorruption
from llama_jax.run import Run, RunConfig, open_run, train

OBJECTIVES = [
    Causal(),
    Prefix(),
    BlankFilling(two_dimensional=False),
    SpanCorruption(source_length=32, start_token="bos"),
    Denoising(source_length=32),
]


def config_with(run_config: RunConfig, tmp_path: Path, **data) -> RunConfig:
    """With two sources of half the texts each, and a vocabulary for 100 sentinels."""
    (path,) = run_config.data.path
    even, odd = ((f"{path}/*[{digits}].txt",) for digits in ("02468", "13579"))
    sources = (Source("even", even, share=1.0), Source("odd", odd, epochs=0.3))
    data = dataclasses.replace(
        run_config.data, path=(), sources=sources, validation_fraction=0.0, cache_dir=str(tmp_path / "cache"), **data
    )
    changes = {"model.vocab_size": 408, "tokenizer.vocab_size": 380, "num_steps": 4, "checkpoint.every_steps": 2}
    config = override(dataclasses.replace(run_config, data=data), changes | {"logging.sample_prompts": ()})
    return config


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_a_mixture_of_packed_rows_trains_and_continues(run_config, tmp_path: Path, objective):
    config = config_with(run_config, tmp_path, objective=objective, packing="best_fit")
    whole = train(config, tmp_path / "whole")
    losses = [line["loss"] for line in whole.metrics()]
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    last = whole.metrics()[-1]
    assert last["share/even"] + last["share/odd"] == pytest.approx(1)
    assert last["epochs/odd"] == pytest.approx(0.3, abs=0.1)
    # Stopped after two steps, then continued from the checkpoint.
    (tmp_path / "again").mkdir()
    for name in ("config.json", "data.json"):
        (tmp_path / "again" / name).write_text((tmp_path / "whole" / name).read_text())
    stopped = Run(tmp_path / "again", config)
    (tmp_path / "again" / "tokenizer").symlink_to(tmp_path / "whole" / "tokenizer")
    (tmp_path / "again" / "checkpoints").mkdir()
    (tmp_path / "again" / "checkpoints" / "2").symlink_to(tmp_path / "whole" / "checkpoints" / "2")
    train(config, stopped.directory)
    assert [line["loss"] for line in stopped.metrics()] == losses[2:]
    batch = open_run(whole.directory).batch(3)
    assert set(objective.fields()) < set(batch)
    assert last["num_targets"] == batch["weights"].sum()


@pytest.mark.slow
def test_epochs_tie_a_run_to_its_length(run_config, tmp_path: Path):
    config = config_with(run_config, tmp_path)
    train(config, tmp_path / "run")
    with pytest.raises(UserError, match="holds a run with num_steps=4, not 6"):
        train(dataclasses.replace(config, num_steps=6), tmp_path / "run")


def test_fields_that_the_model_does_not_take_are_named(run_config, tmp_path: Path):
    for objective, field in ((MaskedLM(), "token_types"), (BlankFilling(), "block_positions")):
        with pytest.raises(UserError, match=f"{type(objective).__name__} gives .*{field}.*DecoderConfig does not take"):
            config_with(run_config, tmp_path, objective=objective)
