"""How a model is computed. Nothing here changes what it computes, beyond rounding."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from llama_jax.config import UserError
from llama_jax.nn import KERNELS
from llama_jax.parallel import platform

# What the backward pass of a layer finds saved; the rest it computes again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
}


@dataclasses.dataclass(frozen=True)
class Compute:
    """Execution options of a run.

    dtype: type of activations; auto is bfloat16 on TPU and GPU, float32 on CPU. Softmax, norms and loss stay float32.
    scan_layers: compile the repeating pattern of layers once and scan over it; off is faster on CPU.
    remat: what the backward pass computes again: none of it, a full layer, all but dots (products with weights), all
      but attention outputs.
    attention_kernel: kernel by name (reference, blockwise, splash on TPU, cudnn on GPU), or auto.
    context: how keys and values reach the other parts of a sequence split over mesh.context; all_gather is sooner
      there, and holds all of them on every device.
    preflight: compare the attention kernel with the reference before the first step, and do not start if they disagree.
    loss_chunk: positions of each row whose logits exist at a time in the loss.
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    scan_layers: bool = True
    remat: Literal["none", "full", "dots", "attention"] = "none"
    attention_kernel: str = "auto"
    context: Literal["ring", "all_gather"] = "ring"
    loss_chunk: int = 128
    preflight: bool = True

    def __post_init__(self) -> None:
        if self.attention_kernel != "auto" and self.attention_kernel not in KERNELS:
            raise UserError(
                f"attention_kernel={self.attention_kernel!r} does not exist: the kernels are auto, {', '.join(KERNELS)}"
            )
        if self.loss_chunk < 1:
            raise UserError(f"loss_chunk={self.loss_chunk} must be at least 1")

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The activation type, auto resolved for the platform of the mesh."""
        name = self.dtype
        if name == "auto":
            name = "float32" if platform() == "cpu" else "bfloat16"
        return jnp.dtype(name)
