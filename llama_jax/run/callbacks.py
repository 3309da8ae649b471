"""Callbacks: functions that `train` calls with each logged step, to measure more, to save or to stop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoint import LanguageModel
from llama_jax.config import UserError
from llama_jax.models import Compute, Params, abstract_params, from_params
from llama_jax.parallel import distributed
from llama_jax.run.directory import Run
from llama_jax.training import TrainState


class Event(dict[str, Any]):
    """Metrics of a logged step by name, as `Logger.write` gets them, and what a callback can do at this step.

    step: number of updates done.
    run: the run.
    """

    def __init__(self, run: Run, step: int, state: TrainState | None):
        super().__init__()
        self.run, self.step = run, step
        self.saves = False
        self.reason: str | None = None  # of the stop
        self._state = state

    def stop(self, reason: str = "") -> None:
        """End the run after this step, with a checkpoint; `train` returns, and a later start goes on."""
        self.reason = reason

    def save(self) -> None:
        """Save a checkpoint of this step."""
        self.saves = True

    def load(self) -> LanguageModel:
        """Return the model after this step, on the run's mesh and in the dtype that `run.load()` takes."""
        if self._state is None:
            raise UserError("event.load() works within the callback only: later, run.load(step) loads a checkpoint")
        config, compute, params = self.run.config, Compute(), self._state.params | self._state.buffers
        dtypes = {name: a.dtype for name, a in abstract_params(config.model, compute.jax_dtype).items()}
        # Copies: the next step takes over the state's arrays.
        params = {name: jnp.array(params[name], dtype, copy=True) for name, dtype in dtypes.items()}
        mesh = jax.sharding.get_mesh()
        assert isinstance(mesh, Mesh)
        model = from_params(config.model, params, compute, mesh)
        return LanguageModel(config.model, model, self.run.tokenizer, chat_template=config.data.chat_template)

    def params(self) -> Params:
        """Return copies of the trained parameters after this step, by name, in float32."""
        if self._state is None:
            raise UserError("event.params() works within the callback only")
        return {name: jnp.array(value, copy=True) for name, value in self._state.params.items()}

    def call(self, callbacks: Sequence["Callback"]) -> None:
        """Call the callbacks in order and add the numbers that they return.

        Raises UserError where one fails, on all processes. Of several, process 0 decides for all.
        """
        if not callbacks:
            return
        distributed.all_agree(lambda: [self._call(callback) for callback in callbacks])
        self._state = None
        decided: list[Any] = [self.saves, self.reason, dict(self)]
        self.saves, self.reason, metrics = distributed.broadcast_from_main(lambda: decided)
        self.update(metrics)

    def _call(self, callback: "Callback") -> None:
        place = f"callback '{name_of(callback)}' at step {self.step}"
        try:
            found = callback(self)
        except Exception as error:
            raise UserError(f"{place} failed: {type(error).__name__}: {error}") from error
        if not isinstance(found, Mapping | None):
            raise UserError(f"{place} returned {type(found).__name__}: return None or numbers by name")
        for name, value in (found or {}).items():
            number = np.asarray(value)
            if name in self or not isinstance(name, str):
                raise UserError(f"{place} returned {name!r}, which the step has: take another name")
            if number.dtype.kind not in "biuf" or number.ndim > 1:
                raise UserError(f"{place} returned {name}={value!r}: return numbers, or lists of them, by name")
            self[name] = number.astype(float).tolist()


type Callback = Callable[[Event], Mapping[str, Any] | None]


def name_of(callback: Any) -> str:
    """Return the name of a callback in messages."""
    return getattr(callback, "__name__", type(callback).__name__)


def check_callbacks(callbacks: Any) -> None:
    """Raise UserError for what cannot be called."""
    if callable(callbacks):
        raise UserError(f"callbacks={name_of(callbacks)} must be a tuple: callbacks=({name_of(callbacks)},)")
    for callback in callbacks:
        if not callable(callback):
            raise UserError(f"callbacks={callback!r} cannot be called: give functions of one argument")
