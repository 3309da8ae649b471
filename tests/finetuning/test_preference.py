"""Direct preference optimization: the loss of TRL, the same on every mesh and in micro-batches; texts and chats."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import llama_jax
from llama_jax.config import UserError
from llama_jax.data import Preference, Vocabulary
from llama_jax.data.objectives.base import Document
from llama_jax.data.rows.packing import pack
from llama_jax.models import Compute, abstract_params, frozen
from llama_jax.parallel import make_mesh, shard
from llama_jax.training import AdamW, init_state, make_eval_step, make_train_step
from llama_jax.training.step import _loss

GOLDENS = Path(__file__).parent / "goldens"
GOLDEN = json.loads((GOLDENS / "dpo.json").read_text())
OBJECTIVE = Preference(beta=GOLDEN["beta"])
HYPER = AdamW(learning_rate=1e-2, warmup_steps=0, weight_decay=0.0).hyper(10)
VOCABULARY = Vocabulary(size=64, bos_id=1, eos_id=2, pad_id=0, special={}, start_ids=(1,))


def document(pair: dict[str, list[int]]) -> Document:
    """The pair as a shard holds it: EOS ends the document."""
    prompt, chosen, rejected = (pair[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
    tokens = np.array([*prompt, *chosen[:-1], *rejected], np.int32)
    return Document(tokens, (len(prompt), len(prompt) + len(chosen) - 1))


def batch_of(rows: list[list[dict[str, list[int]]]], length: int = 24) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    packed = [pack([OBJECTIVE.example(document(p), rng, VOCABULARY) for p in row], length, None) for row in rows]
    return {name: jnp.stack([jnp.asarray(row[name]) for row in packed]) for name in packed[0]}


@functools.cache
def golden():
    """Config and, on the host, the state before the first step."""
    policy, base = (llama_jax.load(GOLDENS / "llama" / name, dtype="float32") for name in ("adapter", "base"))
    begin = jax.jit(init_state, static_argnums=2, static_argnames="reference")
    state = begin(base.model.params(), HYPER, frozen(policy.config), reference=True)
    return policy.config, jax.tree.map(np.asarray, dataclasses.replace(state, params=policy.model.params()))


def golden_state():
    config, state = golden()
    return config, jax.tree.map(jnp.array, state)  # copies, for the step takes them over


def step_of(config, **options):
    return make_train_step(config, Compute(dtype="float32"), preference=OBJECTIVE, **options)


@pytest.fixture(scope="module")
def one_step():
    """Config, state before, state after a step on TRL's pairs, and its metrics."""
    config, state = golden_state()
    before = jax.tree.map(np.asarray, state)
    after, metrics = step_of(config)(state, batch_of([[pair] for pair in GOLDEN["pairs"]]), HYPER)
    return config, before, jax.tree.map(np.asarray, after), metrics


def test_loss_and_metrics_are_those_of_trl(one_step):
    metrics = one_step[3]
    assert float(metrics["loss"]) == pytest.approx(GOLDEN["loss"], abs=1e-5)
    for name, value in GOLDEN["metrics"].items():
        assert float(metrics[name]) == pytest.approx(value, abs=2e-5), name


@pytest.mark.slow
def test_the_gradient_is_that_of_trl():
    config, state = golden_state()
    batch = batch_of([GOLDEN["pairs"]])
    options = {"buffers": state.buffers, "hyper": HYPER, "config": config, "preference": OBJECTIVE}
    loss = functools.partial(_loss, compute=Compute(dtype="float32"), **options)
    grads, _ = jax.jit(lambda params: jax.grad(loss, has_aux=True)(params, batch, None, None))(state.params)
    norm = float(jnp.linalg.norm(grads["layers.attention.q_proj.weight"][0].ravel()))
    assert norm == pytest.approx(GOLDEN["q_proj_gradient_norm"], rel=1e-4)


def test_the_reference_stays(one_step):
    _, before, after, _ = one_step
    assert set(before.buffers) == {f"reference.{name}" for name in before.params}
    for name, value in before.buffers.items():
        np.testing.assert_array_equal(after.buffers[name], value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["packed", "accumulated", "mesh", "context"])
def test_the_step_is_the_same_however_pairs_lie(one_step, kind: str):
    config, _, wanted, metrics = one_step
    pairs, state, steps = GOLDEN["pairs"], golden_state()[1], 1
    batch, mesh = batch_of([[pair] for pair in pairs]), {}
    if kind == "packed":
        batch = batch_of([pairs])
    if kind == "accumulated":
        steps = 2
    if kind == "mesh":
        mesh = {"fsdp": 2, "tensor": 2}
    if kind == "context":
        mesh = {"data": 2, "context": 2}
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 4 if mesh else 1])):
        batch = {name: shard(jnp.asarray(np.asarray(x)), "batch", "sequence") for name, x in batch.items()}
        shardings = {name: a.sharding for name, a in abstract_params(config).items()}
        put = lambda name, x: jax.device_put(np.asarray(x), shardings[name.removeprefix("reference.")])  # noqa: E731
        first = jax.jit(init_state)({n: put(n, x) for n, x in state.params.items()}, HYPER)
        state = dataclasses.replace(first, buffers={n: put(n, x) for n, x in state.buffers.items()})
        after, found = step_of(config, accumulation_steps=steps)(state, batch, HYPER)
    for name in ("loss", *GOLDEN["metrics"]):
        assert float(found[name]) == pytest.approx(float(metrics[name]), abs=1e-5), name
    for name, value in wanted.params.items():
        np.testing.assert_allclose(after.params[name], value, atol=2e-4)


def test_label_smoothing_and_validation():
    config, state = golden_state()
    smoothed = dataclasses.replace(OBJECTIVE, label_smoothing=0.2)
    step = make_eval_step(config, Compute(dtype="float32"), preference=smoothed)
    loss, count = step(state.params | state.buffers, batch_of([GOLDEN["pairs"]]))
    assert float(count) == 2
    # Of conservative DPO: the loss is linear in the smoothing, and that of swapped pairs at 1.
    swapped = [p | {"chosen_ids": p["rejected_ids"], "rejected_ids": p["chosen_ids"]} for p in GOLDEN["pairs"]]
    plain = make_eval_step(config, Compute(dtype="float32"), preference=OBJECTIVE)
    losses = [float(plain(state.params | state.buffers, batch_of([pairs]))[0]) for pairs in (GOLDEN["pairs"], swapped)]
    assert float(loss) == pytest.approx(0.8 * losses[0] + 0.2 * losses[1], abs=1e-5)


def test_examples_have_the_prompt_before_both_answers():
    example = OBJECTIVE.example(document(GOLDEN["pairs"][0]), np.random.default_rng(0), VOCABULARY)
    assert example["tokens"].tolist() == [1, 7, 9, 11, 12, 13, 1, 7, 9, 21]
    assert example["targets"].tolist() == [7, 9, 11, 12, 13, 2, 7, 9, 21, 2]
    assert example["weights"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 1, 1]
    assert example["branch"].tolist() == [0] * 6 + [1] * 4
    assert example["positions"].tolist() == [*range(6), *range(4)]
    # A chat whose end of a turn is no EOS: the EOS of the document is of neither answer.
    chat = Document(np.array([1, 7, 9, 11, 5, 21, 22, 5, 2], np.int32), (3, 5, 8))
    example = OBJECTIVE.example(chat, np.random.default_rng(0), VOCABULARY)
    assert example["targets"][example["weights"] > 0].tolist() == [11, 5, 21, 22, 5]
    assert len(example["tokens"]) == OBJECTIVE.lengths(np.array([9]), np.array([3]))[0][0]


@pytest.mark.parametrize("options", [{"beta": 0.0}, {"label_smoothing": 0.5}])
def test_options_that_mean_nothing_are_refused(options: dict[str, float]):
    with pytest.raises(UserError, match=next(iter(options))):
        Preference(**options)


CHAT = {
    "prompt": [{"role": "user", "content": "the cat"}],
    "chosen": [{"role": "assistant", "content": "sat on a mat"}],
    "rejected": [{"role": "assistant", "content": "ran"}],
}
FORMS = {
    "texts": ({"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"}, "prompt,chosen,rejected"),
    "chats": (CHAT, "prompt,chosen,rejected"),
    "conversations": ({n: CHAT["prompt"] + CHAT[n] for n in ("chosen", "rejected")}, "chosen,rejected"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["chats", "texts", "conversations"])
def test_a_run_prefers_the_chosen_answers(form: str, tmp_path: Path):
    record, fields = FORMS[form]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(record) for _ in range(24)) + "\n")
    changes = {
        "data.path": (str(file),),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.fields": fields,
        "data.validation_fraction": 0.0,
        "data.objective": "Preference",
        "data.chat_template": None if form == "texts" else "ChatML",
        "tokenizer.vocab_size": 285,
        "model.adapters": "LoRA",
        "sequence_length": 64,
        "num_steps": 6,
        "logging.sample_prompts": (),
    }
    config = llama_jax.override(tiny_run.get_config(), changes)
    run = llama_jax.train(config, tmp_path / "run", quiet=True)
    lines = run.metrics()
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["rewards/margins"] > 0 < np.log(2) - lines[-1]["loss"]
    # The reference is the base, of which there is no second copy.
    assert not any(name.startswith("reference") for name in run.load().model.params())


@pytest.mark.slow
def test_a_full_run_is_continued_with_its_reference(tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(FORMS["texts"][0] | {"prompt": f"the cat {i}"}) for i in range(24)) + "\n")
    changes = {
        "data.path": (str(file),),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.fields": "prompt,chosen,rejected",
        "data.validation_fraction": 0.3,
        "data.objective": "Preference",
        "tokenizer.vocab_size": 285,
        "num_steps": 4,
        "checkpoint.every_steps": 2,
        "logging.sample_prompts": (),
        "optimizer.schedule": "Constant",
    }
    config = llama_jax.override(tiny_run.get_config(), changes)
    whole = llama_jax.train(config, tmp_path / "whole", quiet=True)
    llama_jax.train(dataclasses.replace(config, num_steps=2), tmp_path / "parts", quiet=True)
    parts = llama_jax.train(config, tmp_path / "parts", quiet=True)
    for name, value in whole.load().model.params().items():
        np.testing.assert_array_equal(parts.load().model.params()[name], value)
    assert "val_bits_per_byte" not in whole.metrics()[-1]


def test_documents_without_two_answers_are_refused(tmp_path: Path):
    changes = {
        "data.path": (str(tiny_run.write_texts(tmp_path / "texts")),),
        "data.cache_dir": str(tmp_path / "cache"),
        "data.objective": "Preference",
    }
    with pytest.raises(UserError, match="fields=prompt,chosen,rejected"):
        llama_jax.train(llama_jax.override(tiny_run.get_config(), changes), tmp_path / "run", quiet=True)
