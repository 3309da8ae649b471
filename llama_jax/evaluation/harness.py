"""lm-evaluation-harness: a model as its `LM`, tasks by name, and their results as numbers by name.

Only this module imports `lm_eval` (extra `eval`), and only `evaluating.py` imports it, within a function.
"""

import contextlib
import difflib
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets.utils
import lm_eval.tasks
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.evaluation.scoring import Scorer
from llama_jax.remote import local_path
from llama_jax.sampling import (
    Request,
    SamplingConfig,
    answers,
    built_in,
    rendered_chat,
    stop_ids,
    tokenizer_of,
)

BOOTSTRAP = 1000  # resamples, for standard errors of metrics that are not means
SEED = 1234  # of few-shot examples, lm_eval's own
WRITES_CODE = "writes_code"  # in a task's metadata


class HarnessLM(TemplateLM):
    """A decoder with its tokenizer, as tasks of lm-evaluation-harness call it.

    The same requests give the scores and texts of its `hf` model on an export: ids as `AutoTokenizer` gives them,
    texts longer than the model's positions cut from the left, BOS (else EOS) before an empty context. Requests whose
    ids differ in the last one alone, such as the letters of a multiple choice, are one row.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int = 8,
        progress: Callable[[int, int], object] = lambda done, total: None,
        chat_template: str | None = None,
    ):
        """`chat_template` names another one than that of the run or of the model's files.

        Raises UserError for a model that is not a decoder, and for a tokenizer with neither BOS nor EOS.
        """
        super().__init__()
        self.lm, self.scorer = lm, Scorer(lm, batch_size=batch_size, progress=progress)
        self.text_tokenizer = tokenizer_of(lm)
        if self.text_tokenizer.bos_id is None and not self.text_tokenizer.eos_ids:
            raise UserError("the tokenizer has neither BOS nor EOS, which begin a text without context: add one")
        self.template = lm.chat_template if chat_template is None else built_in(chat_template, self.text_tokenizer)
        self.tok_encode = functools.lru_cache(4096)(self.tok_encode)  # contexts come once for each choice
        self.remarks: dict[str, None] = {}  # in order, each once

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return (self.text_tokenizer.eos_ids or (self.prefix_token_id,))[0]

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        bos = self.text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The longest row of inputs."""
        return self.lm.config.length_limit

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return self.text_tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation, by the template of the run or of the model's files."""
        render = functools.partial(rendered_chat, self.text_tokenizer, template=self.template)
        others = [message for message in chat_history if message["role"] != "system"]
        try:
            return render(chat_history, opens_answer=add_generation_prompt)
        except UserError:
            if len(others) == len(chat_history):
                raise
            self.remarks["the chat template refuses system messages: they were left out"] = None
            return render(others, opens_answer=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return ids, in None with what the tokenizer's files put around a text that does not begin with BOS."""
        if add_special_tokens is None:
            names = {i: name for name, i in self.text_tokenizer.special_tokens.items()}
            first = names.get(self.prefix_token_id)
            add_special_tokens = first is None or not string.startswith(first)
        return self.text_tokenizer.encode_prompt(string, special=True, affixes=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows: dict[tuple[int, ...], dict[int, int]] = {}  # by inputs: last ids, each with its place among them
        found: list[tuple[tuple[int, ...], int, int]] = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's {self.max_length} "
                    "positions: this task is for a model with more"
                )
            *inputs, last = (*context, *continuation)[-(self.max_length + 1) :]
            choices = rows.setdefault(tuple(inputs), {})
            found.append((tuple(inputs), choices.setdefault(last, len(choices)), len(continuation)))
        scores = dict(zip(rows, self.scorer.score([(inputs, [*last]) for inputs, last in rows.items()]), strict=True))
        answers = []
        for inputs, choice, count in found:
            logprobs, greedy = scores[inputs]
            answers.append(
                (float(logprobs[-count:, choice].sum(dtype=np.float64)), bool(greedy[-count:, choice].all()))
            )
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each token once, with as much context as there is room for."""
        windows = list[tuple[None, list[int], list[int]]]()
        owners = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the texts that the model writes after each context, cut before the first of the task's stop strings.

        A task's `max_gen_toks` is at most half of the model's positions, of which a context takes the rest.
        """
        texts, done = [""] * len(requests), 0
        names = self.text_tokenizer.special_tokens.items()
        end = next((name for name, i in names if i == self.eot_token_id), None)
        options: list[Any] = [normalize_gen_kwargs(request.args[1], 256) for request in requests]
        until = [[s for s in handle_stop_sequences(own.pop("until"), eos=end) if s] for own in options]
        keys = [json.dumps(own, sort_keys=True, default=str) for own in options]
        for key in dict.fromkeys(keys):
            numbers = [i for i, own in enumerate(keys) if own == key]
            option = options[numbers[0]]
            count = min(option["max_gen_toks"], max(1, self.max_length // 2))
            if count < option["max_gen_toks"]:
                asked = f"{option['max_gen_toks']} new tokens were asked for, and {count} are"
                self.remarks[f"{asked} half of the model's {self.max_length} positions"] = None
            start, room = [self.prefix_token_id], self.max_length - count
            ids = {i: (self.tok_encode(requests[i].args[0]) or start)[-room:] for i in numbers}
            temperature = option.get("temperature", 0.0) if option.get("do_sample") else 0.0
            sampling = SamplingConfig.of(
                max_new_tokens=count,
                temperature=temperature,
                top_k=option.get("top_k"),
                top_p=option.get("top_p"),
                stop_ids=stop_ids(self.lm),
            )
            prompts, ends = [ids[i] for i in numbers], [until[i] for i in numbers]
            report = functools.partial(self._report, done, len(requests))
            for i, text in zip(numbers, self._written(prompts, sampling, ends, report), strict=True):
                texts[i] = text
            done += len(numbers)
        return texts

    def _report(self, before: int, total: int, done: int, of: int) -> None:
        self.scorer.progress(before + done, total)

    def _written(
        self,
        prompts: list[list[int]],
        config: SamplingConfig,
        until: list[list[str]],
        progress: Callable[[int, int], object],
    ) -> list[str]:
        """Return the texts that follow prompts, each cut before its stop strings."""

        def enough(i: int, sample: int, ids: list[int]) -> bool:
            text = self._decode(ids)
            return any(s in text for s in until[i])

        requests = [Request(tuple(ids), config, row=row) for row, ids in enumerate(prompts)]
        rows = self.scorer.batch_size
        found = answers(self.lm, requests, rows=rows, longest_first=True, enough=enough, progress=progress)
        texts = [self._decode(answer.token_ids) for (answer,) in found]
        return [postprocess_generated_text(text, own, None) for text, own in zip(texts, until, strict=True)]

    def _decode(self, ids: list[int]) -> str:
        return self.text_tokenizer.decode([i for i in ids if i < self.text_tokenizer.vocab_size])


def evaluate_tasks(
    lm: HarnessLM,
    names: Sequence[str],
    *,
    task_files: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    system: str | None = None,
) -> tuple[dict[str, dict[str, float]], dict[str, Any], list[str]]:
    """Return numbers by task and metric, each task's version, hash and items, and remarks.

    Raises UserError for an unknown task, and one that cannot be loaded.
    """
    with _quiet():
        tasks = load_tasks(names, task_files)
        for task in tasks["tasks"].values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        options = {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "system_instruction": system}
        found: Any = run_tasks(lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAP, **options)
    remarks, details = [*lm.remarks], {}
    for name, task in tasks["tasks"].items():
        samples = found["samples"][name]
        hashes = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in samples)
        details[name] = {
            "version": found["versions"].get(name),
            "hash": hashlib.sha256(hashes.encode()).hexdigest(),
            "num_fewshot": found["n-shot"].get(name),
            "items": found["n-samples"][name]["effective"],
            "items_of_task": found["n-samples"][name]["original"],
        }
        if (task.get_config("metadata") or {}).get(WRITES_CODE):
            remarks.append(f"{name}: its metric runs the code that the model writes, so only the texts are kept")
            details[name]["texts"] = [
                {"prompt": sample["arguments"][0][0], "text": sample["resps"][0][0]} for sample in samples
            ]
    groups = found.get("groups", {})
    results = {name: _numbers(values) for name, values in (groups | found["results"]).items()}
    for name, values in results.items():
        if name in details:
            values["n"] = details[name]["items"]
    return {name: values for name, values in results.items() if values}, details, remarks


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task: `acc,none` as `acc`, `exact_match,strict-match` as it is."""
    found = {key.removesuffix(",none"): value for key, value in values.items() if "," in key}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float) and key != "bypass"}


def load_tasks(names: Sequence[str], task_files: str | Path | None = None) -> Any:
    """Return the tasks and groups of lm_eval by these names, and of the YAML files below `task_files`.

    Tasks whose metric runs the model's code keep its texts in place of the metric. Raises UserError for unknown names,
    and where a task's data cannot be had.
    """
    if task_files is not None and not local_path(task_files, "task_files").is_dir():
        raise UserError(f"task_files={task_files} is not a directory: give the one that has the tasks' YAML files")
    manager = _manager(names, task_files)
    loaded: list[Any] = []
    for name in names:
        config = manager.task_index[name].cfg or {}
        try:
            if config.get("unsafe_code"):
                drop = ("process_results", "fewshot_config", "filter_list", "unsafe_code", "group")
                config = {key: value for key, value in config.items() if key not in drop}
                config["metadata"] = {**(config.get("metadata") or {}), WRITES_CODE: True}
                found = manager.load([config | {"metric_list": [{"metric": "bypass", "aggregation": "bypass"}]}])
            else:
                found = manager.load([name])
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {lines[0] if lines else ''}"
            data = config.get("dataset_path", "its data")
            raise UserError(
                f"the data of task '{name}' ({data}) cannot be loaded ({reason}): it needs the network once, or files "
                "here, of which a task file names the paths"
            ) from error
        loaded.append(found)
    merged: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for part in loaded:
        for key, values in merged.items():
            values |= part[key]
    return merged


def _manager(names: Sequence[str], task_files: str | Path | None) -> TaskManager:
    """Return a manager that knows the tasks. Only their folders are read: all of them take a minute."""
    root, own = Path(lm_eval.tasks.__file__).parent, [] if task_files is None else [Path(task_files)]
    found = TaskManager(include_defaults=False, include_path=[*own])
    if all(name in found.task_index for name in names):
        return found
    known = _folders_by_name(root)
    if unknown := [name for name in names if name not in known and name not in found.task_index]:
        near = difflib.get_close_matches(unknown[0], [*known, *found.task_index], n=3)
        hint = f"did you mean {' or '.join(f"'{name}'" for name in near)}?" if near else "see docs/evaluation.md"
        raise UserError(f"there is no task '{unknown[0]}' in lm_eval, nor in --task-files: {hint}")
    folders = sorted({root / folder for name in names for folder in known.get(name, ())})
    return TaskManager(include_defaults=False, include_path=[*folders, *own])


@functools.cache
def _folders_by_name(root: Path) -> dict[str, set[str]]:
    """Return the folders of lm_eval's tasks that have a task, group or tag of each name, by a look at the files."""
    found: dict[str, set[str]] = {}
    pattern = re.compile(r"^(?:(?:task|group|tag):[ \t]*|[ \t]*-[ \t]+)[\"']?([\w.+-]+)[\"']?[ \t]*$", re.MULTILINE)
    for file in root.rglob("*.yaml"):
        for name in pattern.findall(file.read_text(encoding="utf-8", errors="replace")):
            found.setdefault(name, set()).add(file.relative_to(root).parts[0])
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm_eval's and datasets' messages and bars off the screen; random numbers and processes are as before."""
    level, states = logging.root.manager.disable, (random.getstate(), np.random.get_state())
    variable = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # a forked process could wait for JAX's threads forever
    logging.disable(logging.CRITICAL)
    bars = not datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    random.seed(0)
    np.random.seed(SEED)
    try:
        nowhere = io.StringIO()
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(nowhere),
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        logging.disable(level)
        if bars:
            datasets.utils.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        os.environ.pop("DISABLE_MULTIPROC")
        if variable is not None:
            os.environ["DISABLE_MULTIPROC"] = variable
