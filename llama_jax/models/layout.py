"""Parameters by name, stacked over layers, and the module made of them.

Training state, checkpoints and conversions hold one flat dict: `{"embedding.weight": [V, D], ...,
"layers.attention.q_proj.weight": [L, D, N, H], ...}`. A name beginning with `layers.` is stacked over the layers that
have it; a model of several stacks of blocks has other such names too (`encoder_layers.`). Scanning or unrolling is a
way to read this dict, not another layout. Buffers, which no gradient trains, are in it like parameters.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llama_jax.models.block import Layers
from llama_jax.models.compute import Compute
from llama_jax.models.config import ModelConfig
from llama_jax.nn import Buffer, child, seed_key

Params = dict[str, jax.Array]


def is_stacked(name: str) -> bool:
    """Whether a parameter of this name has a leading dimension of layers: the names of stacks end with `layers`."""
    return name.partition(".")[0].endswith("layers")


class _Template:
    """Structure of a module without values: what `merge` needs to make it from parameters by name."""

    def __init__(self, make: Any):
        graphdef, state = nnx.split(nnx.eval_shape(make))
        self.graphdef = graphdef
        self.shapes = _flat(state)
        self.treedef = jax.tree.structure(state)
        leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
        self.buffers = {_dotted(path): x.get_metadata("update") for path, x in leaves if isinstance(x, Buffer)}

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
def _templates(config: ModelConfig) -> tuple[dict[str, _Template], dict[str, list[_Template]]]:
    """Templates of the parts by name, and of each layer's block by stack (one object per kind of block)."""

    def rngs() -> nnx.Rngs:  # made where nothing is computed: the mesh's devices may be those of a machine not here
        return nnx.Rngs(params=jax.random.key(0))

    def of_stack(stack: str, layers: tuple[Any, ...]) -> list[_Template]:
        kinds = {
            pieces: _Template(lambda pieces=pieces: config.build_block(stack, pieces, rngs=rngs()))
            for pieces in dict.fromkeys(layers)
        }
        return [kinds[pieces] for pieces in layers]

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        names = list(nnx.eval_shape(lambda: nnx.Dict(config.build_parts(rngs=rngs()))))
        parts = {name: _Template(lambda name=name: config.build_parts(rngs=rngs())[name]) for name in names}
        stacks = {stack: of_stack(stack, layers) for stack, layers in config.stacks().items()}
    return parts, stacks


def layers_with(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of every stacked parameter, the layers that have it, in the order of its first dimension."""
    found: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for stack, blocks in _templates(config)[1].items():
        for i, block in enumerate(blocks):
            for own_name, value in block.shapes.items():
                name = f"{stack}.{own_name}"
                found.setdefault(name, []).append(i)
                if shapes.setdefault(name, value.shape) != value.shape:
                    raise ValueError(
                        f"parameter '{name}' has shape {value.shape} in layer {i} and {shapes[name]} before it: "
                        "pieces of different shapes need different parameter names"
                    )
    return {name: tuple(layers) for name, layers in found.items()}


def buffers(config: ModelConfig) -> dict[str, Any]:
    """The names of what no gradient trains, each with the function that updates it after a step, or None."""
    parts, stacks = _templates(config)
    found = {f"{name}.{k}": update for name, part in parts.items() for k, update in part.buffers.items()}
    for stack, blocks in stacks.items():
        found |= {f"{stack}.{k}": update for block in blocks for k, update in block.buffers.items()}
    return found


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """First values: a function of the seed, the parameter's name and its layer alone. Jit it to get it sharded, with
    `seed_value` of a large seed."""
    rngs = nnx.Rngs(params=seed_key(seed))
    params: Params = {}
    for name, part in config.build_parts(rngs=rngs).items():
        params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(part)[1]).items()}
    for stack, pieces in config.stacks().items():
        params |= _init_stack(config, stack, pieces, child(rngs, stack)["params"].key[...])
    return params


def _init_stack(config: ModelConfig, stack: str, pieces: tuple[Any, ...], base: jax.Array) -> Params:
    params: Params = {}
    stacked: dict[str, list[tuple[tuple[int, ...], jax.Array]]] = {}
    for kind in dict.fromkeys(pieces):
        layers = tuple(i for i, p in enumerate(pieces) if p == kind)
        keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.array(layers))
        values = jax.vmap(
            lambda key, kind=kind: _flat(nnx.split(config.build_block(stack, kind, rngs=nnx.Rngs(params=key)))[1])
        )(keys)
        for name, value in values.items():
            stacked.setdefault(f"{stack}.{name}", []).append((layers, value))
    for name, groups in stacked.items():
        if len(groups) == 1:
            params[name] = groups[0][1]
        else:
            order = [i for layers, _ in groups for i in layers]
            joined = jnp.concatenate([value for _, value in groups])
            params[name] = joined[jnp.array(sorted(range(len(order)), key=order.__getitem__))]
    return params


def abstract_params(config: ModelConfig, dtype: Any = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and, under a mesh, shardings of all parameters; nothing is allocated. Buffers are always float32."""
    kept = buffers(config)
    abstract = jax.eval_shape(functools.partial(init_params, config), 0)
    mesh = jax.sharding.get_mesh()
    return {
        name: jax.ShapeDtypeStruct(
            a.shape,
            jnp.float32 if name in kept else dtype,
            sharding=None if mesh.empty else jax.sharding.NamedSharding(mesh, a.sharding.spec),
        )
        for name, a in abstract.items()
    }


def num_parameters(config: ModelConfig) -> int:
    """The exact number of parameters, buffers not counted; nothing is allocated."""
    parts, stacks = _templates(config)
    templates = (*parts.values(), *(block for blocks in stacks.values() for block in blocks))
    return sum(math.prod(v.shape) for t in templates for name, v in t.shapes.items() if name not in t.buffers)


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


def per_layer(config: ModelConfig, params: Params, stack: str = "layers") -> list[dict[str, jax.Array]]:
    """The parameters of each layer of a stack, from the stacked ones."""
    # split, not indexing: its transpose is one concatenation, where L slices would add L full-size arrays.
    layers: list[dict[str, jax.Array]] = [{} for _ in config.stacks()[stack]]
    for name, owners in layers_with(config).items():
        if not name.startswith(f"{stack}."):
            continue
        for i, value in zip(owners, jax.lax.split(params[name], [1] * len(owners)), strict=True):
            layers[i][name.removeprefix(f"{stack}.")] = value.reshape(value.shape[1:])
    return layers


def assemble(config: ModelConfig, params: Params, compute: Compute, *, scan: bool | None = None) -> Any:
    """The module of these parameters; `scan` (default: what `compute` says) leaves repeating layers stacked."""
    if not (compute.scan_layers if scan is None else scan):
        layers = {stack: per_layer(config, params, stack) for stack in config.stacks()}
        return assemble_unrolled(config, params, layers, compute)
    stacks = {stack: _scanned(config, params, stack, pieces) for stack, pieces in config.stacks().items()}
    return config.build_model(_merge_parts(config, params), stacks, compute)


def _scanned(config: ModelConfig, params: Params, stack: str, pieces: tuple[Any, ...]) -> Layers:
    blocks = _templates(config)[1][stack]
    prefix, period = repeating_pattern(pieces)
    owners = layers_with(config)

    def repeats(offset: int) -> dict[str, jax.Array]:
        chosen = range(prefix + offset, len(pieces), period)
        names = {k: f"{stack}.{k}" for k in blocks[prefix + offset].shapes}
        return {k: _take(params[name], owners[name], chosen) for k, name in names.items()}

    pattern = [blocks[prefix + offset].merge(repeats(offset)) for offset in range(period)]
    first = per_layer(config, params, stack)[:prefix] if prefix else []
    return Layers(stack, [block.merge(values) for block, values in zip(blocks, first, strict=False)], pattern)


def assemble_unrolled(
    config: ModelConfig, params: Params, layers: dict[str, list[dict[str, jax.Array]]], compute: Compute
) -> Any:
    """The unrolled module: the parts around the layers from `params`, the layers of each stack one by one."""
    stacks = {
        stack: Layers(stack, [block.merge(values) for block, values in zip(blocks, layers[stack], strict=True)])
        for stack, blocks in _templates(config)[1].items()
    }
    return config.build_model(_merge_parts(config, params), stacks, compute)


def _merge_parts(config: ModelConfig, params: Params) -> dict[str, nnx.Module]:
    parts, _ = _templates(config)
    return {name: part.merge({k: params[f"{name}.{k}"] for k in part.shapes}) for name, part in parts.items()}


def _take(value: jax.Array, owners: tuple[int, ...], chosen: range) -> jax.Array:
    rows = [owners.index(i) for i in chosen]
    if rows == list(range(value.shape[0])):
        return value
    start, step = rows[0], rows[1] - rows[0]
    return value[start : rows[-1] + 1 : step]


def flatten(model: Any) -> Params:
    """Parameters by name of an unrolled module: the inverse of `assemble`."""
    params: Params = {}
    for name in model.part_names:
        params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(model.part(name))[1]).items()}
    layers = {name: [_flat(nnx.split(block)[1]) for block in model.part(name).prefix] for name in model.stack_names}
    for name, owners in layers_with(model.config).items():
        stack, _, own_name = name.partition(".")
        params[name] = jnp.stack([layers[stack][i][own_name] for i in owners])
    return params
