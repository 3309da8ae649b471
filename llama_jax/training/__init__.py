"""Losses, optimizers, learning-rate schedules, and the pure train step.

In: a model config, a `TrainState` and a batch. Out: the next state and its metrics. A new optimizer is a class that
derives from `Optimizer`, a new schedule one that derives from `Schedule`; their numbers are traced, so that a sweep
compiles once.
"""

from llama_jax.training.flops import (
    peak_flops as peak_flops,
    train_flops_per_token as train_flops_per_token,
)
from llama_jax.training.kernel_check import (
    Agreement as Agreement,
    PreflightFailed as PreflightFailed,
    preflight as preflight,
)
from llama_jax.training.losses import cross_entropy as cross_entropy
from llama_jax.training.optimizer import (
    SGD as SGD,
    STATIC as STATIC,
    Adafactor as Adafactor,
    AdamW as AdamW,
    Hyper as Hyper,
    Lion as Lion,
    Muon as Muon,
    Optimizer as Optimizer,
    OptimizerConfig as OptimizerConfig,
    learning_rate as learning_rate,
    make_optimizer as make_optimizer,
    state_bytes as state_bytes,
)
from llama_jax.training.piece_check import check_pieces as check_pieces
from llama_jax.training.preference import copies_reference as copies_reference
from llama_jax.training.schedules import (
    Constant as Constant,
    Cosine as Cosine,
    InverseSqrt as InverseSqrt,
    Linear as Linear,
    Schedule as Schedule,
    WarmupStableDecay as WarmupStableDecay,
    schedule_of_name as schedule_of_name,
)
from llama_jax.training.step import (
    CPU_COMPILER_OPTIONS as CPU_COMPILER_OPTIONS,
    Batch as Batch,
    TrainState as TrainState,
    compiler_options as compiler_options,
    gradient as gradient,
    init_state as init_state,
    make_eval_step as make_eval_step,
    make_train_step as make_train_step,
)
