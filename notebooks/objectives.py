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
# # Objectives
#
# What happens to a document's tokens before they reach a model: an objective makes inputs and targets of them, and
# sources and documents are put together into batches. No model is trained here. All texts are written below, and it
# takes seconds.

# %%
import math

import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import numpy as np

import llama_jax.data.objectives as objectives
from llama_jax.data import Shard, Vocabulary
from llama_jax.data.chat import ChatML, chat_tokens
from llama_jax.data.mixture import Schedule
from llama_jax.data.objectives import Document
from llama_jax.data.rows.fitting import fit_rows
from llama_jax.data.rows.packing import pack
from llama_jax.nn import Mask
from llama_jax.tokenizers import train_tokenizer

tools.style()

# %% [markdown]
# ## One document, and what objectives make of it
#
# An objective is a function from a document's tokens and a random generator to named arrays: `tokens` go in, `targets`
# are to come out, and `weights` give the targets that have a loss. Below, one column is one position. The tokenizer is
# a WordPiece one trained on these very sentences, so that a token is a word.

# %%
TEXT = "the cat sat on the mat . the dog saw it and ran away ."
OTHER = "a bird sang all day long in the tree . nobody heard the song ."
TRANSLATION = "the cat saw the dog .", "le chat a vu le chien ."
LABELS = "cat", "bird"
CHAT = [{"role": "user", "content": "who ran away ?"}, {"role": "assistant", "content": "the dog ."}]

special_tokens = ["<sop>", "<eop>", "<mask>", "<extra_id_0>", "<extra_id_1>", "<|im_start|>", "<|im_end|>"]
tokenizer = train_tokenizer(
    [TEXT, OTHER, *TRANSLATION, *(f"{message['role']} {message['content']}" for message in CHAT)] * 2,
    kind="wordpiece",
    vocab_size=108,
    special_tokens=special_tokens,
)
vocabulary = Vocabulary.of(tokenizer, LABELS)
special_names = {i: name for name, i in tokenizer.special_tokens.items()}


def name(token: int) -> str:
    """Return a token's text, special tokens by name; decoding alone drops these."""
    return special_names.get(token) or tokenizer.decode([token])


shown = set()


def show(objective: objectives.Objective, document: Document, *, seed: int, width: int = 112) -> objectives.Example:
    """The example of a document, printed: a field is a line, a position a column; too long lines go on below."""
    shown.add(type(objective))
    example = objective.example(document, np.random.default_rng(seed), vocabulary)
    for prefix in ("source_", ""):
        fields = {field: x for field, x in example.items() if field.startswith("source_") == bool(prefix)}
        if not fields:
            continue
        columns = [
            [
                name(int(x[i])) if field in ("source_tokens", "tokens", "targets") else f"{x[i]:g}"
                for field, x in fields.items()
            ]
            for i in range(len(fields[f"{prefix}tokens"]))
        ]
        while columns:
            lines = [f"{field:17}" for field in fields]
            while columns and len(lines[0]) + (size := max(map(len, columns[0])) + 1) <= width:
                lines = [line + cell.ljust(size) for line, cell in zip(lines, columns.pop(0), strict=True)]
            print(*(line.rstrip() for line in lines), "", sep="\n")
    return example


text = np.array(tokenizer.encode(TEXT))
whole = np.array(tokenizer.encode(TEXT, bos=True, eos=True))
assert [name(i) for i in text] == TEXT.split()  # a token is a word
print(" ".join(map(name, whole)))

# %% [markdown]
# ### Causal
#
# Every token from those before it (Radford et al. 2018). Documents come with the tokens that begin and end a text,
# which are `[CLS]` and `[SEP]` in this tokenizer.

# %%
example = show(objectives.Causal(), Document(whole), seed=0)
assert (example["targets"][:-1] == example["tokens"][1:]).all()

# %% [markdown]
# ### Prefix
#
# The same, but the tokens of a prefix of random length all attend to each other, and only what follows has a loss
# (Raffel et al. 2020). The last token of the prefix already has one: its target is the first token that the prefix
# does not show.

# %%
example = show(objectives.Prefix(), Document(whole), seed=1)
assert example["prefix"].sum() + example["weights"].sum() == len(example["tokens"]) + 1

# %% [markdown]
# ### Chat
#
# A conversation is one document whose parts alternate, and only the answers have a loss, with the token that ends them.

# %%
ids, parts = chat_tokens(CHAT, ChatML(), tokenizer)
example = show(objectives.Chat(), Document(ids, parts), seed=0)
answer = [name(i) for i in example["targets"][example["weights"] > 0]]
assert answer == ["the", "dog", ".", "<|im_end|>"]

# %% [markdown]
# ### Preference
#
# Direct preference optimization (Rafailov et al. 2023): a prompt and two answers, the better one first. The prompt
# comes once before each; `branch` is 0 with the chosen answer and 1 with the rejected one, and only answers count.

# %%
prompt, chosen, rejected = (tokenizer.encode(part) for part in ("who ran away ?", "the dog .", "nobody heard ."))
pair = np.array([*prompt, *chosen, *rejected, vocabulary.eos_id])
document = Document(pair, parts=(len(prompt), len(prompt + chosen)))
example = show(objectives.Preference(), document, seed=0)
for branch, answer in enumerate((chosen, rejected)):
    counts = (example["weights"] > 0) & (example["branch"] == branch)
    assert example["targets"][counts].tolist() == [*answer, vocabulary.eos_id]

# %% [markdown]
# ### Masked language model
#
# Some tokens are chosen, 15 % by default and 30 % in the pairs below; of these 80 % become the mask, 10 % a random
# token and 10 % stay. In BERT (Devlin et al. 2019) the text is a pair, and a second task asks at `[CLS]` whether B
# follows A. In RoBERTa (Liu et al. 2019) it is one text.

# %%
document = Document(text, other=np.array(tokenizer.encode(OTHER)))
bert = objectives.MaskedLM(masked_fraction=0.3)
for seed in (3, 1):
    example = show(bert, document, seed=seed)
    print("B follows A." if example["pair_targets"][0] else "B is from another document.", end="\n\n")
    changed = example["tokens"] != example["targets"]
    assert (example["weights"][changed] == 1).all()  # whatever was changed is to be restored

# %%
roberta = objectives.MaskedLM(next_sentence=False)
example = show(roberta, document, seed=0)
assert example["weights"].sum() == round(0.15 * len(text))

# %% [markdown]
# ### Blank filling
#
# GLM (Du et al. 2022) masks spans and writes them one after another, in random order, behind the text with its holes.
# `positions` of a span is the place of its mask, `block_positions` counts inside it. A target without a weight is id 0,
# which is `[PAD]` in this tokenizer.

# %%
blank_filling = objectives.BlankFilling(noise_density=0.3, mean_span_length=2.0)
example = show(blank_filling, Document(text), seed=0)
assert ((example["prefix"] == 1) == (example["weights"] == 0)).all()

# %% [markdown]
# ### Span corruption
#
# T5 (Raffel et al. 2020) is an encoder and a decoder. In the source a sentinel replaces each span, and the target is
# the spans, each behind its sentinel.

# %%
span_corruption = objectives.SpanCorruption(noise_density=0.3, mean_span_length=2.0, num_sentinels=2)
example = show(span_corruption, Document(text), seed=0)
assert sum(len(example[field]) for field in ("source_tokens", "targets")) == len(text) + 2 * 2 + 2

# %% [markdown]
# ### Denoising
#
# BART (Lewis et al. 2020) writes the whole text, from one whose sentences are in another order and whose spans are
# masked; a span may also have no tokens at all, as between `dog` and `saw`.

# %%
denoising = objectives.Denoising(mean_span_length=2.0)
example = show(denoising, Document(text), seed=25)
assert (example["targets"][:-1] == text).all()
source = " ".join(name(int(i)) for i in example["source_tokens"])
assert "dog <mask> saw" in source
assert source.index("dog") < source.index("cat")  # the sentences in another order

# %% [markdown]
# ### Parallel text
#
# Translation and what is like it (Sutskever et al. 2014): a document has two parts, the second is written from the
# first.

# %%
source, target = (tokenizer.encode(part) for part in TRANSLATION)
example = show(objectives.ParallelText(), Document(np.array(source + target), parts=(len(source),)), seed=0)
assert example["tokens"][0] == vocabulary.bos_id

# %% [markdown]
# ### Classification
#
# What an encoder is fine-tuned for (Devlin et al. 2019): a document is a text and its label, and the one target, at
# `[CLS]`, is the number of the class.

# %%
text_and_label = [tokenizer.encode(part) for part in (OTHER, "bird")]
document = Document(np.concatenate(text_and_label), parts=(len(text_and_label[0]),))
example = show(objectives.Classification(LABELS), document, seed=0)
assert example["class_targets"][0] == LABELS.index("bird")
assert example["weights"].sum() == 1

# %% [markdown]
# These are all the objectives that the library has.

# %%
public = [value for value in vars(objectives).values() if isinstance(value, type)]
classes = {cls for cls in public if issubclass(cls, objectives.Objective)}
bases = {objectives.Objective, objectives.SequenceToSequence}
assert shown == classes - bases
print(*sorted(cls.__name__ for cls in shown))

# %% [markdown]
# ### Which tokens attend to which
#
# Short examples share a row. `pack` numbers them in `segment_ids`, and no token attends to another document; 0 is
# padding. The mask comes from three fields and nothing else: order, segments and prefix.

# %%
FIRST, SECOND = "the cat sat on the mat .", "nobody heard the song ."


def packed_row(objective: objectives.Objective, length: int) -> objectives.Example:
    """The two documents, as this objective has them, in one row."""
    rng = np.random.default_rng(5)
    ends = not objective.bare
    documents = [Document(np.array(tokenizer.encode(part, bos=ends, eos=ends))) for part in (FIRST, SECOND)]
    return pack([objective.example(document, rng, vocabulary) for document in documents], length, None)


def allowed(row: objectives.Example) -> np.ndarray:
    """Return [T, T]: true where a query (row) attends to a key (column)."""
    prefix = row["prefix"][None] if "prefix" in row else None
    mask = Mask(segment_ids=row["segment_ids"][None], prefix=prefix)
    size = len(row["tokens"])
    return np.asarray(mask.allowed(0, size, 0, size))[0]


rows = {
    "causal": packed_row(objectives.Causal(), 18),
    "prefix": packed_row(objectives.Prefix(), 18),
    "blank filling": packed_row(objectives.BlankFilling(), 18),
}
fig, axes = plt.subplots(2, 2, figsize=(7, 7.4), layout="constrained")
for (title, row), ax in zip(rows.items(), axes.flat, strict=False):
    seen, segments = allowed(row), row["segment_ids"]
    assert not seen[segments[:, None] != segments].any()  # nothing between documents
    real = segments > 0
    future = np.triu(np.ones_like(seen), 1) & seen
    ax.imshow(np.where(real[:, None] & real, seen + 1 * future, 0), cmap="Blues", vmin=0, vmax=3)
    labels = [name(int(i)) if s else "-" for i, s in zip(row["tokens"], segments, strict=True)]
    ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set(title=title, xlabel="key", ylabel="query")
axes[1, 1].axis("off")
meanings = {1: "its own or an earlier key", 2: "a later key, of a prefix", 0: "no attention"}
patches = [
    plt.Rectangle((0, 0), 1, 1, facecolor=plt.cm.Blues(shade / 3), edgecolor="gray", label=meaning)
    for shade, meaning in meanings.items()
]
axes[1, 1].legend(handles=patches, title="the query attends to", loc="center")
plt.show()

# %% [markdown]
# `-` is padding, left white here. A later key is seen in a prefix only:

# %%
for title, row in rows.items():
    future = np.triu(allowed(row), 1)
    print(f"{title:14} {future.sum():3} pairs of a query and a later key")
    if title == "causal":
        assert not future.any()
    else:
        assert (row["prefix"][future.nonzero()[1]] == 1).all()  # a later key that is seen is always in a prefix

# %% [markdown]
# ## A mixture of sources
#
# The shares of seven sources, as in LLaMA (Touvron et al. 2023). `Schedule` is a fixed order of sequences instead of
# draws: after any number n of sequences, a source with share p has given p · n of them, but for an error below 1. The
# order is that of the chairman assignment problem (Tijdeman 1980), whose bound for seven sources is 1 - 1/12.

# %%
SHARES = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
NUM_SEQUENCES = 1000
schedule = Schedule(SHARES)
n = np.arange(NUM_SEQUENCES + 1)
errors = np.array([schedule.counts(int(i)) for i in n]) - n[:, None] * np.array(SHARES)
bound = 1 - 1 / (2 * len(SHARES) - 2)

drawn = np.random.default_rng(0).choice(len(SHARES), size=NUM_SEQUENCES, p=SHARES)
drawn_errors = np.cumsum(drawn[:, None] == np.arange(len(SHARES)), axis=0) - n[1:, None] * np.array(SHARES)
print(f"largest error of the schedule:    {np.abs(errors).max():.3f} sequences, bound {bound:.3f}")
print(f"largest error of random sampling: {np.abs(drawn_errors).max():.3f} sequences")
assert np.abs(errors).max() <= bound + 1e-9 < 1

# %%
fig, axes = plt.subplots(len(SHARES), 1, figsize=(7, 7), sharex=True, sharey=True, layout="constrained")
for source, ax in enumerate(axes):
    ax.plot(n, errors[:, source], linewidth=0.6, color=f"C{source}")
    ax.axhline(0, color="black", linewidth=0.5)
    for limit in (-bound, bound):
        ax.axhline(limit, color="gray", linewidth=0.8, linestyle="--")
    ax.set(ylim=(-1, 1), yticks=(-1, 0, 1), xlim=(0, NUM_SEQUENCES))
    ax.set_ylabel(f"{SHARES[source]:.1%}", rotation=0, ha="right", va="center")
axes[0].set_title("count - share · n of each source; dashed: the bound")
axes[-1].set_xlabel("n (sequences)")
fig.supylabel("error (sequences), by the source's share")
plt.show()

# %% [markdown]
# ## Packing documents into rows
#
# Cutting writes documents one after another and begins a new row where one is full, so that a document is cut wherever
# a row happens to end. Best fit (Ding et al. 2024) cuts only documents longer than a row, and puts each piece into the
# fullest row that still takes it.

# %%
ROW = 1024
lengths = np.random.default_rng(0).lognormal(mean=5.7, sigma=1.0, size=2000).astype(int) + 2  # with BOS and EOS
starts = np.cumsum(lengths) - lengths
shard = Shard(tokens=np.zeros(lengths.sum(), np.uint16), documents=starts, parts=np.zeros(0, np.int64))
plans = {
    packing: fit_rows(shard, objectives.Causal(), packing, (ROW,), num_before=1, num_after=1)
    for packing in ("cut", "best_fit")
}
fills, pieces_of = {}, {}
print(f"{len(lengths):,} documents, {lengths.sum():,} tokens; {np.mean(lengths - 1 > ROW):.1%} longer than {ROW:,}")
print(f"{'':10}{'rows':>8}{'pieces':>8}{'documents cut':>15}{'fill':>8}")
for packing, plan in plans.items():
    used = plan.pieces[:, 1] - 1  # a piece's last token is only a target
    fills[packing] = np.add.reduceat(used, plan.rows[:-1]) / ROW
    document = np.searchsorted(starts, plan.pieces[:, 0], side="right") - 1
    pieces_of[packing] = np.bincount(document, minlength=len(lengths))
    num_rows, num_cut = len(plan.rows) - 1, np.sum(pieces_of[packing] > 1)
    print(f"{packing:10}{num_rows:8,}{len(plan.pieces):8,}{num_cut:15,}{fills[packing].mean():8.1%}")
    assert fills[packing].max() <= 1
    assert math.isclose(fills[packing].sum() * ROW, plan.num_tokens)

assert (pieces_of["best_fit"] == -(-(lengths - 1) // ROW)).all()  # as few as can be
assert pieces_of["cut"].sum() > pieces_of["best_fit"].sum()
assert min(fill.mean() for fill in fills.values()) > 0.99

# %%
NUM_SHOWN = 24
fig, axes = plt.subplots(1, 2, figsize=(7, 4.4), sharey=True, layout="constrained")
for (packing, plan), ax in zip(plans.items(), axes, strict=True):
    chosen = np.linspace(0, len(plan.rows) - 2, NUM_SHOWN).astype(int)
    for y, row in enumerate(chosen):
        left = 0
        for start, size in plan.pieces[plan.rows[row] : plan.rows[row + 1]]:
            is_cut = pieces_of[packing][np.searchsorted(starts, start, side="right") - 1] > 1
            ax.barh(
                y, size - 1, left=left, height=0.8, color="C1" if is_cut else "C0", edgecolor="white", linewidth=0.8
            )
            left += size - 1
    ax.set(title=packing, xlabel="position (tokens)", xlim=(0, ROW), ylim=(NUM_SHOWN - 0.5, -0.5))
    ax.set_xticks(range(0, ROW, 256))
axes[0].set_ylabel(f"{NUM_SHOWN} rows, evenly spaced")
whole_patch, cut_patch = (plt.Rectangle((0, 0), 1, 1, color=color) for color in ("C0", "C1"))
fig.legend([whole_patch, cut_patch], ["whole document", "piece of a cut one"], loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# Both fill nearly all positions; what differs is how many documents are read in pieces. The figures are those of this
# one distribution of lengths.
