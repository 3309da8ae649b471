"""An encoder is trained on masked tokens and pairs, continued, and fine-tuned to tell texts apart."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.__main__ import parse
from llama_jax.checkpoint import CheckpointConfig
from llama_jax.commands import sample_command
from llama_jax.config import UserError
from llama_jax.data import DataConfig, ValidationBatches
from llama_jax.data.objectives import Classification, MaskedLM
from llama_jax.evaluation import evaluate
from llama_jax.models import Compute
from llama_jax.run import LoggingConfig, Run, RunConfig, train
from llama_jax.run.preparing import inheritance
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW, Linear
from llama_jax.zoo.bert import encoder

WORDS = {"animal": "cat dog hen pig cow", "colour": "red blue green pink grey"}
NUM_STEPS = 4


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder, rng = tmp_path_factory.mktemp("encoder"), random.Random(0)
    with (folder / "texts.jsonl").open("w") as file:
        for i in range(60):
            label, words = list(WORDS.items())[i % 2]
            text = " ".join(rng.choices(f"{words} runs sits eats sees sleeps".split(), k=9))
            file.write(json.dumps({"text": text, "label": label}) + "\n")
    heads = {"pooler": True, "pair_head": True, "head_transform": "gelu", "head_bias": "trained"}
    model = encoder(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        max_positions=48,
        num_token_types=2,
        eps=1e-12,
        **heads,
    )
    return RunConfig(
        model=model,
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=290),
        data=DataConfig(
            path=(str(folder / "texts.jsonl"),),
            objective=MaskedLM(),
            packing="best_fit",
            validation_fraction=0.3,
            cache_dir=str(folder / "cache"),
        ),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=2, schedule=Linear()),
        num_steps=NUM_STEPS,
        global_batch_size=8,
        sequence_length=48,
        compute=Compute(preflight=False),
        checkpoint=CheckpointConfig(every_steps=2),
        logging=LoggingConfig(every_steps=1),
    )


@pytest.fixture(scope="module")
def pretrained(pretraining: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(pretraining, tmp_path_factory.mktemp("pretrained") / "run")


def fine_tuning(pretrained: Run, **changes) -> RunConfig:
    config = pretrained.config
    model = dataclasses.replace(
        config.model, pair_head=False, head_transform=None, head_bias="none", num_classes=2, dropout=0.0
    )
    data = dataclasses.replace(config.data, objective=Classification(tuple(WORDS)), fields=("text", "label"))
    tokenizer = dataclasses.replace(config.tokenizer, path=str(pretrained.directory / "tokenizer"))
    new = {"init_from": str(pretrained.directory), "model": model, "data": data, "tokenizer": tokenizer}
    return dataclasses.replace(config, **{"num_steps": 40} | new | changes)


@pytest.mark.slow
def test_pretraining_continues_where_it_stopped(pretrained: Run, tmp_path: Path):
    metrics = pretrained.metrics()
    assert all(np.isfinite([line["loss"], line["pair_loss"]]).all() for line in metrics)
    assert len(metrics) == NUM_STEPS
    stopped = Run(tmp_path / "again", pretrained.config)
    shutil.copytree(pretrained.directory, stopped.directory, ignore=shutil.ignore_patterns("4", "metrics.jsonl"))
    assert stopped.steps() == [2]
    train(pretrained.config, stopped.directory)
    same = ("loss", "pair_loss", "grad_norm")
    assert [[line[key] for key in same] for line in stopped.metrics()] == [
        [line[key] for key in same] for line in metrics[2:]
    ]


@pytest.mark.slow
def test_a_fine_tuned_classifier_is_right_about_texts_it_has_not_seen(pretrained: Run, tmp_path: Path, capsys):
    run = train(fine_tuning(pretrained), tmp_path / "run")
    said = " ".join("".join(capsys.readouterr()).split())
    assert "classifier.bias, classifier.weight are new" in said
    assert "head_bias.bias, head_transform.dense.bias" in said
    assert f"pair_head.weight of '{pretrained.directory}' are left out" in said

    def right(module, batch):
        (prediction,), _ = module.loss_terms(batch)
        best = prediction.head(prediction.hidden, prediction.head_weight).argmax(-1)
        return ((best == prediction.targets) * prediction.weights).sum(), prediction.weights.sum()

    model = run.load().model
    held_out = ValidationBatches(run.dataset.validation, global_batch_size=8, max_batches=None, rows=range(8))
    counts = [model.run(right, {name: jnp.asarray(x) for name, x in batch.items()}) for batch in held_out]
    correct, asked = (sum(float(x) for x in column) for column in zip(*counts, strict=True))
    assert asked >= 10
    assert correct == asked
    found = evaluate(run, quiet=True).results["held-out"]
    assert (found["n"], found["accuracy"], found["f1_macro"], found["mcc"]) == (asked, 1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_that_it_is_given(pretrained: Run, tmp_path: Path):
    config = fine_tuning(pretrained, num_steps=1)
    still = dataclasses.replace(config.optimizer, learning_rate=1e-30)
    run = train(dataclasses.replace(config, optimizer=still), tmp_path / "run")
    before, after = pretrained.load().model.params(), run.load().model.params()
    taken = set(inheritance(config)[0])
    assert set(after) - taken == {"classifier.weight", "classifier.bias"}
    assert "layers.attention.q_proj.weight" in taken
    for name in taken:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)


@pytest.mark.slow
def test_what_cannot_be_begun_with_is_told_before_anything_is_written(pretrained: Run, tmp_path: Path):
    config = fine_tuning(pretrained)
    with pytest.raises(UserError, match=r"init_from=.* needs the tokenizer.*set tokenizer.path"):
        dataclasses.replace(config, tokenizer=pretrained.config.tokenizer)
    with pytest.raises(UserError, match="does not exist"):
        train(dataclasses.replace(config, init_from=str(tmp_path / "nowhere")), tmp_path / "run")
    other = dataclasses.replace(config.model, hidden_size=16, num_classes=2)
    with pytest.raises(UserError, match=r"another embedding than model \(\(300, 32\), not \(300, 16\)\)"):
        train(dataclasses.replace(config, model=other), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_encoder_is_asked_for_no_text(pretrained: Run):
    with pytest.raises(UserError, match="EncoderConfig continues no texts"):
        sample_command(parse(["sample", str(pretrained.directory), "--prompt", "cat"]))
    logging = dataclasses.replace(pretrained.config.logging, sample_prompts=("cat",))
    with pytest.raises(UserError, match=r"logging\.sample_prompts are no task for EncoderConfig"):
        dataclasses.replace(pretrained.config, logging=logging)
