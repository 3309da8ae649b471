"""Mistral, Qwen, SmolLM3, Starcoder2, OPT and InternLM3: exact sizes, released configs, nothing ignored."""

import json
from typing import Any

import pytest

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import num_parameters

COUNTS = {
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "mistral_7b_v0_1": 7_241_732_096,
    "mistral_7b_v0_2": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "codestral_22b": 22_247_282_688,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "mistral_large_123b": 122_610_069_504,
    "ministral_8b": 8_019_808_256,
    "smollm3_3b": 3_075_098_624,
    "starcoder2_3b": 3_030_371_328,
    "starcoder2_7b": 7_173_923_840,
    "starcoder2_15b": 15_957_889_024,
    "opt_125m": 125_239_296,
    "opt_1_3b": 1_315_758_080,
    "opt_2_7b": 2_651_596_800,
    "opt_6_7b": 6_658_473_984,
    "opt_13b": 12_853_473_280,
    "opt_30b": 29_974_540_288,
    "opt_66b": 65_719_701_504,
    "opt_175b": 174_604_468_224,
    "internlm3_8b": 8_804_241_408,
}
FAMILIES = ("internlm3", "ministral", "mistral", "opt", "qwen2", "qwen3", "smollm3", "starcoder2")


def test_presets_have_the_published_number_of_parameters():
    assert {name: num_parameters(zoo.presets()[name]) for name in COUNTS} == COUNTS
    assert {name for family in FAMILIES for name in zoo.family(family).presets} == set(COUNTS)


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_survive_hugging_face_s_config(name: str):
    family = zoo.family(name)
    for config in family.presets.values():
        data = family.to_hf(config)
        assert json.loads(json.dumps(data)) == data
        assert family.from_hf(data) == config


# Released files, with what no default of a class says.
COMMON = {
    "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
}  # fmt: skip
RELEASED: dict[str, dict[str, Any]] = {
    "qwen2_5_7b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2", "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "qwen3_0_6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "mistral_7b_v0_1": {
        "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "mistral_nemo_12b": {
        "architectures": ["MistralForCausalLM"], "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
        "max_position_embeddings": 128000, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 40,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "vocab_size": 131072,
    },
    "smollm3_3b": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_size": 2048,
        "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
    },
    "starcoder2_3b": {
        "architectures": ["Starcoder2ForCausalLM"], "attention_dropout": 0.1, "embedding_dropout": 0.1,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 3072, "intermediate_size": 12288,
        "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384, "mlp_type": "default",
        "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm", "num_attention_heads": 24,
        "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1, "rope_theta": 999999.4420358813,
        "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
    },
    "opt_125m": {
        "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
        "architectures": ["OPTForCausalLM"], "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 3072,
        "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 12, "num_hidden_layers": 12, "prefix": "</s>", "vocab_size": 50272,
        "word_embed_proj_dim": 768,
    },
    "internlm3_8b": {
        "architectures": ["InternLM3ForCausalLM"], "bias": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 10240, "max_position_embeddings": 32768, "model_type": "internlm3",
        "num_attention_heads": 32, "num_hidden_layers": 48, "num_key_value_heads": 2, "qkv_bias": False,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "rope_theta": 50000000,
        "vocab_size": 128512,
    },
}  # fmt: skip


def family_of(name: str) -> zoo.Family[Any]:
    return zoo.family(RELEASED[name]["model_type"])


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_config_is_the_preset(name: str):
    data = COMMON | RELEASED[name]
    if name == "opt_125m":
        del data["hidden_act"]
    assert family_of(name).from_hf(data) == zoo.presets()[name]


def windows(config: Any) -> list[int | None]:
    return [mixer.window for mixer, _ in config.layer_pieces()]


def test_qwen_has_windows_from_a_layer_on():
    """The keys of one family are those of the other; where the list of types is there, it decides."""
    for name in ("qwen2_5_7b", "qwen3_0_6b"):
        family, data = family_of(name), RELEASED[name] | {"use_sliding_window": True, "sliding_window": 16}
        found = family.from_hf(data | {"max_window_layers": 27})
        assert windows(found) == [None] * 27 + [16]
        assert family.from_hf(family.to_hf(found)) == found
        types = ["sliding_attention"] + ["full_attention"] * 27
        found = family.from_hf(data | {"layer_types": types})
        assert windows(found) == [16] + [None] * 27
        assert family.from_hf(family.to_hf(found)) == found
        absent = {key: value for key, value in RELEASED[name].items() if key not in ("sliding_window", "head_dim")}
        found = family.from_hf(absent | {"use_sliding_window": True, "max_window_layers": 0})
        assert windows(found) == [4096] * 28


def test_mistral_has_a_window_where_the_key_is_absent_and_none_where_it_is_null():
    data = {key: value for key, value in RELEASED["mistral_7b_v0_1"].items() if key != "sliding_window"}
    assert windows(zoo.family("mistral").from_hf(data)) == [4096] * 32
    assert windows(zoo.family("mistral").from_hf(data | {"sliding_window": None})) == [None] * 32
    assert windows(zoo.family("ministral").from_hf(zoo.family("ministral").to_hf(zoo.presets()["ministral_8b"]))) == [
        None, 32_768, 32_768, 32_768,
    ] * 9  # fmt: skip


def test_smollm3_turns_where_the_list_has_ones():
    family, data = zoo.family("smollm3"), RELEASED["smollm3_3b"]
    for listed in (None, [1, 1, 1, 0] * 9, [0, 1] * 18, [0] * 36):
        if listed == [0] * 36:  # nothing says what the base would have been
            found = family.from_hf(data | {"no_rope_layers": listed})
            with pytest.raises(UserError, match="rope=None has no place in a SmolLM3"):
                family.to_hf(found)
        else:
            found = family.from_hf(data | {"no_rope_layers": listed})
            assert family.from_hf(family.to_hf(found)) == found
        turned: list[Any] = [mixer for mixer, _ in found.layer_pieces()]
        assert [int(mixer.rope is not None) for mixer in turned] == (listed or [1, 1, 1, 0] * 9)
    sliding = {"use_sliding_window": True, "sliding_window": 16, "layer_types": None}
    assert windows(family.from_hf(data | sliding)) == [None, None, None, 16] * 9


def test_what_transformers_writes_for_internlm3_is_read():
    """It has no other code for it than Llama's; Llama's own files stay Llama's."""
    new = {key: value for key, value in RELEASED["internlm3_8b"].items() if key not in ("bias", "qkv_bias")}
    new |= {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True}
    found = zoo.family("internlm3").from_hf(new)
    assert (found.attention.qkv_bias, found.attention.out_bias, found.feed_forward.bias) == (True, True, True)
    assert zoo.model_type_of({"architectures": ["LlamaForCausalLM"]}, "it") == "llama"
    assert zoo.model_type_of({"architectures": ["InternLM3ForCausalLM"]}, "it") == "internlm3"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("qwen2_5_7b", {"layer_types": ["sliding_attention"] * 28}, "layer_types=.* 28 of full_attention for a Qwen2"),
        ("qwen2_5_7b", {"attention_bias": True}, "attention_bias=True, which is not supported for a Qwen2"),
        ("qwen2_5_7b", {"dual_chunk_attention_config": {"chunk_size": 4}}, "dual_chunk_attention_config="),
        ("qwen3_0_6b", {"max_window_layers": "all"}, "max_window_layers='all', which should be of type int"),
        ("mistral_7b_v0_1", {"layer_types": ["sliding_attention"] * 32}, "layer_types=.* for a Mistral"),
        ("smollm3_3b", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\].* each of 36 layers"),
        ("smollm3_3b", {"no_rope_layers": [2] * 36}, r"no_rope_layers=\[2"),
        ("smollm3_3b", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0, which must be at least 1"),
        ("starcoder2_3b", {"norm_type": "rms_norm"}, "norm_type='rms_norm', and a Starcoder2 can only have"),
        ("starcoder2_3b", {"layer_norm_epsilon": 1e-6}, "which are one setting"),
        ("opt_125m", {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512, and an OPT can only have 768"),
        ("opt_125m", {"enable_bias": False}, "enable_bias=False, and an OPT can only have True"),
        ("opt_125m", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("internlm3_8b", {"qkv_bias": True}, "qkv_bias=True and bias=False, and they must be the same"),
    ],
)
def test_what_a_config_asks_for_is_never_ignored(name: str, change: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        family_of(name).from_hf(RELEASED[name] | change)


PARAMS = {
    "dim": 16, "head_dim": 4, "hidden_dim": 24, "n_heads": 4, "n_kv_heads": 2, "n_layers": 4, "norm_eps": 1e-05,
    "rope_theta": 100000000.0, "vocab_size": 40,
}  # fmt: skip
SHAPES = {"tok_embeddings.weight": (40, 16), "layers.0.feed_forward.w1.weight": (24, 16), "output.weight": (40, 16)}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, [None] * 4),
        ({"sliding_window": 8, "model_type": "transformer"}, [8] * 4),
        ({"_sliding_window": [None, 8], "max_position_embeddings": 32_768}, [None, 8] * 2),
        ({"sliding_window": [8, 8, None, 8]}, [8, 8, None, 8]),
    ],
)
def test_windows_of_mistral_s_own_params(keys: dict, expected: list):
    config = zoo.family("mistral").meta.from_meta(PARAMS | keys, SHAPES)  # type: ignore[union-attr]
    assert windows(config) == expected
    assert (config.max_positions, config.attention.head_dim, config.tie_embeddings) == (32_768, 4, False)
    family = zoo.family("ministral" if len(set(expected)) > 1 else "mistral")
    assert family.from_hf(family.to_hf(config)) == config


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"sliding_window": [8, None, 8]}, "sliding_window=.*divides n_layers=4"),
        ({"sliding_window": [8, 4]}, "must be a number, or a list of one number and null"),
        ({"sliding_window": "8"}, "must be a number"),
        ({"model_type": "mamba"}, "model_type='mamba', which is not supported"),
        ({"vision_encoder": {"dim": 8}}, "vision_encoder="),
    ],
)
def test_params_that_cannot_be(keys: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        zoo.family("mistral").meta.from_meta(PARAMS | keys, SHAPES)  # type: ignore[union-attr]
