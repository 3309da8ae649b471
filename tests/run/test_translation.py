"""A language is learned from pairs of sentences: trained, stopped, continued, and translated into."""

import dataclasses
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest

import llama_jax
from llama_jax.checkpoint import CheckpointConfig
from llama_jax.config import UserError, override
from llama_jax.data import DataConfig
from llama_jax.data.objectives import ParallelText
from llama_jax.models import Compute
from llama_jax.nn import SinusoidalPositions
from llama_jax.run import LoggingConfig, RunConfig, train
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, InverseSqrt
from llama_jax.zoo.transformer import transformer

WORDS = ["sun", "moon", "tree", "river", "stone", "bird", "fish", "wolf", "wind", "rain", "snow", "fire"]
BOS = 1 + 2 * len(WORDS)  # behind <unk> and the words of both languages


def translation(sentence: str) -> str:
    """The words in reverse, each spelt backwards, with an o."""
    return " ".join(word[::-1] + "o" for word in reversed(sentence.split()))


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    rng = random.Random(0)
    return list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(2, 5))) for _ in range(2500)))


@pytest.fixture(scope="module")
def config(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A post-norm Transformer of one layer on either side and the paper's recipe, on all but 64 of the sentences."""
    folder = tmp_path_factory.mktemp("translation")
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"en": s, "oe": translation(s)}) + "\n" for s in sentences[64:]))
    return RunConfig(
        model=transformer(
            vocab_size=32,
            hidden_size=32,
            num_encoder_layers=1,
            num_layers=1,
            encoder_heads=4,
            num_heads=4,
            encoder_intermediate_size=64,
            intermediate_size=64,
            max_positions=24,
            positions=SinusoidalPositions(),
            decoder_start_id=BOS,
            scale_embedding=True,
            dropout=0.0,
        ),
        tokenizer=TokenizerConfig(
            path=None, kind="whitespace", vocab_size=3 + 2 * len(WORDS), special_tokens=("<s>", "</s>")
        ),
        data=DataConfig(
            path=(str(pairs),),
            fields=("en", "oe"),
            objective=ParallelText(source_length=24),
            packing="best_fit",
            validation_fraction=0.0,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=AdamW(
            learning_rate=1e-2,
            warmup_steps=40,
            weight_decay=0.0,
            beta2=0.98,
            eps=1e-9,
            schedule=InverseSqrt(),
            label_smoothing=0.1,
        ),
        num_steps=100,
        global_batch_size=32,
        sequence_length=24,
        compute=Compute(scan_layers=False),
        checkpoint=CheckpointConfig(every_steps=100),
        logging=LoggingConfig(every_steps=20),
    )


@pytest.mark.slow
def test_sentences_never_seen_are_translated(
    config: RunConfig, sentences: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Hundreds of steps of a few small products, of which eight devices on two cores only wait for each other.
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: one)
    run = train(config, tmp_path / "run")
    assert [line["step"] for line in run.metrics()][-1] == 100
    run = train(dataclasses.replace(config, num_steps=200), tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in run.metrics()}
    assert losses[20] > losses[100] > losses[200]
    lm = llama_jax.load(tmp_path / "run")
    unseen = sentences[:64]
    answers = llama_jax.generate_text(lm, unseen, max_new_tokens=8, temperature=0.0)
    right = [answer == translation(sentence) for answer, sentence in zip(answers, unseen, strict=True)]
    assert np.mean(right) > 0.9
    # Not by heart: the words of a translation are in no other order, nor is it the same for all.
    assert len(set(answers)) > 60


def test_another_start_than_the_model_s_is_refused(config: RunConfig, tmp_path: Path):
    with pytest.raises(UserError, match=rf"decoder_start_id=3 is not the token {BOS} .*start_token"):
        train(override(config, {"model.decoder_start_id": 3}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_source_and_target_have_positions_of_their_own(config: RunConfig):
    """Each as many as the model has; a decoder alone would need both together."""
    assert config.sequence_length == config.data.objective.source_length == config.model.max_positions
    for change in ({"sequence_length": 25}, {"data.objective.source_length": 25}):
        with pytest.raises(UserError, match=r"longer than model\.max_positions=24"):
            override(config, change)
