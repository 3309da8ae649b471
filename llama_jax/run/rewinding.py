"""A run that goes back by itself: to its latest checkpoint, without the batches where its numbers went bad."""

import dataclasses
from collections.abc import Callable, Sequence

from llama_jax.checkpoint import CONFIG_FILE
from llama_jax.parallel import distributed
from llama_jax.run.directory import Run, open_run
from llama_jax.run.skipped import BadBatches
from llama_jax.run_config import ResumeConfig

KEY = "data.skip_batches"


def rewinding(run: Run, first: Callable[[Run], Run], again: Callable[[Run], Run]) -> Run:
    """Return `first(run)`, or `again(run)` where its numbers went bad, `checks.max_rewinds` times at most.

    A rewind does what a start with the command of the message would: the config has the batches in `KEY`, and the
    run's history has the change. Several processes get the same numbers, and decide the same.
    """
    train, run = first, _leaving_out(run, distributed.broadcast_from_main(lambda: _left_out(run)))
    while True:
        try:
            return train(run)
        except BadBatches as error:
            count, most = sum(KEY in entry["changes"] for entry in run.history), run.config.checks.max_rewinds
            if count >= most:
                raise
            batches = sorted({*run.config.data.skip_batches, *error.batches})
            if distributed.is_main():
                left_out = ",".join(map(str, error.batches))
                print(f"{error.what}: rewind {count + 1} of {most}, without batches {left_out}")
        # Outside of `except`: the traceback, and with its frames the state on the devices, is released.
        train, run = again, _leaving_out(run, batches, ResumeConfig((KEY,)))


def _leaving_out(run: Run, batches: Sequence[int], resume: ResumeConfig | None = None) -> Run:
    if resume is None and tuple(batches) == run.config.data.skip_batches:
        return run
    data = dataclasses.replace(run.config.data, skip_batches=tuple(batches))
    config = dataclasses.replace(run.config, data=data, resume=resume or run.config.resume)
    return Run(run.directory, config, run.components)


def _left_out(run: Run) -> Sequence[int]:
    """Return the batches to leave out: where a run may rewind, also those that it has left out in its directory.

    The command that began it then continues it. To change them, `resume.allow` has the key.
    """
    config = run.config
    if not config.checks.max_rewinds or config.resume.allows(KEY) or not (run.directory / CONFIG_FILE).exists():
        return config.data.skip_batches
    before = open_run(run.directory, run.components).config.data.skip_batches
    return tuple(dict.fromkeys((*before, *config.data.skip_batches)))
