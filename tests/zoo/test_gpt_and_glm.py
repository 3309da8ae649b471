"""GPT-2, GPT-3, GLM-4 and ChatGLM2: exact sizes, nothing of a config.json ignored, nothing else exported as one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llama_jax import zoo
from llama_jax.checkpoint import LanguageModel, load, load_params, open_source, save
from llama_jax.checkpoint.formats import read_directory, write_safetensors
from llama_jax.config import UserError
from llama_jax.models import Compute, DecoderConfig, abstract_params, build, num_parameters
from llama_jax.models.config import repeating_pattern
from llama_jax.models.layout import assemble
from llama_jax.nn import GroupedQuery, LearnedPositions, LinearScaling, RMSNorm, Rope
from llama_jax.zoo.gpt2 import gpt3 as make_gpt3

chatglm = zoo.family("chatglm")
glm = zoo.family("glm")
gpt2 = zoo.family("gpt2")
gpt3 = zoo.all_presets()["gpt3"]

COUNTS = {
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "gpt3_125m": 125_226_240,
    "gpt3_350m": 355_871_744,
    "gpt3_760m": 760_300_032,
    "gpt3_1_3b": 1_315_723_264,
    "gpt3_2_7b": 2_651_553_280,
    "gpt3_6_7b": 6_658_404_352,
    "gpt3_13b": 12_853_386_240,
    "gpt3_175b": 174_604_259_328,
    "chatglm2_6b": 6_243_584_000,
    "chatglm3_6b": 6_243_584_000,
    "chatglm3_6b_32k": 6_243_584_000,
    "glm4_9b": 9_399_951_360,
}
FAMILIES = {"gpt2": gpt2, "glm": glm, "chatglm": chatglm}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 4}
GLM = {
    "model_type": "glm", "vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 40, "max_position_embeddings": 128,
}  # fmt: skip
CHATGLM = {
    "model_type": "chatglm", "padded_vocab_size": 64, "hidden_size": 24, "num_layers": 2, "num_attention_heads": 4,
    "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 8, "ffn_hidden_size": 40,
    "seq_length": 128, "layernorm_epsilon": 1e-5, "add_qkv_bias": True,
}  # fmt: skip
CONFIGS = {"gpt2": GPT2, "glm": GLM, "chatglm": CHATGLM}


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(zoo.presets()[name]) for name in COUNTS} == COUNTS
    assert {name for module in (gpt2, gpt3, glm, chatglm) for name in module.presets} == set(COUNTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_survive_hugging_face_s_config(name: str):
    for config in FAMILIES[name].presets.values():
        data = FAMILIES[name].to_hf(config)
        assert json.loads(json.dumps(data)) == data
        assert FAMILIES[name].from_hf(data) == config


def test_gpt3_has_no_files():
    assert "gpt3" not in zoo.families()
    with pytest.raises(UserError, match="'gpt3' is not one of the families"):
        zoo.family("gpt3")


@pytest.mark.parametrize("name", gpt3.presets)
def test_gpt3_sees_all_and_near_tokens_by_turns(name: str):
    config = gpt3.presets[name]
    windows = [mixer.window for mixer, _ in config.stacks()["layers"]]
    assert windows == [None, 256] * (config.num_layers // 2)
    assert repeating_pattern(config.stacks()["layers"]) == (0, 2)


@pytest.mark.slow
def test_gpt3_s_two_kinds_of_layers_are_scanned():
    config = make_gpt3(6, 8, 4, window=2, max_positions=8, vocab_size=8)
    layers = assemble(config, build(config).params(), Compute(scan_layers=True)).layers
    assert (len(layers.leading), len(layers.repeated)) == (0, 2)
    assert [block.attention.config.window for block in layers.repeated] == [None, 2]


# -- config.json


def test_what_old_files_of_gpt2_leave_out():
    config = gpt2.from_hf(GPT2)
    assert config.positions == LearnedPositions(48)
    assert (config.dropout, config.attention.dropout, config.tie_embeddings) == (0.1, 0.1, True)
    assert (config.feed_forward.intermediate_size, config.feed_forward.activation) == (96, "gelu_tanh")
    # A head of its own, and scores as they are, are other models, and come back.
    other = gpt2.from_hf(
        GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False, "activation_function": "relu"}
    )
    assert (other.tie_embeddings, other.attention.scale, other.feed_forward.activation) == (False, 1.0, "relu")
    assert gpt2.from_hf(gpt2.to_hf(other)) == other


def test_both_spellings_of_glm_s_rotary_positions():
    rope = Rope(5000.0, LinearScaling(2.0), rotary_dim=4)
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = glm.from_hf(GLM | {"rope_theta": 5000.0, "rope_scaling": scaling, "partial_rotary_factor": 0.5})
    inside = scaling | {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    assert old == glm.from_hf(GLM | {"rope_parameters": inside})
    assert old.attention.rope == rope
    assert glm.from_hf(glm.to_hf(old)) == old


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"hidden_size": 32}, "hidden_size=32 and n_embd=24, which are one setting"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
        ("gpt2", {"n_head": 5}, "hidden_size=24 is not divisible by num_heads=5"),
        ("gpt2", {"n_embd": None}, "n_embd"),
        ("gpt2", {"resid_pdrop": 1.5, "embd_pdrop": 1.5}, r"dropout=1\.5"),
        ("gpt2", {"a_new_trick": 1}, "a_new_trick=1"),
        ("glm", {"partial_rotary_factor": 1.0}, r"partial_rotary_factor=1\.0.*only have 0\.5"),
        ("glm", {"rope_parameters": {"partial_rotary_factor": 0.25}}, r"partial_rotary_factor=0\.25"),
        (
            "glm",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            r"partial_rotary_factor=1\.0",
        ),
        ("glm", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("glm", {"head_dim": 6}, "rotary_dim=3"),
        ("glm", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("chatglm", {"quantization_bit": 4}, "quantization_bit=4"),
        ("chatglm", {"rope_ratio": 16, "_name_or_path": "THUDM/chatglm2-6b-32k"}, "rope_ratio=16"),
        ("chatglm", {"pre_seq_len": 128}, "pre_seq_len=128"),
        ("chatglm", {"multi_query_attention": False}, "multi_query_attention=False"),
        ("chatglm", {"multi_query_attention": None}, "multi_query_attention=False"),
        ("chatglm", {"add_bias_linear": True}, "add_bias_linear=True"),
        ("chatglm", {"interleaved_qkv": True}, "interleaved_qkv=True"),
        ("chatglm", {"original_rope": False}, "original_rope=False"),
        ("chatglm", {"vocab_size": 60}, "vocab_size=60.*only have 64"),
        ("chatglm", {"multi_query_group_num": 3}, "num_kv_heads=3"),
    ],
)
def test_what_a_config_asks_for_is_never_ignored(family: str, change: dict, named: str):
    FAMILIES[family].from_hf(CONFIGS[family])
    with pytest.raises(UserError, match=named):
        FAMILIES[family].from_hf(CONFIGS[family] | change)


def _changed(config: DecoderConfig, **attention) -> DecoderConfig:
    return dataclasses.replace(config, attention=dataclasses.replace(config.attention, **attention))


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("gpt2", lambda config: _changed(config, rope=Rope(10000.0, None)), r"attention\.rope="),
        ("gpt2", lambda config: _changed(config, window=4), r"attention\.window=4"),
        ("gpt2", lambda config: dataclasses.replace(config, positions=None), "positions=None"),
        ("gpt2", lambda config: dataclasses.replace(config, norm=RMSNorm(eps=1e-5)), "LayerNorm.*RMSNorm"),
        ("gpt2", lambda config: dataclasses.replace(config, norm_placement="post"), "norm_placement=post"),
        ("gpt2", lambda config: gpt3.presets["gpt3_125m"], "overrides="),
        ("glm", lambda config: _changed(config, rope=None), "rope=None"),
        ("glm", lambda config: _changed(config, out_bias=True), r"attention\.out_bias=True"),
        ("glm", lambda config: _changed(config, rope=Rope(10000.0, None)), r"attention\.rope\.rotary_dim="),
        ("glm", lambda config: chatglm.from_hf(CHATGLM), r"norm\.cast_last=True"),
        ("chatglm", lambda config: dataclasses.replace(config, tie_embeddings=True), "tie_embeddings=True"),
        ("chatglm", lambda config: _changed(config, rope=Rope(1e4, LinearScaling(2.0), 4)), r"rope\.scaling="),
        ("chatglm", lambda config: _changed(config, rope=None), "rope=None"),
    ],
)  # fmt: skip
def test_other_models_are_not_exported_as_one(family: str, change, named: str):
    config = FAMILIES[family].from_hf(CONFIGS[family])
    assert isinstance(config.attention, GroupedQuery)
    with pytest.raises(UserError, match=named):
        FAMILIES[family].to_hf(change(config))


# -- tensors


def _written(folder: Path, family: str) -> dict[str, np.ndarray]:
    """A random model of the family in its released form; its tensors."""
    config = FAMILIES[family].from_hf(CONFIGS[family])
    save(LanguageModel(config, build(config), None), folder, format="hf")
    return {name: np.array(tensor.read()) for name, tensor in read_directory(folder).items()}


def _with(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)  # released directories have none
    write_safetensors(folder / "model.safetensors", tensors)


def test_missing_surplus_and_wrong_tensors_are_named(tmp_path: Path):
    folder = tmp_path / "model"
    tensors = _written(folder, "chatglm")
    fused = "transformer.encoder.layers.1.self_attention.query_key_value.weight"
    for change, sentence in (
        ({fused: None}, f"lacks the tensor '{fused}'"),
        ({fused: tensors[fused][:-1]}, rf"'{fused}' with shape \(63, 24\)"),
        ({"transformer.prefix_encoder.embedding.weight": tensors[fused]}, "has the tensor .*prefix_encoder"),
        ({fused: tensors[fused].astype(np.int8)}, f"'{fused}' in int8: quantized"),
    ):
        _with(folder, {name: value for name, value in (tensors | change).items() if value is not None})
        source = open_source(folder)
        with pytest.raises(UserError, match=sentence):
            load_params(source, abstract_params(source.config))


@pytest.mark.slow
def test_a_head_that_gpt2_repeats_has_to_be_its_embedding(tmp_path: Path):
    folder = tmp_path / "model"
    tensors = _written(folder, "gpt2")
    assert "lm_head.weight" not in tensors
    _with(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    load(folder)
    _with(folder, tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(UserError, match=r"a separate 'lm_head.weight'"):
        load(folder)
    _with(folder, tensors | {"wte.weight": tensors["transformer.wte.weight"]})
    with pytest.raises(UserError, match=r"another tensor of the name 'transformer\.wte\.weight'"):
        load(folder)
