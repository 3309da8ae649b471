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
# # Encoder, decoder, encoder-decoder, RNN, n-gram
#
# Five kinds of models get one task: read eight random letters and write them backwards. Random letters have no
# grammar to guess by, so the task asks one thing alone: what can a model see, and can it fetch it? The models have
# about equal numbers of parameters, the same training texts and the same number of steps. They are tiny, and what is
# decided here is decided at this size only.

# %%
import dataclasses
import functools
import json
import math
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np

import llama_jax
from llama_jax.ablation.statistics import t_interval
from llama_jax.checkpoint import CheckpointConfig
from llama_jax.data import DataConfig, Objective, Vocabulary
from llama_jax.data.objectives import Chat, Document, ParallelText
from llama_jax.models import Compute, DecoderConfig, EncoderConfig, EncoderDecoderConfig
from llama_jax.nn import GRU, MLP, CrossAttention, GroupedQuery, NGram, RMSNorm, Rope
from llama_jax.run import LoggingConfig, RunConfig
from llama_jax.tokenizers import TokenizerConfig, train_tokenizer
from llama_jax.training import AdamW

tools.style()
folder = Path(tempfile.mkdtemp(prefix="model_kinds_"))

# %% [markdown]
# ## The task
#
# A record has a source and a target. Letters are words of a WordPiece tokenizer, so that a token is a letter; the colon
# ends the source.

# %%
LETTERS, LENGTH = "abcdefghijklmnop", 8
rng = np.random.default_rng(0)


def record() -> dict[str, str]:
    """Eight letters, and the same backwards."""
    letters = rng.choice(list(LETTERS), LENGTH)
    return {"source": " ".join([*letters, ":"]), "target": " ".join(letters[::-1])}


records = [record() for _ in range(tools.full(40_000, quick=400))]
(folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
tokenizer = train_tokenizer([" ".join(line.values()) for line in records], kind="wordpiece", vocab_size=22)
tokenizer.save(folder / "tokenizer")
records[0]


# %% [markdown]
# ## How each kind is asked
#
# - A **decoder**, an **RNN** and an **n-gram** model read source and target as one text, from left to right; the loss
#   is at the target.
# - An **encoder-decoder** reads the source as a whole, and writes the target from left to right.
# - An **encoder** predicts what is hidden in a text: here, all of the target at once. The objective is written in a
#   cell: the library has BERT's, which hides tokens at random.


# %%
@dataclasses.dataclass(frozen=True)
class HiddenTarget(Objective):
    """The second part of a document behind masks, every token of which sees all of the first."""

    looks_ahead = True

    def special_tokens(self):
        return "[MASK]", "[CLS]", "[SEP]"

    def fields(self):
        return *super().fields(), "prefix"

    def lengths(self, num_tokens, target_start):
        return (num_tokens + 2,)

    def example(self, document, rng, vocabulary):
        mask, cls, sep = map(vocabulary.id, self.special_tokens())
        text = np.array([cls, *document.tokens, sep], np.int32)
        index = np.arange(len(text), dtype=np.int32)
        hidden = index > int(document.parts[0])
        return {
            "tokens": np.where(hidden, np.int32(mask), text),
            "targets": text,
            "weights": hidden.astype(np.float32),
            "positions": index,
            "prefix": np.ones_like(index),
        }


# %%
WIDTH, ROW, ORDER = 64, 20, 6
attention = GroupedQuery(
    num_heads=4, num_kv_heads=4, head_dim=16, rope=Rope(10000.0, None), qkv_bias=False, out_bias=False
)
shared = {
    "vocab_size": 22,  # 5 special tokens, 16 letters and the colon
    "hidden_size": WIDTH,
    "num_layers": 2,
    "max_positions": ROW,
    "attention": attention,
    "feed_forward": MLP(256, "gelu", bias=False),
    "norm": RMSNorm(eps=1e-5),
    "tie_embeddings": True,
}
cross = CrossAttention(num_heads=4, num_kv_heads=4, head_dim=16, qkv_bias=False, out_bias=False)
models = {
    "decoder": DecoderConfig(**shared),
    "encoder": EncoderConfig(**shared),
    "encoder-decoder": EncoderDecoderConfig(
        **shared | {"num_layers": 1, "feed_forward": MLP(192, "gelu", bias=False)},
        num_encoder_layers=1,
        cross_attention=cross,
        decoder_start_id=2,
    ),
    "RNN (GRU)": DecoderConfig(**shared | {"attention": GRU(92), "feed_forward": None}),
    "n-gram": DecoderConfig(
        **shared | {"num_layers": 1, "attention": NGram(order=ORDER, hidden_size=256), "feed_forward": None}
    ),
}
for name, model in models.items():
    print(f"{name:16} {llama_jax.num_parameters(model):,} parameters")

# %% [markdown]
# ## Who sees what
#
# Change one token of the input: which outputs change? It is the same question for attention, a state and a window, and
# the answer is exact, before any training. A column is the token that is changed, a row an output; for an
# encoder-decoder the source is left of the line, and the outputs are those of the target.


# %%
def inputs(name: str, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Arguments of a call of a model with random tokens, [count, T]."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(5, 20, (count, 2 * LENGTH + 2)).astype(np.int32)
    return {"source": ids[:, : LENGTH + 2], "target": ids[:, LENGTH + 2 :]} if "-decoder" in name else {"tokens": ids}


def reach(name: str) -> np.ndarray:
    """Outputs [T] that change with each input [S], true or false, of a model with random weights."""
    model = llama_jax.build(models[name], compute=Compute(dtype="float32"))
    call = inputs(name, 1)
    width = sum(ids.shape[1] for ids in call.values())
    rows, start = {}, 0
    for key, ids in call.items():
        rows[key] = np.repeat(ids, width + 1, 0)
        for place in range(ids.shape[1]):  # row 0 is left as it is
            rows[key][1 + start + place, place] += 1
        start += ids.shape[1]
    logits = np.asarray(model(**rows))
    return (np.abs(logits[1:] - logits[0]).max(-1) > 1e-6).T


seen = {name: reach(name) for name in tools.few(models, "encoder-decoder", "n-gram")}
fig, axes = plt.subplots(1, len(seen), figsize=(7.2, 2.4), layout="constrained")
for ax, (name, field) in zip(axes, seen.items(), strict=True):
    ax.imshow(field, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    ax.set(title=name, xticks=[], yticks=[])
    if "-decoder" in name:
        ax.axvline(LENGTH + 1.5, color="C1")
fig.supxlabel("input token that is changed")
fig.supylabel("output")
plt.show()
for name, field in seen.items():
    past = field[:, LENGTH + 2 :] if "-decoder" in name else field
    later, back = np.triu(past, 1).any(), max(np.arange(len(past)) - np.argmax(past, 1)) + 1
    sees = "later tokens, too" if later else f"the last {back} tokens" if back < len(past) else "all tokens so far"
    sees += " and all of the source" * ("-decoder" in name)
    print(f"{name:16} sees {sees}; {'writes text' if models[name].generates else 'does not write text'}")

# %% [markdown]
# ## Train
#
# `ablate` trains them with the same seeds; a variant may change anything, the objective too. A row has one record, and
# a step 32 of them, for every kind. The metric is the loss of the target's letters and of its end, on records that were
# held out. A uniform guess of a letter costs ln 16 = 2.77 nats.

# %%
config = RunConfig(
    model=models["decoder"],
    tokenizer=TokenizerConfig(path=str(folder / "tokenizer"), kind="wordpiece", vocab_size=22),
    data=DataConfig(
        path=(str(folder / "train.jsonl"),),
        fields=("source", "target"),
        objective=Chat(),
        packing="best_fit",
        validation_fraction=0.02,
        cache_dir=str(folder / "corpora"),
    ),
    optimizer=AdamW(learning_rate=3e-3, warmup_steps=tools.full(50, quick=2)),
    num_steps=tools.full(500, quick=4),
    global_batch_size=tools.full(32, quick=4),
    sequence_length=ROW,
    compute=Compute(dtype="float32", scan_layers=False, preflight=False),
    checkpoint=CheckpointConfig(keep_best=0),
    logging=LoggingConfig(every_steps=tools.full(50, quick=1), validate_every_steps=tools.full(100, quick=4)),
)
pairs = {"data.objective": ParallelText(source_length=LENGTH + 2), "sequence_length": LENGTH + 1}
changes = {"encoder": {"data.objective": HiddenTarget()}, "encoder-decoder": pairs}
variants = {name: {"model": model} | changes.get(name, {}) for name, model in models.items()}
trained = tools.few(variants, "encoder", "encoder-decoder")
sweep = llama_jax.ablate(
    config,
    trained,
    seeds=tools.full(3, quick=2),
    run_dir=folder / "sweep",
    components=(HiddenTarget,),
)
sweep

# %%
sweep.plot()

# %% [markdown]
# ## How good, letter by letter
#
# New records. A letter is predicted from the source and the right letters before it (the encoder: from the source
# alone). Where the best letter is the right one at every place, writing greedily gives exactly the target, so the share
# of such records is the accuracy of whole answers. Intervals are over seeds.

# %%
runs = {
    name: [llama_jax.open_run(trial.directory, (HiddenTarget,)) for trial in sweep.record.trials_of(name)]
    for name in trained
}
vocabulary = Vocabulary.of(tokenizer)
test = [record() for _ in range(tools.full(1000, quick=16))]


def example(name: str, line: dict[str, str]) -> dict[str, np.ndarray]:
    """A record as the kind's objective gives it."""
    source, target = (tokenizer.encode(line[field]) for field in ("source", "target"))
    objective = variants[name].get("data.objective", config.data.objective)
    around = ([], []) if objective.bare else ([vocabulary.bos_id], [vocabulary.eos_id])
    ids = np.array([*around[0], *source, *target, *around[1]], np.int32)
    return objective.example(Document(ids, parts=(len(around[0]) + len(source),)), rng, vocabulary)


def measure(name: str, run) -> tuple[np.ndarray, np.ndarray]:
    """For the letters of every target: is the best one right, and the loss in bits, both [records, LENGTH]."""
    examples = [example(name, line) for line in test]
    rows = {field: np.array([found[field] for found in examples]) for field in examples[0]}
    call = {"source": rows["source_tokens"], "target": rows["tokens"]} if "source_tokens" in rows else rows["tokens"]
    model = run.load(dtype="float32").model
    logits = jnp.asarray(model(**call) if isinstance(call, dict) else model(call))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), rows["targets"][..., None], 2)[..., 0] / math.log(2)
    letters = np.flatnonzero(rows["weights"][0])[:LENGTH]  # without the end of the text
    return np.asarray(logits.argmax(-1) == rows["targets"])[:, letters], np.asarray(losses)[:, letters]


measured = {name: [measure(name, run) for run in found] for name, found in runs.items()}

# %%
fig, ax = plt.subplots(layout="constrained")
for number, (name, found) in enumerate(measured.items()):
    mean, low, high = t_interval(np.array([right.mean(0) for right, _ in found]).T)
    places = np.arange(1, LENGTH + 1)
    ax.plot(places, mean, marker="osD^v"[number], markersize=10 - 1.5 * number, color=f"C{number}", label=name)
    ax.fill_between(places, low.clip(0), high.clip(max=1), color=f"C{number}", alpha=0.2, linewidth=0)
ax.axhline(1 / len(LETTERS), color="gray", linestyle="--", linewidth=1)
ax.set(xlabel="letter of the answer", ylabel="share that is right", ylim=(0, 1.05))
ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
plt.show()


# %% [markdown]
# For letter k of the answer the one to copy is 2k - 1 tokens before the last one that was read. The n-gram model
# reaches four tokens back: from the third letter on it can only guess, one of 16 (the dashed line), whatever its size.
# From the sixth on it does not see the colon, either, and so does not know how far it is: it can do no better than to
# guess that the text ends.


# %%
def shown(values: list[float]) -> str:
    """A mean and half of its t interval over seeds."""
    mean, _, high = t_interval(np.array(values))
    return f"{mean:6.3f} ± {high - mean:.3f}"


print(f"{'':16} {'whole answers':>14} {'bits per letter':>16} {'probability of the answer':>26}")
for name, found in measured.items():
    whole = shown([right.all(1).mean() for right, _ in found])
    bits = shown([loss.mean() for _, loss in found])
    chance = "exact" if models[name].generates else "letter by letter only"
    print(f"{name:16} {whole:>14} {bits:>16} {chance:>26}")
print(f"{'a guess':16} {1 / len(LETTERS) ** LENGTH:>14.1e} {math.log2(len(LETTERS)):>16.3f}")

# %% [markdown]
# Where does it fetch a letter? The attention from target to source of the encoder-decoder, a panel a head. A key is
# what the encoder has made of a token, which may hold its neighbours, too.

# %%
lm = runs["encoder-decoder"][0].load(dtype="float32")
one = example("encoder-decoder", test[0])
call = {"source": one["source_tokens"][None], "target": one["tokens"][None]}
llama_jax.inspect.attention_maps(lm, call, kind="cross").plot(layer=0)

# %% [markdown]
# ## Speed
#
# Answering, for 64 sources at a time: the encoder answers in one pass, the others write one letter after another, with
# what they keep between letters: keys and values, a state, or the last few inputs. All are compiled before, and timed
# by turns, so that what disturbs the machine disturbs all. The speed of training is that of the sweep, whose runs came
# one after another: on a machine that does other work it says less.


# %%
def answer(name: str, lm) -> None:
    """Answer 64 sources greedily."""
    sources = [tokenizer.encode(line["source"]) for line in (test * 64)[:64]]
    if not models[name].generates:
        rows = np.array([example(name, line)["tokens"] for line in (test * 64)[:64]])
        jax.block_until_ready(lm.model(rows).argmax(-1))
        return
    ends = [vocabulary.eos_id] if models[name].has_source else []
    starts = [] if models[name].has_source else [vocabulary.bos_id]
    prompts = [[*starts, *source, *ends] for source in sources]
    llama_jax.generate(lm, prompts, max_new_tokens=LENGTH, temperature=0)


loaded = {name: found[0].load(dtype="float32") for name, found in runs.items()}
calls = [functools.partial(answer, name, lm) for name, lm in loaded.items()]
seconds = dict(zip(loaded, tools.by_turns(calls, tools.full(12, quick=1)), strict=True))
answering = {name: 64 / float(np.median(times)) for name, times in seconds.items()}

# %%
rows = {row["variant"]: row for row in sweep.records()}
lengths = {name: variants[name].get("sequence_length", ROW) for name in trained}
training = {name: (rows[name]["tokens_per_second"] or math.nan) / lengths[name] for name in trained}
fig, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
for ax, (title, speeds) in zip(axes, {"training": training, "answering": answering}.items(), strict=True):
    ax.barh(list(speeds), list(speeds.values()), color=[f"C{i}" for i in range(len(speeds))])
    ax.set(xlabel="records per second", title=title)
axes[0].invert_yaxis()
plt.show()
for name in trained:
    print(f"{name:16} training {training[name]:8,.0f}, answering {answering[name]:8,.0f} records per second")
first, *others = seconds
for name in others:
    low, high = tools.median_interval(seconds[first] / seconds[name])
    print(f"{name} answers {low:.2f} to {high:.2f} times as fast as {first}")
