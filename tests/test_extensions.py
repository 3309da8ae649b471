"""One of each kind of thing is added from outside of the package, and used: what CONTRIBUTING.md promises."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_run
from flax import nnx

import llama_jax
from llama_jax import tokenizers, zoo
from llama_jax.chips import CHIPS
from llama_jax.data import Vocabulary
from llama_jax.data.objectives import Document, Example, Objective
from llama_jax.data.readers import KINDS, Record, add_reader
from llama_jax.models import DecoderConfig
from llama_jax.nn import (
    FeedForward,
    FeedForwardModule,
    Mixer,
    MixerModule,
    Norm,
    Positions,
    PositionsModule,
    Projection,
    child,
    parameter,
)
from llama_jax.run import Logger
from llama_jax.tokenizers import TextStream, Tokenizer
from llama_jax.training import Optimizer, Schedule

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class RunningMean(Mixer):
    """Each token reads the mean of a projection of all tokens so far.

    scale: factor of the mean.
    """

    scale: float = 1.0

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return RunningMeanModule(self, width, rngs=rngs)


class RunningMeanModule(MixerModule):
    def __init__(self, config: RunningMean, width: int, *, rngs: nnx.Rngs):
        self.config = config
        self.v_proj = Projection({"embed": width}, {"mlp": width}, bias=False, rngs=child(rngs, "v_proj"))
        self.o_proj = Projection({"mlp": width}, {"embed": width}, bias=False, rngs=child(rngs, "o_proj"))

    def __call__(self, x: jax.Array, *, positions: jax.Array, ctx: Any, cache: Any = None) -> tuple[Any, ...]:
        count = jnp.arange(1, x.shape[1] + 1)[:, None]
        return self.o_proj(jnp.cumsum(self.v_proj(x), axis=1) / count * self.config.scale), cache


@dataclasses.dataclass(frozen=True)
class MaxNorm(Norm):
    """Divide by the largest absolute value."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return MaxNormModule(width, rngs=rngs)


class MaxNormModule(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.weight = parameter(rngs, "weight", (width,), (None,), std=None)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x / (jnp.abs(x).max(-1, keepdims=True) + 1e-6) * self.weight[...]


@dataclasses.dataclass(frozen=True)
class Ramp(Positions):
    """Add the position, scaled, to every entry of the embedding."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> PositionsModule:
        return RampModule(width)


class RampModule(PositionsModule):
    def __init__(self, width: int):
        self.width = width

    def __call__(self, positions: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.broadcast_to(0.01 * positions[..., None].astype(dtype), (*positions.shape, self.width))


@dataclasses.dataclass(frozen=True)
class Square(FeedForward):
    """The square of a projection, projected back.

    size: width between the two.
    """

    size: int

    def build(self, width: int, *, rngs: nnx.Rngs) -> FeedForwardModule:
        return SquareModule(self, width, rngs=rngs)


class SquareModule(FeedForwardModule):
    def __init__(self, config: Square, width: int, *, rngs: nnx.Rngs):
        self.up_proj = Projection({"embed": width}, {"mlp": config.size}, bias=False, rngs=child(rngs, "up_proj"))
        self.down_proj = Projection({"mlp": config.size}, {"embed": width}, bias=False, rngs=child(rngs, "down_proj"))

    def __call__(self, x: jax.Array, *, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        return self.down_proj(self.up_proj(x) ** 2), {"largest": jnp.abs(x).max()}


@dataclasses.dataclass(frozen=True)
class Backwards(Objective):
    """Every token from those after it.

    share: share of the targets that have a loss.
    """

    share: float = 1.0

    def lengths(self, num_tokens: Any, target_start: Any) -> tuple[np.ndarray, ...]:
        return (np.maximum(np.asarray(num_tokens) - 1, 0),)

    def example(self, document: Document, rng: np.random.Generator, vocabulary: Vocabulary) -> Example:
        tokens = document.tokens[::-1].astype(np.int32)
        length = len(tokens) - 1
        weights = (rng.random(length) < self.share).astype(np.float32)
        return {
            "tokens": tokens[:-1], "targets": tokens[1:], "weights": weights,
            "positions": np.arange(length, dtype=np.int32),
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Halving(Schedule):
    """Halve the learning rate every `period` steps.

    period: steps between two halvings.
    """

    period: float = 2.0

    def factor(self, step: Any, warmup_steps: Any, num_steps: Any, final_fraction: Any) -> Any:
        return 0.5 ** jnp.floor((step - warmup_steps) / self.period)


@dataclasses.dataclass(frozen=True)
class SignDescent(Optimizer):
    """Step by the sign of the gradient, scaled.

    scale: size of a step before the learning rate.
    """

    scale: float = 1.0

    def transform(self) -> optax.GradientTransformation:
        return optax.stateless(lambda updates, _: jax.tree.map(lambda x: self.scale * jnp.sign(x), updates))


class Characters(Tokenizer):
    """A token for each of the characters in its file, and BOS and EOS; other characters are unknown."""

    mark = b"characters "

    def __init__(self, files: Mapping[str, bytes]):
        self.files = files
        self.characters = next(iter(files.values()))[len(self.mark) :].decode()
        self.bos_id, self.eos_ids, self.pad_id, self.unk_id = 0, (1,), None, 2
        self.special_tokens = {"<s>": 0, "</s>": 1}
        self.vocab_size = 3 + len(self.characters)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [
            [self.characters.find(character) + 3 if character in self.characters else 2 for character in text]
            for text in texts
        ]

    def stream(self) -> TextStream:
        return CharacterStream(self)


class CharacterStream(TextStream):
    def __init__(self, tokenizer: Characters):
        self.tokenizer = tokenizer

    def feed(self, token_id: int) -> str:
        token_id = self.tokenizer.check_id(token_id)
        return "\ufffd" if token_id == 2 else "" if token_id < 2 else self.tokenizer.characters[token_id - 3]

    def flush(self) -> str:
        return ""


def read_characters(path: Path, content: bytes, settings: Any) -> Tokenizer | None:
    """Recognise the file of `Characters`."""
    if not content.startswith(Characters.mark):
        return None
    return Characters({"tokenizer.model": content, **settings.files})


def read_poem(unit: Any, config: Any) -> Iterator[Record]:
    """Read a document from every line of a file."""
    for number, line in enumerate(Path(unit.file.place).read_text("utf-8").splitlines()):
        yield Record((line,), f"line {number + 1} of '{unit.file.path}'")


class Keeper(Logger):
    """Keep the metrics of each step, and when the run ended."""

    rows: ClassVar[list[dict[str, Any]]] = []
    closed: ClassVar[bool] = False

    def write(self, metrics: dict[str, Any]) -> None:
        self.rows.append(metrics)

    def close(self) -> None:
        type(self).closed = True


PIECES = {
    "model.attention": RunningMean(scale=2.0),
    "model.norm": MaxNorm(),
    "model.positions": Ramp(),
    "model.feed_forward": Square(size=24),
    "data.objective": Backwards(share=0.9),
    "optimizer": SignDescent(learning_rate=1e-2, warmup_steps=1, schedule=Halving(period=1.0)),
}
COMPONENTS = (*(type(piece) for piece in PIECES.values()), Halving)


@pytest.mark.slow
def test_one_run_with_everything_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = tiny_run.write_texts(tmp_path / "texts")
    poem = "\n".join(file.read_text() for file in sorted(texts.iterdir()))
    (tmp_path / "lines.poem").write_text(poem)
    monkeypatch.setattr(tokenizers.loading, "READERS", [read_characters, *tokenizers.READERS])
    (tmp_path / "tokenizer.model").write_bytes(Characters.mark + "".join(sorted(set(poem) - {"\n"})).encode())
    monkeypatch.setattr("llama_jax.data.readers.KINDS", [*KINDS])
    add_reader("poem", r"\.poem$", read_poem)
    config = llama_jax.override(
        tiny_run.get_config(),
        {
            "data.path": (str(tmp_path / "lines.poem"),), "data.cache_dir": str(tmp_path / "cache"), "num_steps": 4,
            "tokenizer.path": str(tmp_path / "tokenizer.model"), "logging.sample_prompts": (),
            "checkpoint.every_steps": 2, **PIECES,
        },
    )  # fmt: skip
    run = llama_jax.train(config, tmp_path / "run", components=COMPONENTS, loggers=(Keeper,))
    rows = run.metrics()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["largest"] > 0
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2, 1e-2, 5e-3, 2.5e-3])
    assert [row["loss"] for row in Keeper.rows] == [row["loss"] for row in rows]
    assert Keeper.closed
    assert isinstance(run.tokenizer, Characters)
    num_documents = run.dataset.corpora["data"].num_documents
    assert sum(num_documents.values()) == sum(line != "" for line in poem.splitlines())

    # What was trained with classes from here is loaded with them, and refused without.
    lm = llama_jax.load(tmp_path / "run", components=COMPONENTS)
    assert lm.config == dataclasses.replace(config.model, vocab_size=lm.config.vocab_size)
    assert np.isfinite(lm.model(jnp.array([[3, 5, 7]]))).all()
    with pytest.raises(llama_jax.UserError, match=r"components=\("):
        llama_jax.load(tmp_path / "run")
    again = llama_jax.open_run(tmp_path / "run", components=COMPONENTS)
    assert again.config == run.config


@dataclasses.dataclass(frozen=True)
class Cheat(RunningMean):
    """Each token reads the mean of all tokens of its row."""

    def build(self, width: int, *, rngs: nnx.Rngs) -> MixerModule:
        return CheatModule(self, width, rngs=rngs)


class CheatModule(RunningMeanModule):
    def __call__(self, x: jax.Array, *, positions: jax.Array, ctx: Any, cache: Any = None) -> tuple[Any, ...]:
        return self.o_proj(self.v_proj(x).mean(1, keepdims=True) + 0 * x), cache


def test_a_mixer_that_cheats_leaves_nothing_behind(tmp_path: Path):
    texts = tiny_run.write_texts(tmp_path / "texts")
    keys = {"data.path": (str(texts),), "data.cache_dir": str(tmp_path / "cache"), "logging.sample_prompts": ()}
    keys |= {"model.attention": Cheat(), "compute.preflight": True}
    config = llama_jax.override(tiny_run.get_config(), keys, (Cheat,))
    with pytest.raises(llama_jax.UserError, match="attention=Cheat lets a token see later tokens of its row"):
        llama_jax.train(config, tmp_path / "run", components=(Cheat,))
    assert not (tmp_path / "run").exists()


def test_choices_are_named_on_the_command_line():
    config = llama_jax.override(
        tiny_run.get_config(),
        {
            "model.feed_forward": "Square", "model.feed_forward.size": "8",
            "optimizer": "SignDescent", "optimizer.schedule": "Halving", "optimizer.schedule.period": "3",
        },
        COMPONENTS,
    )  # fmt: skip
    assert config.model.feed_forward == Square(8)
    assert config.optimizer == SignDescent(learning_rate=1e-2, warmup_steps=3, schedule=Halving(3.0))


def test_a_control_of_ones_own_changes_logits(tiny_config: DecoderConfig):
    def ban_last(logits: jax.Array, written: Any) -> jax.Array:
        last = jnp.take_along_axis(written.tokens, written.lengths[:, None] - 1, axis=1)
        return jnp.where(jnp.arange(logits.shape[1]) == last, -jnp.inf, logits)

    model, prompts = llama_jax.build(tiny_config, seed=0), np.array([[3, 5, 7]])
    ids = llama_jax.generate(model, prompts, max_new_tokens=6)[0]
    banned = llama_jax.generate(model, prompts, max_new_tokens=6, controls=[ban_last])[0]
    assert any(ids[i] == ids[i + 1] for i in range(2, 8))  # a model with random weights repeats itself
    assert all(banned[i] != banned[i + 1] for i in range(2, 8))


def test_a_family_of_ones_own_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llama_jax.zoo.registry._registered", {})
    llama = zoo.family("llama")
    keys = [dataclasses.replace(key, key="width") if key.key == "hidden_size" else key for key in llama.keys]
    own = dataclasses.replace(
        llama, name="mine", title="Mine", label="a Mine", presets={"mine_7b": llama.presets["llama2_7b"]},
        keys=tuple(keys), architectures=("Mine",),
    )  # fmt: skip
    shutil.copytree(ROOT / "tests" / "directories" / "goldens" / "llama2", tmp_path / "mine")
    file = tmp_path / "mine" / "config.json"
    data = json.loads(file.read_text())
    data |= {"model_type": "mine", "architectures": ["Mine"], "width": data.pop("hidden_size")}
    file.write_text(json.dumps(data))
    with pytest.raises(llama_jax.UserError, match="mine"):
        llama_jax.load(tmp_path / "mine")
    zoo.register(own)
    lm = llama_jax.load(tmp_path / "mine")
    llama_jax.save(lm, tmp_path / "again", format="hf")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (written["model_type"], written["width"]) == ("mine", data["width"])
    tokens = jnp.array([[3, 5, 7]])
    assert (llama_jax.load(tmp_path / "again").model(tokens) == lm.model(tokens)).all()


def test_a_chip_of_ones_own_is_planned_for(monkeypatch: pytest.MonkeyPatch):
    fast = dataclasses.replace(CHIPS["v5e"], name="fast", kinds=("Fast",), peak_flops=2 * CHIPS["v5e"].peak_flops)
    monkeypatch.setitem(CHIPS, "fast", fast)
    config = llama_jax.load_config("llama3_2_1b", {"global_batch_size": 64})
    slow, fast = (llama_jax.plan(config, f"{name}:4x4").plan for name in ("v5e", "fast"))
    assert fast.total_bytes == slow.total_bytes
    assert fast.step_seconds < 0.7 * slow.step_seconds
