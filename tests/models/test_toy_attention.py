"""An attention of somebody else, defined here: it trains, shards, samples with its cache and is saved, with no line in
the package."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxtyping import Array, Float, Int

from llama_jax import LanguageModel, Run, RunConfig, generate, load, save
from llama_jax.config import UserError, override
from llama_jax.models import Compute, DecoderConfig, from_params, initialize
from llama_jax.nn import ForwardContext, Mixer, MixerModule, Projection, child
from llama_jax.parallel import einsum, shard
from llama_jax.run import train
from llama_jax.training import init_state, make_train_step

Cache = dict[str, Float[Array, "b n *rest"]]


@dataclasses.dataclass(frozen=True)
class LinearAttention(Mixer):
    """Attention without softmax (Katharopoulos et al. 2020): what was read is a matrix for each head, not a list.

    num_heads: heads.
    head_dim: size of a head.
    """

    num_heads: int
    head_dim: int

    def build(self, width: int, *, rngs: nnx.Rngs) -> "LinearAttentionModule":
        return LinearAttentionModule(self, width, rngs=rngs)


class LinearAttentionModule(MixerModule):
    def __init__(self, config: LinearAttention, width: int, *, rngs: nnx.Rngs):
        self.config = config
        outer, heads = {"embed": width}, {"heads": config.num_heads, "_head_dim": config.head_dim}
        self.q_proj = Projection(outer, heads, bias=False, rngs=child(rngs, "q_proj"))
        self.k_proj = Projection(outer, heads, bias=False, rngs=child(rngs, "k_proj"))
        self.v_proj = Projection(outer, heads, bias=False, rngs=child(rngs, "v_proj"))
        self.o_proj = Projection(heads, outer, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(
        self, x: Float[Array, "b t d"], *, positions: Int[Array, "b t"], ctx: ForwardContext, cache: Cache | None = None
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        q_BTNH, k_BSNH, v_BSNH = jax.nn.elu(self.q_proj(x)) + 1, jax.nn.elu(self.k_proj(x)) + 1, self.v_proj(x)
        if ctx.is_token is not None:
            k_BSNH = jnp.where(ctx.is_token[..., None, None], k_BSNH, 0)
        allowed = jnp.tri(x.shape[1], dtype=bool)[None]
        if (segment_ids := ctx.mask.segment_ids) is not None:
            allowed &= segment_ids[:, :, None] == segment_ids[:, None]
        heads = ("batch", "heads", None, None)
        weights_BNTS = jnp.where(allowed[:, None], einsum("btnh,bsnh->bnts", q_BTNH, k_BSNH, out=heads), 0)
        sums_BNTH = einsum("bnts,bsnh->bnth", weights_BNTS, v_BSNH, out=heads)
        total_BNT = weights_BNTS.sum(-1)
        if cache is not None:
            sums_BNTH += einsum("btnk,bnkh->bnth", q_BTNH, cache["products"], out=heads)
            total_BNT += einsum("btnk,bnk->bnt", q_BTNH, cache["keys"], out=heads[:3])
            cache = {
                "products": cache["products"] + einsum("bsnk,bsnh->bnkh", k_BSNH, v_BSNH, out=heads),
                "keys": cache["keys"] + k_BSNH.sum(1),
            }
        y_BNTH = sums_BNTH / (total_BNT[..., None] + 1e-6)
        return self.o_proj(shard(y_BNTH.swapaxes(1, 2), "batch", "sequence", "heads", None)), cache

    def init_cache(self, batch: int, length: int, dtype: Any) -> Cache:
        heads, size = self.config.num_heads, self.config.head_dim
        return {
            "products": shard(jnp.zeros((batch, heads, size, size), dtype), "batch", "heads", None, None),
            "keys": shard(jnp.zeros((batch, heads, size), dtype), "batch", "heads", None),
        }


TOY = LinearAttention(num_heads=4, head_dim=8)
COMPONENTS = (LinearAttention,)


@pytest.fixture(scope="module")
def config(two_layers: DecoderConfig) -> DecoderConfig:
    return override(two_layers, {"attention": TOY}, COMPONENTS)


@pytest.fixture(scope="module")
def run(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with it on all eight devices."""
    changes = {"model.attention": TOY, "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "num_steps": 4}
    config = override(run_config, changes | {"logging.sample_prompts": ()}, COMPONENTS)
    return train(config, tmp_path_factory.mktemp("toy") / "run")


@pytest.mark.slow
def test_trains_on_eight_devices_as_on_one(run: Run):
    config = run.config
    step, hyper = make_train_step(config.model, Compute()), config.optimizer.hyper(config.num_steps)
    state, losses = jax.jit(init_state)(initialize(config.model, config.seed), hyper), []
    for i in range(config.num_steps):
        state, metrics = step(state, jax.tree.map(jnp.asarray, run.batch(i)), hyper)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose([line["loss"] for line in run.metrics()], losses, rtol=2e-4)


@pytest.mark.slow
def test_its_checkpoint_is_read_where_it_is_named(run: Run):
    lm = load(run.directory, components=COMPONENTS)
    assert lm.config == run.config.model
    split = load(run.directory, components=COMPONENTS, mesh={"fsdp": 2, "tensor": 4})
    tokens = jnp.asarray([[1, 5, 9, 30, 7, 2, 4, 8]])
    np.testing.assert_allclose(split.model(tokens), lm.model(tokens), atol=1e-4)
    with pytest.raises(UserError, match="LinearAttention"):
        load(run.directory)


def test_is_saved_and_samples_with_its_cache(config: DecoderConfig, random_params, tmp_path: Path):
    params = {name: 3 * v if name.endswith("proj.weight") else v for name, v in random_params(config).items()}
    save(LanguageModel(config, from_params(config, params, Compute()), None), tmp_path / "toy")
    model = load(tmp_path / "toy", components=COMPONENTS).model
    for name, value in model.params().items():
        np.testing.assert_array_equal(value, params[name], err_msg=name)
    prompts, lengths, count = np.random.default_rng(0).integers(40, size=(3, 9)), np.array([5, 1, 9]), 12
    out = generate(model, prompts, max_new_tokens=count, prompt_lengths=lengths)
    logits = np.asarray(model(jnp.asarray(out)))
    new = np.stack([row[length : length + count] for row, length in zip(out, lengths, strict=True)])
    assert len(set(new.ravel().tolist())) > 6, "a model that repeats itself proves nothing"
    for row, length, scores in zip(new, lengths, logits, strict=True):
        np.testing.assert_array_equal(scores[length - 1 : length + count - 1].argmax(-1), row)


def test_packed_documents_are_separate_documents(config: DecoderConfig, random_params):
    model, (first, second) = from_params(config, random_params(config), Compute()), (5, 8)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(2, first + second))
    forward = functools.partial(model, positions=np.zeros_like(tokens))
    together = forward(tokens, segment_ids=np.repeat([[1, 2]], [first, second], axis=1).repeat(2, 0))
    # One program for both: padding behind a document is as if it were not there.
    for begin, end in ((0, first), (first, first + second)):
        alone = np.zeros_like(tokens)
        alone[:, : end - begin] = tokens[:, begin:end]
        segments = (np.arange(first + second) < end - begin).astype(int)[None].repeat(2, 0)
        apart = forward(alone, segment_ids=segments)
        np.testing.assert_allclose(together[:, begin:end], apart[:, : end - begin], atol=1e-4)
