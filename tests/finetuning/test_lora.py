"""Low-rank adapters: the base with zero adapters, the merged model with others; nothing but adapters is trained."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import llama_jax
from llama_jax.config import UserError
from llama_jax.models import (
    ADAPTERS,
    abstract_params,
    from_params,
    frozen,
    initialize,
    merge_adapters,
    num_parameters,
)
from llama_jax.nn import MLP, LatentAttention, LoRA, Rope
from llama_jax.parallel import make_mesh
from llama_jax.training import init_state, make_train_step
from llama_jax.training.step import losses
from llama_jax.zoo.t5 import t5

GOLDENS = Path(__file__).parent / "goldens"
TOKENS = ((np.arange(24).reshape(2, 12) * 7 + 3) % 64).astype(np.int32)
COMPUTE = llama_jax.models.Compute(dtype="float32")
EVERY = LoRA(rank=3, alpha=6.0, targets=("all-linear",))


def tiny(**changes):
    return dataclasses.replace(tiny_run.get_config().model, **changes)


LATENT = LatentAttention(
    num_heads=2,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    eps=1e-6,
    rope=Rope(theta=10000.0, scaling=None),
)


def random_values(config, *, adapters=True):
    """Parameters by name, made on the host: to compile `initialize` takes seconds. `adapters` or zero ones."""
    rng, values = np.random.default_rng(1), {}
    for name, a in abstract_params(config).items():
        value = 0.1 * rng.normal(size=a.shape).astype(np.float32)
        zero = name.endswith("lora_b") and not adapters
        values[name] = np.zeros_like(value) if zero else 1 + value if "norm" in name else value
    return values


def model_of(config, values):
    return from_params(config, {name: jnp.asarray(value) for name, value in values.items()}, COMPUTE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_zero_adapters_are_the_base_bit_for_bit(family: str):
    base = llama_jax.load(GOLDENS / family / "base", dtype="float32")
    config = dataclasses.replace(base.config, adapters=EVERY)
    params = initialize(config, 0) | base.model.params()
    model = from_params(config, params, base.model.module.compute)
    np.testing.assert_array_equal(model(TOKENS), base.model(TOKENS))


@pytest.mark.slow
def test_first_values_of_a_model_with_adapters_are_those_without():
    config = tiny()
    plain, adapted = (initialize(c, 0) for c in (config, dataclasses.replace(config, adapters=EVERY)))
    assert set(plain) == frozen(dataclasses.replace(config, adapters=EVERY)) < set(adapted)
    for name, value in plain.items():
        np.testing.assert_array_equal(value, adapted[name])
    assert not any(np.any(value) for name, value in adapted.items() if name.endswith("lora_b"))
    # PEFT draws A uniformly from +- 1 / sqrt(inputs).
    a = adapted["layers.attention.q_proj.lora_a"]
    assert np.std(a) == pytest.approx((3 * config.hidden_size) ** -0.5, rel=0.15)


@pytest.mark.parametrize("mixer", ["grouped", pytest.param("latent", marks=pytest.mark.slow)])
def test_merged_is_unmerged_and_zero_adapters_are_the_base(mixer: str):
    config = tiny(num_layers=2, adapters=EVERY, **({"attention": LATENT} if mixer == "latent" else {}))
    values = random_values(config)
    lm = llama_jax.LanguageModel(config, model_of(config, values), None)
    merged = llama_jax.merge(lm)
    assert merged.config == dataclasses.replace(config, adapters=None)
    logits = np.asarray(lm.model(TOKENS))
    np.testing.assert_allclose(merged.model(TOKENS), logits, atol=1e-5)
    base = np.asarray(model_of(merged.config, {n: values[n] for n in merged.model.params()})(TOKENS))
    assert np.abs(base - logits).max() > 0.1
    np.testing.assert_array_equal(model_of(config, random_values(config, adapters=False))(TOKENS), base)
    if mixer == "latent":  # which multiplies with its projections in another order where it has a cache
        prompts = TOKENS[:, :5].tolist()
        found = [llama_jax.generate(m, prompts, max_new_tokens=6, temperature=0) for m in (lm, merged)]
        np.testing.assert_array_equal(*found)


@pytest.fixture(scope="module")
def encoder_decoder():
    """A model with adapters, its inputs and its logits; the base, whose logits are those with zero adapters."""
    base = t5(
        vocab_size=64,
        hidden_size=16,
        num_layers=1,
        num_encoder_layers=1,
        num_heads=2,
        head_dim=8,
        feed_forward=MLP(24, "relu", bias=False, dropout=0.1),
        dropout=0.1,
        version_1_0=True,
    )
    config = dataclasses.replace(base, adapters=EVERY)
    inputs, values = {"source": TOKENS, "target": TOKENS[:, :6]}, random_values(config)
    plain = model_of(base, {name: values[name] for name in abstract_params(base)})
    lm = llama_jax.LanguageModel(config, model_of(config, values), None, "t5")
    return lm, inputs, np.asarray(lm.model(**inputs)), dataclasses.replace(lm, config=base, model=plain)


@pytest.mark.slow
def test_adapters_of_an_encoder_decoder(encoder_decoder):
    """Of both stacks and of the attention to the source: zero ones are the base, others are merged as any other's."""
    lm, inputs, logits, base = encoder_decoder
    for part in ("encoder_layers.attention.q_proj", "layers.cross_attention.k_proj", "layers.feed_forward.down_proj"):
        assert part + ADAPTERS[0] in lm.model.params()
    expected = np.asarray(base.model(**inputs))
    np.testing.assert_array_equal(model_of(lm.config, random_values(lm.config, adapters=False))(**inputs), expected)
    assert np.abs(logits - expected).max() > 0.01
    np.testing.assert_allclose(llama_jax.merge(lm).model(**inputs), logits, atol=1e-5)


@pytest.mark.slow
def test_adapters_of_an_encoder_decoder_are_read_again_as_those_of_peft(encoder_decoder, tmp_path: Path):
    lm, inputs, logits, base = encoder_decoder
    llama_jax.save(base, tmp_path / "b", format="hf")
    llama_jax.save_adapters(lm, tmp_path / "a", base=tmp_path / "b")
    np.testing.assert_allclose(llama_jax.load(tmp_path / "a", dtype="float32").model(**inputs), logits, atol=1e-5)


def test_scale():
    assert LoRA(rank=4, alpha=8).scale == 2
    assert LoRA(rank=4, alpha=8, rslora=True).scale == 4


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (("q_proj",), {"attention.q_proj"}),
        (("feed_forward.up_proj", "o_proj"), {"feed_forward.up_proj", "attention.o_proj"}),
    ],
)
def test_targets_are_ends_of_names(targets: tuple[str, ...], adapted: set[str]):
    names = abstract_params(tiny(adapters=LoRA(targets=targets)))
    assert {n.removeprefix("layers.").removesuffix(ADAPTERS[0]) for n in names if n.endswith(ADAPTERS[0])} == adapted


@pytest.mark.parametrize("target", ["proj", "lm_head", "embedding", "experts.up_proj"])
def test_a_target_that_is_no_projection_is_named(target: str):
    with pytest.raises(UserError, match=rf"targets={target} is no projection.*q_proj"):
        num_parameters(tiny(adapters=LoRA(targets=(target,))))


def batch_of(rows: int) -> dict[str, jax.Array]:
    tokens = jnp.array(np.random.default_rng(0).integers(0, 300, (rows, 17)), jnp.int32)
    ones = jnp.ones((rows, 16), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (rows, 16))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": ones.astype(jnp.float32),
        "segment_ids": ones,
        "positions": places,
    }


@pytest.mark.slow
def test_a_step_makes_gradients_and_moments_for_adapters_alone():
    run = tiny_run.get_config()
    config = tiny(adapters=EVERY)
    before = random_values(config, adapters=False)
    params = {name: jnp.array(value) for name, value in before.items()}
    hyper = dataclasses.replace(run.optimizer, weight_decay=0.0).hyper(10)
    begin = jax.jit(init_state, static_argnums=2)
    state = begin(params, hyper, frozen(config))
    assert set(state.params) == {name for name in params if name.endswith(ADAPTERS)}
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert moments < 2 * num_parameters(config, trained=True) + 10
    base = {name: params[name] for name in frozen(config)}
    compiled = {
        name: make_train_step(own, run.compute).lower(first, batch_of(2), hyper).compile()
        for name, own, first in (
            ("lora", config, state),
            ("all", tiny(), jax.eval_shape(lambda: begin(base, hyper, frozenset()))),
        )
    }
    memory = {name: program.memory_analysis() for name, program in compiled.items()}
    assert memory["lora"].argument_size_in_bytes < 0.6 * memory["all"].argument_size_in_bytes
    assert memory["lora"].temp_size_in_bytes < memory["all"].temp_size_in_bytes
    after, _ = compiled["lora"](state, batch_of(2), hyper)
    for name, value in (after.params | after.buffers).items():
        # At the first step A's gradient is zero, since B is.
        assert np.array_equal(value, before[name]) != name.endswith("lora_b"), name


def test_dropout_is_on_the_inputs_of_adapters_and_only_in_training():
    config = tiny(adapters=dataclasses.replace(EVERY, dropout=0.5))
    assert config.needs_rng
    params = random_values(config)

    @jax.jit
    def loss(key, params):
        return losses(params, batch_of(2), config, tiny_run.get_config().compute, key=key)[0][0][2]

    quiet = {name: value * (not name.endswith("lora_b")) for name, value in params.items()}
    first, second = jax.random.key(0), jax.random.key(1)
    assert loss(first, params) == loss(first, params) != loss(second, params)
    assert loss(None, params) != loss(first, params)
    assert loss(first, quiet) == loss(None, quiet)


def test_adapters_are_split_as_their_weights():
    config = tiny(adapters=EVERY)
    with jax.set_mesh(make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])):
        params = abstract_params(config)
        for name in ("attention.q_proj", "attention.o_proj", "feed_forward.down_proj"):
            weight, a, b = (params[f"layers.{name}.{end}"].sharding.spec for end in ("weight", "lora_a", "lora_b"))
            inputs = len(a) - 2
            assert tuple(weight) == (*a[: inputs + 1], *b[2:])
        host = random_values(config)
        values = {name: jax.device_put(value, params[name].sharding) for name, value in host.items()}
        merged = jax.jit(lambda values: merge_adapters(config, values)[1])(values)
        assert (
            merged["layers.attention.q_proj.weight"].sharding.spec
            == params["layers.attention.q_proj.weight"].sharding.spec
        )
        model = from_params(config, values, COMPUTE, jax.sharding.get_mesh())
        split = np.asarray(model(np.tile(TOKENS, (2, 1))))[:2]
    np.testing.assert_allclose(split, model_of(config, host)(TOKENS), atol=1e-5)


@pytest.mark.slow
def test_a_run_trains_adapters_from_the_weights_of_another(tmp_path: Path, capfd):
    texts = tiny_run.write_texts(tmp_path / "texts")
    changes = {"data.path": (str(texts),), "data.cache_dir": str(tmp_path / "cache"), "num_steps": 3}
    base = llama_jax.train(llama_jax.override(tiny_run.get_config(), changes), tmp_path / "base", quiet=True)
    changes |= {"init_from": str(tmp_path / "base"), "tokenizer.path": str(tmp_path / "base" / "tokenizer")}
    changes |= {"model.adapters": "LoRA", "model.adapters.rank": 2}
    config = llama_jax.override(tiny_run.get_config(), changes)
    run = llama_jax.train(config, tmp_path / "lora")
    assert "27,456 parameters, 224 of them trained" in capfd.readouterr().out
    first, after = base.load().model.params(), run.load().model.params()
    assert {name for name in after if not np.array_equal(first.get(name), after[name])} == {
        f"layers.attention.{name}_proj.lora_{side}" for name in "qv" for side in "ab"
    }
    # The run's directory has all of it; a full fine-tuning from there begins with what the adapters have learned.
    again = llama_jax.override(config, {"model.adapters": None, "init_from": str(tmp_path / "lora"), "num_steps": 1})
    full = llama_jax.train(again, tmp_path / "full", quiet=True).load()
    assert set(full.model.params()) == set(first)
    rate = 1.1 * config.optimizer.learning_rate
    for name, value in llama_jax.merge(run.load()).model.params().items():
        np.testing.assert_allclose(full.model.params()[name], value, atol=rate)
