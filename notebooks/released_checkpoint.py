# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A released checkpoint
#
# Load a model as it was released, ask it something, look inside, measure it, fine-tune it with LoRA on a handful of
# chats, measure it again, and give the adapters and the merged model away in the forms that other programs read.
#
# `PATH` is any model on this machine: a directory of Hugging Face or Meta, or a llama2.c `.bin`. Left empty, it is
# `stories260K` (Karpathy's tinyllamas: 260,032 parameters that write stories) where the environment variable
# `LLAMA_JAX_TEST_DATA` names a directory that has it. Without it the notebook trains a model on the standard library
# and writes it in Hugging Face's form. Nothing is downloaded.

# %%
import inspect
import json
import os
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np
import rich

import llama_jax
from llama_jax.ablation.statistics import t_interval
from llama_jax.data import DirectoryChat, Vocabulary
from llama_jax.data.chat import Llama2Chat, chat_tokens
from llama_jax.data.objectives import Chat, Document
from llama_jax.nn import LoRA

PATH = ""
TOKENIZER = None  # its tokenizer, where PATH comes without one

tools.style()
folder = Path(tempfile.mkdtemp(prefix="released_checkpoint_"))


# %%
def make_checkpoint(directory: Path) -> None:
    """Train a small Llama on the standard library without `textwrap.py`, and write it in Hugging Face's form."""
    sizes = {"hidden_size": 128, "num_layers": 3, "attention.head_dim": 16, "feed_forward.intermediate_size": 352}
    changes = {f"model.{name}": size for name, size in sizes.items()} | {"num_steps": 300, "global_batch_size": 16}
    config = tools.small(tools.full(changes, quick={"model.num_layers": 1}))
    config = llama_jax.override(
        config, {"data.exclude": [*config.data.exclude, "*/textwrap.py"], "checkpoint.keep_best": 0}
    )
    run = llama_jax.train(config, folder / "run")
    llama_jax.save(run.load(), directory, format="hf")


stories = Path(os.environ.get("LLAMA_JAX_TEST_DATA", "")) / "llama2c"
if not PATH and (stories / "stories260K.bin").is_file():
    PATH, TOKENIZER = stories / "stories260K.bin", stories / "tok512.bin"
elif not PATH:
    PATH = folder / "checkpoint"
    make_checkpoint(PATH)
print(Path(PATH).name, sorted(p.name for p in Path(PATH).iterdir()) if Path(PATH).is_dir() else "")

# %% [markdown]
# ## Load
#
# The files say which family it is. A key of its config that is not understood would be an error, never ignored.

# %%
lm = llama_jax.load(PATH, tokenizer=TOKENIZER, dtype="float32")
rich.print(lm.config)
print(f"{llama_jax.num_parameters(lm.config):,} parameters, {lm.tokenizer.vocab_size:,} tokens")

# %% [markdown]
# Are they the right numbers in the right places? `convert` compares the logits with those of a plain NumPy model that
# reads the tensors by their original names.

# %%
llama_jax.convert(PATH, folder / "native", to="native")

# %% [markdown]
# What follows begins with a copy in Hugging Face's form, because adapters in PEFT's format name such a directory as
# their base. Its files are read again and their logits compared, too.

# %%
BASE = folder / "base"
report = llama_jax.save(lm, BASE, format="hf")
print(f"largest difference of a logit {report['max_abs_logit_difference']:.1e}, at most {report['tolerance']:.1e}")

# %% [markdown]
# ## Write, and chat
#
# The model was trained to continue texts. An answer to a question is a continuation of a text in which the question
# stands between marks: the chat template. One that came with the model is taken; otherwise it is Llama 2's, whose marks
# are ordinary text.

# %%
PROMPT = "Once upon a time, there was a" if "stories" in str(PATH) else "    def __init__(self"
(written,) = llama_jax.generate_text(lm, PROMPT, max_new_tokens=tools.full(60, quick=8), temperature=0)
print(PROMPT + written)

# %%
template = DirectoryChat() if lm.tokenizer.chat_templates else Llama2Chat()


def ask(model, question: str) -> str:
    """The greedy answer to a question."""
    messages = [{"role": "user", "content": question}]
    return llama_jax.chat(model, messages, template=template, temperature=0, max_new_tokens=24).strip()


QUESTION = "What is the opposite of hot?"
print(QUESTION, "->", repr(ask(lm, QUESTION)))

# %% [markdown]
# ## Look inside
#
# Attention maps of the first layer, a panel a head: a row is a query, and shows how much it takes from each key.

# %%
TEXT = "One day, she saw a big red ball." if "stories" in str(PATH) else "for name in self.names:\n    return self"
llama_jax.inspect.attention_maps(lm, TEXT).plot(layer=0)

# %% [markdown]
# The logit lens reads the hidden states between the layers with the final norm and the head: how early is the next
# token there? Frames are around tokens that follow in the text.

# %%
lens = llama_jax.inspect.logit_lens(lm, TEXT)
lens.plot()

# %%
for layer, ranks in enumerate(lens.target_ranks[:, 0]):
    name = "embedding" if layer == 0 else f"layer {layer - 1}"
    print(f"{name:10} the next token is the best of all at {(ranks == 0).mean():5.0%} of {len(ranks)} places")

# %% [markdown]
# ## Measure it on a text
#
# Perplexity is per token, so it compares models with the same tokenizer only; bits per byte compare any. Two texts: a
# story, and a module of Python.

# %%
STORY = """One day, a little girl named Lily went to the park with her mom. She saw a big red ball near a tree.
"Look, mom! Can I play with the ball?" she asked. Her mom smiled and said, "Yes, but be careful." Lily kicked the ball
and it went up high. A dog ran to the ball and took it. Lily was sad. But the dog came back and gave her the ball. Lily
was happy, and she and the dog played all day. At night she told her dad about her new friend.
"""
(folder / "story.txt").write_text(STORY, encoding="utf-8")
(folder / "textwrap.py.txt").write_text(inspect.getsource(textwrap)[: tools.full(8000, quick=500)], encoding="utf-8")
texts = [str(folder / name) for name in ("story.txt", "textwrap.py.txt")]
before = llama_jax.evaluate(lm, texts=texts, quiet=True)
before

# %% [markdown]
# ## Fine-tune with LoRA
#
# Eleven chats about opposites. `LoRA` (Hu et al. 2022) freezes the model and adds a product of two thin matrices to
# every projection; the loss is at the tokens of the answers alone. Four more opposites are kept back: learning eleven
# answers by heart is one thing, an opposite that was never shown another. The share of the parameters that is trained
# is large here, because the model is narrow: it falls with its width.

# %%
PAIRS = "big small, happy sad, day night, up down, good bad, old new, fast slow, hot cold, wet dry, in out, on off"
KEPT_BACK = "loud quiet, hard soft, light dark, open closed"


def chats(pairs: str) -> list[list[dict[str, str]]]:
    """A question and its answer for each pair of words."""
    words = [pair.split() for pair in pairs.split(", ")]
    return [
        [
            {"role": "user", "content": f"What is the opposite of {word}?"},
            {"role": "assistant", "content": f"The opposite of {word} is {opposite}."},
        ]
        for word, opposite in words
    ]


lines = [json.dumps({"messages": messages}) for messages in chats(PAIRS)]
(folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

config = llama_jax.override(
    tools.small(),
    {
        "model": lm.config,
        "model.adapters": LoRA(rank=8, alpha=16.0, targets=("all-linear",)),
        "init_from": str(BASE),
        "tokenizer.path": str(BASE),
        "data.path": [str(folder / "chats.jsonl")],
        "data.exclude": [],
        "data.fields": ["messages"],
        "data.chat_template": template,
        "data.objective": Chat(),
        "data.packing": "best_fit",
        "data.validation_fraction": 0.0,
        "data.cache_dir": str(folder / "corpora"),
        "num_steps": tools.full(150, quick=4),
        "global_batch_size": 4,
        "sequence_length": min(256, lm.config.length_limit),
        "optimizer.learning_rate": 5e-3,
        "optimizer.warmup_steps": 5,
        "optimizer.weight_decay": 0.0,
        "logging.every_steps": 1,
    },
)
trained = llama_jax.num_parameters(config.model) - llama_jax.num_parameters(lm.config)
print(f"{trained:,} parameters in adapters, {trained / llama_jax.num_parameters(lm.config):.1%} of the model")
run = llama_jax.train(config, folder / "lora")

# %%
fig, ax = plt.subplots(layout="constrained")
ax.plot([row["step"] for row in run.metrics()], [row["loss"] for row in run.metrics()])
ax.set(xlabel="step", ylabel="loss of answers (nats per token)", xlim=0, ylim=0)
plt.show()

# %% [markdown]
# ## Before and after
#
# The loss of each answer, with the model as it was and with its adapters: the eleven that it learned from, and the four
# that it did not see. The interval is over chats, paired. All answers share a form, which lowers the loss of the four,
# too: the answers below show whether the word is right.

# %%
adapted = run.load(dtype="float32")


def answer_losses(model, pairs: str) -> np.ndarray:
    """The mean loss of each answer, in nats per token."""
    vocabulary, rng = Vocabulary.of(model.tokenizer), np.random.default_rng(0)
    documents = [Document(*chat_tokens(messages, template, model.tokenizer)) for messages in chats(pairs)]
    examples = [Chat().example(document, rng, vocabulary) for document in documents]
    length = max(len(example["tokens"]) for example in examples)
    tokens, targets, weights = (
        np.array([np.pad(example[name], (0, length - len(example[name]))) for example in examples])
        for name in ("tokens", "targets", "weights")
    )
    scores = jnp.take_along_axis(jax.nn.log_softmax(model.model(tokens)), targets[..., None], 2)[..., 0]
    return -np.asarray((scores * weights).sum(1) / weights.sum(1))


losses = np.array([answer_losses(model, f"{PAIRS}, {KEPT_BACK}") for model in (lm, adapted)])
NUM_LEARNED = len(chats(PAIRS))
for name, (first, last) in (("learned", losses[:, :NUM_LEARNED]), ("kept back", losses[:, NUM_LEARNED:])):
    print(f"{name}: {first.mean():.2f} before, {last.mean():.2f} after, nats per token, {len(first)} chats")
    low, high = t_interval(last - first)[1:]
    tools.claim("    LoRA lowers the loss of these answers (after minus before)", (low, high), (-np.inf, 0), "nats")

# %%
for question in (QUESTION, "What is the opposite of loud?"):
    for name, model in (("before", lm), ("after", adapted)):
        print(f"{question} {name:6} -> {ask(model, question)!r}")

# %% [markdown]
# And what did it forget? The texts from before, measured again.

# %%
after = llama_jax.evaluate(adapted, texts=texts, quiet=True)
for name, numbers in before.results.items():
    old, new = numbers["bits_per_byte"], after.results[name]["bits_per_byte"]
    print(f"{name:16} {old:.3f} bits per byte before, {new:.3f} after: {new - old:+.3f}")

# %% [markdown]
# ## Give it away
#
# The adapters alone, as PEFT reads them; and one model without adapters, their product added to the weights, as
# transformers reads it. Exports are compared as above.

# %%
llama_jax.save_adapters(adapted, folder / "adapters", base=BASE)
llama_jax.save(adapted, folder / "merged", format="hf")
for directory in ("adapters", "merged"):
    print(directory, {file.name: f"{file.stat().st_size:,} bytes" for file in sorted((folder / directory).iterdir())})
rich.print_json((folder / "adapters" / "adapter_config.json").read_text(encoding="utf-8"))

# %% [markdown]
# Three ways to the same model: the run with its adapters, the adapters read into their base, and the merged export.

# %%
ids = np.array([lm.tokenizer.encode(STORY)[:64]])
expected = np.asarray(adapted.model(ids))
again = {
    "adapters and base": llama_jax.load(folder / "adapters", dtype="float32"),
    "merged": llama_jax.load(folder / "merged", dtype="float32"),
}
for name, model in again.items():
    difference = np.abs(np.asarray(model.model(ids)) - expected).max()
    print(f"{name:18} largest difference of a logit {difference:.1e}: {ask(model, QUESTION)!r}")
