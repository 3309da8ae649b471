"""The command line: what it tells, its exit codes, and one sentence for every mistake."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llama_jax.__main__ import COMMANDS, RESTARTED, TUNABLES, main, parse
from llama_jax.commands import COMMON_KEYS
from llama_jax.config import config_names, leaves, override
from llama_jax.data import DataConfig
from llama_jax.run import Run, RunConfig, load_config

HERE = Path(__file__).resolve().parent
GOLDENS = HERE / "parity" / "goldens"
TINY = str(HERE / "tiny_run.py")


@pytest.fixture
def options(run_config: RunConfig, tmp_path: Path) -> list[str]:
    """Of a run that would start if nothing else were wrong."""
    data = run_config.data
    return [
        "train",
        TINY,
        "--data.path",
        data.path[0],
        "--data.cache-dir",
        f"{tmp_path}/cache",
        "--run-dir",
        f"{tmp_path}/run",
    ]


def listing(folder: Path) -> set[str]:
    """What is there, the cache's empty folder, lock files and the files' hashes aside."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"} - {
        "cache",
        "cache/corpora",
        "cache/digests.jsonl",
    }


def refused(argv: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that the command ends with; the code is 2 and nothing is left behind."""
    before = listing(folder)
    capsys.readouterr()
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""
    assert listing(folder) == before
    return captured.err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--optimizer.learning-rat 3", r"unknown key 'optimizer.learning_rat'.*mean 'optimizer.learning_rate'\?"),
        ("--model.attention.num-kv-head 1", r"unknown key.*mean 'model.attention.num_kv_heads'\?"),
        ("--num-steps many", "num_steps='many' is not of type int"),
        ("--compute.scan-layers 2", "compute.scan_layers='2' is not of type bool"),
        ("--model.attention.num-kv-heads 3", "model.attention.num_kv_heads=3 does not divide num_heads=4: take one of"),
        ("--sequence-length 65", "sequence_length=65 is longer than model.max_positions=64: shorten"),
        ("--global-batch-size 12", "global_batch_size=12 is not divisible by mesh.data x mesh.fsdp=8: take a multiple"),
        ("--optimizer.accumulation-steps 3", "global_batch_size=8 is not divisible by optimizer.accumulation_steps=3"),
        ("--mesh.tensor 3", "devices and there are 8"),
        (
            "--mesh.context 8 --mesh.fsdp 1 --sequence-length 20",
            "sequence_length=20 is not divisible by mesh.context=8",
        ),
        ("--tokenizer.vocab-size 305", "tokenizer.vocab_size=305 is more than model.vocab_size=304"),
        ("--compute.attention-kernel quick", "compute.attention_kernel='quick' does not exist: the kernels are"),
        ("--data.path absent/", "path 'absent/' is no file, no directory"),
        ("--tokenizer.path absent.model", "tokenizer file 'absent.model' does not exist"),
        ("--data.validation-fraction 0.0001", "leaves no document for validation"),
        ("--logging.wandb-project x", "logging.wandb_project needs an extra: pip install"),
        ("--checkpoint.keep-last 0", "checkpoint.keep_last=0 must be at least 1"),
        ("surplus", "'surplus' is one argument too many"),
        ("--num-processes 2", "--coordinator-address is missing: give --coordinator-address, --num-processes and"),
        ("--coordinator-address a:1 --num-processes 2", "--process-id is missing"),
        ("--coordinator-address a:1 --num-processes 2 --process-id 2", "--process-id=2 must be less than --num-proce"),
        ("--coordinator-address a:1 --num-processes 2 --process-id -1", "--process-id='-1' must be a number"),
        ("--coordinator-address a --num-processes 2 --process-id 0", "--coordinator-address='a' must be HOST:PORT"),
    ],
)
def test_wrong_options(options: list[str], tmp_path: Path, capsys, monkeypatch, more: str, sentence: str):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert re.search(sentence, refused([*options, *more.split(" ")], tmp_path, capsys))


def test_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sentence = refused(["train", "tiny_pyton", "--run-dir", f"{tmp_path}/run"], tmp_path, capsys)
    assert sentence == "there is no config 'tiny_pyton': did you mean 'tiny_python'?"
    sentence = refused(["train", f"{tmp_path}/absent.py"], tmp_path, capsys)
    assert sentence == f"config file '{tmp_path}/absent.py' does not exist"
    (tmp_path / "empty.py").write_text("")
    assert "has no function get_config()" in refused(["train", f"{tmp_path}/empty.py"], tmp_path, capsys)
    assert refused(["train", TINY, "--run-dir"], tmp_path, capsys) == "--run-dir needs a directory"


def test_a_text_too_small(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], finished_run: Run):
    text = tmp_path / "text.txt"
    options += ["--data.path", str(text), "--data.validation-fraction", "0", "--sequence-length", "64"]
    options += ["--tokenizer.path", str(finished_run.directory / "tokenizer")]
    text.write_text("")
    assert "has no text" in refused(options, tmp_path, capsys)
    text.write_text("too short for a window")
    assert main(options) == 2
    assert re.search(r"sequence_length=64 needs 65 tokens, and the training text has \d+:", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()  # what remains is the text's place in the cache


def test_loss_that_is_no_number_exits_with_1(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    limit = ["--checks.max-skipped-steps", "1"]
    code = main([*options, "--optimizer.learning-rate", "1e30", "--logging.sample-prompts", "", *limit])
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("\n") == 1
    assert re.match(
        r"failed: the (loss|norm of the gradient) at step 2 is nan, .*: lower optimizer.learning_rate", error
    )
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]


def test_continuing_with_another_key(finished_run: Run, run_config: RunConfig, tmp_path: Path, capsys):
    copy = shutil.copytree(finished_run.directory, tmp_path / "run")
    argv = ["train", TINY, "--data.path", run_config.data.path[0], "--seed", "3", "--run-dir", str(copy)]
    assert f"'{copy}' holds a run with seed=0, not 3" in refused(argv, tmp_path, capsys)


def truncate(file: Path) -> None:
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)


def damaged_checkpoint(folder: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.directory, folder / "x")
    for file in (folder / "x" / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            truncate(file)


def damaged_config(folder: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.directory, folder / "x")
    truncate(folder / "x" / "config.json")


def without_checkpoints(folder: Path, finished_run: Run) -> None:
    shutil.copytree(finished_run.directory, folder / "x")
    shutil.rmtree(folder / "x" / "checkpoints")
    (folder / "x" / "checkpoints").mkdir()


def not_a_run(folder: Path, _: Run) -> None:
    (folder / "x").mkdir()
    (folder / "x" / "thesis.txt").write_text("mine")


def truncated_safetensors(folder: Path, _: Run) -> None:
    shutil.copytree(GOLDENS / "llama_gqa", folder / "x")
    truncate(folder / "x" / "model.safetensors")


def index_outside(folder: Path, _: Run) -> None:
    shutil.copytree(GOLDENS / "llama_gqa", folder / "x")
    (folder / "x" / "model.safetensors").rename(folder / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "x" / "model.safetensors.index.json").write_text(json.dumps(index))


def wrong_shapes(folder: Path, _: Run) -> None:
    shutil.copytree(GOLDENS / "llama_gqa", folder / "x")
    config = json.loads((folder / "x" / "config.json").read_text())
    (folder / "x" / "config.json").write_text(
        json.dumps(config | {"intermediate_size": config["intermediate_size"] * 2})
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("command", ["sample", "convert"])
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda *_: None, "does not exist"),
        (damaged_checkpoint, "checkpoint .*12' is damaged"),
        (damaged_config, "config.json' is not valid JSON"),
        (without_checkpoints, "has no finished checkpoint yet"),
        (not_a_run, "has neither config.json"),
        (truncated_safetensors, "model.safetensors'? is (damaged|truncated)|truncated"),
        (index_outside, "outside"),
        (wrong_shapes, "with shape .* and its config asks for"),
    ],
)
def test_wrong_source(
    finished_run: Run, tmp_path: Path, capsys, command: str, damage: Callable[[Path, Run], None], sentence: str
):
    damage(tmp_path, finished_run)
    end = ["--prompt", "a"] if command == "sample" else [f"{tmp_path}/made", "--to", "hf"]
    assert re.search(sentence, refused([command, f"{tmp_path}/x", *end], tmp_path, capsys))
    gc.collect()


def test_prompt_longer_than_the_context(finished_run: Run, capsys: pytest.CaptureFixture[str]):
    argv = ["sample", str(finished_run.directory), "--prompt", "the cat " * 64]
    said = refused(argv, finished_run.directory, capsys)
    assert re.search(r"prompt of \d+ tokens .* more than the model's 64 positions: shorten the prompt", said)


def test_as_a_process(tmp_path: Path):
    """No traceback and no chatter of the libraries, from a start outside the checkout."""
    command = [sys.executable, HERE.parent / "train.py", "tiny_python", "--num-step", "3"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == ("error: unknown key 'num_step': RunConfig has no 'num_step'. Did you mean 'num_steps'?\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whoever_has_seen_enough(finished_run: Run):
    """`sample.py ... | head -c 1`: into a pipe that nobody reads."""
    options = ["--prompt", "a", "--max-new-tokens", "40"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, HERE.parent / "sample.py", finished_run.directory, *options]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_help_of_every_config_names_every_key(capsys: pytest.CaptureFixture[str]):
    for name in config_names():
        assert main(["train", name, "--help", "all"]) == 0
        lines = capsys.readouterr().out.splitlines()
        for key, _, _ in leaves(load_config(name)):
            [index] = [i for i, line in enumerate(lines) if line.startswith(f"  --{key.replace('_', '-')} <")]
            assert re.fullmatch(r"  --\S+ <[^>]+> = .+", lines[index]), lines[index]
            assert re.fullmatch(r" {6}\S.*", lines[index + 1]), f"{name}: {key} has no line of meaning"


def test_help_shows_the_keys_that_are_changed_most(capsys: pytest.CaptureFixture[str]):
    everything = {key for key, _, _ in leaves(load_config("tiny_python"))}
    assert len(COMMON_KEYS) == 20
    assert set(COMMON_KEYS) <= everything
    for command in ("train", "plan"):
        assert main([command, "tiny_python", "--help"]) == 0
        shown = re.findall(r"^  --(\S+) <", capsys.readouterr().out, re.MULTILINE)
        assert {key.replace("-", "_") for key in shown} == set(COMMON_KEYS)


def test_defaults_in_the_help_of_prepare_are_those_of_the_config():
    """They are written out there, because the help imports no config."""
    config, found = DataConfig(path=()), {}
    for names, options in COMMANDS["prepare"].arguments:
        key = names[0].lstrip("-").replace("-", "_")
        if hasattr(config, key) and (default := re.search(r"default: (\S+)$", options["help"])):
            found[key] = default[1]
    assert found.keys() == {"fields", "document_chars", "max_record_bytes", "max_bad_records", "validation_fraction"}
    assert override(config, found) == config


@pytest.mark.parametrize("words", [[], *(name.split() for name in COMMANDS), ["tokenizer"]], ids=" ".join)
def test_help_imports_no_jax(words: list[str]):
    """And takes less than 0.5 s of processor time; so does the package itself."""
    code = f"import resource, sys; from llama_jax.__main__ import main; main({[*words, '--help']})"
    check = "import llama_jax; assert not {'jax', 'numpy'} & sys.modules.keys()"
    code = f"import sys, resource\ntry:\n {code}\nexcept SystemExit as e: assert not e.code\n{check}"
    code += "\nused = resource.getrusage(resource.RUSAGE_SELF); assert used.ru_utime + used.ru_stime < 0.5, used"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "usage: " in ended.stdout


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", TINY, "--run-dri", "x"], "unknown flag '--run-dri': did you mean '--run-dir'?"),
        (["train", TINY, "--data.cache-dir"], "--data.cache-dir needs a value of type str or none"),
        (["train", TINY, "--num-steps", "--seed", "1"], "--num-steps needs a value of type int"),
        (["sample", "x", "--promt", "a"], "unknown flag '--promt': did you mean '--prompt'?"),
        (["sample", "x", "--top-k", "many"], "--top-k='many' must be a whole number"),
        (["sample", "x", "y"], "'y' is one argument too many: did you mean --prompt 'y'?"),
        (["convert", "a", "b"], "the following arguments are required: --to: `python -m llama_jax convert --help`"),
        (["prepare", "x", "--tokenizer", "t", "--document-chars", "x"], "document_chars='x' is not of type int"),
        (
            ["prepare", "x", "--tokenizer", "t", "--chat-template", "ChatMl"],
            "(one of ChatGLM2Chat, ChatML, DirectoryChat",
        ),
        (["tokenizer", "tran"], "there is no command 'tokenizer tran': did you mean 'tokenizer train'?"),
        (["trian"], "there is no command 'trian': did you mean 'train'?"),
        ([], "give a command: the commands are train, plan"),
    ],
    ids=" ".join,
)
def test_wrong_words(argv: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert sentence in refused(argv, tmp_path, capsys)


def test_keys_and_flags_in_any_order():
    words = ["--num-steps", "3", "--logging.tensorboard", "--run-dir=x", "tiny", "--mesh.fsdp=-1", "--mesh.data", "-1"]
    args = parse(["train", *words])
    assert (args.config, args.run_dir) == ("tiny", "x")
    assert args.keys == {"num_steps": "3", "logging.tensorboard": True, "mesh.fsdp": "-1", "mesh.data": "-1"}


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize("start", [["train.py"], ["-m", "llama_jax", "train"]], ids=" ".join)
def test_the_allocator_s_settings(start: list[str], tmp_path: Path):
    """`train` has them however it is started, once; a debugger, a notebook and other commands do not."""
    packages = tmp_path / "packages"
    packages.mkdir()
    code = "import os, sys\nprint(os.environ.get('GLIBC_TUNABLES'), sys._xoptions)\nraise SystemExit(7)\n"
    (packages / "jax.py").write_text(code)  # imported once the settings are decided, and sooner than JAX itself
    config = tmp_path / "config.py"
    config.write_text("import jax\n")
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment["PYTHONPATH"] = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])

    def started(*before: str, **more: str) -> str:
        command = [sys.executable, *before, *start, str(config)]
        root = HERE.parent
        ended = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment | more, timeout=120)
        assert (ended.returncode, ended.stderr) == (7, "")
        return ended.stdout.strip()

    assert started() == f"{TUNABLES['GLIBC_TUNABLES']} {{'{RESTARTED}': True}}"
    assert started(GLIBC_TUNABLES="") == "{}"
    assert started("-X", RESTARTED).startswith("None"), "whatever drops the environment does not make a loop"
    if start[0] == "train.py":
        watched = "import sys, runpy; sys.argv = sys.argv[1:]; sys.settrace(lambda *_: None); "
        assert started("-c", watched + "runpy.run_path('train.py', run_name='__main__')") == "None {}"


@pytest.mark.skipif(sys.platform != "linux", reason="on_exit of glibc")
def test_a_signal_while_python_ends_changes_no_exit_code():
    """What is done is done: a SIGTERM after Python has taken its handlers away, by a function of the C library."""
    late = "import ctypes; libc = ctypes.CDLL(None); libc.on_exit(libc.kill, ctypes.c_void_p(15)); "  # kill(0, SIGTERM)
    code = late + "from llama_jax.__main__ import console; console(['plan', '--help'])"
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True, timeout=120)
    assert ended.returncode == 0


def test_help_without_a_config_names_the_configs(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    assert "tiny_python" in capsys.readouterr().out
    assert main(["train"]) == 2


@pytest.mark.parametrize("command", ["sample", "convert", "prepare", "tokenizer"])
def test_help_of_the_other_commands(command: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.slow
def test_freed_memory_that_is_kept_goes_back_when_it_is_released():
    code = """
import re
from pathlib import Path
import numpy as np
from llama_jax.run.hardware import release_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before = resident()
blocks = [np.ones(500_000) for _ in range(80)]  # 4 MB each
last = np.ones(10)  # above them
del blocks
kept = resident() - before
release_freed_memory()
print(kept, resident() - before)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | TUNABLES
    )
    kept, left = map(float, found.stdout.split())
    assert kept > 250
    assert left < 50


@pytest.mark.slow
def test_the_temporary_arrays_of_one_step_are_resident_at_a_time(tmp_path: Path):
    code = """
import sys
from pathlib import Path
from llama_jax.config import override
from llama_jax.run import train, training
from llama_jax.run.hardware import settle
from tests.tiny_run import get_config, write_texts

resident, temporary = [], []

def watched(taken, step, state, *args):
    if not taken:
        temporary.append(step.lower(state, *args).compile().memory_analysis().temp_size_in_bytes)
    settle(taken, step, state, *args)
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

training.settle = watched
wide = {"model.hidden_size": 256, "model.feed_forward.intermediate_size": 1024, "model.num_layers": 3}
once = {"num_steps": 20, "checkpoint.every_steps": 20, "logging.validate_every_steps": 20}  # nothing between the steps
texts = {"data.path": (str(write_texts(Path(sys.argv[1]) / "texts")),), "global_batch_size": 32, "sequence_length": 64}
train(override(get_config(), wide | once | texts), Path(sys.argv[1]) / "run")
print(temporary[0], resident[0], max(resident))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=HERE.parent, env=os.environ | TUNABLES | {"XLA_FLAGS": ""},
    )  # fmt: skip
    block, first, highest = map(int, found.stdout.splitlines()[-1].split())
    assert block > 2**25, found.stdout
    assert highest < first + 1.5 * block
