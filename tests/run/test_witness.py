"""Every option has a witness: changing it alone changes something that can be seen.

The leaves are found by the test itself; one that nothing shows to matter fails. What can be seen is looked at from the
cheap to the dear: an error, the parameters' shapes, hyper-parameters, the tokenizer, the corpus, batches, the mesh, the
lowered programs, and at last what a run with a train step of no cost writes.
"""

import contextlib
import dataclasses
import functools
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from jax.sharding import NamedSharding

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.config import UserError, leaves, override
from llama_jax.data import DataConfig, Dataset, Source, Stage, Vocabulary, prepare_dataset
from llama_jax.data.chat import Llama2Chat
from llama_jax.data.objectives import Prefix
from llama_jax.models import Compute, DecoderConfig, abstract_params
from llama_jax.models.config import LayerOverride
from llama_jax.nn import (
    Alibi,
    Experts,
    GroupedQuery,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    LoRA,
    NTKScaling,
    RMSNorm,
    RopeScaling,
    SinusoidalPositions,
    SoftmaxTopK,
    SwiGLU,
    SwitchRouter,
    YarnScaling,
)
from llama_jax.parallel import make_mesh, spec
from llama_jax.run import (
    LoggingConfig,
    ProfileConfig,
    Run,
    RunConfig,
    RunFailed,
    directory,
    hardware,
    preparing,
    skipped,
    train,
    training,
)
from llama_jax.run.preparing import trained_tokenizer
from llama_jax.run.programs import programs
from llama_jax.run.watchdog import watching
from llama_jax.tokenizers import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer
from llama_jax.training import AdamW, TrainState, init_state, make_train_step


class OtherAttention(GroupedQuery):
    def build(self, width: int, *, rngs: nnx.Rngs) -> Any:
        return (
            dataclasses.replace(self, rope=None).build(width, rngs=rngs)
            if self.rope
            else super().build(width, rngs=rngs)
        )


class OtherFeedForward(SwiGLU):
    def build(self, width: int, *, rngs: nnx.Rngs) -> Any:
        return SwiGLU(self.intermediate_size, bias=True).build(width, rngs=rngs)


class OtherNorm(RMSNorm):
    def build(self, width: int, *, rngs: nnx.Rngs) -> Any:
        return RMSNorm(0.5).build(width, rngs=rngs)


class OtherModel(DecoderConfig):
    def build_parts(self, *, rngs: nnx.Rngs) -> Any:
        return DecoderConfig.build_parts(dataclasses.replace(self, norm=RMSNorm(0.5)), rngs=rngs)


def other_class(cls: type, value: Any) -> Any:
    return cls(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


# What a leaf becomes where doubling, halving, negating or the next choice would not do.
CHANGES: dict[str, Callable[[RunConfig, Path], Any]] = {
    "model": lambda config, _: other_class(OtherModel, config.model),
    "model.attention": lambda config, _: other_class(OtherAttention, config.model.attention),
    "model.feed_forward": lambda config, _: other_class(OtherFeedForward, config.model.feed_forward),
    "model.norm": lambda config, _: other_class(OtherNorm, config.model.norm),
    "model.overrides": lambda config, _: (LayerOverride((0,), other_class(OtherAttention, config.model.attention)),),
    "model.max_positions": lambda *_: 16,  # shorter than the sequences
    "model.positions": lambda *_: SinusoidalPositions(),
    "model.position_bias": lambda config, _: Alibi(config.model.attention.num_heads),
    "model.embedding_norm": lambda *_: RMSNorm(0.5),
    "model.logit_softcap": lambda *_: 5.0,
    "model.adapters": lambda *_: LoRA(),
    "model.attention.rope.scaling": lambda *_: LinearScaling(7.0),
    "model.attention.rope.rotary_dim": lambda *_: 4,
    "model.attention.rope.scaling.short_factor": lambda *_: (3.0,) * 8,
    "model.attention.rope.scaling.long_factor": lambda *_: (5.0,) * 8,
    "model.attention.scale": lambda *_: 0.5,
    "model.attention.qk_norm": lambda *_: RMSNorm(0.5),
    "model.attention.window": lambda *_: 5,
    "model.attention.softcap": lambda *_: 5.0,
    "model.feed_forward.router": lambda *_: SwitchRouter(0.0),
    "model.feed_forward.activation": lambda *_: "relu",
    "model.feed_forward.limit": lambda *_: 1.0,
    "model.feed_forward.shared_size": lambda *_: 8,
    "model.feed_forward.capacity": lambda *_: 4,
    "model.feed_forward.capacity_factor": lambda *_: 1.0,
    "tokenizer.path": lambda _, folder: str(folder / "tokenizer"),
    "tokenizer.vocab_size": lambda *_: 290,
    "tokenizer.special_tokens": lambda *_: ("<pad>",),
    "data.path": lambda config, _: (config.data.path[0] + "/1*.txt",),
    "data.exclude": lambda *_: ("*7.txt",),
    "data.fields": lambda *_: ("content",),
    "data.max_record_bytes": lambda *_: 30,
    "data.max_bad_records": lambda *_: 0,
    "data.chat_template": lambda *_: Llama2Chat(),
    "data.objective": lambda *_: Prefix(),
    "data.sources": lambda config, _: (Source("one", ("a.txt",), share=1.0), *config.data.sources[1:]),
    "data.stages": lambda *_: (Stage(1, (1.0, 0.0)),),
    "data.skip_batches": lambda *_: (0,),
    "data.document_chars": lambda *_: 100,
    "data.cache_dir": lambda _, folder: str(folder / "elsewhere"),
    "optimizer": lambda *_: "Lion",
    "optimizer.schedule": lambda *_: "Linear",
    "compute.dtype": lambda *_: "float32",
    "compute.attention_kernel": lambda *_: "blockwise",
    "compute.loss_chunk": lambda *_: 8,
    "compute.pipeline_microbatches": lambda *_: 2,
    "init_from": lambda _, folder: str(folder / "nowhere"),
    "mesh.fsdp": lambda *_: 4,
    "checkpoint.keep_best": lambda *_: 3,
    "checkpoint.every_minutes": lambda *_: 1e-9,
    "checkpoint.keep_every_steps": lambda *_: 1,
    "logging.validation_batches": lambda *_: 1,
    "logging.sample_prompts": lambda *_: ("the cat", "a mat"),
    "logging.sample_every_steps": lambda *_: 2,
    "logging.wandb_project": lambda *_: "mine",
    "checks.max_skipped_steps": lambda *_: 1,
    "checks.spike_zscore": lambda *_: 5.0,
    "checks.every_steps": lambda *_: 3,
    "profile.start_step": lambda *_: 5,
    "resume.allow": lambda *_: ("no.such.key",),
}  # fmt: skip


def changed(config: RunConfig, key: str, annotation: Any, value: Any, folder: Path) -> Any:
    if key in CHANGES:
        return CHANGES[key](config, folder)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2 * value or 1
    if isinstance(value, float):
        return value / 2 or 0.5
    if typing.get_origin(annotation) is typing.Literal:
        return next(option for option in typing.get_args(annotation) if option != value)
    raise AssertionError(f"say in CHANGES what '{key}' becomes: it is {value!r}")


@pytest.fixture(scope="module")
def folder(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a JSONL file beside the texts, of whose records one is bad, and a tokenizer of another kind."""
    folder = tmp_path_factory.mktemp("witness")
    texts = sorted(Path(run_config.data.path[0]).iterdir())
    (folder / "texts").mkdir()
    for file in texts:
        (folder / "texts" / file.name).write_text(file.read_text())
    lines = '{"text": "a line of its own", "content": "another line"}\n{"a bad record": 1}\n'
    (folder / "texts" / "more.jsonl").write_text(lines)
    train_tokenizer([file.read_text() for file in texts], kind="unigram", vocab_size=280).save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def base(run_config: RunConfig, folder: Path) -> RunConfig:
    """Saved, measured and profiled often enough for every policy to show."""
    return dataclasses.replace(
        run_config,
        model=dataclasses.replace(run_config.model, num_layers=2),  # scanning one layer is no scan
        data=dataclasses.replace(
            run_config.data, path=(str(folder / "texts"),), cache_dir=str(folder / "cache"), max_bad_records=1
        ),
        compute=Compute(dtype="bfloat16"),  # for it to matter when a norm rounds
        checkpoint=CheckpointConfig(every_steps=2, keep_last=2, keep_best=1),
        logging=LoggingConfig(every_steps=3, validate_every_steps=2, sample_prompts=("the",)),
        profile=ProfileConfig(start_step=3),
    )


def variants(base: RunConfig, folder: Path) -> list[RunConfig]:
    """Configs that together have all leaves."""
    scalings: list[RopeScaling] = [
        LinearScaling(2.0),
        NTKScaling(2.0),
        YarnScaling(4.0, 32, 2.0, 1.0, 1.0, 0.5),
        Llama3Scaling(4.0, 1.0, 4.0, 32),
        LongRopeScaling((1.0,) * 8, (2.0,) * 8, 32, 1.1),
    ]
    # A small theta and more pairs: each of the scalings' thresholds lies between two of them.
    rope = {"model.attention.head_dim": 16, "model.attention.rope.theta": 10.0}
    groups = SoftmaxTopK(1, normalize=False, num_groups=2, top_groups=1)
    experts = Experts(4, 16, groups, "silu", gated=True, load_balance_loss=0.1)
    path, own = base.data.path, {"tokenizer.path": str(folder / "tokenizer")}
    sources = (Source("some", (path[0] + "/0*.txt",), share=0.5), Source("more", (path[0] + "/1*.txt",), share=0.5))
    return [
        base,
        override(base, own),  # weights of others come with their tokenizer
        override(base, {"checks.spike_zscore": 5.0}),
        override(base, {"model.attention.qk_norm": RMSNorm(0.5)}),
        override(base, {"model.feed_forward": experts}),
        override(base, {"model.feed_forward": dataclasses.replace(experts, num_shared=1)}),
        override(base, {"data.path": (), "data.sources": sources, "data.validation_fraction": 0.0}),
        *(override(base, rope | {"model.attention.rope.scaling": scaling}) for scaling in scalings),
    ]


# What is seen of a config. Each returns something to be compared, or raises UserError.


@functools.cache
def tokenizer_of(config: TokenizerConfig, data: DataConfig) -> Tokenizer:
    if config.path is not None:
        return load_tokenizer(config.path)
    return trained_tokenizer(config, data)


@functools.cache
def dataset_of(config: TokenizerConfig, data: DataConfig, sequence_length: int, seed: int) -> Dataset:
    tokenizer = tokenizer_of(config, data)
    directories = prepare_dataset(data, tokenizer, sequence_length=sequence_length)
    return Dataset(data, directories, Vocabulary.of(tokenizer), sequence_length=sequence_length, seed=seed)


@functools.cache
def loop_of(config: RunConfig) -> Any:
    """The run's own loop, not started: what it makes of the config is looked at."""
    dataset = dataset_of(config.tokenizer, config.data, config.sequence_length, config.seed)
    with jax.set_mesh(make_mesh(config.mesh)):
        return training.Loop(Run(Path("unused"), config), dataset, 1)


@functools.cache
def first_batches(tokenizer: TokenizerConfig, data: DataConfig, rows: int, length: int, seed: int) -> Any:
    """Two batches, and how many were prepared when they were taken."""
    asked: list[int] = []
    sizes = {"global_batch_size": rows, "sequence_length": length, "seed": seed}
    config = dataclasses.replace(tiny_run.get_config(), tokenizer=tokenizer, data=data, **sizes)
    found = Run(Path("unused"), config).batches(dataset_of(tokenizer, data, length, seed))
    made = found.batch
    found.batch = lambda step: asked.append(step) or made(step)  # type: ignore[method-assign,func-returns-value]
    iterator = found.iterate()
    first = [{name: x.tolist() for name, x in next(iterator).items()} for _ in range(2)]
    prepared = -1
    while prepared != (prepared := len(asked)):
        time.sleep(0.1)
    return first, prepared


def step_program(model: DecoderConfig, compute: Compute, optimizer: AdamW, rows: int, length: int) -> str:
    return step_program_on(jax.sharding.get_mesh(), model, compute, optimizer, rows, length)


@functools.cache
def step_program_on(mesh: Any, model: DecoderConfig, compute: Compute, optimizer: AdamW, rows: int, length: int) -> str:
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    hyper = optimizer.hyper(1)
    if not mesh.empty:
        batch = {k: x.update(sharding=NamedSharding(mesh, spec("batch", "sequence"))) for k, x in batch.items()}
    state = jax.eval_shape(init_state, abstract_params(model), hyper)
    step = make_train_step(model, compute, accumulation_steps=optimizer.accumulation_steps)
    return step.lower(state, batch, hyper).as_text()


@functools.cache
def shapes(model: DecoderConfig) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in abstract_params(model).items()}


def parameters(config: RunConfig) -> Any:
    return shapes(config.model)


def hyper(config: RunConfig) -> Any:
    """That the step minds each of them is shown in tests/training."""
    values, optimizer = jax.tree.flatten(loop_of(config).hyper)
    return [float(value) for value in values], optimizer


def mesh(config: RunConfig) -> Any:
    config.check_mesh(8)
    return config.mesh.sizes(8)


def tokenizer(config: RunConfig) -> Any:
    return tokenizer_of(config.tokenizer, config.data).fingerprint


def corpus(config: RunConfig) -> Any:
    found = dataset_of(config.tokenizer, config.data, config.sequence_length, config.seed)
    return [corpus.directory for corpus in found.corpora.values()], found.content_hash


def batches(config: RunConfig) -> Any:
    rows, length, seed = config.global_batch_size, config.sequence_length, config.seed
    return first_batches(config.tokenizer, config.data, rows, length, seed)


def program(config: RunConfig) -> Any:
    """Of the train step; its hyper-parameters are traced, so that their values are not in it."""
    optimizer = AdamW(1.0, 1, accumulation_steps=config.optimizer.accumulation_steps)
    return step_program(config.model, config.compute, optimizer, config.global_batch_size, config.sequence_length)


def program_on_a_mesh(config: RunConfig) -> Any:
    """With the sequence split."""
    with jax.set_mesh(make_mesh({"context": 2}, jax.devices()[:2])):
        return program(config)


def program_of_stages(config: RunConfig) -> Any:
    """With four layers over two stages."""
    with jax.set_mesh(make_mesh({"pipeline": 2}, jax.devices()[:2])):
        return program(dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=4)))


def files(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a run writes and where it sends it, the steps' arithmetic left out."""
    events: list[Any] = []

    def train_step(state: TrainState, batch: Any, hyper: Any) -> Any:
        value = 1 / (1 + state.step)
        metrics = dict.fromkeys(("loss", "grad_norm", "learning_rate"), value)
        # One that is skipped, and a spike.
        metrics["loss"] = {1: jnp.float32(jnp.nan), 6: jnp.float32(100)}.get(int(state.step), value)
        return dataclasses.replace(state, step=state.step + 1), metrics

    def eval_step(*_: Any) -> Any:  # better every time, and not the same for every batch
        return np.float32(1 / (1 + next(evaluations))), np.float32(1)

    evaluations = iter(range(10**6))
    values = {
        "programs": lambda config: dataclasses.replace(programs(config), train_step=train_step, eval_step=eval_step),
        "checked": lambda *_: events.append("preflight") or [],
        "check_devices": lambda: events.append("devices"),
        "watching": lambda seconds: events.append(("watching", seconds)) or watching(None),
    }
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = ModuleSpec("wandb", None)
    wandb.init = lambda **kwargs: types.SimpleNamespace(  # type: ignore[attr-defined]
        log=lambda metrics, step: events.append(("wandb", step)), finish=lambda: None
    )

    @contextlib.contextmanager
    def trace(directory: str, **_: Any) -> Iterator[None]:
        events.append(("trace", Path(directory).name, len(taken)))
        yield
        events.append(("traced", len(taken)))

    taken: list[int] = []
    to_devices = training.to_devices
    values["to_devices"] = lambda *args: taken.append(0) or to_devices(*args)
    with monkeypatch.context() as patch:
        for name, value in values.items():
            patch.setattr(training, name, value)
        patch.setattr(hardware, "taken_twice", lambda step, *args: events.append("twice") or step(*args))
        patch.setattr(skipped, "LEAST", 3)
        patch.setattr(directory, "generate_text", lambda lm, prompts, **_: ["..."] * len(prompts))
        patch.setattr(preparing, "trained_tokenizer", lambda config, data, *_: tokenizer_of(config, data))
        patch.setattr(jax.profiler, "trace", trace)
        patch.setitem(sys.modules, "wandb", wandb)
        run = train(config, folder / "run")
    told = [{k: v for k, v in m.items() if k not in ("mfu", "tokens_per_second")} for m in run.metrics()]
    top = {path.name for path in run.directory.iterdir()} - {"config.json"}
    samples = run.directory / "samples.txt"
    return told, run.steps(), top, events, samples.read_text() if samples.exists() else None, next(evaluations)


def seen(look: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return look(*arguments)
    except (UserError, RunFailed) as error:
        return str(error)


@pytest.mark.slow
def test_every_leaf_has_a_witness(base: RunConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @functools.cache
    def written(config: RunConfig) -> Any:
        directory = tmp_path / str(written.cache_info().misses)
        directory.mkdir()
        return files(config, directory, monkeypatch)

    cheap = (parameters, mesh, tokenizer, corpus, batches, hyper)
    witnesses: dict[str, str] = {}
    for config in variants(base, folder):
        for key, annotation, value in leaves(config):
            if witnesses.get(key) not in (None, "", "error"):  # what shows nothing in one of them may in another
                continue
            witnesses[key] = ""
            try:
                new = override(config, {key: changed(config, key, annotation, value, folder)})
            except UserError:
                witnesses[key] = "error"
                continue
            assert new != config, key
            told_only = key.startswith(("checkpoint.", "logging.", "checks.", "profile.", "resume."))
            programs_of = () if told_only else (program, program_on_a_mesh, program_of_stages)
            for look in (*cheap, *programs_of, written):
                if seen(look, config) != seen(look, new):
                    witnesses[key] = look.__name__
                    break
    unseen = [key for key, witness in witnesses.items() if not witness]
    assert not unseen, f"nothing shows that these matter: {', '.join(unseen)}"
    assert len(witnesses) > 60
    # An error shows nothing where the value was meant to be possible.
    assert [key for key, witness in witnesses.items() if witness == "error"] == ["model.max_positions"]
    by = {look: [key for key, witness in witnesses.items() if witness == look] for look in set(witnesses.values())}
    assert "model.attention.rope.theta" in by["program"]
    assert "logging.tensorboard" in by["written"]
    # Beyond leaving out a metric that only all of the text can give, it saves work.
    assert written(override(base, {"logging.validation_batches": 1}))[-1] < written(base)[-1]
