"""`plan`: what it prints, its exit codes, and one sentence for every mistake."""

import json
import re
import types
from pathlib import Path

import pytest
import rich
from rich.console import Console

import llama_jax
from llama_jax.__main__ import main
from llama_jax.planning import Collective, CompiledStep, Cycles, DoesNotFit, Memory, Report, Topology, estimate
from llama_jax.run_config import RunConfig

# Searches with run-time type checks take minutes.
pytestmark = pytest.mark.slow

TINY = str(Path(__file__).resolve().parents[1] / "tiny_run.py")


def told(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["plan", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_that_fits(capsys: pytest.CaptureFixture[str]):
    code, out, err = told(["llama2_7b", "--topology", "v5e:16x16"], capsys)
    assert (code, err) == (0, "")
    assert "v5e:16x16: 256 chips as fsdp 256; batch 1024 x 4096, remat full" in out
    assert "6,738,415,616 parameters" in out
    assert out.rstrip().endswith("fits")
    assert "XLA" not in out


def test_a_plan_that_does_not_fit_and_its_remedy(capsys: pytest.CaptureFixture[str]):
    code, out, _ = told(["llama2_7b", "--topology", "v5e:8x8"], capsys)
    assert code == 1
    text = " ".join(out.split())
    found = re.search(r"does not fit; the smallest change that helps: with (.*?): [\d.]+ GiB", text)
    assert found
    assert told(["llama2_7b", "--topology", "v5e:8x8", *found[1].split(" ")], capsys)[0] == 0


@pytest.fixture(scope="module")
def report() -> Report:
    config = llama_jax.load_config("llama2_7b")
    return llama_jax.plan(config, "v5e:8x8", search_all=True, sample_batch=64, sample_length=4096)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_it_stays_within_the_terminal(width: int, report: Report):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(report)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines), "cut off"


def test_json_for_programs(capsys: pytest.CaptureFixture[str]):
    argv = ["llama2_7b", "--topology", "v5p:4x4x4", "--json", "--search", "--mesh.tensor", "2"]
    code, out, _ = told([*argv, "--sample-batch", "64", "--sample-length", "4096"], capsys)
    data = json.loads(out)
    assert (code, data["fits"]) == (0, True)
    assert data["plan"]["mesh"] == {"pipeline": 1, "data": 1, "fsdp": 32, "tensor": 2, "context": 1, "expert": 1}
    assert data["sampling"]["fits"]
    assert data["remedy"] is None
    assert data["candidates"][0]["plan"]["fits"]
    assert "compiled" not in data


def test_the_python_function_says_the_same(capsys: pytest.CaptureFixture[str]):
    config = llama_jax.load_config("llama2_7b", {"compute.remat": "dots"})
    report = llama_jax.plan(config, topology="v5e:8x8")
    _, out, _ = told(["llama2_7b", "--topology", "v5e:8x8", "--compute.remat", "dots", "--json"], capsys)
    assert json.loads(out) == json.loads(json.dumps(report.to_json()))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["tiny_python"], "plan needs --topology, such as h100"),
        (["tiny_python", "--topology"], "--topology needs a value"),
        (["tiny_python", "--topology", "--json"], "--topology needs a value"),
        (
            ["tiny_python", "--topolgy", "v5e:8x8", "--topology", "v5e:8x8"],
            "did you mean '--topology'",
        ),
        (["tiny_python", "--topology", "v5x:8x8"], "there is no chip 'v5x': did you mean 'v5"),
        (["tiny_pyton", "--topology", "v5e:8x8"], "there is no config 'tiny_pyton': did you mean 'tiny_python'"),
        (["llama2_7b", "--topology", "v5e:8x8", "--mesh.tensr", "2"], "unknown key 'mesh.tensr'"),
        (["llama2_7b", "--topology", "v5e:8x8", "--mesh.tensor", "3"], "devices and there are 64"),
        (
            ["llama2_7b", "--topology", "v5e:8x8", "--global-batch-size", "100"],
            "is not divisible by mesh.data x mesh.fsdp=64",
        ),
        (["llama2_7b", "more", "--topology", "v5e:8x8"], "'more' is one argument too many"),
        (["llama2_7b", "--topology", "v5e:8x8", "--json", "yes"], "'yes' is one argument too many"),
        (["llama2_7b", "--topology", "v5e:8x8", "--sample-batch", "8"], "sample_batch needs sample_length too"),
        (["llama2_7b", "--topology", "v5e:8x8", "--sample-batch", "x"], "--sample-batch='x' must be a whole number"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]):
    code, out, err = told(argv, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(sentence, err)


def test_help(capsys: pytest.CaptureFixture[str]):
    for argv, expected in ((["--help"], 0), ([], 2), (["llama2_7b", "--help"], 0)):
        code, out, _ = told(argv, capsys)
        assert code == expected
        assert "llama2_7b" in out
        assert ("--mesh.fsdp" if len(argv) == 2 else "--topology") in out


GIB = 1 << 30
COMPILED = CompiledStep(
    num_devices=64,
    memory=Memory(arguments=GIB, outputs=GIB, aliased=GIB, temporaries=GIB, generated_code=0),
    flops=1,
    collectives=(
        Collective("all-gather", ("fsdp",), 64, ("bf16[512,1024]",), 1 << 20, (32,), True, True, False, "gather"),
    ),
    cycles=Cycles(products=3000, copies=1000),
    seconds=1.0,
)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """In place of libtpu: `compiler.answer` is what it says."""
    compiler = types.SimpleNamespace(requests=[])

    def compile_step(config: RunConfig, topology: str) -> CompiledStep:
        compiler.requests.append((config, topology))
        if isinstance(compiler.answer, Exception):
            raise compiler.answer
        return compiler.answer

    monkeypatch.setattr("llama_jax.planning.report.compile_step", compile_step)
    return compiler


def test_xla_s_figures_stand_beside_the_estimate_and_decide(compiler, capsys: pytest.CaptureFixture[str]):
    compiler.answer = COMPILED
    config = llama_jax.load_config("llama2_7b")
    assert not estimate(config, Topology.parse("v5e:8x8")).fits
    code, out, _ = told(["llama2_7b", "--topology", "v5e:8x8", "--compile"], capsys)
    assert code == 0, "XLA's figure decides"
    assert compiler.requests == [(config, "v5e:8x8")]
    assert re.search(r"= arguments +1\.18 +1\.00", out)
    assert re.search(r"all-gather +fsdp +32\.0 +32 +yes", out)
    assert "by the compiler: products 75.0%, copies 25.0%" in " ".join(out.split())
    compiler.answer = DoesNotFit("Used 20.1G of 15.75G hbm.")
    code, out, _ = told(["llama2_7b", "--topology", "v5e:16x16", "--compile"], capsys)
    assert code == 1
    assert "does not fit by XLA: Used 20.1G of 15.75G hbm." in " ".join(out.split())


def test_a_report_shows_itself_in_a_notebook(capsys: pytest.CaptureFixture[str]):
    rich.print(llama_jax.plan(llama_jax.load_config("llama2_7b"), topology="v5p:4x4x4"))
    assert "memory of a device" in capsys.readouterr().out
