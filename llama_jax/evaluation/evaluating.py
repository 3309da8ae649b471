"""`evaluate`, its result, and the callback that evaluates while a run trains: the same code for all."""

import dataclasses
import datetime
import importlib.util
import io
import itertools
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_jax import __version__
from llama_jax.checkpoint import (
    CONFIG_FILE,
    LanguageModel,
    MeshLike,
    committed_steps,
    load,
    locate,
)
from llama_jax.config import UserError, from_json, read_json
from llama_jax.data import Classification, DataConfig, SequenceToSequence, read_texts
from llama_jax.evaluation.pairs import aligned, evaluate_classes, evaluate_translations, read_pairs
from llama_jax.evaluation.perplexity import evaluate_texts, read_documents
from llama_jax.evaluation.scoring import Scorer
from llama_jax.figures import as_html
from llama_jax.files import write_text
from llama_jax.parallel import distributed
from llama_jax.remote import as_local, local_path
from llama_jax.screen import Bar
from llama_jax.tokenizers import Tokenizer

EVALUATIONS_DIRECTORY = "evaluations"
HELD_OUT = "held-out"
SIZES = ("tokens", "bytes", "documents", "n")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers of an evaluation.

    results: numbers by the name of a text, task or set of pairs, and by metric; `METRIC_stderr` is a standard error and
      `n` the number of items.
    details: all that they depend on (step, versions, settings, tasks with version and hash), the date, remarks.
    path: the JSON file that has both; None where none was written.
    """

    results: dict[str, dict[str, float]]
    details: dict[str, Any]
    path: Path | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers as a run logs them: `eval/NAME/METRIC`, of several texts only those of "total"."""
        texts = {name for name, values in self.results.items() if "documents" in values}
        parts = texts - {"total"} if "total" in texts else ()
        return {
            f"eval/{name}/{metric}": value
            for name, values in self.results.items()
            for metric, value in values.items()
            if metric not in SIZES and name not in parts
        }

    def records(self) -> list[dict[str, Any]]:
        """Return a dict per number: `name`, `metric`, `value`, `stderr`, and `n`, its items or tokens; or None."""
        return [
            {
                "name": name,
                "metric": metric,
                "value": value,
                "stderr": values.get(stderr_of(metric)),
                "n": values.get("n", values.get("tokens")),
            }
            for name, values in self.results.items()
            for metric, value in values.items()
            if metric not in SIZES and "_stderr" not in metric
        ]

    def table(self) -> Table:
        """Return the numbers as a table for a terminal."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in COLUMNS[:2] else "right")
        for row in self._cells():
            table.add_row(*row)
        return table

    def _repr_html_(self) -> str:
        columns = {title: [row[i] for row in self._cells()] for i, title in enumerate(COLUMNS)}
        return as_html(columns, self.details.get("remarks", ()), left=2)

    def __repr__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=160, force_jupyter=False).print(self.table())
        return text.getvalue().rstrip()

    def _cells(self) -> list[list[str]]:
        def shown(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        return [
            [row["name"], row["metric"], f"{row['value']:.4f}", shown(row["stderr"], ".4f"), shown(row["n"], ",.0f")]
            for row in self.records()
        ]


COLUMNS = ["evaluation", "metric", "value", "± stderr", "n"]


def stderr_of(metric: str) -> str:
    """Return the name of a metric's standard error: that of `exact_match,strict-match` is before its filter."""
    name, comma, filter = metric.partition(",")
    return f"{name}_stderr{comma}{filter}"


def evaluate(
    model: Any,
    tasks: str | Sequence[str] = (),
    *,
    texts: str | Sequence[str] = (),
    pairs: str | Sequence[str] = (),
    source: str | None = None,
    reference: str | None = None,
    fields: Sequence[str] | None = None,
    task_files: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat: bool | str = False,
    system: str | None = None,
    window: int | None = None,
    stride: int | None = None,
    output: str | Path | None = None,
    tokenizer: str | Path | Tokenizer | None = None,
    dtype: str | None = None,
    mesh: MeshLike = None,
    step: int | None = None,
    components: Sequence[type] = (),
    quiet: bool = False,
) -> Scores:
    """Return a model's numbers on texts, tasks and pairs; for a run without any of these, on its held-out data.

    `model` is what `load` takes, a run, or a loaded model. `tasks` are names of lm-evaluation-harness or of the YAML
    files below `task_files`, with `limit` items each, `num_fewshot` examples (default: the task's), and with `chat` by
    the model's chat template, or the one of this name, and the `system` message. `texts` are files, directories and
    globs, scored by a sliding window (`evaluate_texts`). `pairs` are files of records with two fields: texts and labels
    for a classifier, sources and translations for an encoder-decoder; `source` and `reference` are two files of lines.
    `fields` are the records' fields (default: the run's, else `text`). A file is written to `output`, else into
    `evaluations/` of a run. The other arguments are those of `load`. Raises UserError for mistakes, and where the model
    cannot be evaluated so.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} must be at least 1")
    if output is not None and not (folder := local_path(output, "output").parent).is_dir():
        raise UserError(f"'{folder}' is no directory: give another --output")
    opened = _Opened.of(model, step, components)
    lm = opened.lm or load(
        opened.path, tokenizer=tokenizer, dtype=dtype, mesh=mesh, step=opened.step, components=opened.components
    )
    measured = _Measured(lm, opened, batch_size, limit, quiet)
    names, texts, pairs = ([x] if isinstance(x, str) else list(x) for x in (tasks, texts, pairs))
    fields = fields or (opened.data.fields if opened.data is not None else ("text",))
    if texts:
        measured.texts(read_documents(texts, fields, limit), window, stride)
    if names:
        measured.tasks(names, chat, task_files=task_files, num_fewshot=num_fewshot, system=system)
    if source is not None or reference is not None:
        if source is None or reference is None:
            raise UserError("--source and --reference belong together: give both files")
        measured.pairs(Path(reference).name, aligned(source, reference, limit))
    if pairs:
        config = DataConfig(path=tuple(pairs), fields=tuple(fields), validation_fraction=0.0)
        measured.pairs(", ".join(Path(path).name for path in pairs), read_pairs(config, "train", limit))
    if not measured.results:
        measured.held_out(window, stride)
    return measured.written(output)


@dataclasses.dataclass(frozen=True)
class _Opened:
    """A model to evaluate: its path or the loaded model, and of a run its data, rows, directory and step."""

    path: str | Path
    lm: LanguageModel | None = None
    data: DataConfig | None = None
    sequence_length: int | None = None
    directory: Path | None = None
    step: int | None = None
    components: tuple[type, ...] = ()

    @classmethod
    def of(cls, model: Any, step: int | None, components: Sequence[type]) -> "_Opened":
        """Return what an argument of `evaluate` means: a loaded model, a run, or a path."""
        if isinstance(model, _Opened):
            return model
        if isinstance(model, LanguageModel):
            return cls("", model)
        components = (*components, *getattr(model, "components", ()))
        path = getattr(model, "url", None) or getattr(model, "directory", model)
        if not isinstance(path, str | Path):
            raise UserError(f"model is a {type(model).__name__}: give a path, a run, or what load returns")
        path, inside = locate(path)
        local = as_local(path)
        found = cls(path, step=inside if step is None else step, components=components)
        if local is None or not (local / CONFIG_FILE).is_file():
            return found
        saved = read_json(local / CONFIG_FILE)
        if not isinstance(saved, dict) or saved.get("type") != "RunConfig":
            return found
        return dataclasses.replace(
            found,
            data=from_json(DataConfig, saved["data"], components, "data."),
            sequence_length=saved["sequence_length"],
            directory=local,
            step=max(committed_steps(local), default=None) if found.step is None else found.step,
        )


class _Measured:
    """Numbers that are found one after the other, and what they depend on."""

    def __init__(self, lm: LanguageModel, opened: _Opened, batch_size: int, limit: int | None, quiet: bool):
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        self.lm, self.opened, self.batch_size, self.limit, self.quiet = lm, opened, batch_size, limit, quiet
        self.results: dict[str, dict[str, float]] = {}
        self.settings: dict[str, Any] = {"limit": limit, "batch_size": batch_size}
        self.remarks: list[str] = []
        self.others: dict[str, Any] = {}

    def _bar(self, name: str) -> Bar:
        console = Console(file=sys.stderr)  # as it is now: lm_eval's own output goes nowhere
        return Bar(f"evaluating {name}", 0, None, quiet=self.quiet, silent=not distributed.is_main(), console=console)

    def texts(
        self, documents: Mapping[str, Any], window: int | None, stride: int | None, *, ends: bool = False
    ) -> None:
        """Score texts; the default window of a run is its rows."""
        length = self.opened.sequence_length
        if window is None and length is not None:
            window = min(length, self.lm.config.length_limit)
        with self._bar("texts") as bar:
            scorer = Scorer(self.lm, batch_size=self.batch_size, progress=bar.advance)
            found, settings, remarks = evaluate_texts(scorer, documents, window=window, stride=stride, ends=ends)
        self._add(found, remarks)
        self.settings |= settings

    def tasks(self, names: Sequence[str], chat: bool | str, **options: Any) -> None:
        """Run tasks of lm-evaluation-harness. Raises UserError where it is not installed."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("tasks need lm-evaluation-harness: `pip install 'llama_jax[eval]'`")
        with warnings.catch_warnings(action="ignore"):  # of widgets that a notebook lacks, for bars that are not shown
            from llama_jax.evaluation.harness import HarnessLM, evaluate_tasks

        with self._bar("tasks") as bar:
            template = chat if isinstance(chat, str) else None
            model = HarnessLM(self.lm, batch_size=self.batch_size, progress=bar.advance, chat_template=template)
            found, tasks, remarks = evaluate_tasks(model, names, limit=self.limit, chat=bool(chat), **options)
        self._add(found, remarks)
        self.settings |= {"chat": chat, **options}
        self.others["tasks"] = tasks

    def pairs(self, name: str, pairs: list[tuple[str, str]]) -> None:
        """Classify, or translate and compare. Raises UserError where sacrebleu is not installed."""
        data = self.opened.data
        objective = data.objective if data is not None and isinstance(data.objective, Classification) else None
        with self._bar(name) as bar:
            common = {"batch_size": self.batch_size, "progress": bar.advance}
            if not self.lm.config.generates:
                found, remarks = evaluate_classes(self.lm, pairs, objective, **common)
            elif importlib.util.find_spec("sacrebleu") is None:
                raise UserError("BLEU needs sacrebleu: `pip install 'llama_jax[eval]'`")
            else:
                found, remarks, self.others["translations"] = evaluate_translations(self.lm, pairs, **common)
        self._add({name: found}, remarks)

    def held_out(self, window: int | None, stride: int | None) -> None:
        """Evaluate on the held-out documents of the run, in the way that its objective asks for."""
        data = self.opened.data
        if data is None:
            raise UserError("there is nothing to evaluate on: give tasks, texts or pairs (a run has held-out data)")
        if isinstance(data.objective, Classification | SequenceToSequence):
            self.pairs(HELD_OUT, read_pairs(data, "validation", self.limit))
            return
        if data.chat_template is not None:
            raise UserError("the held-out documents are chats, of which answers alone are learned: give texts or tasks")
        held_out = itertools.chain.from_iterable(read_texts(own, "validation") for _, own in data.corpora())
        documents = ((f"document {i}", text) for i, text in enumerate(held_out, 1))
        self.texts({HELD_OUT: itertools.islice(documents, self.limit)}, window, stride, ends=True)

    def _add(self, found: Mapping[str, dict[str, float]], remarks: Sequence[str]) -> None:
        self.results |= found
        self.remarks += remarks

    def written(self, output: str | Path | None) -> Scores:
        """Return the numbers, and write them where `output` or the run has a place for them."""
        now, opened = datetime.datetime.now(datetime.UTC), self.opened
        packages = ("jax", *(("lm_eval",) if "tasks" in self.others else ()))
        details = {
            "path": str(opened.directory or opened.path),
            "step": opened.step,
            "date": now.isoformat(timespec="seconds"),
            "versions": {"llama_jax": __version__, **{name: version(name) for name in packages}},
            "settings": self.settings | {"dtype": str(self.lm.model.module.compute.jax_dtype)},
            "remarks": self.remarks,
            **self.others,
        }
        path = None if output is None else local_path(output, "output")
        if path is None and opened.directory is not None:
            name = f"step{opened.step}-{now:%Y%m%dT%H%M%S}.json"
            path = opened.directory / EVALUATIONS_DIRECTORY / name
        if path is not None and distributed.is_main():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps({"results": self.results, **details}, indent=2, default=str) + "\n")
            except OSError as error:
                raise UserError(f"'{path}' cannot be written ({error.strerror}): give another --output") from None
        return Scores(self.results, details, path)


class Evaluation:
    """A callback of `train` that evaluates the model while it trains and logs `eval/NAME/METRIC`.

    It evaluates at the first logged step of every `every_steps` and at the last step; the other arguments are those of
    `evaluate`. Without tasks, texts and pairs it takes the run's held-out data. Each evaluation is also a file in the
    run's `evaluations/`. A task that does not exist fails at the first logged step.
    """

    def __init__(self, *, every_steps: int, **options: Any):
        if every_steps < 1:
            raise UserError(f"every_steps={every_steps} must be at least 1")
        self.every_steps, self.options = every_steps, options
        self._last: int | None = None

    def __call__(self, event: Any) -> dict[str, float]:
        """Return the numbers where the step is one to evaluate. `event` is the `Event` of a logged step."""
        last, self._last = self._last, event.step
        passed = last is not None and event.step // self.every_steps > last // self.every_steps
        run = event.run
        if not (passed or event.step % self.every_steps == 0 or event.step == run.config.num_steps):
            return {}
        opened = _Opened(
            run.directory, event.load(), run.config.data, run.config.sequence_length, run.directory, event.step
        )
        return evaluate(opened, quiet=True, **self.options).metrics()
