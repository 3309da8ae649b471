"""The optimizer does what the Llama recipe says, in numbers worked out otherwise."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, abstract_params, build, initialize
from llama_jax.models.config import causal_score_flops, full_score_flops
from llama_jax.nn import seed_key
from llama_jax.training import (
    AdamW,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    OptimizerConfig,
    Schedule,
    WarmupStableDecay,
    init_state,
    learning_rate,
    make_optimizer,
    peak_flops,
    train_flops_per_token,
)
from llama_jax.training.matrices import is_matrix

CONFIG = AdamW(learning_rate=0.02, warmup_steps=4, final_fraction=0.1)


def test_schedule_by_hand():
    hyper = CONFIG.hyper(20)
    for step in range(25):
        if step < 4:
            expected = 0.02 * (step + 1) / 4
        else:
            progress = min((step - 4) / 16, 1)
            expected = 0.02 * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)
        assert float(learning_rate(step, hyper)) == pytest.approx(expected, rel=1e-6), step


def test_schedule_is_optax_one():
    # Optax's first update has the initial value, ours the first step towards the peak.
    theirs = optax.warmup_cosine_decay_schedule(0.005, 0.02, warmup_steps=3, decay_steps=19, end_value=0.002)
    ours = [float(learning_rate(step, AdamW(0.02, 4).hyper(19))) for step in range(4)]
    np.testing.assert_allclose(ours, [theirs(step) for step in range(4)], rtol=1e-6)
    theirs = optax.cosine_decay_schedule(0.02, decay_steps=15, alpha=0.1)
    ours = [float(learning_rate(4 + step, AdamW(0.02, 4).hyper(19))) for step in range(20)]
    np.testing.assert_allclose(ours, [theirs(step) for step in range(20)], rtol=1e-6)


@pytest.mark.parametrize("schedule", [Linear(), InverseSqrt(), Constant(), WarmupStableDecay(0.25)], ids=str)
@pytest.mark.parametrize(("warmup", "num_steps"), [(4, 20), (0, 20), (1, 20), (4, 4)])
def test_other_schedules_by_hand(schedule: Schedule, warmup: int, num_steps: int):
    """Alike in the warm-up, whose last update has the peak; those with an end reach its fraction there."""
    config = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=warmup)
    for step in range(num_steps + 5):
        part = min((step - warmup) / max(num_steps - warmup, 1), 1)
        if isinstance(schedule, WarmupStableDecay):
            part = max(part - 0.75, 0) / 0.25
        if step < warmup:
            expected = 0.02 * (step + 1) / warmup
        elif isinstance(schedule, Linear | WarmupStableDecay):
            expected = 0.02 * (1 - part) + 0.1 * 0.02 * part
        elif isinstance(schedule, InverseSqrt):
            expected = 0.02 * max(warmup, 1) ** 0.5 * (step + 1) ** -0.5
        else:
            expected = 0.02
        found = float(learning_rate(step, config.hyper(num_steps)))
        assert found == pytest.approx(expected, rel=1e-5), step


def test_schedules_with_an_end_are_optax_ones():
    theirs = {
        Cosine(): optax.cosine_decay_schedule(0.02, decay_steps=16, alpha=0.1),
        Linear(): optax.linear_schedule(0.02, 0.002, 16),
        WarmupStableDecay(0.25): optax.linear_schedule(0.02, 0.002, 4, transition_begin=12),
        Constant(): optax.constant_schedule(0.02),
    }
    for schedule, expected in theirs.items():
        hyper = dataclasses.replace(CONFIG, schedule=schedule).hyper(20)
        found = [float(learning_rate(4 + step, hyper)) for step in range(20)]
        np.testing.assert_allclose(found, [expected(step) for step in range(20)], rtol=1e-5)


def test_no_schedule_jumps_where_the_warm_up_ends():
    for schedule in (Cosine(), Linear(), InverseSqrt(), Constant(), WarmupStableDecay()):
        hyper = dataclasses.replace(CONFIG, schedule=schedule, warmup_steps=100).hyper(10_000)
        rates = [float(learning_rate(step, hyper)) for step in (98, 99, 100, 101)]
        assert rates[1] == max(rates) == pytest.approx(0.02), schedule
        assert rates[2] > 0.99 * rates[1], schedule


def test_config_files_of_before_schedules_were_components_still_run():
    old = OptimizerConfig(learning_rate=0.02, warmup_steps=4, schedule="inverse_sqrt")  # type: ignore[arg-type]
    assert old == AdamW(learning_rate=0.02, warmup_steps=4, schedule=InverseSqrt())
    with pytest.raises(UserError, match="schedule='cosin' must be a schedule"):
        OptimizerConfig(learning_rate=0.02, warmup_steps=4, schedule="cosin")  # type: ignore[arg-type]


@pytest.mark.parametrize(("warmup", "num_steps"), [(0, 5), (5, 5), (9, 5)])
def test_schedule_at_its_ends(warmup: int, num_steps: int):
    rates = [float(learning_rate(step, AdamW(1.0, warmup).hyper(num_steps))) for step in range(num_steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[0] == (pytest.approx(1 / warmup) if warmup else 1)


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    shapes = {"embedding.weight": (5, 3), "layers.norm.weight": (2, 3), "layers.proj.weight": (2, 3, 4)}
    shapes |= {"layers.proj.bias": (2, 4, 2), "norm.weight": (3,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def updates(config: AdamW, steps: int = 3) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters after some updates at rate 0.01: ours, and those of optax.adamw with the config's numbers."""
    ours, theirs = params(), params()
    optimizer = make_optimizer(config.hyper(10))
    reference = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            0.01,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask={name: name in ("embedding.weight", "layers.proj.weight") for name in ours},
        ),
    )
    state, reference_state = optimizer.init(ours), reference.init(theirs)
    for step in range(steps):
        grads = {name: jnp.sin(7 * p + step) for name, p in theirs.items()}
        change, state = optimizer.update(grads, state, ours)
        ours = {name: p - 0.01 * change[name] for name, p in ours.items()}
        change, reference_state = reference.update(grads, reference_state, theirs)
        theirs = optax.apply_updates(theirs, change)
    return ours, theirs  # type: ignore[return-value]


@pytest.mark.parametrize(
    "change", [{}, {"weight_decay": 0.0}, {"clip_norm": 1e9}, {"beta1": 0.5, "beta2": 0.7, "eps": 0.1}], ids=str
)
def test_adamw_is_optax_one(change: dict[str, float]):
    ours, theirs = updates(dataclasses.replace(CONFIG, **change))
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


def test_decay_is_for_matrices_alone():
    with_decay, _ = updates(dataclasses.replace(CONFIG, weight_decay=0.5), steps=1)
    without, _ = updates(dataclasses.replace(CONFIG, weight_decay=0.0), steps=1)
    for name, before in params().items():
        expected = 0.01 * 0.5 * before if name in ("embedding.weight", "layers.proj.weight") else 0 * before
        np.testing.assert_allclose(without[name] - with_decay[name], expected, atol=1e-6)


def test_matrices_of_the_decoder(tiny_config: DecoderConfig):
    config = dataclasses.replace(
        tiny_config,
        attention=dataclasses.replace(tiny_config.attention, qkv_bias=True, out_bias=True),
        feed_forward=dataclasses.replace(tiny_config.feed_forward, bias=True),
    )
    parameters = abstract_params(config)
    decayed = {name for name, p in parameters.items() if is_matrix(name, p)}
    assert decayed == {name for name in parameters if name.endswith("weight") and "norm" not in name}
    assert any(name.endswith("bias") for name in parameters)


def test_biases_of_relative_positions_are_not_decayed():
    """As transformers leaves out what has `bias` in its name, T5's `relative_attention_bias.weight` too."""
    shape = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    names = ["position_bias.weight", "encoder_position_bias.weight", "layers.position_bias.bias"]
    assert not any(is_matrix(name, shape) for name in names)
    assert is_matrix("positions.weight", shape)


@dataclasses.dataclass(frozen=True)
class Device:
    device_kind: str
    platform: str = "gpu"


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v5", 459e12),
        ("TPU v5 lite", 197e12),
        ("NVIDIA H100", None),  # which of the boards?
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200 of a kind to come", None),
        ("TPU v50", None),
        ("TPU7x", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_are_of_the_whole_name_or_none(kind: str, peak: float | None):
    assert peak_flops(Device(kind), jnp.dtype(jnp.bfloat16)) == peak


def test_first_moments_are_zero_and_all_is_float32():
    state = init_state(params(), CONFIG.hyper(10))
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
        assert not leaf.any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("clip_norm", 0.0),
        ("eps", 0.0),
        ("warmup_steps", -1),
        ("weight_decay", -0.1),
        ("z_loss", -1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("final_fraction", 1.1),
        ("accumulation_steps", 0),
    ],
)
def test_impossible_values_are_named(field: str, value: float):
    with pytest.raises(UserError, match=rf"^{field}={value} must"):
        dataclasses.replace(CONFIG, **{field: value})


@pytest.mark.parametrize("tied", [False, True])
def test_flops_counted_by_hand(two_layers: DecoderConfig, tied: bool):
    # D 16, 4 heads of 8, 2 kv heads, F 24, V 40, 2 layers.
    layer = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24
    head = 16 * 40
    attention = 2 * 2 * 4 * 8 * (10 / 2)  # scores and values, 2 FLOPs each, of 4 heads of 8 with half of 10 keys
    expected = 6 * (2 * layer + head) + 3 * 2 * attention
    assert train_flops_per_token(dataclasses.replace(two_layers, tie_embeddings=tied), 10) == expected


@pytest.mark.parametrize("length", [1, 6, 7, 40])
@pytest.mark.parametrize("window", [1, 3, 7, None])
def test_scores_are_those_of_the_keys_that_are_seen(two_layers: DecoderConfig, length: int, window: int | None):
    """Counted one by one: of causal ones a token is half before itself, as of the whole triangle half is counted."""
    mixer = dataclasses.replace(two_layers.attention, window=window)
    of_key = 4 * mixer.num_heads * mixer.head_dim
    before, inside = 0.0, 0
    for query in range(length):
        before += min(sum(1.0 for key in range(query)) + 0.5, window or length)
        inside += sum(window is None or abs(query - key) < window for key in range(length))
    assert causal_score_flops([mixer, mixer], length) == 2 * of_key * before
    assert full_score_flops([mixer], length) == of_key * inside
    config = dataclasses.replace(two_layers, attention=mixer)
    assert config.score_flops(length, 0) == 2 * of_key * before


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_small_seeds_are_what_they_were(seed: int):
    assert jnp.array_equal(jax.random.key_data(seed_key(seed)), jax.random.key_data(jax.random.key(seed)))


def test_every_seed_of_64_bits_is_another():
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**63, 2**64 - 1]
    keys = [np.asarray(jax.random.key_data(seed_key(seed))) for seed in seeds]
    assert len({key.tobytes() for key in keys}) == len(seeds)
    for seed, key in zip(seeds, keys, strict=True):  # jitted, as a train step takes it
        traced = jax.jit(lambda seed: jax.random.key_data(seed_key(seed)))(CONFIG.hyper(1, seed).seed)
        assert np.array_equal(traced, key), seed
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=f"seed={seed} must be at least 0 and below"):
            CONFIG.hyper(1, seed)


def test_models_of_any_seed(tiny_config: DecoderConfig):
    config = dataclasses.replace(tiny_config, num_layers=1)
    values = [np.asarray(initialize(config, seed)["embedding.weight"]) for seed in (7, 2**31 + 7, 2**32 + 7, 2**64 - 1)]
    assert len({value.tobytes() for value in values}) == 4
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match="seed="):
            build(config, seed=seed)
