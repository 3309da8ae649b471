"""Supervised fine-tuning: the gradient comes from the tokens of answers alone, in every template."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

import llama_jax
from llama_jax.config import UserError, choices
from llama_jax.data import ChatTemplate, DataConfig, Dataset, DirectoryChat, Vocabulary, prepare_dataset
from llama_jax.data.chat import ChatML, chat_prompt, chat_tokens, turn_ends
from llama_jax.data.objectives import Chat
from llama_jax.models import Compute, assemble, initialize
from llama_jax.run.preparing import trained_tokenizer
from llama_jax.tokenizers import TEMPLATE_FILE, Tokenizer
from llama_jax.training import cross_entropy

# Letters of questions and answers differ, and neither is in a template.
TALKS = [
    [
        {"role": "system", "content": "z z"},
        {"role": "user", "content": "qu qu" + " qu" * i},
        {"role": "assistant", "content": "KWKW KW"},
        {"role": "user", "content": "qu qu qu"},
        {"role": "assistant", "content": "KW" + "KW" * i},
    ]
    for i in range(6)
]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """The tokenizer of a directory that has this chat template."""
    changed = type(tokenizer).__new__(type(tokenizer))
    changed.__dict__.update({k: v for k, v in vars(tokenizer).items() if k != "chat_templates"})
    changed.files = {**tokenizer.files, TEMPLATE_FILE: template.encode()}
    changed.special_tokens = {"sop": tokenizer.special_tokens["[gMASK]"], **tokenizer.special_tokens}
    return changed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory):
    """A file of conversations and a tokenizer with the special tokens of all templates; its directory has ChatML's."""
    file = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk}) for talk in TALKS) + "\n")
    data = DataConfig(path=(str(file),), fields=("messages",), cache_dir=str(file.parent), validation_fraction=0.0)
    kinds = choices(ChatTemplate).values()
    special = [name for kind in kinds for name in kind().special_tokens() if name != "sop"]  # no name to train
    config = dataclasses.replace(tiny_run.get_config().tokenizer, special_tokens=tuple(dict.fromkeys(special)))
    tokenizer = trained_tokenizer(dataclasses.replace(config, vocab_size=282), data, quiet=True)
    return data, with_template(tokenizer, ChatML.JINJA)


@jax.jit
def gradient_norms(params, batch):
    """The norm of the loss's gradient by each position's final hidden state."""
    config = dataclasses.replace(tiny_run.get_config().model, vocab_size=304)
    (term,), _ = assemble(config, params, Compute(dtype="float32")).loss_terms(batch)
    grad = jax.grad(lambda h: cross_entropy(term.head, term.head_weight, h, term.targets, term.weights)[0])(term.hidden)
    return jnp.linalg.norm(grad, axis=-1)


@pytest.mark.parametrize("name", sorted(choices(ChatTemplate)))
@pytest.mark.parametrize("length", [32, pytest.param(96, marks=pytest.mark.slow)])
def test_the_gradient_comes_from_answers_alone(name: str, length: int, corpus):
    data, tokenizer = corpus
    template = choices(ChatTemplate)[name]()
    data = dataclasses.replace(data, chat_template=template, objective=Chat(), packing="best_fit")
    vocabulary = Vocabulary.of(tokenizer)
    directories = prepare_dataset(data, tokenizer, sequence_length=length)
    rows = Dataset(data, directories, vocabulary, sequence_length=length, seed=0).train[0]
    batch = rows.read([(0, row) for row in range(rows.num_rows)])
    params = initialize(dataclasses.replace(tiny_run.get_config().model, vocab_size=304), 0)
    norms = np.asarray(gradient_norms(params, {k: jnp.asarray(v) for k, v in batch.items()}))
    count, learned_ids = 0, set()
    for targets, segments, norm in zip(batch["targets"], batch["segment_ids"], norms, strict=True):
        learned, other = (targets[where & (segments > 0)] for where in (norm > 0, norm == 0))
        learned_ids |= set(learned.tolist())
        assert not set("qz") & set(tokenizer.decode(learned.tolist()))
        assert not set("KW") & set(tokenizer.decode(other.tolist()))
        count += tokenizer.decode(learned.tolist()).count("K")
    assert set(turn_ends(template, tokenizer)) <= learned_ids
    written = sum(m["content"].count("K") for talk in TALKS for m in talk)
    # Each piece of a conversation that is cut has its answers, too, but for the token that it begins with.
    assert written - rows.num_rows * 2 * (length == 32) <= count <= written


def test_a_directory_s_template_is_tokenized_as_it_is_sampled(corpus):
    _, tokenizer = corpus
    tokens, starts = chat_tokens(TALKS[1], DirectoryChat(), tokenizer)
    wanted, places = chat_tokens(TALKS[1], ChatML(), tokenizer)
    np.testing.assert_array_equal(tokens, wanted)
    prompt = chat_prompt(TALKS[1][:2], DirectoryChat(), tokenizer)
    assert prompt == tokens[: starts[0]].tolist() == wanted[: places[0]].tolist()
    assert turn_ends(DirectoryChat(), tokenizer) == turn_ends(ChatML(), tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
            "in another way once others follow",
        ),
        ("{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}", "too long"),
    ],
)
def test_a_template_that_cannot_be_trained_on_is_one_sentence(template: str, message: str, corpus):
    with pytest.raises(UserError, match=message):
        chat_tokens(TALKS[0], DirectoryChat(), with_template(corpus[1], template))
    with pytest.raises(UserError, match="no chat template 'other'"):
        chat_tokens(TALKS[0], DirectoryChat("other"), corpus[1])


def test_another_template_of_the_directory_makes_another_corpus(corpus, tmp_path: Path):
    data, tokenizer = corpus
    data = dataclasses.replace(data, chat_template=DirectoryChat(), objective=Chat())
    other = with_template(tokenizer, ChatML.JINJA + "{# changed #}")
    first, second = (prepare_dataset(data, t, sequence_length=32) for t in (tokenizer, other))
    assert first != second
    assert llama_jax.data.DirectoryChat is DirectoryChat
