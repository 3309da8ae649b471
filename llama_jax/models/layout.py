"""Parameters by name, stacked over layers, and the module made of them.

Training state, checkpoints and conversions hold one flat dict: `{"embedding.weight": [V, D], ...,
"layers.attention.q_proj.weight": [L, D, N, H], ...}`. A name beginning with `layers.` is stacked over the layers that
have it. Scanning or unrolling is a way to read this dict, not another layout.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.models.compute import Compute
from llama_jax.models.decoder import Decoder, Layers, ModelConfig
from llama_jax.nn.parameters import child

Params = dict[str, jax.Array]
PREFIX = "layers."


class _Template:
    """Structure of a module without values: what `merge` needs to make it from parameters by name."""

    def __init__(self, make: Any):
        graphdef, state = nnx.split(nnx.eval_shape(make))
        self.graphdef = graphdef
        self.shapes = _flat(state)
        self.treedef = jax.tree.structure(state)

    def merge(self, values: dict[str, Any]) -> Any:
        state = jax.tree.unflatten(self.treedef, [values[name] for name in self.shapes])
        return nnx.merge(self.graphdef, state)


def _flat(state: Any) -> dict[str, Any]:
    """Values of a state by dotted name, in leaf order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_dotted(path): value for path, value in leaves}


def _dotted(path: Any) -> str:
    keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(key for key in keys if key not in ("value", "raw_value"))


@functools.lru_cache(maxsize=64)
def _templates(config: ModelConfig) -> tuple[dict[str, _Template], list[_Template]]:
    """Templates of the parts by name, and of each layer's block (one object per kind of block)."""
    key = jax.random.key(0)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        names = list(nnx.eval_shape(lambda: nnx.Dict(config.build_parts(rngs=nnx.Rngs(params=key)))))
        parts = {
            name: _Template(lambda name=name: config.build_parts(rngs=nnx.Rngs(params=key))[name]) for name in names
        }
        kinds = {
            pieces: _Template(lambda pieces=pieces: config.build_block(pieces, rngs=nnx.Rngs(params=key)))
            for pieces in dict.fromkeys(config.layer_pieces())
        }
    return parts, [kinds[pieces] for pieces in config.layer_pieces()]


def layers_with(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every stacked parameter, the layers that have it, in the order of its first dimension."""
    found: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for i, block in enumerate(_templates(config)[1]):
        for name, value in block.shapes.items():
            found.setdefault(PREFIX + name, []).append(i)
            if shapes.setdefault(name, value.shape) != value.shape:
                raise ValueError(
                    f"parameter '{name}' has shape {value.shape} in layer {i} and {shapes[name]} before it: "
                    "pieces of different shapes need different parameter names"
                )
    return {name: tuple(layers) for name, layers in found.items()}


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """First values: a function of the seed, the parameter's name and its layer alone. Jit it to get it sharded."""
    rngs = nnx.Rngs(params=jax.random.key(seed))
    params: Params = {}
    for name, part in config.build_parts(rngs=rngs).items():
        params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(part)[1]).items()}
    pieces = config.layer_pieces()
    stacked: dict[str, list[tuple[tuple[int, ...], jax.Array]]] = {}
    base = child(rngs, "layers")["params"].key[...]
    for kind in dict.fromkeys(pieces):
        layers = tuple(i for i, p in enumerate(pieces) if p == kind)
        keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.array(layers))
        values = jax.vmap(
            lambda key, kind=kind: _flat(nnx.split(config.build_block(kind, rngs=nnx.Rngs(params=key)))[1])
        )(keys)
        for name, value in values.items():
            stacked.setdefault(PREFIX + name, []).append((layers, value))
    for name, groups in stacked.items():
        if len(groups) == 1:
            params[name] = groups[0][1]
        else:
            order = [i for layers, _ in groups for i in layers]
            joined = jnp.concatenate([value for _, value in groups])
            params[name] = joined[jnp.array(sorted(range(len(order)), key=order.__getitem__))]
    return params


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and, under a mesh, shardings of all parameters; nothing is allocated."""
    abstract = jax.eval_shape(functools.partial(init_params, config), 0)
    mesh = jax.sharding.get_mesh()
    return {
        name: jax.ShapeDtypeStruct(
            a.shape, dtype, sharding=None if mesh.empty else jax.sharding.NamedSharding(mesh, a.sharding.spec)
        )
        for name, a in abstract.items()
    }


def num_parameters(config: ModelConfig) -> int:
    """The exact number of parameters; nothing is allocated."""
    parts, blocks = _templates(config)
    return sum(math.prod(v.shape) for template in (*parts.values(), *blocks) for v in template.shapes.values())


def repeating_pattern(pieces: tuple[Any, ...]) -> tuple[int, int]:
    """(prefix, period): after `prefix` layers the rest repeats every `period`; their sum is the smallest possible."""
    total = len(pieces)
    best = (total, 0)
    for prefix in range(total):
        rest = pieces[prefix:]
        for period in range(1, len(rest) // 2 + 1):
            repeats = len(rest) % period == 0 and all(rest[i] == rest[i % period] for i in range(len(rest)))
            if repeats and prefix + period < sum(best):
                best = (prefix, period)
    return best


def per_layer(config: ModelConfig, params: Params) -> list[dict[str, jax.Array]]:
    """Each layer's parameters, from the stacked ones."""
    # split, not indexing: its transpose is one concatenation, where L slices would add L full-size arrays.
    layers: list[dict[str, jax.Array]] = [{} for _ in range(config.num_layers)]
    for name, owners in layers_with(config).items():
        for i, value in zip(owners, jax.lax.split(params[name], [1] * len(owners)), strict=True):
            layers[i][name.removeprefix(PREFIX)] = value.reshape(value.shape[1:])
    return layers


def assemble(config: ModelConfig, params: Params, compute: Compute, *, scan: bool | None = None) -> Decoder:
    """The module of these parameters; `scan` (default: what `compute` says) leaves repeating layers stacked."""
    if not (compute.scan_layers if scan is None else scan):
        return assemble_unrolled(config, params, per_layer(config, params), compute)
    _, blocks = _templates(config)
    prefix, period = repeating_pattern(config.layer_pieces())
    owners = layers_with(config)

    def repeats(offset: int) -> dict[str, jax.Array]:
        chosen = range(prefix + offset, config.num_layers, period)
        names = blocks[prefix + offset].shapes
        return {k: _take(params[PREFIX + k], owners[PREFIX + k], chosen) for k in names}

    pattern = [blocks[prefix + offset].merge(repeats(offset)) for offset in range(period)]
    first = per_layer(config, params)[:prefix] if prefix else []
    layers = Layers([block.merge(values) for block, values in zip(blocks, first, strict=False)], pattern)
    return Decoder(config, _merge_parts(config, params), layers, compute)


def assemble_unrolled(
    config: ModelConfig, params: Params, layers: list[dict[str, jax.Array]], compute: Compute
) -> Decoder:
    """The unrolled module: the parts around the layers from `params`, the layers one by one."""
    blocks = [block.merge(values) for block, values in zip(_templates(config)[1], layers, strict=True)]
    return Decoder(config, _merge_parts(config, params), Layers(blocks), compute)


def _merge_parts(config: ModelConfig, params: Params) -> dict[str, nnx.Module]:
    parts, _ = _templates(config)
    return {name: part.merge({k: params[f"{name}.{k}"] for k in part.shapes}) for name, part in parts.items()}


def _take(value: jax.Array, owners: tuple[int, ...], chosen: range) -> jax.Array:
    rows = [owners.index(i) for i in chosen]
    if rows == list(range(value.shape[0])):
        return value
    start, step = rows[0], rows[1] - rows[0]
    return value[start : rows[-1] + 1 : step]


def flatten(model: Decoder) -> Params:
    """Parameters by name of an unrolled module: the inverse of `assemble`."""
    params: Params = {}
    for name in ("embedding", "norm", "lm_head"):
        if (part := getattr(model, name)) is not None:
            params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(part)[1]).items()}
    layers = [_flat(nnx.split(block)[1]) for block in model.layers.prefix]
    for name, owners in layers_with(model.config).items():
        params[name] = jnp.stack([layers[i][name.removeprefix(PREFIX)] for i in owners])
    return params
