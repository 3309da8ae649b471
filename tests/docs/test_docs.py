"""The pages are true: their code runs, their tables are those of the package, their links lead somewhere."""

import dataclasses
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from tiny_run import write_texts

import llama_jax
from llama_jax import tokenizers
from llama_jax.__main__ import parse
from llama_jax.checkpoint import LanguageModel
from llama_jax.data import readers
from llama_jax.models import Compute, DecoderConfig, from_params
from llama_jax.nn import Rope
from llama_jax.parallel import make_mesh
from llama_jax.training import init_state, make_train_step

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def snippets(page: str) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def own_attention() -> type:
    """Return the class of architecture.md's example, defined in a separate module."""
    source = next(block for block in snippets("docs/architecture.md") if "class NormedAttention" in block)
    namespace = {"__name__": "own_attention"}
    exec(compile(source, "docs/architecture.md", "exec"), namespace)
    return namespace["NormedAttention"]  # type: ignore[return-value]


@pytest.fixture(scope="module")
def own_config(own_attention: type, tiny_config: DecoderConfig) -> DecoderConfig:
    return dataclasses.replace(tiny_config, attention=own_attention(4, 8, Rope(10000.0, None)))


@pytest.mark.slow
def test_own_attention_decodes_with_its_cache(own_config: DecoderConfig):
    # Embeddings and head of the size of the rest: first values are small, and write one token again and again.
    params = llama_jax.build(own_config, seed=0).params()
    params |= {name: 50 * params[name] for name in ("embedding.weight", "lm_head.weight")}
    model = from_params(own_config, params, Compute())
    prompts, lengths = np.array([[3, 5, 7, 2], [9, 4, 0, 0]]), [4, 2]
    ids = llama_jax.generate(model, prompts, max_new_tokens=6, prompt_lengths=lengths)
    chosen = np.asarray(model(jnp.asarray(ids, jnp.int32)).argmax(-1))
    for row, length, following in zip(ids, lengths, chosen, strict=True):
        assert row[length : length + 6].tolist() == following[length - 1 : length + 5].tolist()
        assert len(set(row[length : length + 6])) > 1


@pytest.mark.slow
def test_own_attention_trains_alike_on_a_mesh(own_config: DecoderConfig):
    tokens = np.random.default_rng(0).integers(0, own_config.vocab_size, (8, 17)).astype(np.int32)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((8, 16), np.float32)}
    batch |= {"positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)), "segment_ids": np.ones((8, 16), np.int32)}
    hyper = llama_jax.load_config("tiny_python").optimizer.hyper(10)
    step = make_train_step(own_config, Compute())

    def update() -> tuple[dict[str, jax.Array], float]:
        state = init_state(llama_jax.build(own_config, seed=0).params(), hyper)
        state, metrics = step(state, {name: jnp.asarray(value) for name, value in batch.items()}, hyper)
        return state.params, float(metrics["loss"])

    alone, loss = update()
    with jax.set_mesh(make_mesh({"fsdp": 4, "tensor": 2})):
        split, split_loss = update()
    q_proj = split["layers.attention.q_proj.weight"]
    assert q_proj.addressable_shards[0].data.size == q_proj.size // 8
    assert split_loss == pytest.approx(loss, rel=1e-5)
    for name, value in alone.items():
        np.testing.assert_allclose(split[name], value, rtol=0, atol=1e-5, err_msg=name)


def test_own_attention_is_saved_and_loaded(own_config: DecoderConfig, own_attention: type, tmp_path: Path):
    model = llama_jax.build(own_config, seed=0)
    llama_jax.save(LanguageModel(own_config, model, None), tmp_path / "saved", format="native")
    with pytest.raises(llama_jax.UserError, match=r"components=\(NormedAttention,\)"):
        llama_jax.load(tmp_path / "saved")
    loaded = llama_jax.load(tmp_path / "saved", components=(own_attention,))
    tokens = jnp.array([[3, 5, 7]], jnp.int32)
    assert (loaded.model(tokens) == model(tokens)).all()


def test_other_blocks_of_architecture_run(monkeypatch: pytest.MonkeyPatch):
    """Their behaviour is tested in tests/test_extensions.py; here the code as it is shown."""
    monkeypatch.setattr("llama_jax.data.readers.KINDS", [*readers.KINDS])
    before = [*tokenizers.READERS]
    blocks = [block for block in snippets("docs/architecture.md") if "class NormedAttention" not in block]
    assert len(blocks) >= 4
    try:
        for block in blocks:
            exec(compile(block, "docs/architecture.md", "exec"), {"__name__": "architecture"})
        assert readers.kind_of("a.poem").name == "poem"
        assert tokenizers.READERS[1:] == before
    finally:
        tokenizers.READERS[:] = before


def test_readme_example_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (source,) = snippets("README.md")
    texts = write_texts(tmp_path / "texts")
    shrunk = {
        "model.hidden_size": 16, "model.num_layers": 1, "model.max_positions": 64, "num_steps": 2,
        "global_batch_size": 8, "sequence_length": 16, "data.path": [str(texts)], "data.validation_fraction": 0.2,
        "data.exclude": [], "data.cache_dir": str(tmp_path / "cache"), "tokenizer.vocab_size": 300,
        "logging.sample_prompts": [], "compute.preflight": False,
    }  # fmt: skip
    load_config = llama_jax.load_config
    monkeypatch.setattr(llama_jax, "load_config", lambda *args: llama_jax.override(load_config(*args), shrunk))
    monkeypatch.chdir(tmp_path)
    shown: dict = {}
    exec(compile(source, "README.md", "exec"), shown)
    assert shown["config"].model.attention.num_kv_heads == 1
    assert shown["logits"].shape == (*shown["tokens"].shape, shown["config"].model.vocab_size)
    again = llama_jax.load(tmp_path / "one_kv_head_hf").model(shown["tokens"])
    np.testing.assert_allclose(again, shown["logits"], rtol=0, atol=1e-5)


def test_tables_are_the_package_s():
    zoo = (ROOT / "docs" / "zoo.md").read_text("utf-8")
    assert zoo.count("6,738,415,616") == 2  # Llama 1 and 2
    for page in tables.TABLES:
        text = (ROOT / page).read_text("utf-8")
        assert tables.with_tables(page, text) == text, "run: python docs/tables.py"


def test_readme_commands_parse():
    commands = [line.split("  #")[0] for line in re.findall(r"^python train\.py .*$", README, re.MULTILINE)]
    assert len(commands) >= 3
    for command in commands:
        args = parse(["train", *shlex.split(command)[2:]])
        if not args.config.startswith("runs/"):
            llama_jax.load_config(args.config, args.keys)


def test_architecture_names_every_package():
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    packages = {path.parent.name for path in (ROOT / "llama_jax").glob("*/__init__.py")}
    assert {name for name in packages if f"| `{name}/` |" not in page} == set()


def test_changelog_has_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert llama_jax.__version__ in headings


def test_files_that_the_pages_name_exist():
    pages = [*ROOT.glob("*.md"), ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text("utf-8")
        named = re.findall(r"`((?:tests|configs|docs|notebooks|benchmarks|llama_jax)/[\w./]+)`", text)
        linked = re.findall(r"\]\(([\w./-]+)\)", text)
        assert [name for name in named if not (ROOT / name).exists()] == []
        assert [name for name in linked if not (page.parent / name).exists()] == []
