"""The config of a run."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from llama_jax.checkpoint import CheckpointConfig
from llama_jax.config import UserError, from_json, leaves, load_config_module, override, read_json, to_json
from llama_jax.data import Classification, DataConfig
from llama_jax.models import Compute, ModelConfig, check_pipeline
from llama_jax.nn import check_above_zero, check_at_least, seed_value
from llama_jax.parallel import LOGICAL_AXES, MeshConfig, batch_parts
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import Optimizer, schedule_of_name, train_flops_per_token


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Reports of a run, and their destinations.

    every_steps: steps between metrics.
    validate_every_steps: steps between measurements on the held-out text; the last step is always measured.
    validation_batches: measure on so many batches only; None takes all of the held-out text.
    sample_prompts: texts to continue at the end of the run, into samples.txt.
    sample_every_steps: steps between continuing them while it trains, too, into samples/STEP.txt; None never does.
    tensorboard: write metrics to the run directory for TensorBoard, too (extra `tensorboard`).
    wandb_project: send metrics to this Weights & Biases project, too (extra `wandb`).
    """

    every_steps: int = 10
    validate_every_steps: int = 500
    validation_batches: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_every_steps: int | None = None
    tensorboard: bool = False
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        check_at_least(self, 1, "every_steps", "validate_every_steps")
        check_at_least(self, 1, "validation_batches", hint=", or none for all")
        check_at_least(self, 1, "sample_every_steps", hint=", or none for never")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A window of steps to record for a profile viewer, into the run directory's `profile/`.

    start_step: first step to record; None records nothing.
    num_steps: how many.
    """

    start_step: int | None = None
    num_steps: int = 3

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_steps")
        check_at_least(self, 0, "start_step", hint=", or none")


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """Changes that are allowed when a run is continued, beyond those that do not change what it learns.

    allow: keys, or sections of keys, that may have another value than the run had: optimizer.learning_rate,...
    """

    allow: tuple[str, ...] = ()

    def allows(self, key: str) -> bool:
        """Return whether `allow` has this key, or a section of it."""
        return any(f"{key}.".startswith(f"{allowed.replace('-', '_')}.") for allowed in self.allow)


@dataclasses.dataclass(frozen=True)
class ChecksConfig:
    """Limits at which a run stops, and checks of its computation.

    max_skipped_steps: steps in a row without an update, because their loss or gradient was not finite, at which the run
      stops.
    spike_zscore: standard deviations by which a loss may exceed the median of those before; where it does by more, the
      run stops, with the batches to leave out. None: any.
    max_rewinds: times that a run goes back to its latest checkpoint by itself instead, and leaves these batches out
      (`data.skip_batches`), so many changes of that key in its history. Runs of a sweep stop.
    stall_seconds: seconds, or 20 times the usual where that is longer, that a step, its batch, a validation or a save
      may take before the process ends with exit code 76, to be started again; the first may take 60 times as long. None
      sets no limit.
    every_steps: steps between those that are computed twice and compared bit by bit, as are the copies of parameters
      on different devices; None: none. It needs memory for a second state.
    hardware: run a program with a known result on each device before the first step.
    """

    max_skipped_steps: int = 10
    spike_zscore: float | None = None
    max_rewinds: int = 0
    stall_seconds: float | None = 60.0
    every_steps: int | None = None
    hardware: bool = False

    def __post_init__(self) -> None:
        check_at_least(self, 1, "max_skipped_steps", "every_steps")
        check_at_least(self, 0, "max_rewinds")
        check_above_zero(self, "spike_zscore", "stall_seconds", hint=", or none")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Config of a run.

    model: architecture.
    tokenizer: text to tokens.
    data: texts and objective.
    optimizer: updates of the parameters, and their learning rate.
    num_steps: updates of the parameters; the learning rate's decay ends there.
    global_batch_size: sequences of one update, over all devices.
    sequence_length: tokens of a sequence.
    seed: of initial values and of the order of the data; below 2**64.
    init_from: path or URL of the weights to begin with, of any format that can be loaded; parameters that they lack are
      drawn. None draws all.
    mesh: devices by axis.
    compute: types, kernels and recomputation; they change speed and memory, not the result.
    checkpoint: when to save, and how many to keep.
    logging: metrics, validation and samples.
    checks: limits at which the run stops, and checks of its computation.
    profile: a window of steps to record.
    resume: changes that are allowed when the run is continued.
    """

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: Optimizer
    num_steps: int
    global_batch_size: int
    sequence_length: int
    seed: int = 0
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    compute: Compute = Compute()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    checks: ChecksConfig = ChecksConfig()
    profile: ProfileConfig = ProfileConfig()
    resume: ResumeConfig = ResumeConfig()

    def __post_init__(self) -> None:
        check_at_least(self, 1, "num_steps", "global_batch_size", "sequence_length")
        self._check_lengths()
        seed_value(self.seed)
        takes, gives = self.model.batch_fields, self.data.objective.fields()
        if unknown := [name for name in gives if name not in takes]:
            raise UserError(
                f"data.objective={type(self.data.objective).__name__} gives {', '.join(unknown)}, which "
                f"{type(self.model).__name__} does not take: choose another objective, options of it, or another model"
            )
        if self.init_from is not None and self.tokenizer.path is None:
            raise UserError(
                f"init_from={self.init_from} needs the tokenizer that its model was trained with: set tokenizer.path"
            )
        self._check_encoder()
        parts = self.optimizer.accumulation_steps
        if self.global_batch_size % parts:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not divisible by optimizer.accumulation_steps={parts}: "
                f"take a multiple of {parts}"
            )
        if self.tokenizer.path is None and self.tokenizer.vocab_size > self.model.vocab_size:
            raise UserError(
                f"tokenizer.vocab_size={self.tokenizer.vocab_size} is more than model.vocab_size="
                f"{self.model.vocab_size}: lower the one or raise the other"
            )

    def check_allowed(self) -> None:
        """Raise UserError where an entry of `resume.allow` is not a key."""
        keys = [key for key, *_ in leaves(self)]
        for allowed in self.resume.allow:
            if not any(ResumeConfig((allowed,)).allows(key) for key in keys):
                near = difflib.get_close_matches(allowed, keys, n=1)
                hint = f"did you mean '{near[0]}'?" if near else "give keys such as optimizer.learning_rate"
                raise UserError(f"resume.allow={allowed} is no key of a run: {hint}")

    def _check_lengths(self) -> None:
        """Raise UserError where rows are longer than the model's positions."""
        source, name = self.data.objective.source_length, "data.objective.source_length"
        lengths = {f"sequence_length={self.sequence_length}": self.sequence_length}
        if source is not None and self.model.joins_source:
            lengths = {f"sequence_length={self.sequence_length} with {name}={source}": self.row_length}
        elif source is not None:
            lengths[f"{name}={source}"] = source
        for what, length in lengths.items():
            if length > self.model.length_limit:
                raise UserError(
                    f"{what} is longer than model.max_positions={self.model.max_positions}: shorten the one or raise "
                    "the other"
                )

    def _check_encoder(self) -> None:
        """Raise UserError where objective and model do not belong together."""
        objective, num_classes = self.data.objective, getattr(self.model, "num_classes", 0)
        if self.model.has_source and objective.source_length is None:
            raise UserError(
                f"data.objective={type(objective).__name__} has no source for the encoder of "
                f"{type(self.model).__name__}: take SpanCorruption, Denoising or ParallelText"
            )
        if not self.model.generates and not objective.looks_ahead:
            raise UserError(
                f"data.objective={type(objective).__name__} asks for tokens that {type(self.model).__name__}, which "
                "looks ahead, sees: take MaskedLM or Classification"
            )
        if not self.model.generates and self.logging.sample_prompts:
            raise UserError(f"logging.sample_prompts are no task for {type(self.model).__name__}: leave them out")
        if isinstance(objective, Classification) and len(objective.labels) != num_classes:
            raise UserError(
                f"data.objective.labels has {len(objective.labels)} labels and model.num_classes={num_classes}: make "
                "them equal"
            )

    @property
    def row_length(self) -> int:
        """Positions of a row: the sequence, and the source that some objectives have."""
        return self.sequence_length + (self.data.objective.source_length or 0)

    @property
    def measures_checkpoints(self) -> bool:
        """Whether a checkpoint before the last is of a step with a validation."""
        validates = self.logging.validate_every_steps
        return validates >= self.num_steps or any(
            math.lcm(every, validates) < self.num_steps for every in self.checkpoint.intervals
        )

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token of the target (`train_flops_per_token`)."""
        return train_flops_per_token(self.model, self.sequence_length, self.data.objective.source_length or 0)

    def check_mesh(self, num_devices: int) -> None:
        """Raise UserError where the mesh does not fit the devices, or the batch the mesh."""
        sizes = self.mesh.sizes(num_devices)
        rows, parts = batch_parts(sizes), self.optimizer.accumulation_steps
        if self.global_batch_size // parts % rows:
            axes = [axis for axis in LOGICAL_AXES["batch"] if sizes[axis] > 1 or axis in ("data", "fsdp")]
            accumulated = f" x optimizer.accumulation_steps={parts}" if parts > 1 else ""
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not divisible by "
                f"{' x '.join(f'mesh.{axis}' for axis in axes)}={rows}{accumulated}: take a multiple of {rows * parts}"
            )
        check_pipeline(self.model, self.compute, sizes, self.global_batch_size // parts)
        if sizes["context"] > 1 and not self.model.splits_sequence:
            raise UserError(
                f"mesh.context={sizes['context']} cannot split the sequences of {type(self.model).__name__}: take 1, "
                "and more of mesh.data or mesh.fsdp"
            )
        for name, length in (
            ("sequence_length", self.sequence_length),
            ("data.objective.source_length", self.data.objective.source_length or 0),
        ):
            if length % sizes["context"]:
                raise UserError(f"{name}={length} is not divisible by mesh.context={sizes['context']}")


def load_config(
    name: str | Path, overrides: Mapping[str, Any] | None = None, components: Sequence[type] = ()
) -> RunConfig:
    """Return the config called `name` in `configs/`, or of the file at that path, with dotted keys changed.

    Raises UserError for an unknown name, key or value.
    """
    return override(config_of(load_config_module(name)), overrides or {}, components)


def config_of(module: ModuleType) -> RunConfig:
    """Return the config of a config file's module. Raises UserError where it is something else."""
    config = module.get_config()
    if not isinstance(config, RunConfig):
        raise UserError(f"get_config() of '{module.__file__}' returns {config!r}: it must return a RunConfig")
    return config


def read_config(file: Path, components: Sequence[type] = ()) -> RunConfig:
    """Return the config that a run directory has in its `config.json`.

    Raises UserError as `from_json` does.
    """
    data = read_json(file)
    optimizer = data.get("optimizer") if isinstance(data, dict) else None
    # From before optimizers and schedules were components.
    if isinstance(optimizer, dict) and optimizer.get("type") == "OptimizerConfig":
        optimizer["type"] = "AdamW"
        if isinstance(name := optimizer.get("schedule"), str):
            optimizer["schedule"] = to_json(schedule_of_name(name))
    return from_json(RunConfig, data, components)
