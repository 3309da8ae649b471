"""Split a model over a mesh of devices; the logits stay the same.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/shard_on_mesh.py   # eight virtual devices of a CPU
"""

import tempfile

import jax
import jax.numpy as jnp

import llama_jax
from llama_jax.checkpoint import LanguageModel

MESH = {"fsdp": 4, "tensor": 2}


def main() -> None:
    """Save a model with random weights, load it whole and split, and compare."""
    config = llama_jax.load_config("tiny_python", {"model.num_layers": 2}).model
    with tempfile.TemporaryDirectory() as folder:
        llama_jax.save(LanguageModel(config, llama_jax.build(config, seed=0), None), f"{folder}/model", format="native")
        whole = llama_jax.load(f"{folder}/model")
        split = llama_jax.load(f"{folder}/model", mesh=MESH)  # read onto the mesh, never whole on one device

    name = "layers.attention.q_proj.weight"
    weight = split.model.params()[name]
    print(f"{name}: {weight.shape}, a device has {weight.addressable_shards[0].data.shape}")
    jax.debug.visualize_array_sharding(split.model.params()["embedding.weight"])

    tokens = jnp.arange(1, 17).reshape(2, 8)
    difference = jnp.abs(jax.device_get(whole.model(tokens)) - jax.device_get(split.model(tokens))).max()
    print(f"logits differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
