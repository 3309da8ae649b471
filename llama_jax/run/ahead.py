"""Programs of a run's first step, compiled in a thread while the main thread prepares the text and checks the model.

Nothing depends on the thread: a call finds its program where its arguments have the shapes and shardings that are
assumed here. Where they have others, or the thread has failed, the call compiles as ever, and raises its errors.
"""

import contextlib
import threading
from collections.abc import Iterator

import jax
from jax.sharding import NamedSharding

from llama_jax.data import empty_batch
from llama_jax.models import abstract_params, lower_initialize
from llama_jax.parallel import MeshConfig, distributed, make_mesh
from llama_jax.run.programs import Programs
from llama_jax.run_config import RunConfig
from llama_jax.stopping import COMPILING


class Ahead:
    """The thread. At the end of a `with` block it is left to end with the program that it compiles.

    Python waits for it at its own end, since XLA would crash else; the command line does not.
    """

    def __init__(self) -> None:
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def start(self, config: RunConfig, mesh: MeshConfig, programs: Programs, step: int) -> None:
        """Start to compile what a run needs that begins at `step`."""

        def compile_all() -> None:
            with contextlib.suppress(Exception), jax.set_mesh(make_mesh(mesh)):
                for lowered in _lowered(config, programs, step):
                    if self._left.is_set():
                        break
                    lowered.compile()

        self._thread = threading.Thread(target=compile_all, name=COMPILING)
        self._thread.start()

    def wait(self) -> None:
        """Wait for what was started."""
        if self._thread is not None:
            self._thread.join()


def _lowered(config: RunConfig, programs: Programs, step: int) -> Iterator[jax.stages.Lowered]:
    """Yield the programs on the current mesh, in the order of their calls."""
    params, hyper = abstract_params(config.model), config.optimizer.hyper(config.num_steps, config.seed)
    if step == 0:
        yield lower_initialize(config.model, config.seed)
        yield programs.init_state.lower(params, hyper)
    # Without its sharding, the type of an array that is on no mesh yet would be another.
    state = jax.tree.map(_placed, jax.eval_shape(programs.init_state, params, hyper))
    rows = empty_batch(config.data.objective, 1, config.sequence_length)
    batch = {name: distributed.abstract_rows(x, config.global_batch_size) for name, x in rows.items()}
    if step < config.num_steps:
        yield programs.train_step.lower(state, batch, hyper)


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return the type of an array that is computed on the current mesh."""
    sharding = NamedSharding(jax.sharding.get_mesh(), jax.typeof(x).sharding.spec)  # type: ignore[arg-type]
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
