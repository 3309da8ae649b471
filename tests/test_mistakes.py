"""What people mistype: exit code 2, one sentence that says what to do, and nothing left behind."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llama_jax import installation
from llama_jax.__main__ import main
from llama_jax.run import Run, RunConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests" / "tiny_run.py")

# Words of a command line, and what the sentence has to contain. T is a config whose run would start, R a finished run.
KEYS = """
T --learning-rate 1e-4 | RunConfig has no 'learning_rate'. Did you mean 'optimizer.learning_rate'?
T --lr 1 | Did you mean 'optimizer.learning_rate'?
T --optimizer.lr 1 | Did you mean 'optimizer.learning_rate'?
T --training.learning-rate 1 | Did you mean 'optimizer.learning_rate'?
T --optimiser.learning_rate 1 | Did you mean 'optimizer.learning_rate'?
T --batch-size 1 | Did you mean 'global_batch_size'?
T --steps 1 | Did you mean 'num_steps'?
T --n-layer 1 | Did you mean 'model.num_layers'?
T --dropout 0.1 | Did you mean 'model.attention.dropout' or 'model.dropout'?
T --model.num-heads 2 | Did you mean 'model.attention.num_heads'?
T --model.norm.bias true | (LayerNorm has it: choose it with --model.norm LayerNorm)
T -num-steps 5 | '-num-steps' has one dash: did you mean '--num-steps'?
T num_steps=5 | 'num_steps=5' lacks the dashes of a key: did you mean '--num-steps 5'?
T num-steps=5 | did you mean '--num-steps 5'?
T num_steps 5 | 'num_steps' is one argument too many: did you mean '--num-steps 5'?
T --no-compute.scan-layers | unknown flag '--no-compute.scan-layers': did you mean '--compute.scan-layers false'?
T --compute.scan-layers yes | compute.scan_layers='yes' is not of type bool: give true or false
T --num-steps 1M | num_steps='1M' is not of type int: give a whole number such as 1000 or 1e3
T --num-steps 1.5 | give a whole number
T --num-steps= | num_steps='' is not of type int
T --optimizer.learning-rate 0,1 | give a number such as 0.1 or 1e-4
T --optimizer.learning-rate -1 | optimizer.learning_rate=-1.0 must be above 0
T --seed -1 | seed=-1 must be at least 0 and below 2**64
T --mesh 8 | mesh='8' is not of type MeshConfig: change its keys, such as mesh.pipeline
T --mesh.fsdp 3 | devices and there are 8
T --optimizer adamw | did you mean 'AdamW'?
T --model.attention Latent | did you mean 'LatentAttention' or 'SparseLatentAttention'?
T --model.norm layernorm | did you mean 'LayerNorm'?
T --data.objective span | did you mean 'SpanCorruption'?
T --model.feed_forward Experts | model.feed_forward=Experts also needs model.feed_forward.num_experts: give it too
T --run_dri x | unknown flag '--run-dri': did you mean '--run-dir'?
T --run-dir '' | --run-dir is empty: give a value
T --run-dir file.txt | 'file.txt' is a file: give another --run-dir
T --data.cache-dir file.txt | 'file.txt' cannot be a directory, because
T --data.path '' | path is empty: name the files
T --profile.start-step -1 | profile.start_step=-1 must be at least 0
T --help=nothing_here | no key is about 'nothing_here'
T --help optimizr | no key is about 'optimizr': did you mean 'optimizer'?
--help optimizer | --help optimizer needs a config: `train.py tiny_python --help optimizer`
-help | '-help' has one dash: did you mean '--help'?
--num-steps 5 | give a config first, such as tiny_python: there are
num_steps=5 | did you mean '--num-steps 5'?
'' | CONFIG is empty
tiny_python.py | config file 'tiny_python.py' does not exist: did you mean 'tiny_python'?
../configs/tiny_python.py | does not exist: did you mean 'tiny_python'?
configs/tiny_python | did you mean 'tiny_python'?
file.txt | 'file.txt' is not a config: give the name of one
syntax.py | syntax.py' is not Python: line 2: '(' was never closed
imports.py | config file 'imports.py' imports 'absent_package', which is not installed
number.py | returns 3: it must return a RunConfig
folder | 'folder' is not a run: give a config
"""
COMMANDS = """
sample | the following arguments are required: PATH
sample '' | PATH is empty
sample tiny_python | 'tiny_python' is a config and has no weights
sample number.py | 'number.py' is a config and has no weights
sample file.txt | 'file.txt' is no GGUF file and no llama2.c .bin; others are given as their directory
sample folder | 'folder' has neither config.json
sample R | 'R' does not exist
sample $R a | 'a' is one argument too many: did you mean --prompt 'a'?
sample $R -prompt a | '-prompt' has one dash: did you mean '--prompt'?
sample $R --promt a | did you mean '--prompt'?
sample $R --prompt | --prompt needs a value
sample $R --prompt a --max_new_tokens x | --max-new-tokens='x' must be a whole number
sample $R --prompt a --max-new-tokens 0 | max_new_tokens=0 must be at least 1
sample $R --prompt a --max-new-tokens 1000 | take at most
sample $R --prompt a --temperature -1 | temperature=-1.0 must be 0 (greedy) or above
sample $R --prompt a --temperature nan | temperature=nan must be
sample $R --prompt a --top-p 2 | top_p=2.0 must be above 0 and at most 1
sample $R --prompt a --top-k 0 | top_k=0 must be at least 1
sample $R --prompt a --seed abc | --seed='abc' must be a whole number
sample $R --prompt a --seed -1 | seed=-1 must be from 0 to 2**64 - 1
sample $R --prompt a --tokenizer '' | --tokenizer is empty
sample $R --prompt a --tokenizer folder | give the tokenizer's own path
convert $R | the following arguments are required: DESTINATION, --to
convert $R out --to gguf | --to='gguf' must be one of hf, native
convert $R folder --to hf | 'folder' exists already
convert $R '' --to hf | DESTINATION is empty
convert $R file.txt/x --to hf | 'file.txt/x' cannot be a directory, because
convert tiny_python out --to hf | 'tiny_python' is a config and has no weights
convert $R out --to hf --dtype fp16 | --dtype='fp16' must be one of float32, bfloat16
prepare folder --tokeniser t | unknown flag '--tokeniser': did you mean '--tokenizer'?
prepare folder --tokenizer '' | --tokenizer is empty
prepare '' --tokenizer $R/tokenizer | PATH is empty
prepare absent --tokenizer $R/tokenizer --cache-dir . | path 'absent' is no file
prepare folder --tokenizer $R/tokenizer --output file.txt | cannot be a directory, because
prepare folder --tokenizer $R/tokenizer --output folder --cache-dir cache | has other files than a corpus
prepare bad.json --tokenizer $R/tokenizer --output out --cache-dir cache | record 1 of 'bad.json' lacks a field
prepare folder --tokenizer $R/tokenizer --num-workers 0 | --num-workers=0 must be at least 1
prepare folder --tokenizer $R/tokenizer --shards 3:1 | --shards=3:1 names no shard
tokenizer | give a command: the commands are tokenizer train, tokenizer encode
tokenizer train folder --vocab-size 300 | the following arguments are required: --output
tokenizer train folder --vocab-size x --output out | --vocab-size='x' must be a whole number
tokenizer train folder --vocab-size 10 --output out | vocab_size=10 must be at least
tokenizer train folder --vocab-size 300 --output file.txt | cannot be a directory, because
tokenizer train folder --vocab-size 300 --output '' | --output is empty
tokenizer train folder --vocab-size 300 --kind BPE --output out | --kind='BPE' must be one of bpe, unigram
tokenizer encode file.txt a | 'file.txt' is damaged or of an unknown kind
tokenizer decode $R/tokenizer 1,2 | '1,2' is not a token id
tokenizer decode $R/tokenizer -1 | token id -1 is outside
plan tiny_python | plan needs --topology, such as h100
plan tiny_python --topologie h100 | unknown flag '--topologie': did you mean '--topology'?
plan tiny_python --topology h1000 | there is no chip 'h1000': did you mean 'h100'?
plan tiny_python --topology rtx4090:2x8 --global-batch-size 64 | the network between several rtx4090 is not known
plan tiny_python --chip name=mine | must give peak_flops (FLOP/s), memory (bytes) and bandwidth
--versoin | '--versoin' comes before a command: did you mean '--version'?
smaple x | there is no command 'smaple': did you mean 'sample'?
"""
LINES = [f"train {line}" for line in KEYS.split("\n") if line] + [line for line in COMMANDS.split("\n") if line]


def listing(folder: Path) -> set[str]:
    """What is there, locks and what a cache knows about files aside."""
    ignored = (".lock", "digests.jsonl", "cache", "corpora")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.name.endswith(ignored)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few files."""
    for name, text in {
        "file.txt": "hello\n",
        "folder/a.txt": "the cat sat on the mat\n",
        "bad.json": '{"a": 1}',
        "syntax.py": "import os\nx = (\n",
        "imports.py": "import absent_package\n",
        "number.py": "def get_config():\n    return 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line", LINES)
def test_a_mistake_is_one_sentence(
    line: str, place: Path, finished_run: Run, run_config: RunConfig, capsys: pytest.CaptureFixture[str]
):
    words, sentence = line.split(" | ")
    words = words.replace("train T", f"train {TINY} --data.path {run_config.data.path[0]}")
    words = words.replace("$R", str(finished_run.directory))
    before = listing(place)
    code = main(shlex.split(words))
    told = capsys.readouterr()
    assert (code, told.out) == (2, ""), told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1, told.err
    assert sentence in told.err
    assert listing(place) == before


def test_files_that_an_old_python_reads():
    """So far as to say which Python is needed, where Python 3.8 would stop at new syntax."""
    for name in ("train.py", "sample.py", "llama_jax/__init__.py", "llama_jax/installation.py"):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize("start", [["train.py", "x"], ["sample.py", "x"], ["-m", "llama_jax", "plan", "x"]])
def test_an_old_python(start: list[str]):
    """A sentence in place of a SyntaxError; a true old Python where there is one."""
    code = "import runpy, sys; sys.version_info = (3, 11, 7); sys.argv = sys.argv[1:]; "
    run = "sys.argv[0] = '-m'; runpy.run_module('llama_jax')" if start[0] == "-m" else "runpy.run_path(sys.argv[0])"
    ended = subprocess.run([sys.executable, "-c", code + run, *start], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: llama_jax needs Python 3.12 or newer, and this is 3.11.7 (")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["lazy_loader", "flax"])
def test_a_missing_package(package: str):
    code = f"import runpy, sys; sys.modules['{package}'] = None; sys.argv = ['train.py', 'tiny_python']; "
    ended = subprocess.run(
        [sys.executable, "-c", f"{code}runpy.run_path('train.py', run_name='__main__')"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"error: the package '{package}' is not installed for {sys.executable}: ")
    assert ended.stderr.count("\n") == 1


def test_where_a_python_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In a checkout its environment, which `make install` makes; outside of one by pip."""
    monkeypatch.setattr(installation, "__file__", str(tmp_path / "llama_jax" / "installation.py"))
    assert "pip install llama_jax" in installation.missing_package("flax")
    (tmp_path / "Makefile").write_text("")
    assert f"run `make install` in {tmp_path}" in installation.missing_package("flax")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("")
    assert installation.missing_package("flax").endswith(f"take the checkout's {tmp_path}/.venv/bin/python")


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"], ["sample", "--version"]], ids=" ".join)
def test_version(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("llama_jax 0.1.0 (jax ")


def test_help_by_section_leaf_and_word(capsys: pytest.CaptureFixture[str]):
    def keys(*words: str) -> set[str]:
        assert main(["train", "tiny_python", "--help", *words]) == 0
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0].removeprefix("--") for line in lines if line.startswith("  --")}

    assert {"optimizer", "optimizer.learning-rate", "optimizer.schedule"} < keys("optimizer")
    assert all(key.startswith("optimizer") for key in keys("optimizer"))
    assert all(key.startswith("model.attention") for key in keys("--model.attention"))
    assert keys("learning_rate") == keys("learning-rate") == {"optimizer.learning-rate"}
    assert keys("warm-up") == {"optimizer.warmup-steps", "optimizer.schedule"}
    assert keys("--learning-rate") == {"optimizer.learning-rate"}
    assert keys("seed", "mesh.fsdp") == {"seed", "mesh.fsdp"}
    assert "optimizer" in keys("Lion")
