"""Every path that a user gives may be a URL, or is refused in one sentence; none makes a local folder `gs:`.

The paths are found by themselves, in the commands' arguments, the configs' keys and the package's functions: a new text
among them has to be said here to be a path or not.
"""

import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import llama_jax
from llama_jax import data, tokenizers
from llama_jax.__main__ import COMMANDS as PARSED, main, make_parser
from llama_jax.config import Component, UserError, choices, field_types, override
from llama_jax.data import Source
from llama_jax.nn import LoRA
from llama_jax.run import Run, RunConfig

HERE = Path(__file__).resolve().parent

# Command lines with URL where the path is. RUN, TEXTS, OUT and CONFIG are local paths.
COMMANDS = {
    "convert source": "convert URL OUT --to hf",
    "convert destination": "convert RUN URL --to hf",
    "verify path": "verify URL",
    "tokenizer train files": "tokenizer train URL --vocab-size 300 --output OUT",
    "tokenizer train output": "tokenizer train TEXTS/00.txt --vocab-size 300 --output URL",
    "tokenizer encode tokenizer": "tokenizer encode URL text",
    "tokenizer decode tokenizer": "tokenizer decode URL 1",
    "tokenizer compare tokenizers": "tokenizer compare RUN/tokenizer URL",
    "tokenizer compare text": "tokenizer compare RUN/tokenizer --text URL",
    "prepare path": "prepare URL --tokenizer RUN/tokenizer --output OUT",
    "prepare tokenizer": "prepare TEXTS --tokenizer URL --output OUT",
    "prepare cache_dir": "prepare TEXTS --tokenizer RUN/tokenizer --cache-dir URL",
    "prepare output": "prepare TEXTS --tokenizer RUN/tokenizer --output URL",
    "sample path": "sample URL --prompt a",
    "sample tokenizer": "sample RUN --prompt a --tokenizer URL",
    "sample draft": "sample RUN --prompt a --draft URL",
    "sample output": "sample RUN --prompt a --output URL",
    "sample prompt_file": "sample RUN --prompt-file URL",
    "serve path": "serve URL",
    "serve tokenizer": "serve RUN --tokenizer URL",
    "serve base": "serve ADAPTER --base URL",
    "train config": "train URL/config.py --run-dir OUT",
    "train run_dir": "train CONFIG --data.path TEXTS --run-dir URL",
    "compare runs": "compare URL",
    "report runs": "report URL",
    "evaluate path": "evaluate URL",
    "evaluate tokenizer": "evaluate RUN --tokenizer URL",
    "evaluate text": "evaluate RUN --text URL",
    "evaluate pairs": "evaluate RUN --pairs URL --fields a,b",
    "evaluate source": "evaluate RUN --source URL --reference OUT",
    "evaluate task_files": "evaluate RUN --tasks a --task-files URL",
    "evaluate output": "evaluate RUN --output URL",
    "convert base": "convert ADAPTER OUT --to hf --base URL",
    "convert tokenizer": "convert RUN OUT --to hf --tokenizer URL",
    "sample base": "sample ADAPTER --prompt a --base URL",
    "plan config": "plan URL/config.py --topology v5e:8x8",
}
COMMAND_WORDS = {
    "tokenizer train special_token", "tokenizer encode text", "tokenizer decode ids", "prepare exclude",
    "tokenizer train fields", "tokenizer compare fields",
    "prepare fields", "prepare shards", "prepare max_bad_records", "sample prompt",
    "sample chat_template", "sample system", "sample stop", "sample regex", "sample json_schema", "sample logit_bias",
    "sample banned_ids", "sample forced_ids", "sample stop_ids", "sample early_stopping",
    "serve host", "serve name", "serve api_key", "serve chat_template", "serve ignore_config_keys",
    "sample ignore_config_keys", "convert ignore_config_keys", "prepare chat_template", "prepare document_chars",
    "prepare max_record_bytes", "prepare validation_fraction", "train more", "plan more", "plan topology",
    "plan chip", "compare metric", "compare png", "train coordinator_address", "train num_processes",
    "train process_id", "report metric", "report html",
    "evaluate chat_template", "evaluate fields", "evaluate system", "evaluate tasks", "evaluate reference",
}  # fmt: skip

# Keys that are paths, with what else a run needs for them. A source's stand in a config file.
KEYS = {
    "RunConfig.init_from": "train CONFIG --run-dir OUT --data.path TEXTS --tokenizer.path RUN/tokenizer"
    " --init-from URL",
    "TokenizerConfig.path": "train CONFIG --run-dir OUT --data.path TEXTS --tokenizer.path URL",
    "DataConfig.path": "train CONFIG --data.path URL --run-dir OUT --tokenizer.path RUN/tokenizer",
    "DataConfig.cache_dir": "train CONFIG --run-dir OUT --data.path TEXTS --data.cache-dir URL",
    "Source.path": "",
}
KEY_WORDS = {
    "sample_prompts", "wandb_project", "attention_kernel", "exclude", "fields", "name", "mask_token", "cls_token",
    "sep_token", "start_token", "end_token", "labels", "special_tokens", "allow", "targets",
}  # fmt: skip

ADAPTER = HERE / "adapter"  # no more than the config of one
SIZES = [{"model.num_layers": layers} for layers in (1, 2, 3)]


def adapted(run: Run) -> llama_jax.LanguageModel:
    """The run's model, with adapters."""
    lm = run.load()
    config = override(lm.config, {"adapters": LoRA(rank=1, alpha=1.0, targets=("q_proj",))})
    return dataclasses.replace(lm, config=config, model=llama_jax.build(config))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ablate run_dir": lambda url, run, config: llama_jax.ablate(config, [{}], run_dir=url),
    "convert base": lambda url, run, config: llama_jax.convert(ADAPTER, "out", to="hf", base=url),
    "convert destination": lambda url, run, config: llama_jax.convert(run.directory, url, to="hf"),
    "convert source": lambda url, run, config: llama_jax.convert(url, "out", to="hf"),
    "convert tokenizer": lambda url, run, config: llama_jax.convert(run.directory, "out", to="hf", tokenizer=url),
    "evaluate output": lambda url, run, config: llama_jax.evaluate(run, output=url),
    "evaluate task_files": lambda url, run, config: llama_jax.evaluate(run, tasks="a", task_files=url),
    "evaluate tokenizer": lambda url, run, config: llama_jax.evaluate(run.directory, tokenizer=url),
    "load base": lambda url, run, config: llama_jax.load(ADAPTER, base=url),
    "load path": lambda url, run, config: llama_jax.load(url),
    "load tokenizer": lambda url, run, config: llama_jax.load(run.directory, tokenizer=url),
    "load_config name": lambda url, run, config: llama_jax.load_config(url),
    "load_tokenizer path": lambda url, run, config: tokenizers.load_tokenizer(url),
    "open_run directory": lambda url, run, config: llama_jax.open_run(url),
    "open_sweep run_dir": lambda url, run, config: llama_jax.open_sweep(url),
    "prepare_corpus directory": lambda url, run, config: data.prepare_corpus(config.data, run.tokenizer, directory=url),
    "prepare_shards directory": lambda url, run, config: data.prepare_shards(
        config.data, run.tokenizer, [0], directory=url
    ),
    "report paths": lambda url, run, config: llama_jax.report(url),
    "resume run_dir": lambda url, run, config: llama_jax.resume(url),
    "save_adapters directory": lambda url, run, config: llama_jax.save_adapters(adapted(run), url),
    "scaling run_dir": lambda url, run, config: llama_jax.scaling(config, [1e9, 2e9], SIZES, run_dir=url),
    "save directory": lambda url, run, config: llama_jax.save(run.load(), url),
    "Tokenizer.save directory": lambda url, run, config: run.tokenizer.save(url),
    "train run_dir": lambda url, run, config: llama_jax.train(config, url),
}


@pytest.fixture(autouse=True)
def _empty_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is made: not where the command runs, not in the cache."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # not installed
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["here"]


def parts_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    if typing.get_origin(annotation) is not typing.Literal:
        for argument in typing.get_args(annotation):
            yield from parts_of(argument)


def text_keys() -> set[str]:
    """Every field of a run's config, or of a component that may be in it, that takes a text, as `Class.field`."""
    found, seen, left = set(), set(), [RunConfig]
    while left:
        cls = left.pop()
        if cls in seen:
            continue
        seen.add(cls)
        for name, annotation in field_types(cls).items():
            for part in parts_of(annotation):
                if part in (str, Path):
                    found.add(f"{cls.__name__}.{name}")
                elif isinstance(part, type) and issubclass(part, Component):
                    left += choices(part).values()
                elif isinstance(part, type) and dataclasses.is_dataclass(part):
                    left.append(part)
    return found


def text_arguments() -> set[str]:
    """`COMMAND NAME` of every argument that is no number, switch or choice."""
    return {
        f"{command} {action.dest}"
        for command in PARSED
        for action in make_parser(command)._actions
        if action.nargs != 0 and action.type not in (int, float) and not action.choices
    }


def test_every_argument_is_known_to_be_a_path_or_not():
    unknown = text_arguments() - COMMANDS.keys() - COMMAND_WORDS
    assert unknown == set(), "is it a path? Then give it a command line in COMMANDS, else put it into COMMAND_WORDS"
    assert len(text_arguments()) > 20


def test_every_key_is_known_to_be_a_path_or_not():
    unknown = {key for key in text_keys() if key not in KEYS and key.partition(".")[2] not in KEY_WORDS}
    assert unknown == set(), "is it a path? Then give it a command line in KEYS, else put it into KEY_WORDS"
    assert set(KEYS) <= text_keys()


def test_every_function_that_takes_a_path_is_known():
    named = {name: getattr(llama_jax, name) for name in llama_jax.__all__}
    named |= {
        function.__name__: function
        for function in (data.prepare_corpus, data.prepare_shards, tokenizers.load_tokenizer)
    }
    named |= {"Tokenizer.save": tokenizers.Tokenizer.save}
    found = set()
    for name, function in named.items():
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                if Path in parts_of(parameter.annotation) or "Path" in str(parameter.annotation):
                    found.add(f"{name} {parameter.name}")
    assert found - {"save_adapters base"} == set(FUNCTIONS)  # it is written as it is, and not read


URLS = [("gs://bucket/it", r"llama_jax\[gcs\]"), ("nowhere://bucket/it", "no file system that fsspec knows")]


@pytest.mark.parametrize(("url", "sentence"), URLS, ids=lambda value: value[:2])
@pytest.mark.parametrize("line", [*COMMANDS.values(), *filter(None, KEYS.values())])
def test_command_refuses_in_one_sentence(
    line: str, url: str, sentence: str, finished_run: Run, run_config: RunConfig, capfd: pytest.CaptureFixture[str]
):
    places = {
        "RUN": finished_run.directory, "ADAPTER": ADAPTER,
        "TEXTS": run_config.data.path[0], "CONFIG": HERE.parent / "tiny_run.py",
        "OUT": "out", "URL": url,
    }  # fmt: skip
    for name, place in places.items():
        line = line.replace(name, str(place))
    assert main(line.split()) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    [said] = captured.err.splitlines()
    assert said.startswith("error: ")
    assert url in said
    assert "must be a local file" in said or re.search(sentence, said)


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_refuses_in_one_sentence(name: str, kind: type, finished_run: Run, run_config: RunConfig):
    with pytest.raises(UserError, match=r"llama_jax\[gcs\]|must be a local file"):
        FUNCTIONS[name](kind("gs://bucket/it.py"), finished_run, run_config)


def test_source_of_a_mixture_refuses_in_one_sentence(run_config: RunConfig):
    sources = (Source("a", ("gs://bucket/it",), share=1.0),)
    config = override(run_config, {"data.path": (), "data.sources": sources})
    with pytest.raises(UserError, match=r"llama_jax\[gcs\]"):
        llama_jax.train(config, "out")


def test_cache_of_the_environment_is_local(monkeypatch: pytest.MonkeyPatch, run_config: RunConfig, finished_run: Run):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "gs://bucket/cache")
    config = override(run_config, {"data.cache_dir": None})
    with pytest.raises(UserError, match="LLAMA_JAX_CACHE='gs://bucket/cache' must be a local directory"):
        data.prepare_corpus(config.data, finished_run.tokenizer)
