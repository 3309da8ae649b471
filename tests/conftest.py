"""Set-up of all tests: eight virtual CPU devices, kept compilations, shapes checked at run time."""

import dataclasses
import gc
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parent.parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Programs this small are compiled for longer than they run.
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()
# As variables, so that the commands that tests start share them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Those whose annotations say shapes. Elsewhere types alone are checked, and that by pyright: here each call would pay.
PACKAGES = [f"llama_jax.{name}" for name in ("data", "evaluation", "models", "nn", "sampling", "training")]
# An int is a float to type checkers, and to users.
install_import_hook(PACKAGES, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

import budget  # noqa: E402
import tiny_run  # noqa: E402

from llama_jax.config import override  # noqa: E402
from llama_jax.models import DecoderConfig, abstract_params  # noqa: E402
from llama_jax.nn import SwiGLU  # noqa: E402
from llama_jax.run import Run, RunConfig, train  # noqa: E402

MAX_MAPPINGS = 20_000
TESTS = itertools.count(1)
# On a shared machine the time of one example says nothing; the same examples every time, so that a failure stays.
settings.register_profile("llama_jax", deadline=None, derandomize=True, database=None)
settings.load_profile("llama_jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget", type=float, metavar="SECONDS", help="limit of one test's processor time")
    parser.addoption(
        "--part", default="1/1", metavar="K/N", help="the K-th of N parts of the tests: some of every file"
    )
    parser.addoption("--trials", type=float, default=1.0, metavar="SHARE", help="share of these trials to make")
    parser.addoption("--reliability", metavar="FILE", help="make all trials of tests/faults and write their counts")


def pytest_configure(config: pytest.Config) -> None:
    if (limit := config.getoption("budget")) is not None:
        config.pluginmanager.register(budget.Budget(limit))
    # beartype draws the items of a list that it checks; nothing that a test sees depends on it.
    config.addinivalue_line(
        "filterwarnings", "ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark cases as slow that `quick` does not name, and leave the tests of other parts out.

    All cases of one test are in one part: they share fixtures and programs.
    """
    missing: dict[str, set[str]] = {}
    for item in items:
        if (mark := item.get_closest_marker("quick")) is not None:
            case = item.name.partition("[")[2][:-1]
            missing.setdefault(item.nodeid.partition("[")[0], set(mark.args)).discard(case)
            if case not in mark.args:
                item.add_marker("slow")
    if any(missing.values()) and not any("::" in arg for arg in config.args):
        raise pytest.UsageError(f"no cases of these tests: { ({name: ids for name, ids in missing.items() if ids}) }")
    k, n = map(int, config.getoption("part").split("/"))
    here = [zlib.crc32(item.nodeid.split("[")[0].encode()) % n == k - 1 for item in items]
    config.hook.pytest_deselected(items=[item for item, kept in zip(items, here, strict=True) if not kept])
    items[:] = itertools.compress(items, here)


def pytest_collection_finish() -> None:
    """Leave modules and tests out of every later garbage collection, and collect rarely: tracing makes many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(autouse=True)
def _few_mappings() -> Iterator[None]:
    """A process may map 65,530 pieces of memory (Linux's vm.max_map_count) and XLA's CPU programs take several each.

    Without this, one that runs half the tests, or one module of all families, ends in a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if next(TESTS) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real files of others that are not part of this repository."""
    folder = Path(os.environ.get("LLAMA_JAX_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real files to check against are absent: LLAMA_JAX_TEST_DATA names their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_config() -> DecoderConfig:
    """A decoder with everything in it and nothing large: one layer, grouped queries, an untied head."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "feed_forward": SwiGLU(intermediate_size=24, bias=False)}
    return override(cast("DecoderConfig", tiny_run.get_config().model), sizes)


@pytest.fixture(scope="session")
def two_layers(tiny_config: DecoderConfig) -> DecoderConfig:
    """The same with two layers, for what is different from layer to layer: stacks, scans, caches, files."""
    return dataclasses.replace(tiny_config, num_layers=2)


@pytest.fixture(scope="session")
def random_params() -> Callable[[DecoderConfig], dict[str, jax.Array]]:
    """Parameters by name in which every value is random and none is small: norms and biases too."""

    def make(config: DecoderConfig) -> dict[str, jax.Array]:
        rng = np.random.default_rng(0)
        values = {
            name: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for name, a in abstract_params(config).items()
        }
        return {name: 1 + 0.3 * v if "norm" in name else 0.3 * v for name, v in values.items()}

    return make


@pytest.fixture(scope="session")
def run_config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of a dozen steps on texts made for it, on all eight devices."""
    folder = tmp_path_factory.mktemp("tiny_run")
    texts = tiny_run.write_texts(folder / "texts")
    return override(tiny_run.get_config(), {"data.path": (str(texts),), "data.cache_dir": str(folder / "cache")})


@pytest.fixture(scope="session")
def finished_run(run_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That run, finished. Only to be read: copy its directory to change it."""
    return train(run_config, tmp_path_factory.mktemp("finished") / "run")
