"""The corpora of a run as rows: prepared, packed, mixed."""

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from llama_jax.config import UserError
from llama_jax.data.batches import Batches, first_place
from llama_jax.data.config import DataConfig, Source, Split, Stage
from llama_jax.data.corpus.corpus import Corpus, check_split
from llama_jax.data.corpus.prepare import prepare_corpus
from llama_jax.data.mixture import Mixture, Schedule
from llama_jax.data.objectives.base import Vocabulary
from llama_jax.data.objectives.decoder import Causal
from llama_jax.data.rows.packing import PackedRows, Packer
from llama_jax.data.rows.windows import Rows, WindowRows
from llama_jax.tokenizers import Tokenizer


def prepare_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> list[Path]:
    """Tokenize the corpora of `config` and pack their rows, as far as this is not done; return their directories.

    `progress` is called with the name of the work, the amount that is done, and all of it, for one corpus after
    another. Raises UserError where a corpus cannot be prepared, and where the tokenizer lacks a token of the objective.
    """
    vocabulary = Vocabulary.of(tokenizer, config.objective.texts())
    config.objective.check(vocabulary)
    packer = Packer(config.objective, config.packing, vocabulary, sequence_length)
    corpora = []
    for _, source in config.corpora():
        tokenizing, planning = (functools.partial(progress, work) for work in ("tokenizing", "planning rows"))
        corpus = prepare_corpus(source, tokenizer, progress=tokenizing, needs_validation=not config.sources)
        if packer.needs_index:
            packer.write(corpus, progress=planning)
        corpora.append(corpus)
    if config.validation_fraction > 0:
        check_split("validation", _sum(corpus.num_documents for corpus in corpora), config)
    return [corpus.directory for corpus in corpora]


class Dataset:
    """The data of a run: the rows of every source's splits.

    `corpora` by the source's name; `num_tokens` and `num_bytes` are sums over all of them by split; `content_hash`
    identifies their texts and tokenizer.
    """

    def __init__(
        self,
        config: DataConfig,
        directories: Sequence[Path],
        vocabulary: Vocabulary,
        *,
        sequence_length: int,
        seed: int,
    ):
        self.config = config
        self.sources: list[Source] = []
        self.corpora: dict[str, Corpus] = {}
        for (source, own), directory in zip(config.corpora(), directories, strict=True):
            self.sources.append(source)
            self.corpora[source.name] = Corpus(directory, own)
        hashes = [corpus.content_hash for corpus in self.corpora.values()]
        self.content_hash = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()
        self.num_tokens = _sum(corpus.num_tokens for corpus in self.corpora.values())
        self.num_bytes = _sum(corpus.num_bytes for corpus in self.corpora.values())
        packer = Packer(config.objective, config.packing, vocabulary, sequence_length)
        self.train = self._rows("train", packer, seed)
        self.validation = self._rows("validation", packer, seed)

    def scored_bytes(self) -> int | None:
        """Return the bytes of the text that validation scores, of all rows of all sources, or None without a number.

        Only a left-to-right model without another objective gives the likelihood of a whole text.
        """
        counts = [corpus.scored_bytes for corpus in self.corpora.values() if corpus.num_documents["validation"]]
        if type(self.config.objective) is not Causal or None in counts:
            return None
        return sum(count for count in counts if count is not None)

    def mixture(self, *, global_batch_size: int, num_steps: int, earlier: Sequence[tuple[int, int]] = ()) -> Mixture:
        """Return the sources of a run's sequences; `earlier` as in `first_place`.

        Raises UserError where the sources' epochs are more than the run's sequences.
        """
        place = functools.partial(first_place, global_batch_size, earlier)
        stages = (Stage(0, tuple(source.share or 0.0 for source in self.sources)), *self.config.stages)
        return Mixture(
            tuple(
                (place(stage.start_step), Schedule(self._sequence_shares(stage, place(num_steps)))) for stage in stages
            )
        )

    def texts(self, split: Split) -> Iterator[str]:
        """Yield the text of all documents of a split, read again from the original files."""
        return itertools.chain.from_iterable(corpus.texts(split) for corpus in self.corpora.values())

    def describe(self, batches: Batches, num_steps: int) -> list[str]:
        """Return lines for a run's report: how full rows are, what it takes of which source, what was left out."""
        lines, taken = [], self.proportions(batches, num_steps)
        for source, rows, held_out in zip(self.sources, self.train, self.validation, strict=True):
            text = f"{source.name}: {rows.num_rows:,} rows, {rows.num_tokens / rows.num_positions:.1%} full"
            if rows.num_dropped:
                text += f", {rows.num_dropped:,} documents in none"
            if len(self.sources) > 1:
                text += f"; {taken[f'share/{source.name}']:.1%} of the tokens"
            lines.append(f"{text}; {taken[f'epochs/{source.name}']:.2f} epochs")
            if not held_out.num_rows and self.corpora[source.name].num_documents["validation"]:
                lines.append(f"{source.name}: none of the held-out documents is in a row")
        for name, corpus in self.corpora.items():
            lines += [f"{name}: {line}" for line in corpus.left_out()]
            if type(self.config.objective) is Causal and corpus.num_documents["validation"] and corpus.unscored:
                lines.append(f"{name}: no val_bits_per_byte, for {corpus.unscored}")
        return lines

    def proportions(self, batches: Batches, step: int) -> dict[str, float]:
        """Return each source's share of the tokens before `step`, with average rows, and its epochs."""
        counts = batches.num_sequences(step)
        tokens = [n * rows.num_tokens / rows.num_rows for n, rows in zip(counts, self.train, strict=True)]
        shares = {f"share/{s.name}": n / max(sum(tokens), 1) for s, n in zip(self.sources, tokens, strict=True)}
        epochs = {f"epochs/{s.name}": n / r.num_rows for s, n, r in zip(self.sources, counts, self.train, strict=True)}
        return shares | epochs

    def _rows(self, split: Split, packer: Packer, seed: int) -> list[Rows]:
        rows: list[Rows] = []
        for number, (name, corpus) in enumerate(self.corpora.items()):
            stream = getattr(corpus, split)
            if packer.needs_index:
                made = PackedRows(stream, packer, packer.open(corpus, split), seed=(seed, number))
            else:
                made = WindowRows(stream, packer.sequence_length, partial=split == "validation")
            if split == "train" and not made.num_rows:
                of, length = f" of source '{name}'" if self.config.sources else "", packer.sequence_length
                if packer.needs_index:
                    raise UserError(
                        f"none of the {stream.num_documents:,} documents{of} fits a row: give other text, or raise "
                        f"sequence_length={length} (and data.objective.source_length, where there is one)"
                    )
                raise UserError(
                    f"sequence_length={length} needs {length + 1} tokens, and the training text{of} has "
                    f"{stream.num_tokens}: give more text or a shorter sequence_length"
                )
            rows.append(made)
        return rows

    def _sequence_shares(self, stage: Stage, total: int) -> list[Fraction]:
        """Return shares of the sequences that give the sources' epochs, and the stage's shares of the other tokens."""
        by_epochs, by_share = [], []
        for source, rows, share in zip(self.sources, self.train, stage.shares, strict=True):
            epochs = Fraction(0) if source.epochs is None else Fraction(str(source.epochs))
            by_epochs.append(epochs * rows.num_rows / total)
            # A share of the tokens is one of the sequences over how full these are.
            by_share.append(0 if epochs else Fraction(str(share)) * rows.num_rows / rows.num_tokens)
        if not any(by_share):  # epochs alone are kept in proportion, and fill the run
            return by_epochs
        left = 1 - sum(by_epochs)
        if left <= 0:
            raise UserError(
                f"the epochs of data.sources are {float(sum(by_epochs)) * total:,.0f} sequences, and the run has "
                f"{total:,}: lower them, raise num_steps, or give all sources epochs, which then fill it in proportion"
            )
        return [epochs + left * share / sum(by_share) for epochs, share in zip(by_epochs, by_share, strict=True)]


def _sum(counts: Iterable[dict[Split, int]]) -> dict[Split, int]:
    counts = list(counts)
    return {split: sum(count[split] for count in counts) for split in counts[0]}
