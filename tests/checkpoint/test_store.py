"""Checkpoints: which stay, the same bits on any mesh, and what is said of damaged ones."""

import concurrent.futures
import contextlib
import gc
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.checkpoint import (
    CheckpointConfig,
    CheckpointStore,
    SaveFailed,
    check_manifest,
    store as store_module,
    to_disk,
)
from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, abstract_params
from llama_jax.parallel import distributed, make_mesh
from llama_jax.training import AdamW, TrainState, init_state

HYPER = AdamW(0.01, 1).hyper(10)


def small(step: int) -> TrainState:
    return TrainState(step=jnp.int32(step), params={"a": jnp.full(3, step, jnp.float32)}, opt_state={})


@contextlib.contextmanager
def opened(directory: Path, config: CheckpointConfig | None = None) -> Iterator[CheckpointStore]:
    with contextlib.closing(CheckpointStore(directory, config)) as store:
        yield store


def test_arrays_are_written_as_they_are(tmp_path: Path):
    """Compression would take more time than the disk, for a twelfth of the bytes of trained weights."""
    state = TrainState(step=jnp.int32(1), params={"a": jnp.zeros((1000, 1000))}, opt_state={})
    with opened(tmp_path, CheckpointConfig()) as store:
        store.save(state)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) > 4e6


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(1, 0, [6]), (2, 0, [5, 6]), (2, 1, [2, 5, 6]), (1, 2, [2, 4, 6]), (9, 1, [1, 2, 3, 4, 5, 6])],
)
def test_the_last_and_the_best_stay(tmp_path: Path, keep_last: int, keep_best: int, kept: list[int]):
    losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: 2.5}
    with opened(tmp_path, CheckpointConfig(keep_last=keep_last, keep_best=keep_best)) as store:
        for step in (1, 2, 3):
            store.save(small(step), val_loss=losses[step])
    # The best are known to the next process too.
    with opened(tmp_path, CheckpointConfig(keep_last=keep_last, keep_best=keep_best)) as store:
        for step in (4, 5, 6):
            store.save(small(step), val_loss=losses[step])
    with opened(tmp_path) as store:
        assert store.steps() == kept
        assert float(store.load(kept[0], jax.eval_shape(lambda: small(0))).params["a"][0]) == kept[0]


@pytest.mark.parametrize("main", [True, False])
def test_leftovers_are_removed_by_the_first_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: bool):
    leftover = tmp_path / "8.orbax-checkpoint-tmp"
    leftover.mkdir()
    monkeypatch.setattr(distributed, "broadcast_from_main", lambda function: function() if main else None)
    with opened(tmp_path, CheckpointConfig()):
        assert leftover.exists() != main


def test_every_save_happens_and_survives_donation(tmp_path: Path):
    """However fast one comes after another; and what is saved is the state at that time."""
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = TrainState(step=jnp.int32(0), params={"a": jnp.zeros(1 << 20)}, opt_state={})
    with opened(tmp_path, CheckpointConfig(keep_last=9)) as store:
        for _ in range(5):
            state = change(state)
            store.save(state)
    with opened(tmp_path) as store:
        assert store.steps() == [1, 2, 3, 4, 5]
        for step in (1, 4):
            loaded = store.load(step, jax.eval_shape(lambda: state))
            assert int(loaded.step) == step
            assert np.array_equal(loaded.params["a"], np.full(1 << 20, step))


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts what Linux lists under /proc")
def test_saving_and_loading_hold_nothing(tmp_path: Path):
    """After 60 checkpoints as after 10, and after 20 loads as after one, but for a few that are just ending."""
    counts = []
    with opened(tmp_path, CheckpointConfig(keep_last=1, keep_best=0)) as store:
        for step in range(1, 61):
            store.save(small(step))
            if step in (10, 60):
                store.wait()
                counts.append(held())
    for times in (1, 20):
        for _ in range(times):
            with opened(tmp_path) as store:
                store.load(60, jax.eval_shape(lambda: small(0)))
        counts.append(held())
    for before, after in (counts[:2], counts[2:]):
        assert all(b <= a + 10 for a, b in zip(before, after, strict=True)), counts


class Failing:
    """The response of a save that fails in the background."""

    def result(self, timeout: float | None = None) -> bool:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("then", ["wait", "close"])
def test_a_save_that_fails_in_the_background_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str):
    store = CheckpointStore(tmp_path, CheckpointConfig())
    monkeypatch.setattr("llama_jax.checkpoint.store.ocp.save_checkpointables_async", lambda *_, **__: Failing())
    store.save(small(1))
    with pytest.raises(SaveFailed, match=r"checkpoint of step 1 cannot be written .*No space left on device"):
        getattr(store, then)()
    store.close()


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupt_while_the_last_save_is_awaited_loses_neither_it_nor_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
):
    store = CheckpointStore(tmp_path, CheckpointConfig())
    write, interrupted = store_module.write_manifest, threading.Event()

    def slow(*args: Any) -> None:
        interrupted.wait(10)
        if fails:
            raise OSError(5, "Input/output error")
        write(*args)

    monkeypatch.setattr(store_module, "write_manifest", slow)
    store.save(small(1))
    with monkeypatch.context() as patched:

        def interrupt(*_: Any) -> None:
            interrupted.set()
            raise KeyboardInterrupt

        patched.setattr(concurrent.futures, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    with pytest.raises(SaveFailed, match="Input/output") if fails else contextlib.nullcontext():
        store.close()
    assert store.steps() == [1]
    assert check_manifest(tmp_path / "1", 1) == (None if fails else [])


def test_the_best_are_told_from_the_rest(tmp_path: Path):
    """By what was measured, in this process or one before; a loss that is no number never is one of them."""
    with opened(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) as store:
        assert store.is_best(9.0)
        for step, loss in ((1, 3.0), (2, None), (3, float("nan")), (4, 2.0), (5, None)):
            store.save(small(step), val_loss=loss)
        assert not store.is_best(3.0)
    with opened(tmp_path, CheckpointConfig(keep_last=1, keep_best=2)) as store:
        assert [store.is_best(loss) for loss in (2.9, 3.0, float("nan"), float("-inf"))] == [True, False, False, False]
        store.save(small(6))
    with opened(tmp_path) as store:
        assert store.steps() == [1, 4, 6]


MESHES = [None, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def saved(two_layers: DecoderConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One state, random in all of it, saved from each mesh."""
    folders = {}
    for mesh in MESHES:
        folder = folders[str(mesh)] = tmp_path_factory.mktemp("store")
        with entered(mesh), opened(folder, CheckpointConfig()) as store:
            zeros = lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding)  # noqa: E731
            state = jax.jit(init_state)({name: zeros(a) for name, a in abstract_params(two_layers).items()}, HYPER)
            rng = np.random.default_rng(0)
            noise = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)  # noqa: E731, B023
            store.save(TrainState(jnp.int32(7), *jax.tree.map(noise, (state.params, state.opt_state))))
    return folders


@contextlib.contextmanager
def entered(mesh: dict[str, int] | None) -> Iterator[None]:
    if mesh is None:
        yield
    else:
        with jax.set_mesh(make_mesh(mesh)):
            yield


def abstract_state(config: DecoderConfig) -> TrainState:
    return jax.eval_shape(init_state, abstract_params(config), HYPER)


def test_same_bits_from_every_mesh_on_every_mesh(two_layers: DecoderConfig, saved: dict[str, Path]):
    with opened(saved["None"]) as store:
        expected = to_disk(store.load(7, abstract_state(two_layers)))
    assert expected["step"] == 7
    assert {name.split(".")[0] for name in expected} == {"step", "params", "optimizer"}
    for origin, folder in saved.items():
        for mesh in MESHES:
            with entered(mesh), opened(folder) as store:
                loaded = to_disk(store.load(7, abstract_state(two_layers)))
            assert loaded.keys() == expected.keys()
            for name, value in loaded.items():
                assert len(value.sharding.device_set) == (8 if mesh else 1)
                assert np.array_equal(value, expected[name]), (origin, mesh, name)


def test_only_parameters_in_another_type(two_layers: DecoderConfig, saved: dict[str, Path]):
    with opened(saved[str(MESHES[1])]) as store:
        plain = store.load_params(7, abstract_params(two_layers))
        cast = store.load_params(7, abstract_params(two_layers, jnp.bfloat16))
    for name, value in plain.items():
        assert np.array_equal(cast[name], value.astype(jnp.bfloat16)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, r"has 'params.embedding.weight' of shape \(40, 16\), and this config needs \(40, 32\)"),
        ({"tie_embeddings": True}, "has 'optimizer.1.mu.lm_head.weight', which this config does not have"),
    ],
)
def test_another_model_is_refused_by_name(two_layers, saved, change, message):
    config = DecoderConfig(**(two_layers.__dict__ | change))
    with opened(saved["None"]) as store, pytest.raises(UserError, match=message):
        store.load(7, abstract_state(config))


def test_a_parameter_that_was_not_saved_is_named(two_layers: DecoderConfig, saved: dict[str, Path]):
    more = abstract_params(two_layers) | {"extra.weight": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with opened(saved["None"]) as store, pytest.raises(UserError, match=r"lacks 'params.extra.weight'"):
        store.load_params(7, more)


def test_no_such_step(saved: dict[str, Path], tmp_path: Path):
    with opened(saved["None"]) as store, pytest.raises(UserError, match="no checkpoint of step 3: there are 7"):
        store.load(3, jax.eval_shape(lambda: small(0)))
    with pytest.raises(UserError, match="has no checkpoints"):
        CheckpointStore(tmp_path / "absent")


def data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


# Orbax leaves the other arrays' reads behind when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["truncated", "removed", "emptied"])
def test_every_damaged_file_is_said_or_harmless(
    two_layers: DecoderConfig, saved: dict[str, Path], tmp_path: Path, how: str
):
    """Whatever file of a checkpoint is hurt: one sentence, or the right numbers."""
    with opened(saved["None"]) as store:
        expected = to_disk(store.load(7, abstract_state(two_layers)))
    told = 0
    for victim in data_files(saved["None"]):
        folder = tmp_path / str(told) / victim.name
        shutil.copytree(saved["None"], folder)
        hurt = folder / victim.relative_to(saved["None"])
        size = hurt.stat().st_size
        if how == "removed":
            hurt.unlink()
        else:
            with hurt.open("r+b") as file:
                file.truncate(size // 2 if how == "truncated" else 0)
        message, loaded = "", {}
        try:
            with opened(folder) as store:
                loaded = to_disk(store.load(7, abstract_state(two_layers)))
        except UserError as error:
            message = str(error)
        if loaded:
            assert all(np.array_equal(value, expected[name]) for name, value in loaded.items()), victim
        else:
            told += 1
            assert "\n" not in message
            assert "damaged" in message or "no checkpoint of step 7" in message, victim
        shutil.rmtree(folder)
    gc.collect()
    assert told >= 2


def test_leftovers_of_a_killed_save_are_cleared_away(tmp_path: Path):
    leftover = tmp_path / "9.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "part").write_bytes(b"x")
    with opened(tmp_path) as store:  # a reader is not the one to clear it: the writer may be alive
        assert store.steps() == []
    assert leftover.exists()
    with opened(tmp_path, CheckpointConfig()) as store:
        assert store.steps() == []
    assert not leftover.exists()


@pytest.mark.parametrize(("field", "value"), [("every_steps", 0), ("keep_last", 0), ("keep_best", -1)])
def test_impossible_values_are_named(field: str, value: int):
    with pytest.raises(UserError, match=f"^{field}={value} must be at least"):
        CheckpointConfig(**{field: value})
