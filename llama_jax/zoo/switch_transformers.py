"""Switch Transformers (arXiv 2101.03961): T5 whose every second feed-forward is a choice of one expert."""

from collections.abc import Mapping
from typing import Any

from llama_jax.models import EncoderDecoderConfig, LayerOverride
from llama_jax.nn import MLP, Experts, SwitchRouter
from llama_jax.zoo import Weight
from llama_jax.zoo.reading import ConfigReader, checked, expect
from llama_jax.zoo.t5 import ALIASES, IGNORED, TIED, plain, read_shape, t5, weights, write_shape

__all__ = ["IGNORED", "PRESETS", "TIED", "WEIGHTS", "from_hf", "to_hf"]


def _sparse(num_layers: int, step: int, experts: Experts) -> tuple[LayerOverride, ...]:
    """The layers that have experts: the second of every `step`, or all."""
    layers = tuple(i for i in range(num_layers) if step == 1 or i % step == 1)
    return (LayerOverride(layers, experts),) if layers else ()


def _switch(shape: dict[str, Any], size: int, steps: tuple[int, int], tied: bool, experts: Experts) -> Any:
    return t5(
        **shape,
        feed_forward=MLP(size, "relu", bias=False, dropout=shape["dropout"]),
        version_1_0=tied,
        encoder_overrides=_sparse(shape["num_encoder_layers"], steps[0], experts),
        overrides=_sparse(shape["num_layers"], steps[1], experts),
    )


def _experts(size: int, num_experts: int, **options: Any) -> Experts:
    router = SwitchRouter(options.pop("jitter"), bias=options.pop("bias"))
    return Experts(num_experts, size, router, activation="relu", gated=False, **options)


OBJECTIVES = ("SpanCorruption",)
PRESETS: dict[str, EncoderDecoderConfig] = {
    "switch_base_8": _switch(
        {
            "vocab_size": 32128,
            "hidden_size": 768,
            "num_encoder_layers": 12,
            "num_layers": 12,
            "num_heads": 12,
            "head_dim": 64,
            "dropout": 0.1,
        },
        3072,
        (2, 2),
        tied=True,
        experts=_experts(
            3072, 8, jitter=0.01, bias=False, capacity=64, load_balance_loss=0.001, router_z_loss=0.001
        ),
    ),
}  # fmt: skip


def _feed_forward(ours: str, theirs: str) -> tuple[Weight, ...]:
    expert = f"{theirs}.mlp.experts.expert_" + "{expert}"
    return (
        *plain(ours, f"{theirs}.mlp"),
        Weight(f"{ours}.router.weight", f"{theirs}.mlp.router.classifier.weight", "e d -> d e"),
        Weight(f"{ours}.router.bias", f"{theirs}.mlp.router.classifier.bias", "e -> e"),
        Weight(f"{ours}.experts.up_proj.weight", f"{expert}.wi.weight", "e f d -> e d f"),
        Weight(f"{ours}.experts.down_proj.weight", f"{expert}.wo.weight", "e d f -> e f d"),
    )


WEIGHTS = weights(_feed_forward)

_A_SWITCH = "a Hugging Face Switch Transformer"
ARCHITECTURES = ("SwitchTransformersForConditionalGeneration", "SwitchTransformersModel")


def from_hf(data: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a `config.json` of model_type `switch_transformers` describes.

    Raises UserError for a key that is missing, not known, or asks for something the model cannot do.
    """
    reader = ConfigReader(data, "a Switch Transformer", ARCHITECTURES, aliases=ALIASES)
    take = reader.take
    reader.only(
        feed_forward_proj="relu",
        dense_act_fn="relu",
        is_gated_act=False,
        add_cross_attention=False,
        router_dtype="float32",
        router_ignore_padding_tokens=False,
        router_type="tokens_masked",
        num_selected_experts=1,
    )
    shape, size, tied = read_shape(reader, data), take("d_ff", int), take("tie_word_embeddings", bool, True)
    experts = _experts(
        size,
        take("num_experts", int, 8),
        jitter=take("router_jitter_noise", float, 0.01),
        bias=take("router_bias", bool, False),
        capacity=take("expert_capacity", int, 64),
        load_balance_loss=take("router_aux_loss_coef", float, 0.001),
        router_z_loss=take("router_z_loss_coef", float, 0.001),
    )
    steps = []
    for name, layers in (("encoder", shape["num_encoder_layers"]), ("decoder", shape["num_layers"])):
        sparse = take(f"num_sparse_{name}_layers", int, 3)
        # As the original has it, a layer of a model that asks for none, too.
        steps.append(take(f"{name}_sparse_step", int, layers // sparse if sparse else layers))
    reader.finish()
    return _switch(shape, size, (steps[0], steps[1]), tied, experts)


def to_hf(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The `config.json` of a model, for Hugging Face's `SwitchTransformersForConditionalGeneration`.

    Raises UserError for a model that is no Switch Transformer, naming what it has that one cannot have.
    """
    shape, feed_forward = write_shape(config, _A_SWITCH), expect(config.feed_forward, MLP, _A_SWITCH)
    stacks = {"encoder": config.stacks()["encoder_layers"], "decoder": config.stacks()["layers"]}
    sparse = {name: [i for i, (_, f) in enumerate(s) if isinstance(f, Experts)] for name, s in stacks.items()}
    found = [f for s in stacks.values() for _, f in s if isinstance(f, Experts)]
    experts = expect(found[0] if found else None, Experts, _A_SWITCH)
    router = expect(experts.router, SwitchRouter, _A_SWITCH)
    data = shape | {
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "model_type": "switch_transformers",
        "d_ff": feed_forward.intermediate_size,
        "dense_act_fn": feed_forward.activation,
        "num_experts": experts.num_experts,
        "router_jitter_noise": router.jitter,
        "router_bias": router.bias,
        "router_dtype": "float32",
        "expert_capacity": experts.capacity,
        "router_aux_loss_coef": experts.load_balance_loss,
        "router_z_loss_coef": experts.router_z_loss,
    }
    for name, layers in sparse.items():
        data[f"num_sparse_{name}_layers"] = len(layers)
        data[f"{name}_sparse_step"] = layers[1] - layers[0] if len(layers) > 1 else len(stacks[name])
    return checked(data, config, from_hf, _A_SWITCH)
