"""Every file of configs/ loads, its command is complete, and its train step builds with nothing allocated."""

import shlex
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest

import llama_jax
from llama_jax.__main__ import parse
from llama_jax.config import config_names, load_config_module, override
from llama_jax.data.mixture import Schedule
from llama_jax.data.objectives.base import FLOATS
from llama_jax.models import abstract_params, frozen
from llama_jax.parallel import make_mesh
from llama_jax.run.programs import preference_of
from llama_jax.training import init_state, make_train_step, train_flops_per_token

# Tokens of a batch.
PRETRAINING = dict.fromkeys(
    ("llama1_7b", "llama2_7b", "llama2_70b", "llama3_2_1b", "llama3_8b", "mixtral_8x7b", "qwen3_0_6b"), 4 * 2**20
)
PRETRAINING |= {"gpt2": 2**19, "gpt3_125m": 2**19, "chatglm2_6b": 4 * 2**20}
PRETRAINING |= {"llama3_405b": 16 * 2**20}
PRETRAINING |= {"pythia_160m": 2**21, "smollm2_135m": 2**20, "olmo2_1b": 2 * 2**20}


def command(name: str) -> list[str]:
    """The words of the first command in a config's docstring."""
    lines = (load_config_module(name).__doc__ or "").splitlines()
    return shlex.split(next((line for line in lines if line.startswith("python train.py ")), ""))


def config_of(name: str) -> llama_jax.RunConfig:
    """The config as its own command gives it."""
    return override(load_config_module(name).get_config(), parse(["train", *command(name)[2:]]).keys)


def test_the_configs_are_found():
    assert {"tiny_python", "tiny_shakespeare", "mixtures/llama1", *PRETRAINING} <= set(config_names())


def test_llama1_mixture_is_the_table_of_its_paper():
    shares = {source.name: source.share for source in config_of("mixtures/llama1").data.sources}
    assert sum(map(Fraction, map(str, shares.values()))) == 1
    schedule = Schedule(list(shares.values()))
    assert schedule.counts(1000) == [670, 150, 45, 45, 45, 25, 20]


@pytest.mark.parametrize("name", config_names())
def test_the_command_in_the_docstring_is_complete(name: str):
    assert command(name)[:3] == ["python", "train.py", name]
    assert config_of(name).data.path or config_of(name).data.sources


@pytest.mark.quick("bert_base", "mixtral_8x7b")
@pytest.mark.parametrize("name", config_names())
def test_train_step_builds_with_nothing_allocated(name: str):
    config = config_of(name)
    config.check_mesh(8)
    parts, preference = config.optimizer.accumulation_steps, preference_of(config)
    step = make_train_step(config.model, config.compute, accumulation_steps=parts, preference=preference)

    def first_update(params: dict[str, jax.Array], batch: dict[str, jax.Array]):
        hyper = config.optimizer.hyper(config.num_steps, config.seed)
        before = init_state(params, hyper, frozen(config.model))
        after, metrics = step(before, batch, hyper)
        return [(state.params, state.opt_state) for state in (before, after)], metrics

    lengths = dict.fromkeys((*config.data.objective.fields(), "segment_ids"), config.sequence_length)
    if (source_length := config.data.objective.source_length) is not None:
        lengths |= dict.fromkeys(("source_tokens", "source_positions", "source_segment_ids"), source_length)
    kinds = {name: jnp.float32 if name in FLOATS else jnp.int32 for name in lengths}
    with jax.set_mesh(make_mesh(config.mesh)):
        batch = {
            name: jax.ShapeDtypeStruct((config.global_batch_size, lengths[name]), dtype)
            for name, dtype in kinds.items()
        }
        (before, after), metrics = jax.eval_shape(first_update, abstract_params(config.model), batch)
    # A step's result is the next one's argument: same shapes, types and, for what is not a scalar, shardings.
    kind = lambda tree: [(a.shape, a.dtype, a.ndim and a.sharding) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert kind(after) == kind(before)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_cost_in_the_docstring_is_the_config_s(name: str):
    config, doc = config_of(name), load_config_module(name).__doc__ or ""
    assert config.global_batch_size * config.sequence_length == PRETRAINING[name]
    config.check_mesh(256)
    tokens = config.num_steps * PRETRAINING[name]
    flops = f"{train_flops_per_token(config.model, config.sequence_length) * tokens:.2e}".replace("e+", "e")
    for figure in (f"{llama_jax.num_parameters(config.model):,} parameters", f"{config.num_steps:,} steps", flops):
        assert figure in doc.replace("\n", " ")


@pytest.mark.parametrize("name", ["tiny_shakespeare", *PRETRAINING])
def test_a_forgotten_text_is_one_sentence(name: str, tmp_path):
    with pytest.raises(llama_jax.UserError, match=r"--data\.path"):
        llama_jax.train(llama_jax.load_config(name), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
