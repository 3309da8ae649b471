"""What an encoder-decoder must be, whatever its weights: who sees what, and the same however it is computed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import UserError
from llama_jax.models import (
    Compute,
    EncoderDecoderConfig,
    LayerOverride,
    abstract_params,
    assemble,
    from_params,
    initialize,
)
from llama_jax.nn import (
    MLP,
    CrossAttention,
    GatedLinearUnit,
    GroupedQuery,
    LayerNorm,
    LearnedPositions,
    RelativeBias,
    RMSNorm,
)
from llama_jax.parallel import make_mesh
from llama_jax.training import AdamW, Constant, init_state, make_train_step, train_flops_per_token
from llama_jax.training.matrices import is_matrix
from llama_jax.training.step import losses

# Two documents in the target and in the source of each row, and padding behind; the source of the second is longer.
TARGET, SOURCE = np.repeat([1, 2, 0], [5, 8, 1]), np.repeat([1, 2, 0], [6, 9, 2])
ROWS = 4


@pytest.fixture(scope="module")
def config() -> EncoderDecoderConfig:
    """Everything that the two stacks can have differently, and dropout everywhere."""
    heads: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": True, "out_bias": True}
    return EncoderDecoderConfig(
        vocab_size=40,
        hidden_size=16,
        num_encoder_layers=2,
        num_layers=2,
        max_positions=32,
        attention=GroupedQuery(rope=None, dropout=0.1, **heads),
        cross_attention=CrossAttention(dropout=0.1, **heads),
        feed_forward=MLP(24, "relu", bias=True, dropout=0.1),
        norm=RMSNorm(eps=1e-6),
        norm_placement="sandwich",
        tie_embeddings=True,
        positions=LearnedPositions(32, offset=2),
        position_bias=RelativeBias(4, 8, 6, bidirectional=False),
        encoder_position_bias=RelativeBias(4, 8, 6, bidirectional=True),
        embedding_norm=LayerNorm(eps=1e-5, bias=True),
        encoder_overrides=(LayerOverride((0,), GatedLinearUnit(24, "gelu_tanh", bias=True)),),
        decoder_start_id=3,
        dropout=0.1,
        final_dropout=0.1,
    )


def places(segments: np.ndarray) -> np.ndarray:
    """The position of each token in its document."""
    return np.concatenate([np.arange(n) for n in np.bincount(segments)[[1, 2, 0]]])


def batch_of(config: EncoderDecoderConfig) -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    fields = {"": TARGET, "source_": SOURCE}
    batch = {f"{p}tokens": rng.integers(config.vocab_size, size=(ROWS, len(s))) for p, s in fields.items()}
    batch |= {f"{p}segment_ids": s[None].repeat(ROWS, 0) for p, s in fields.items()}
    batch |= {f"{p}positions": places(s)[None].repeat(ROWS, 0) for p, s in fields.items()}
    batch["targets"] = rng.integers(config.vocab_size, size=(ROWS, len(TARGET)))
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    batch["weights"] = (rng.random((ROWS, len(TARGET))) * (TARGET > 0)).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in batch.items()}


@pytest.mark.slow
def test_a_source_sees_itself_and_a_target_its_source_and_what_stands_before_it(config, random_params):
    config = dataclasses.replace(config, tie_embeddings=False, vocab_size=64, num_encoder_layers=1, num_layers=1)
    config = dataclasses.replace(config, encoder_overrides=())
    params = random_params(config)
    batch = {name: x[:1] for name, x in batch_of(config).items()}
    # Each row of the table once, so that its gradient says which token a result came from.
    unique = np.random.default_rng(2).permutation(config.vocab_size)[: len(TARGET) + len(SOURCE)]
    tokens, source = unique[: len(TARGET)], unique[len(TARGET) :]
    batch |= {"tokens": jnp.asarray(tokens)[None], "source_tokens": jnp.asarray(source)[None]}
    direction = np.random.default_rng(3).normal(size=config.hidden_size)

    @jax.jit
    def jacobian(table):
        def scalars(table):
            model = assemble(config, params | {"embedding.weight": table}, Compute())
            (main,), _ = model.loss_terms(batch)
            encoded, _ = model.encode(batch["source_tokens"], segment_ids=batch["source_segment_ids"])
            return jnp.concatenate([main.hidden[0], encoded[0]]) @ direction

        return jax.jacrev(scalars)(table)

    size = np.abs(np.asarray(jacobian(params["embedding.weight"]))).max(-1)  # [to t, from a token of the vocabulary]
    size, encoded = size[: len(TARGET)], size[len(TARGET) :]
    own = TARGET[:, None] == TARGET
    np.testing.assert_array_equal(size[:, tokens] > 0, own & np.tri(len(TARGET), dtype=bool))
    np.testing.assert_array_equal(size[:, source] > 0, TARGET[:, None] == SOURCE)
    np.testing.assert_array_equal(encoded[:, source] > 0, SOURCE[:, None] == SOURCE)


@pytest.mark.slow
def test_packed_documents_are_separate_documents(config, random_params):
    params, batch = random_params(config), batch_of(config)
    model = from_params(config, params, Compute())
    together = model.run(lambda module, batch: module.logits(module.loss_terms(batch)[0][0].hidden), batch)
    for segment in (1, 2):
        target, source = segment == TARGET, segment == SOURCE
        alone = [np.zeros((ROWS, 10), np.int32) for _ in range(2)]
        alone[0][:, : source.sum()] = batch["source_tokens"][:, source]
        alone[1][:, : target.sum()] = batch["tokens"][:, target]
        # What stands behind the source has no effect, by the mask.
        mask = np.arange(10) < source.sum()
        alone[0][:, ~mask] = 7
        apart = model(*map(jnp.asarray, alone), source_mask=jnp.asarray(mask[None].repeat(ROWS, 0)))
        np.testing.assert_allclose(together[:, target], apart[:, : target.sum()], atol=2e-5)
    assert np.asarray(apart).std() > 0.1


def test_cached_is_uncached(config, random_params):
    """Sources with padding anywhere; a prefill of padded rows, then single tokens at each row's own end."""
    model = from_params(config, random_params(config), Compute())
    batch = {name: np.asarray(x) for name, x in batch_of(config).items()}
    real = np.random.default_rng(5).random(batch["source_tokens"].shape) < 0.7
    tokens, first = batch["tokens"], np.array([4, 1, 3, 2])
    full = np.asarray(model(batch["source_tokens"], tokens, source_mask=real))

    def decode(module, source, real, tokens):
        cache = module.init_cache(ROWS, 12, source=source, source_mask=real)
        valid = jnp.arange(4) < first[:, None]
        hidden, cache = module.extend(tokens[:, :4], cache=cache, lengths=jnp.zeros(ROWS, jnp.int32), is_token=valid)
        found = [module.logits(hidden)]
        for i in range(2):
            new = tokens[np.arange(ROWS), first + i][:, None]
            hidden, cache = module.extend(new, cache=cache, lengths=jnp.asarray(first + i))
            found.append(module.logits(hidden))
        return found

    prefilled, *singles = model.run(decode, batch["source_tokens"], real, tokens)
    for row, length in enumerate(first):
        np.testing.assert_allclose(prefilled[row, :length], full[row, :length], atol=1e-5)
        for i, logits in enumerate(singles):
            np.testing.assert_allclose(logits[row, 0], full[row, length + i], atol=1e-5)


def loss_and_gradient(config: EncoderDecoderConfig, compute: Compute, params: Any, batch: Any) -> Any:
    """With dropout, whose bits are the same on every mesh."""

    @jax.jit
    def run(params, batch):
        key = jax.random.key(4)
        return jax.value_and_grad(lambda p: losses(p, batch, config, compute, key=key)[0][0][1])(params)

    return run(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "remat"), [(1, "none"), pytest.param(2, "full", id="scanned and recomputed")])
def test_eight_devices_are_one(layers: int, remat: Any, config, random_params):
    config = dataclasses.replace(config, num_encoder_layers=layers, num_layers=layers, encoder_overrides=())
    params, batch = random_params(config), batch_of(config)
    loss, gradient = loss_and_gradient(config, Compute(scan_layers=False), params, batch)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        placed = {name: jax.device_put(params[name], a.sharding) for name, a in abstract_params(config).items()}
        found_loss, found = loss_and_gradient(config, Compute(remat=remat), placed, batch)
    np.testing.assert_allclose(found_loss, loss, rtol=1e-5)
    for name, value in gradient.items():
        # A bias of all keys of a query changes no weight of attention.
        assert np.abs(value).max() > 0 or name.endswith("k_proj.bias"), name
        np.testing.assert_allclose(found[name], value, atol=1e-4, rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_one_batch_is_learned_by_heart(config):
    hyper = AdamW(learning_rate=1e-2, warmup_steps=5, weight_decay=0.0, schedule=Constant()).hyper(60)
    plain = dataclasses.replace(
        config,
        num_encoder_layers=1,
        num_layers=1,
        dropout=0.0,
        final_dropout=0.0,
        attention=dataclasses.replace(config.attention, dropout=0.0),
        cross_attention=dataclasses.replace(config.cross_attention, dropout=0.0),
        feed_forward=dataclasses.replace(config.feed_forward, dropout=0.0),
    )
    step = make_train_step(plain, Compute(scan_layers=False))
    state, batch = init_state(initialize(plain, 0), hyper), batch_of(plain)
    found = []
    for _ in range(60):
        state, metrics = step(state, batch, hyper)
        found.append(float(metrics["loss"]))
    assert abs(found[0] - np.log(plain.vocab_size)) < 0.2
    assert found[-1] < 0.1 * found[0]


def products_of(jaxpr: Any) -> float:
    """FLOPs of all products of a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += products_of(inner) if hasattr(inner, "eqns") else 0
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inside = np.prod([equation.invars[0].aval.shape[dim] for dim in contracted])
            total += 2 * inside * np.prod(equation.outvars[0].aval.shape)
    return total


def test_flops_are_those_of_the_program(config):
    """Of a row of 7 targets and 12 source tokens; its causal scores are computed in full and counted at half."""
    target, source = 7, 12
    params = abstract_params(config)

    def forward(params):
        model = assemble(config, params, Compute(scan_layers=False, attention_kernel="reference"))
        return model(jnp.zeros((1, source), jnp.int32), jnp.zeros((1, target), jnp.int32))

    spared = target * sum(mixer.score_flops(target / 2) for mixer, _ in config.stacks()["layers"])
    matrices = {name: np.prod(p.shape) for name, p in params.items() if is_matrix(name, p)}
    counted = 2 * sum(size * config.tokens_of(name, target, source) for name, size in matrices.items())
    counted += config.score_flops(target, source)
    assert products_of(jax.make_jaxpr(forward)(params)) == counted + spared
    assert train_flops_per_token(config, target, source) == pytest.approx(3 * counted / (target + source))


def test_a_sequence_cannot_be_split(config, random_params):
    with (
        jax.set_mesh(make_mesh({"context": 8})),
        pytest.raises(UserError, match=r"mesh\.context cannot split the sequences of an encoder-decoder"),
    ):
        jax.eval_shape(lambda p: assemble(config, p, Compute()).loss_terms(batch_of(config)), random_params(config))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_encoder_layers": 0}, "num_encoder_layers=0 must be at least 1"),
        ({"decoder_start_id": 40}, "decoder_start_id=40 is outside of vocab_size=40"),
        ({"decoder_start_id": -1}, "decoder_start_id=-1 is outside"),
        ({"final_dropout": 1.0}, "final_dropout=1.0 must be"),
        (
            {"encoder_overrides": (LayerOverride((2,), MLP(8, "relu", bias=False)),)},
            "encoder_overrides name layer 2, and num_encoder_layers=2 ends at 1",
        ),
    ],
)
def test_impossible_encoder_decoders(change: dict, sentence: str, config):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(config, **change)
