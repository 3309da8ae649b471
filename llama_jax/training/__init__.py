"""Losses, optimizer, and the pure train step.

In: a model config, a `TrainState` and a batch. Out: the next state and its metrics. A new optimizer is a function like
`optimizer.make_optimizer`; hyper-parameters are traced, so that a sweep does not compile again.
"""

from llama_jax.training.flops import peak_flops, train_flops_per_token
from llama_jax.training.kernel_check import PreflightFailed, preflight
from llama_jax.training.losses import cross_entropy
from llama_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from llama_jax.training.step import (
    CPU_COMPILER_OPTIONS,
    TrainState,
    compiler_options,
    init_state,
    make_eval_step,
    make_train_step,
)

__all__ = [
    "CPU_COMPILER_OPTIONS",
    "OptimizerConfig",
    "PreflightFailed",
    "TrainState",
    "compiler_options",
    "cross_entropy",
    "init_state",
    "learning_rate",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "peak_flops",
    "preflight",
    "train_flops_per_token",
]
