"""Parameters by name, stacked over layers, and the module that is made of them.

Training state, checkpoints and conversions hold one flat dict: `{"embedding.weight": [V, D], ...,
"layers.attention.q_proj.weight": [L, D, N, H], ...}`. A name beginning with `layers.` is stacked over the layers that
have it; a model of several stacks of blocks has other such names too (`encoder_layers.`). `assemble` makes a module of
this dict, with the repeating layers scanned or unrolled: both read the same parameters. Buffers, which no gradient
trains, are in the dict like parameters.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from llama_jax.config import UserError
from llama_jax.models.config import Compute, ModelConfig, Pieces, repeating_pattern
from llama_jax.models.stack import Layers
from llama_jax.nn import ALL_PROJECTIONS as ALL, Buffer, Keys, PyTree, child, seed_key
from llama_jax.parallel import axes_of, split_layers

Params = dict[str, jax.Array]


ADAPTERS = (".lora_a", ".lora_b")


def is_stacked(name: str) -> bool:
    """Return whether a parameter of this name has a leading dimension of layers: names of stacks end with `layers`."""
    return name.partition(".")[0].endswith("layers")


class _Template:
    """Structure of a module without values, which `nnx.eval_shape` made; `merge` makes the module of it."""

    def __init__(self, module: nnx.Module):
        self.graphdef, state = nnx.split(module)
        self.shapes = _flat(state)
        self.treedef = jax.tree.structure(state)
        leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable))[0]
        self.buffers = {_dotted(path): x.get_metadata("update") for path, x in leaves if isinstance(x, Buffer)}

    def merge(self, values: dict[str, PyTree]) -> PyTree:
        """Return the module of these values by name."""
        state = jax.tree.unflatten(self.treedef, [values[name] for name in self.shapes])
        return nnx.merge(self.graphdef, state)


def _flat(state: PyTree) -> dict[str, PyTree]:
    """Return values of a state by dotted name, in the order of its leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_dotted(path): value for path, value in leaves}


def _dotted(path: Any) -> str:
    keys = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(key for key in keys if key not in ("value", "raw_value"))


@functools.lru_cache(maxsize=64)
def _templates(config: ModelConfig) -> tuple[dict[str, _Template], dict[str, list[_Template]]]:
    """Return templates of the parts by name, and of each layer's block by stack, one object for each kind of block."""

    def key() -> jax.Array:  # made inside of `eval_shape`: the mesh's devices may be those of another machine
        return jax.random.key(0)

    def rngs() -> nnx.Rngs:
        return nnx.Rngs(params=key())

    def of_stack(stack: str, layers: tuple[Pieces, ...]) -> list[_Template]:
        def block(pieces: Pieces) -> nnx.Module:
            return nnx.eval_shape(lambda: config.build_block(stack, pieces, rngs=layer_rngs(config, key())))

        kinds = {pieces: _Template(block(pieces)) for pieces in dict.fromkeys(layers)}
        return [kinds[pieces] for pieces in layers]

    # A template is the same on all meshes, so it is made without one.
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        built = nnx.eval_shape(lambda: nnx.Dict(config.build_parts(rngs=rngs())))
        parts = {name: _Template(part) for name, part in built.items()}
        stacks = {stack: of_stack(stack, layers) for stack, layers in config.stacks().items()}
    if config.adapters is not None:
        _check_targets(config, {name for blocks in stacks.values() for block in blocks for name in block.shapes})
    return parts, stacks


def _check_targets(config: ModelConfig, names: set[str]) -> None:
    """Raise UserError for a target of adapters that is no projection; `names` are those of the layers' arrays."""
    assert config.adapters is not None
    adapted = [f".{name.removesuffix(ADAPTERS[0])}" for name in names if name.endswith(ADAPTERS[0])]
    for target in config.adapters.targets:
        if (target == ALL and adapted) or any(name.endswith(f".{target}") for name in adapted):
            continue
        wanted = dataclasses.replace(config.adapters, targets=(ALL,))
        if config.adapters == wanted:
            raise UserError("adapters are for projections, and the layers of this model have none: set it to none")
        stacks = _templates(dataclasses.replace(config, adapters=wanted))[1]  # type: ignore[type-var]
        known = {
            k.split(".")[-2] for blocks in stacks.values() for b in blocks for k in b.shapes if k.endswith(ADAPTERS)
        }
        raise UserError(
            f"adapters.targets={target} is no projection of this model's layers (stacked experts, embeddings and the "
            f"head take no adapters): give some of {', '.join(sorted(known))}, or {ALL}"
        )


def layer_rngs(config: ModelConfig, key: jax.Array) -> nnx.Rngs:
    """Return the key stream of a layer, by which its projections know of the adapters."""
    # Parts around the layers get none: the head's weights are read without a call.
    return nnx.Rngs(params=key) if config.adapters is None else Keys(key, adapters=config.adapters)


def _named_templates(config: ModelConfig) -> Iterator[tuple[str, _Template]]:
    """Yield the template of every part and every layer, with the beginning of its parameters' names."""
    parts, stacks = _templates(config)
    yield from parts.items()
    for stack, blocks in stacks.items():
        yield from ((stack, block) for block in blocks)


def layers_with(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return for every stacked parameter the layers that have it, in the order of its first dimension."""
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


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters by name."""
    parts, stacks = _templates(config)
    found = {f"{name}.{k}": value.shape for name, part in parts.items() for k, value in part.shapes.items()}
    for name, owners in layers_with(config).items():
        stack, _, own_name = name.partition(".")
        found[name] = (len(owners), *stacks[stack][owners[0]].shapes[own_name].shape)
    return found


def buffers(config: ModelConfig) -> dict[str, Any]:
    """Return the names of the buffers, each with the function that updates it after a step, or None."""
    return {f"{name}.{k}": update for name, t in _named_templates(config) for k, update in t.buffers.items()}


def frozen(config: ModelConfig) -> frozenset[str]:
    """Return the names of the arrays that no gradient trains: the buffers, and with adapters all but these."""
    names = buffers(config)
    if config.adapters is not None:
        names = [name for name in shapes(config) if not name.endswith(ADAPTERS)]
    return frozenset(names)


def num_parameters(config: ModelConfig, *, trained: bool = False) -> int:
    """Return the exact number of parameters, without buffers, or of those that are trained; nothing is allocated."""
    left_out = frozen(config) if trained else buffers(config)
    return sum(math.prod(shape) for name, shape in shapes(config).items() if name not in left_out)


def init_params(config: ModelConfig, seed: int | jax.Array) -> Params:
    """Return first values: each is a function of the seed, the parameter's name and its layer alone.

    Jit it to get them sharded, with `seed_value` of a large seed.
    """
    rngs = nnx.Rngs(params=seed_key(seed))
    params: Params = {}
    for name, part in config.build_parts(rngs=rngs).items():
        params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(part)[1]).items()}
    for stack, pieces in config.stacks().items():
        params |= _init_stack(config, stack, pieces, child(rngs, stack)["params"].key[...])
    return params


def _init_stack(config: ModelConfig, stack: str, pieces: tuple[Pieces, ...], base: jax.Array) -> Params:
    stacked: dict[str, list[tuple[tuple[int, ...], jax.Array]]] = {}
    for kind in dict.fromkeys(pieces):  # layers of one kind are made at once
        layers = tuple(i for i, p in enumerate(pieces) if p == kind)
        keys = jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.array(layers))
        values = jax.vmap(
            lambda key, kind=kind: _flat(nnx.split(config.build_block(stack, kind, rngs=layer_rngs(config, key)))[1])
        )(keys)
        for name, value in values.items():
            stacked.setdefault(f"{stack}.{name}", []).append((layers, value))
    params: Params = {}
    for name, groups in stacked.items():
        if len(groups) == 1:
            params[name] = split_layers(groups[0][1])
        else:
            order = [i for layers, _ in groups for i in layers]
            # Kinds of layers were made apart: put their values into the order of the layers.
            joined = jnp.concatenate([value for _, value in groups])
            params[name] = split_layers(joined[jnp.array(sorted(range(len(order)), key=order.__getitem__))])
    return params


def abstract_params(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and, under a mesh, shardings of all parameters; nothing is allocated.

    Buffers are always float32.
    """
    mesh, kept = jax.sharding.get_mesh(), buffers(config)
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            jnp.float32 if name in kept else dtype,
            sharding=None if spec is None else jax.sharding.NamedSharding(mesh, spec),
        )
        for name, (shape, spec) in _shapes_and_specs(config, jax.sharding.get_abstract_mesh()).items()
    }


@functools.lru_cache(maxsize=64)
def _shapes_and_specs(
    config: ModelConfig, mesh: jax.sharding.AbstractMesh
) -> dict[str, tuple[tuple[int, ...], jax.sharding.PartitionSpec | None]]:
    # Tracing takes a second. Specs depend on the current mesh, which is an argument for the cache to tell them apart.
    abstract = jax.eval_shape(functools.partial(init_params, config), 0)
    return {name: (a.shape, None if mesh.empty else a.sharding.spec) for name, a in abstract.items()}


def per_layer(config: ModelConfig, params: Params, stack: str = "layers") -> list[dict[str, jax.Array]]:
    """Return the parameters of each layer of a stack, from the stacked ones."""
    layers: list[dict[str, jax.Array]] = [{} for _ in config.stacks()[stack]]
    for name, owners in layers_with(config).items():
        if not name.startswith(f"{stack}."):
            continue
        # split, not indexing: its transpose is one concatenation, where L slices would add L full-size arrays.
        values = jax.lax.split(split_layers(params[name], whole=True), [1] * len(owners))
        for i, value in zip(owners, values, strict=True):
            layers[i][name.removeprefix(f"{stack}.")] = value.reshape(value.shape[1:])
    return layers


def assemble(config: ModelConfig, params: Params, compute: Compute, *, scan: bool | None = None) -> Any:
    """Return the module of these parameters; `scan` (None: as `compute` has it) leaves repeating layers stacked."""
    scan = compute.scan_layers if scan is None else scan
    templates, blocks = _templates(config)
    parts = {name: part.merge({k: params[f"{name}.{k}"] for k in part.shapes}) for name, part in templates.items()}
    stacks = {stack: _layers(config, params, stack, blocks[stack], scan=scan) for stack in blocks}
    return config.build_model(parts, stacks, compute)


def _layers(config: ModelConfig, params: Params, stack: str, blocks: list[_Template], *, scan: bool) -> Layers:
    leading, period = repeating_pattern(config.stacks()[stack]) if scan else (len(blocks), 0)
    first = per_layer(config, params, stack)[:leading] if leading else []
    owners, repeated = layers_with(config), []
    for offset in range(period):
        block, chosen = blocks[leading + offset], range(leading + offset, len(blocks), period)
        names = {k: f"{stack}.{k}" for k in block.shapes}
        repeated.append(block.merge({k: _take(params[name], owners[name], chosen) for k, name in names.items()}))
    return Layers(stack, [block.merge(values) for block, values in zip(blocks, first, strict=False)], repeated)


def _take(value: jax.Array, owners: tuple[int, ...], chosen: range) -> jax.Array:
    # Rows of the stacked array; the layers of a pattern are a fixed distance apart in it, so that one slice takes them.
    rows = [owners.index(i) for i in chosen]
    if rows == list(range(value.shape[0])):
        return value
    start, step = rows[0], rows[1] - rows[0]
    if any(axes_of(value)[0]):  # a stage has whole repeats of the pattern, and no stage a slice of all
        spec = jax.typeof(value).sharding.spec
        pattern = jnp.reshape(value, (-1, step, *value.shape[1:]), out_sharding=jax.P(spec[0], None, *spec[1:]))
        return pattern[:, start]
    return value[start : rows[-1] + 1 : step]


def flatten(model: Any) -> Params:
    """Return parameters by name of an unrolled module: the inverse of `assemble`."""
    params: Params = {}
    for name in model.part_names:
        params |= {f"{name}.{k}": v for k, v in _flat(nnx.split(model.part(name))[1]).items()}
    layers = {name: [_flat(nnx.split(block)[1]) for block in model.part(name).leading] for name in model.stack_names}
    for name, owners in layers_with(model.config).items():
        stack, _, own_name = name.partition(".")
        params[name] = jnp.stack([layers[stack][i][own_name] for i in owners])
    return params
