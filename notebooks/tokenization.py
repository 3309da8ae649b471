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
# # Tokenizers
#
# A model reads numbers, so a text is cut into pieces of a vocabulary first. Two algorithms find these pieces, byte-pair
# encoding and the unigram language model; both are shown step by step, in English and in Chinese, which has no spaces
# between words. All texts are written below, and no model is trained.

# %%
import itertools
import math
import re
from collections import Counter

import matplotlib.pyplot as plt
import notebook_tools as tools  # in this notebook's folder
import rich
import textbook_tokenizers as textbook  # likewise: the algorithms as in their papers, short and slow

import llama_jax.tokenizers.comparing as comparing
from llama_jax.tokenizers import KINDS, train_tokenizer

tools.style()

ENGLISH = """\
The farmer gets up before the sun and looks at the sky. If the sky is red, there will be rain in the afternoon. She
feeds the hens, opens the gate and leads the cows to the lower field, where the grass is long and wet in the morning.
Her brother mends the fence on the other side of the river. He has a hammer, a bag of nails and a dog that is afraid of
the cows. At noon they eat bread and cheese under the old tree and talk about the price of milk, which is lower than
last year, and about the road, which is worse. In the afternoon it rains. The water runs down the road and into the
lower field, and the cows stand under the tree and wait. The farmer closes the gate, counts the hens and looks for the
dog. In the evening there is a light in the window, and the rain is louder than the river. Her brother is reading the
newspaper. The price of milk will be lower next year, he reads, and the road will be mended after the winter.
"""
CHINESE = """\
农民在太阳出来以前起床，先看看天。如果天是红的，下午就会下雨。她喂了鸡，打开门，把牛带到下面的田里，那里的草早上又长又湿。
她的哥哥在河的另一边修篱笆。他有一把锤子，一袋钉子，还有一只怕牛的狗。中午他们在老树下面吃面包，说牛奶的价钱，今年比去年低；\
又说那条路，今年比去年坏。下午下雨了。水从路上流到下面的田里，牛站在树下面等。农民关上门，数了数鸡，去找狗。
晚上窗子里有光，雨的声音比河的声音大。她的哥哥在看报纸。报纸上说，明年牛奶的价钱会更低，路要等冬天以后再修。
"""
# Not trained on.
HELD_OUT = {
    "English": "In the winter the farmer mends the gate, and the cows wait in the field for the grass of next year.\n",
    "Chinese": "冬天农民修门，牛在田里等明年的草。晚上她的哥哥看天，说明天会下雨。\n",
}

# %% [markdown]
# ## Byte-pair encoding, merge by merge
#
# Byte-pair encoding (Sennrich et al. 2016) begins with characters and merges, again and again, the most frequent pair
# of neighbours. Nothing is merged across a space. Of equally frequent pairs this implementation takes the one seen
# first; others decide otherwise, and so two correct implementations may learn different vocabularies.

# %%
merges = list(textbook.bpe_merges(["the car", "the cat", "the rat"]))
for number, merge in enumerate(merges, start=1):
    words = "   ".join(" ".join(word) for word in merge.words)
    print(f"{number}. {' + '.join(merge.pair):8} count {merge.count}   {words}")

assert [merge.pair for merge in merges[:3]] == [("t", "h"), ("th", "e"), ("c", "a")]
assert all(earlier.count >= later.count for earlier, later in itertools.pairwise(merges))

# %% [markdown]
# The same in Chinese. There are no spaces between words, so it is punctuation that nothing is merged across. The first
# merges are words: 下面 is below, 农民 a farmer, 下午 the afternoon. 到下面的田里, "to the lower field", becomes one
# piece because the page says it twice: on so short a text, few pairs are seen more often.


# %%
def words_of(text):
    """Return the words of a text with their counts: English ones between spaces, Chinese clauses and punctuation."""
    return Counter(re.findall(r"[，。；]|[^\s，。；]+", text))


chinese_merges = list(textbook.bpe_merges([" ".join(words_of(CHINESE).elements())]))
for number, merge in enumerate(chinese_merges[:8], start=1):
    print(f"{number}. {' + '.join(merge.pair)}  count {merge.count}")
first = CHINESE.split("，")[0]
for number in (0, 8, 40, len(chinese_merges)):
    print(f"{number:3} merges: {'|'.join(textbook.bpe_encode(first, chinese_merges[:number]))}")

# %% [markdown]
# ### Bytes
#
# A vocabulary of characters misses those that the training text does not have. Byte-level encoding begins with the 256
# bytes, and every text can be written: a letter is one byte in UTF-8, a Chinese character three.

# %%
for character in "a", "é", "农":
    print(f"{character} = {len(character.encode())} bytes: {character.encode().hex(' ')}")

# %% [markdown]
# ## The unigram language model
#
# A unigram model (Kudo 2018) gives every piece a probability, and a segmentation the product of its pieces'. With
# p(ab) = 2/3 and p(c) = 1/3, `ababc` as ab|ab|c has 2/3 · 2/3 · 1/3 = 4/27.

# %%
probabilities = {"ab": 2 / 3, "c": 1 / 3}
value = textbook.likelihood(["ab", "ab", "c"], probabilities)
print(f"ab|ab|c: {value:.6f} = {value * 27:.0f}/27")
assert math.isclose(value, 4 / 27)

# %% [markdown]
# Usually a text has many segmentations, and its probability is the sum over all of them. Viterbi's algorithm finds the
# most likely one without listing the others.

# %%
probabilities = {"a": 0.3, "b": 0.2, "c": 0.2, "ab": 0.2, "abc": 0.1}
every = {s: textbook.likelihood(s, probabilities) for s in textbook.segmentations("ababc", probabilities)}
for segmentation, value in sorted(every.items(), key=lambda item: -item[1]):
    print(f"{'|'.join(segmentation):10} {value:.6f}")
print(f"{'sum':10} {sum(every.values()):.6f}")

assert textbook.best_segmentation("ababc", probabilities) == max(every, key=every.__getitem__)
assert math.isclose(textbook.loss({"ababc": 1}, probabilities), -math.log(sum(every.values())))

# %% [markdown]
# Which pieces there should be and how probable they are is learned in rounds. Expectation-maximization (EM) counts each
# piece as often as it is expected over all segmentations and makes these counts the new probabilities: the loss, the
# negative logarithm of the text's likelihood, never rises. Then the pieces that matter least are dropped.

# %%
words = Counter(ENGLISH.split())
num_words = words.total()
seed = textbook.seed_pieces(words, size=600)

steps = [seed]
for _ in range(12):
    steps.append(textbook.unigram_step(words, steps[-1]))
step_losses = [textbook.loss(words, p) / num_words for p in steps]
assert all(after <= before + 1e-9 for before, after in itertools.pairwise(step_losses))

rounds = list(textbook.train_unigram(words, num_pieces=60, seed_size=600, keep=0.9))
round_losses = [textbook.loss(words, p) / num_words for p in rounds]
print(f"{num_words} words, {len(words)} of them different; {len(seed)} seed pieces")
print(f"pieces after each round: {', '.join(str(len(p)) for p in rounds)}")
assert len(rounds[-1]) == 60

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.3), sharey=True, layout="constrained")
left.plot(range(len(steps)), step_losses, "o-", markersize=4)
left.set(title=f"EM, all {len(seed)} pieces", xlabel="step", ylabel="loss (nats per word)")
right.plot(range(1, len(rounds) + 1), round_losses, "o-", markersize=4, color="C1")
for number, (p, value) in enumerate(zip(rounds, round_losses, strict=True), start=1):
    right.annotate(str(len(p)), (number, value), (0, 7), textcoords="offset points", ha="center", fontsize=8)
right.set(title="Pruning (labels: pieces left)", xlabel="round")
right.margins(y=0.15)
plt.show()

# %% [markdown]
# Fewer pieces describe the text less well, so pruning raises the loss. The last round ends with
# expectation-maximization and drops nothing after it, so the loss falls once more. The most probable pieces of several
# characters that are left:

# %%
final = rounds[-1]
longer = sorted((piece for piece in final if len(piece) > 1), key=lambda piece: -final[piece])
for line in itertools.batched(longer[:16], 8):
    print("  ".join(f"{piece} {final[piece]:.3f}" for piece in line))
for word in ("farmer", "mended", "winter"):
    print(word, "->", "|".join(textbook.best_segmentation(word, final)))
assert math.isclose(sum(final.values()), 1)
*pruned, without_pruning = round_losses
assert all(before < after for before, after in itertools.pairwise(pruned))
assert without_pruning < pruned[-1]

# %% [markdown]
# In Chinese nothing says where words begin. Many of the longer pieces that remain are words all the same (农民, 报纸,
# 下雨); the others are strings that the page repeats, from 到下面的田里 to 有一, which is no word. The two algorithms
# need not agree: byte-pair encoding repeats its merges in their order, the unigram model takes the most likely
# segmentation of the whole.

# %%
chinese_words = words_of(CHINESE)
characters = {character for word in chinese_words for character in word}
chinese_pieces = list(textbook.train_unigram(chinese_words, len(characters) + 40, seed_size=600, keep=0.9))[-1]
longer = sorted((piece for piece in chinese_pieces if len(piece) > 1), key=lambda piece: -chinese_pieces[piece])
print(f"{len(characters)} characters and {len(longer)} longer pieces:", " ".join(longer), sep="\n", end="\n\n")

english_merges = list(textbook.bpe_merges([ENGLISH]))
num_merges = {"English": len(final) - len({c for word in words for c in word}), "Chinese": len(longer)}
examples = {"English": ["afternoon", "milk", "newspaper"], "Chinese": ["农民在太阳出来以前起床", "今年比去年低"]}
for language, merges, pieces in (("English", english_merges, final), ("Chinese", chinese_merges, chinese_pieces)):
    print(f"{language}, both with {num_merges[language]} pieces of several characters")
    for word in examples[language]:
        print("  byte-pair encoding  ", "|".join(textbook.bpe_encode(word, merges[: num_merges[language]])))
        print("  unigram             ", "|".join(textbook.best_segmentation(word, pieces)))

# %% [markdown]
# ## How many tokens
#
# The larger the vocabulary, the fewer tokens a text has, and the more entries the model's embedding. Below, both
# algorithms cut a text that they have not seen. Counted in characters per token English is ahead, counted in bytes per
# token Chinese is, whose characters take three bytes each: languages are compared in bytes, or by a translation.


# %%
def lengths_of(language, cut):
    """Return the characters and bytes per token of the held-out text, its spaces left out."""
    held_out = list(words_of(HELD_OUT[language]).elements())
    num_tokens = sum(len(cut(word)) for word in held_out)
    return sum(map(len, held_out)) / num_tokens, sum(len(word.encode()) for word in held_out) / num_tokens


fig, axes = plt.subplots(1, 2, figsize=(7, 3.8), layout="constrained")
for color, (language, text) in enumerate({"English": ENGLISH, "Chinese": CHINESE}.items()):
    counts, merges = words_of(text), {"English": english_merges, "Chinese": chinese_merges}[language]
    alphabet = len({character for word in counts for character in word})
    numbers = range(0, len(merges) + 1, 10)
    byte_pairs = [
        lengths_of(language, lambda word, number=number, merges=merges: textbook.bpe_encode(word, merges[:number]))
        for number in numbers
    ]
    rounds = list(textbook.train_unigram(counts, alphabet, seed_size=300, keep=0.95))
    unigrams = [
        lengths_of(language, lambda word, pieces=pieces: textbook.best_segmentation(word, pieces)) for pieces in rounds
    ]
    for ax, pair, single in zip(axes, zip(*byte_pairs, strict=True), zip(*unigrams, strict=True), strict=True):
        ax.plot([alphabet + n for n in numbers], pair, color=f"C{color}", label=f"{language}, byte-pair encoding")
        ax.plot([len(p) for p in rounds], single, "o--", markersize=3, color=f"C{color}", label=f"{language}, unigram")
axes[0].set(xlabel="vocabulary (pieces)", ylabel="characters per token", ylim=0)
axes[1].set(xlabel="vocabulary (pieces)", ylabel="bytes per token", ylim=0)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# The texts are a page long, so that both algorithms soon know whole words of them by heart: what is learned on a page
# stops helping another text early. The unigram model takes only pieces that the page has at least twice, so its curves
# end early, the Chinese one after a few pieces. Vocabularies of 32,000 entries and more are trained on gigabytes.

# %% [markdown]
# ## Tokenizers of every kind
#
# `train_tokenizer` trains the ones that runs use: SentencePiece's byte-pair encoding and unigram model with Llama's
# settings, GPT-2's byte-level byte-pair encoding, BERT's WordPiece, and words between spaces. All are trained on the
# same English and Chinese text. A vocabulary cannot be larger than the text fills; of the first three, 256 tokens are
# the bytes.

# %%
sizes = {"bpe": 480, "unigram": 480, "byte_bpe": 480, "wordpiece": 340, "whitespace": 100}
assert set(sizes) == set(KINDS)
tokenizers = {kind: train_tokenizer([ENGLISH, CHINESE], kind=kind, vocab_size=sizes[kind]) for kind in KINDS}
for language, text in HELD_OUT.items():
    print(f"{language}: {len(text):,} characters, {len(text.encode()):,} bytes")

# %%
comparing.NUM_RUNS, comparing.MIN_BYTES = 1, 20_000  # speeds, measured in passing here
figures = {
    language: {kind: comparing.compare(tokenizer, text) for kind, tokenizer in tokenizers.items()}
    for language, text in HELD_OUT.items()
}
for language, rows in figures.items():
    rich.print(comparing.comparison_table(language, [(kind, tokenizers[kind], row) for kind, row in rows.items()]))

# %% [markdown]
# Fertility is the number of tokens per word. Chinese is written without spaces, so there it is counted per character
# or per byte. A table of two sentences and vocabularies of several sizes shows how it is measured, not which kind is
# better, and a speed measured once on so short a text means little.
#
# Low fertility alone is not a merit: the tokenizer of whole words has one token for a word and cannot tell which one it
# was where it had not seen it. WordPiece loses what its normalization takes away, here
# capital letters and the line end. Only the three kinds that know every byte give every text back.

# %%
for rows in figures.values():
    for kind in ("bpe", "unigram", "byte_bpe"):
        assert rows[kind].exact
        assert rows[kind].unknown_rate == 0
    assert not rows["wordpiece"].exact
    assert not rows["whitespace"].exact
assert figures["English"]["whitespace"].tokens_per_word == 1
assert figures["Chinese"]["whitespace"].unknown_rate == 1
assert all(row.tokens_per_word is None for row in figures["Chinese"].values())
for kind, tokenizer in tokenizers.items():
    print(f"{kind:11}{tokenizer.decode(tokenizer.encode(HELD_OUT['English']))!r}")
