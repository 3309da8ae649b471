"""A report: the page has the runs' numbers and nothing that runs or is fetched, and a served one follows its runs."""

import base64
import html
import html.parser
import http.client
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_run
from hypothesis import given, settings, strategies as st

import llama_jax
from llama_jax.__main__ import main
from llama_jax.ablation import VariantRecord
from llama_jax.config import UserError, override, to_json
from llama_jax.reports import server
from llama_jax.run import compare_runs
from tests.ablation.made import write_sweep

type Make = Callable[..., Path]
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<!--<script>"
ESCAPE = "\x1b[2J\u202e"


def lines_of(steps: int, best: float = 2.0) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "loss": best + 1 / step, "learning_rate": 1e-3 / step, "grad_norm": 1.0 + step % 3}
        line |= {"tokens_per_second": 1000.0 * step, "experts_load": [0.5, 0.25, 0.25]}
        lines.append(line | ({"val_loss": best + 0.1 / step} if step % 3 == 0 else {}))
    return lines


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that writes the files of a run."""

    def run(
        name: str, lines: list[dict[str, Any]] | None = None, keys: dict[str, Any] | None = None, samples: str = ""
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(to_json(override(tiny_run.get_config(), keys or {}))))
        if lines is not None:
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if samples:
            (folder / "samples.txt").write_text(samples)
        return folder

    return run


class Page(html.parser.HTMLParser):
    """The tags of a page, and the text of each script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] in self.texts:
            self.texts[self.tags[-1][0]].append(data)

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.texts["script"][0])


def page_of(capsys: pytest.CaptureFixture[str], *runs: object) -> tuple[str, Page]:
    """The page that the command writes, as text and parsed."""
    file = Path(str(runs[0])).parent / "out.html"
    assert main(["report", *map(str, runs), "--html", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    text = file.read_text(encoding="utf-8")
    return text, Page(text)


numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32) | st.integers(-10, 10**9)


@settings(max_examples=25)
@given(
    st.lists(st.fixed_dictionaries({}, optional={"loss": numbers, "val_loss": numbers, "mine": numbers}), max_size=9)
)
def test_page_has_the_metrics_of_the_run(tmp_path_factory: pytest.TempPathFactory, metrics: list[dict[str, Any]]):
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(json.dumps(to_json(tiny_run.get_config())))
    lines = [{"step": 2 * i + 1, **line} for i, line in enumerate(metrics)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [run] = Page(llama_jax.report(folder).html()).data["runs"]
    assert run["steps"] == [line["step"] for line in lines]
    for name in {name for line in metrics for name in line}:
        for found, line in zip(run["metrics"][name], lines, strict=True):
            wanted = line.get(name)
            assert found is None if wanted is None else found == pytest.approx(wanted, rel=1e-6)


def test_page_needs_no_network(make: Make, capsys: pytest.CaptureFixture[str]):
    text, page = page_of(capsys, make("a", lines_of(9), samples="the cat"), make("b", lines_of(5)))
    links = {value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")}
    assert links == {"data:,"}
    assert not re.search(r"https?:|@import|url\(|import\(", text)
    [policy] = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'none'" in policy
    assert [tag for tag, _ in page.tags if tag in ("a", "div")] == ["div"] * 2  # controls are controls
    named = {a["for"] for tag, a in page.tags if tag == "output"}
    assert named == {"smooth"}


def test_what_files_say_is_text_alone(make: Make, capsys: pytest.CaptureFixture[str]):
    plain, _ = page_of(capsys, make("plain", lines_of(3)))
    name = f"bad{ESCAPE}\"'&<b>"
    bad = make(name, [{"step": 1, "loss": 1.0, HOSTILE: 2.0}], {"data.path": (HOSTILE,)}, samples=HOSTILE + ESCAPE)
    (bad / "evaluations").mkdir()
    (bad / "evaluations" / "1.json").write_text(json.dumps({"results": {HOSTILE: {HOSTILE + ESCAPE: 1.0}}}))
    (bad / "run.json").write_text(
        json.dumps({"history": [{"step": 1, "date": HOSTILE, "changes": {"data.path": [[], [ESCAPE]]}}]})
    )
    text, page = page_of(capsys, bad)
    assert page.tags == Page(plain).tags
    assert page.data["runs"][0]["samples"] == [{"step": None, "text": HOSTILE + ESCAPE}]
    assert "\x1b" not in text
    assert main(["report", str(bad)]) == 0
    out = capsys.readouterr().out
    assert HOSTILE in out
    assert not {"\x1b", "\u202e"} & set(out)
    assert "bad\\x1b[2J\\u202e" in out
    assert main(["compare", str(bad)]) == 0
    assert not {"\x1b", "\u202e"} & set(capsys.readouterr().out)


def test_terminal_has_the_table_of_compare(make: Make, capsys: pytest.CaptureFixture[str]):
    runs = [str(make(f"s{seed}", lines_of(6, 2 + seed), {"seed": seed})) for seed in range(2)]
    runs.append(str(make("wide", lines_of(4), {"model.hidden_size": 64})))
    assert main(["compare", "--all", *runs]) == 0
    table = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert main(["report", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[: len(table[0])] for line in lines[: len(table)]] == table
    assert lines[0].split()[-1] == "tokens"


def test_report_shows_what_a_run_has(make: Make, capsys: pytest.CaptureFixture[str]):
    run = make("a", lines_of(9), {"num_steps": 12})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo\n{"step": 11, "loss": null}\n{"step": 12')
    for step in (4, 12):
        for folder, text in (("samples", "a text"), ("evaluations", "")):
            (run / folder).mkdir(exist_ok=True)
            (run / folder / f"{step}.{'txt' if text else 'json'}").write_text(
                text or json.dumps({"step": step, "results": {"arc": {"acc,none": step / 16, "acc_stderr,none": 0.01}}})
            )
    (run / "run.json").write_text(
        json.dumps({"history": [{"step": 4, "date": "2026-01-01", "changes": {"global_batch_size": [2, 8]}}]})
    )
    data = page_of(capsys, run)[1].data
    [found] = data["runs"]
    assert [sample["step"] for sample in found["samples"]] == [4, 12]
    assert data["evaluations"] == {
        "task": ["arc"], "metric": ["acc"], "a @12": ["0.75 ±0.01"], "a @4": ["0.25 ±0.01"]
    }  # fmt: skip
    assert found["tokens"] == [32 * (2 * min(step, 4) + 8 * max(step - 4, 0)) for step in found["steps"]]
    assert found["lists"]["experts_load"][0] == [0.5, 0.25, 0.25]
    assert "a: 1 damaged lines of metrics.jsonl are left out" in data["notes"]
    assert "a: the loss is not finite at step 11" in data["notes"]
    assert main(["report", str(run)]) == 0
    assert "a: continued at step 4 with global_batch_size=2 -> 8" in capsys.readouterr().out


def test_time_follows_the_size_of_batches(make: Make):
    run = make("a", [{"step": step, "loss": 1.0, "tokens_per_second": 32.0} for step in (2, 4)])
    (run / "run.json").write_text(
        json.dumps({"history": [{"step": 2, "date": "", "changes": {"global_batch_size": [4, 8]}}]})
    )
    [record] = compare_runs([run])
    assert record.seconds() == [8, 8 + 16]
    assert record.numbers("loss")["seconds"] == 24


def test_a_sweep_has_its_table_and_its_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    variants = [VariantRecord("base", num_parameters=1000), VariantRecord(HOSTILE, {"model.attention.num_kv_heads": 1})]
    folder = write_sweep(
        tmp_path / "sweeps" / "one", variants, lambda place, seed: 2 + place + seed / 10 + place * seed
    )
    plain = Page(llama_jax.report(folder / "base" / "seed-0").html())
    for place in (folder / "sweep.json", folder.parent):  # of the folder of sweeps, too
        _, page = page_of(capsys, place)
        [sweep] = page.data["sweeps"]
        assert (page.data["title"], page.tags) == ("Report: one", plain.tags)
        assert sweep["table"]["variant"] == ["base", HOSTILE]
        assert sweep["table"]["val_loss"][0].startswith("2.10")
        assert base64.b64decode(sweep["plots"][0].partition(",")[2]).startswith(b"\x89PNG")
        assert sweep["state"] == "6 of 6 runs are done"
        assert len(page.data["runs"]) == 6
        assert len({run["group"] for run in page.data["runs"]}) == 2
    shutil.rmtree(folder / variants[1].directory)
    assert llama_jax.report(folder).data["sweeps"][0]["state"] == "3 of 6 runs are done"
    shutil.rmtree(folder / "base")
    data = llama_jax.report(folder).data  # nothing has begun
    assert (data["sweeps"][0]["state"], data["sweeps"][0]["table"], data["runs"]) == ("0 of 6 runs are done", {}, [])
    assert main(["report", str(folder)]) == 0
    assert "0 of 6 runs are done" in capsys.readouterr().out


def test_long_runs_keep_their_validations(make: Make, monkeypatch: pytest.MonkeyPatch):
    from llama_jax.reports import collecting

    monkeypatch.setattr(collecting, "MAX_LINES", 10)
    data = llama_jax.report(make("a", lines_of(100))).data
    steps = data["runs"][0]["steps"]
    assert len(steps) < 50
    assert set(range(3, 101, 3)) <= set(steps)
    assert data["notes"] == ["a: one of 10 logged lines is shown, and those of validations"]


def test_a_notebook_shows_the_page_in_its_cell(make: Make, tmp_path: Path):
    report = llama_jax.report(str(make("a", lines_of(4))))
    [(tag, frame)] = Page(report._repr_html_()).tags
    assert (tag, frame["sandbox"]) == ("iframe", "allow-scripts")
    assert frame["srcdoc"] == report.html()
    assert report.save(tmp_path / "x.html").read_text(encoding="utf-8") == report.html()
    assert "a" in repr(report)


MISTAKES = {
    "there is nothing at '{}/none'": ["{}/none"],
    "there is nothing at '{}/none*'": ["{}/none*"],
    "'{}/empty' has no run": ["{}/empty"],
    "no run has the metric 'vall_loss': did you mean 'val_loss'?": ["{}/runs", "--metric", "vall_loss"],
    "'{}/empty' cannot be written": ["{}/runs", "--html", "{}/empty"],
    "path=s3://bucket/a.html must be a local file": ["{}/runs", "--html", "s3://bucket/a.html"],
    "--watch serves the page and --html writes it": ["{}/runs", "--html", "a.html", "--watch"],
    "port=99999 cannot be had": ["{}/runs", "--watch", "--port", "99999"],
    "--port='x' must be a whole number": ["{}/runs", "--watch", "--port", "x"],
    "'{}/broken/config.json'": ["{}/broken"],
}


@pytest.mark.parametrize("sentence", MISTAKES)
def test_mistakes_are_sentences(sentence: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make("a", lines_of(3))
    for name in ("empty", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    assert main(["report", *(word.format(tmp_path) for word in MISTAKES[sentence])]) == 2
    error = capsys.readouterr().err
    assert sentence.format(tmp_path) in error
    assert len(error.splitlines()) == 1


@pytest.fixture
def served(make: Make) -> Iterator[tuple[Path, Callable[..., http.client.HTTPResponse]]]:
    """A run that has not logged, and a function that asks the server of its report."""
    run = make("a")
    with server([str(run)]) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()

        def ask(path: str, **headers: str) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=20)
            connection.request("GET", path, headers={key.replace("_", "-"): value for key, value in headers.items()})
            return connection.getresponse()

        yield run, ask
        running.shutdown()


def test_a_served_report_follows_its_run(served: tuple[Path, Callable[..., http.client.HTTPResponse]]):
    run, ask = served
    page = Page(ask("/").read().decode())
    assert page.data["runs"][0]["steps"] == []
    assert any("connect-src 'self'" in (attributes.get("content") or "") for _, attributes in page.tags)
    first = ask("/data")
    version = first.headers["ETag"]
    assert json.loads(first.read())["runs"][0]["steps"] == []
    assert ask("/data", If_None_Match=version).status == 304
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    second = ask("/data", If_None_Match=version)
    assert (second.status, json.loads(second.read())["runs"][0]["metrics"]) == (200, {"loss": [2.0]})
    config = (run / "config.json").read_text()
    (run / "config.json").write_text("{")
    assert "config.json" in json.loads(ask("/data").read())["error"]
    assert ask("/").status == 503
    (run / "config.json").write_text(config)
    assert json.loads(ask("/data").read())["runs"][0]["steps"] == [1]


def test_a_served_report_is_for_this_machine_alone(served: tuple[Path, Callable[..., http.client.HTTPResponse]]):
    _, ask = served
    assert ask("/", Host="evil.example:80").status == 403
    assert ask("/../config.json").status == 404


def test_a_taken_port_is_a_sentence(make: Make):
    run = str(make("a"))
    with server([run]) as running, pytest.raises(UserError, match=rf"^port={running.server_port} is taken: give"):
        server([run], port=running.server_port)


CHECKS = """
const wait = (done) => setTimeout(done, 200);
function check(name, found) { document.body.dataset[name] = String(found); }
wait(() => {
  const canvas = document.querySelector("#charts canvas"), key = (key) =>
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  check("charts", document.querySelectorAll("#charts canvas").length);
  canvas.focus();
  key("End");
  check("read", canvas.getAttribute("aria-valuetext"));
  key("+");
  check("zoomed", state.zoom !== null && state.zoom[1] === 9);
  key("Escape");
  for (const [id, value] of [["x", "tokens"], ["smooth", "0.9"]]) {
    find(id).value = value;
    find(id).dispatchEvent(new Event(id === "x" ? "change" : "input"));
  }
  for (const id of ["logx", "logy", "whole", "mean"]) find(id).click();
  wait(() => {
    const painted = [...document.querySelectorAll("#charts canvas, #heatmaps canvas")].filter((one) =>
      one.getContext("2d").getImageData(0, 0, one.width, one.height).data.some((part) => part));
    check("painted", painted.length);
    key("End");
    check("mean", canvas.getAttribute("aria-valuetext"));
    const beyond = (one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 1;
    const wide = [...document.body.querySelectorAll("*")].filter((one) => !one.closest(".scroll") && beyond(one));
    check("wide", wide.map((one) => one.tagName + one.className));
    const controls = [...document.querySelectorAll("button, input, select, canvas[tabindex], summary")];
    const named = (one) => one.textContent.trim() || one.getAttribute("aria-label") || one.labels?.length;
    check("unnamed", controls.filter((one) => !named(one)).length);
    find("legend").querySelector("button + button").click();
    check("empty", canvas.getAttribute("aria-label"));
  });
});
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
@pytest.mark.parametrize("width", [360, 1440])
def test_a_browser_draws_the_page_and_obeys_the_keyboard(make: Make, tmp_path: Path, width: int):
    for seed, name in enumerate(["a", HOSTILE.replace("/", "")]):
        make(name, lines_of(9, 2 + seed), {"seed": seed}, samples=HOSTILE)
    page = llama_jax.report(str(tmp_path / "runs")).html()
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"<script>{CHECKS}</script></body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", file.as_uri()]
    done = subprocess.run(["chromium", *flags], capture_output=True, text=True, timeout=100)
    assert "CONSOLE" not in done.stderr
    found = next(attributes for tag, attributes in Page(done.stdout).tags if tag == "body")
    assert found["data-read"] == f"step 9: a {2 + 0.1 / 9:.4f}, {HOSTILE.replace('/', '')} {3 + 0.1 / 9:.4f}"
    keep = 0.9**3  # three logged lines between validations
    weights = {3: 0.1 * keep**2, 6: (1 - keep) * keep, 9: 1 - keep}
    mean = sum(weight * (2.5 + 0.1 / step) for step, weight in weights.items()) / sum(weights.values())
    assert found["data-mean"] == f"tokens 2,304: a and 1 more, mean {mean:.4f}"
    assert found["data-empty"] == "val_loss: nothing to draw yet"
    rest = {name: found[f"data-{name}"] for name in ("charts", "painted", "zoomed", "wide", "unnamed")}
    assert rest == {"charts": "5", "painted": "6", "zoomed": "true", "wide": "", "unnamed": "0"}
    assert not {"img"} & {tag for tag, _ in Page(done.stdout).tags}
