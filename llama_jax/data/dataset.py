"""The corpora of a run as rows: prepared, planned, mixed."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from llama_jax.config import UserError
from llama_jax.data.batches import Batches
from llama_jax.data.config import DataConfig, Packing, Source, Split, Stage
from llama_jax.data.corpus import Corpus
from llama_jax.data.mixture import Mixture, Schedule
from llama_jax.data.objectives import Causal, Objective, Vocabulary
from llama_jax.data.plan import longest_piece, plan_rows
from llama_jax.data.prepare import prepare
from llama_jax.data.rows import PackedRows, Rows, WindowRows, special_ends
from llama_jax.tokenizers import Tokenizer

PLAN_FORMAT = 1  # part of a plan's name


def prepare_dataset(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Tokenizes the corpora of `config` and plans their rows, as far as this is not done; their directories.

    Raises UserError where a corpus cannot be prepared, and where the tokenizer lacks what the objective needs.
    """
    vocabulary = Vocabulary.of(tokenizer)
    config.objective.check(vocabulary)
    directories = []
    for _, source in config.corpora():
        corpus = prepare(source, tokenizer, progress=progress)
        if not _by_windows(config.objective, config.packing):
            for split in ("train", "validation"):
                _write_plan(corpus, split, config.objective, config.packing, vocabulary, sequence_length)
        directories.append(corpus.directory)
    return directories


class Dataset:
    """What a run learns from: the rows of every source's splits.

    `corpora` by the source's name; `num_tokens` and `num_bytes` are those of all of them by split; `content_hash` says
    which texts and which tokenizer they are.
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
        self.config, self._vocabulary, self._length, self._seed = config, vocabulary, sequence_length, seed
        self.sources: list[Source] = []
        self.corpora: dict[str, Corpus] = {}
        for (source, own), directory in zip(config.corpora(), directories, strict=True):
            self.sources.append(source)
            self.corpora[source.name] = Corpus(directory, own)
        self.train = self._rows("train")
        self.validation = self._rows("validation")

    @property
    def content_hash(self) -> str:
        hashes = [corpus.content_hash for corpus in self.corpora.values()]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def num_tokens(self) -> dict[Split, int]:
        return _sum(corpus.num_tokens for corpus in self.corpora.values())

    @property
    def num_bytes(self) -> dict[Split, int]:
        return _sum(corpus.num_bytes for corpus in self.corpora.values())

    def mixture(self, *, global_batch_size: int, num_steps: int) -> Mixture:
        """Which source gives which of a run's sequences.

        Raises UserError where the sources' epochs are more than the run's sequences.
        """
        total = num_steps * global_batch_size
        schedules = []
        for stage in self.config.stages or (Stage(0, tuple(source.share or 0.0 for source in self.sources)),):
            shares = _sequence_shares(self.sources, self.train, stage, total)
            schedules.append((stage.start_step * global_batch_size, Schedule(shares)))
        return Mixture(tuple(schedules))

    def texts(self, split: Split) -> Iterator[str]:
        """All documents' text again, read from the original files."""
        return itertools.chain.from_iterable(corpus.texts(split) for corpus in self.corpora.values())

    def describe(self, batches: Batches, num_steps: int) -> list[str]:
        """What a run is told of its data: how full rows are, and what it takes of which source."""
        lines = []
        for source, rows, count in zip(self.sources, self.train, batches.num_sequences(num_steps), strict=True):
            text = f"{source.name}: {rows.num_rows:,} rows, {rows.num_tokens / rows.num_positions:.1%} full"
            if rows.num_dropped:
                text += f", {rows.num_dropped:,} documents do not fit"
            lines.append(f"{text}; {count / rows.num_rows:.2f} epochs")
        return lines

    def proportions(self, batches: Batches, step: int) -> dict[str, float]:
        """Of a mixture, each source's share of the sequences before `step`, and its epochs."""
        if len(self.sources) == 1 or not step:
            return {}
        counts = batches.num_sequences(step)
        shares = {f"share/{s.name}": n / sum(counts) for s, n in zip(self.sources, counts, strict=True)}
        epochs = {f"epochs/{s.name}": n / r.num_rows for s, n, r in zip(self.sources, counts, self.train, strict=True)}
        return shares | epochs

    def _rows(self, split: Split) -> list[Rows]:
        rows = []
        for name, corpus in self.corpora.items():
            stream, objective = getattr(corpus, split), self.config.objective
            if _by_windows(objective, self.config.packing):
                made = WindowRows(stream, self._length, partial=split == "validation")
            else:
                directory = _plan_directory(corpus, objective, self.config.packing, self._vocabulary, self._length)
                plan = json.loads((directory / f"{split}.json").read_text())
                made = PackedRows(
                    stream,
                    objective,
                    self._vocabulary,
                    _map(directory / f"{split}.pieces", 2 * plan["num_pieces"]).reshape(-1, 2),
                    _map(directory / f"{split}.rows", plan["num_rows"] + 1),
                    sequence_length=self._length,
                    num_tokens=plan["num_tokens"],
                    num_dropped=plan["num_dropped"],
                    seed=self._seed,
                )
            if split == "train" and not made.num_rows:
                of = f" of source '{name}'" if self.config.sources else ""
                raise UserError(
                    f"sequence_length={self._length} needs {self._length + 1} tokens, and the training text{of} has "
                    f"{stream.num_tokens}: give more text or a shorter sequence_length"
                )
            rows.append(made)
        return rows


def _sum(counts) -> dict[Split, int]:
    counts = list(counts)
    return {split: sum(count[split] for count in counts) for split in counts[0]}


def _sequence_shares(sources: Sequence[Source], rows: Sequence[Rows], stage: Stage, total: int) -> list[Fraction]:
    """Shares of the sequences that give the sources' epochs, and the stage's shares of the tokens that are left."""
    by_epochs = [
        Fraction(0) if source.epochs is None else Fraction(str(source.epochs)) * own.num_rows / total
        for source, own in zip(sources, rows, strict=True)
    ]
    # A share of the tokens is one of the sequences over how full these are.
    by_share = [
        Fraction(str(share)) * own.num_rows / own.num_tokens if source.epochs is None else Fraction(0)
        for share, source, own in zip(stage.shares, sources, rows, strict=True)
    ]
    if not any(by_share):  # epochs alone are kept in proportion, and fill the run
        return by_epochs
    left = 1 - sum(by_epochs)
    if left <= 0:
        raise UserError(
            f"the epochs of data.sources are {float(sum(by_epochs)) * total:,.0f} sequences, and the run has "
            f"{total:,}: lower them, raise num_steps, or give all sources epochs, which then fill it in proportion"
        )
    return [epochs + left * share / sum(by_share) for epochs, share in zip(by_epochs, by_share, strict=True)]


def _by_windows(objective: Objective, packing: Packing) -> bool:
    """Whether rows need no plan."""
    return type(objective) is Causal and packing == "cut"


def _capacity(objective: Objective, sequence_length: int) -> tuple[int, ...]:
    source = objective.source_length
    return (sequence_length,) if source is None else (sequence_length, source)


def _plan_directory(
    corpus: Corpus, objective: Objective, packing: Packing, vocabulary: Vocabulary, sequence_length: int
) -> Path:
    """Where the plan is kept: named after all that it depends on, lengths of examples by their figures."""
    capacity = _capacity(objective, sequence_length)
    kind = [PLAN_FORMAT, packing, capacity, objective.bare, objective.overlap, objective.divisible]
    digest = hashlib.sha256(json.dumps([*kind, special_ends(vocabulary)]).encode())
    sizes = np.arange(2 * sum(capacity) + 2)
    for starts in (sizes, sizes // 2):
        for lengths in objective.lengths(sizes, starts):
            digest.update(np.asarray(lengths, np.int64).tobytes())
    return corpus.directory / "rows" / digest.hexdigest()[:32]


def _write_plan(
    corpus: Corpus, split: Split, objective: Objective, packing: Packing, vocabulary: Vocabulary, sequence_length: int
) -> None:
    """Plans the rows of a split, shard by shard, unless it is done."""
    capacity = _capacity(objective, sequence_length)
    if objective.divisible and longest_piece(objective, capacity) <= objective.overlap:
        raise UserError(
            f"{type(objective).__name__} cannot fit a token into sequence_length={sequence_length}: take a longer one"
        )
    final = _plan_directory(corpus, objective, packing, vocabulary, sequence_length)
    if (final / f"{split}.json").exists():
        return
    final.mkdir(parents=True, exist_ok=True)
    stream = getattr(corpus, split)
    before, after = special_ends(vocabulary)
    counts = dict.fromkeys(("num_rows", "num_pieces", "num_tokens", "num_dropped"), 0)
    names = [final / f"{split}.{kind}" for kind in ("pieces", "rows")]
    with contextlib.ExitStack() as stack:
        pieces, rows = (stack.enter_context(name.with_suffix(name.suffix + ".partial").open("wb")) for name in names)
        rows.write(np.zeros(1, "<i8").tobytes())
        for shard, start in zip(stream.shards, stream.starts, strict=False):
            plan = plan_rows(shard, objective, packing, capacity, num_before=before, num_after=after)
            pieces.write((plan.pieces + np.array([start, 0])).astype("<i8").tobytes())
            rows.write((plan.rows[1:] + counts["num_pieces"]).astype("<i8").tobytes())
            counts["num_rows"] += len(plan.rows) - 1
            counts["num_pieces"] += len(plan.pieces)
            counts["num_tokens"] += plan.num_tokens
            counts["num_dropped"] += plan.num_dropped
    for name in names:
        name.with_suffix(name.suffix + ".partial").replace(name)
    partial = final / f"{split}.json.partial"
    partial.write_text(json.dumps(counts))
    partial.replace(final / f"{split}.json")


def _map(file: Path, size: int) -> np.ndarray:
    if file.stat().st_size != 8 * size:
        raise UserError(f"'{file}' is not whole: remove its directory, and it is made again")
    return np.asarray(np.memmap(file, "<i8", mode="r")) if size else np.zeros(0, np.int64)
