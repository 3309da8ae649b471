"""Gemma, OLMo, Phi-3 and Granite: counts, config.json as it is released and in both spellings, what is refused."""

import copy

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax import zoo
from llama_jax.config import Json, UserError, override
from llama_jax.models import Compute, abstract_params, from_params, num_parameters
from llama_jax.nn import LinearScaling, LongRopeScaling, Rope
from llama_jax.sampling import Engine, Request, SamplingConfig

# Sums of the released files' tensors, a tied head counted once; of Gemma 3 the text model's.
COUNTS = {
    "gemma_2b": 2_506_172_416,
    "gemma_7b": 8_537_680_896,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "gemma3_4b": 3_880_263_168,
    "gemma3_12b": 11_766_034_176,
    "gemma3_27b": 27_009_346_304,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "olmo3_7b": 7_298_011_136,
    "olmo3_32b": 32_233_522_176,
    "phi3_mini_4k": 3_821_079_552,
    "phi3_mini_128k": 3_821_079_552,
    "phi3_medium_4k": 13_960_238_080,
    "phi4": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
    "granite3_1_2b": 2_533_531_648,
    "granite3_1_8b": 8_170_848_256,
}
FAMILIES = ("gemma", "gemma2", "gemma3", "gemma3_text", "granite", "olmo2", "olmo3", "phi3")
PRESETS = {name: family for family in FAMILIES for name in zoo.family(family).presets}


def test_all_presets_are_counted():
    assert PRESETS.keys() == COUNTS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_config_json(name: str):
    family = zoo.family(PRESETS[name])
    config = family.presets[name]
    assert num_parameters(config) == COUNTS[name]
    assert family.from_hf(family.to_hf(config)) == config


# What stands in released files; sizes that a class has as its defaults are left out of some.
GEMMA3_4B: Json = {
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
}  # fmt: skip
GEMMA3_270M: Json = {
    "_sliding_window_pattern": 6, "architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "attn_logit_softcapping": None, "bos_token_id": 2, "eos_token_id": 1,
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 640,
    "initializer_range": 0.02, "intermediate_size": 2048, "max_position_embeddings": 32768,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3, "model_type": "gemma3_text",
    "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000.0, "rope_scaling": None,
    "rope_theta": 1000000.0, "sliding_window": 512, "torch_dtype": "bfloat16", "use_bidirectional_attention": False,
    "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA2_27B: Json = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "initializer_range": 0.02,
    "intermediate_size": 36864, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32,
    "num_hidden_layers": 46, "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144,
    "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096,
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip
OLMO3_7B: Json = {
    "architectures": ["Olmo3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "eos_token_id": 100257,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8, "max_position_embeddings": 65536,
    "model_type": "olmo3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_theta": 500000, "sliding_window": 4096,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
        "original_max_position_embeddings": 8192, "rope_type": "yarn",
    },
    "tie_word_embeddings": False, "use_cache": False, "vocab_size": 100278,
}  # fmt: skip
PHI3_4K: Json = {
    "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu",
    "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096,
    "model_type": "phi3", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
    "use_cache": True, "vocab_size": 32064,
}  # fmt: skip
PHI4_MINI: Json = PHI3_4K | {
    "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 24, "num_key_value_heads": 8, "partial_rotary_factor": 0.75,
    "rope_scaling": {
        "long_factor": list(zoo.presets()["phi4_mini"].attention.rope.scaling.long_factor),  # type: ignore[attr-defined]
        "short_factor": [1.0] * 48, "type": "longrope",
    },
    "sliding_window": 262144, "tie_word_embeddings": True, "vocab_size": 200064,
}  # fmt: skip
GRANITE_2B: Json = {
    "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
    "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "granite",
    "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "pad_token_id": 0,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0,
    "tie_word_embeddings": True, "use_cache": True, "vocab_size": 49155,
}  # fmt: skip
RELEASED = {
    "gemma3_4b": GEMMA3_4B,
    "gemma3_270m": GEMMA3_270M,
    "gemma2_27b": GEMMA2_27B,
    "olmo3_7b": OLMO3_7B,
    "phi3_mini_4k": PHI3_4K,
    "phi4_mini": PHI4_MINI,
    "granite3_1_2b": GRANITE_2B,
}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_config_is_the_preset(name: str):
    config = zoo.presets()[name]
    if name == "granite3_1_2b":
        config = override(config, {"attention.dropout": 0.1})
    assert zoo.family(PRESETS[name]).from_hf(RELEASED[name]) == config


def test_rotary_positions_by_layer_type_in_both_spellings():
    """`rope_parameters` of transformers 5 says what the older keys said; both together must agree."""
    family = zoo.family("gemma3_text")
    preset = family.presets["gemma3_1b"]
    config = override(preset, {"overrides": preset.overrides})
    old = family.to_hf(config)
    full = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500_000.0}
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"full_attention": full, "sliding_attention": {"rope_theta": 5000.0}}
    read = family.from_hf(new)
    ropes = {mixer.rope for mixer, _ in read.layer_pieces()}
    assert ropes == {Rope(500_000.0, LinearScaling(4.0)), Rope(5000.0, None)}
    as_before = {key: value for key, value in family.to_hf(read).items() if key != "rope_parameters"}
    assert as_before["rope_local_base_freq"] == 5000.0
    assert family.from_hf(as_before) == family.from_hf(family.to_hf(read)) == read
    with pytest.raises(UserError, match=r"rope_parameters\.full_attention, and other keys for the same that differ"):
        family.from_hf(new | {"rope_theta": 10_000.0})
    with pytest.raises(UserError, match=r"rope_parameters\.rope_theta, which should be settings of full_attention"):
        family.from_hf(new | {"rope_parameters": {"rope_theta": 10_000.0}})


def test_longrope_in_its_spellings():
    family = zoo.family("phi3")
    scaling = family.presets["phi4_mini"].attention.rope.scaling
    assert scaling.attention_factor == pytest.approx(1.1902380714238083)  # of 32 times 4096
    written = family.to_hf(family.presets["phi4_mini"])["rope_scaling"]
    assert written.keys() == {"type", "short_factor", "long_factor"}  # the released code takes no other
    for kind in ("su", "yarn", "longrope"):
        data = copy.deepcopy(PHI4_MINI)
        data["rope_scaling"]["type"] = kind
        assert family.from_hf(data).attention.rope.scaling == scaling
    data["rope_scaling"] |= {"attention_factor": 1.5}
    data["original_max_position_embeddings"] = 8192
    other = family.from_hf(data)
    assert isinstance(other.attention.rope.scaling, LongRopeScaling)
    assert (other.attention.rope.scaling.attention_factor, other.attention.rope.scaling.original_max_positions) == (
        1.5,
        8192,
    )
    assert family.from_hf(family.to_hf(other)) == other


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("gemma2_27b", {"hidden_activation": "gelu"}, "hidden_activation='gelu', which is not supported for a Gemma 2"),
        ("gemma2_27b", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2_27b", {"layer_types": ["full_attention"]}, "should be 46 of full_attention, sliding_attention"),
        ("gemma2_27b", {"sliding_window_size": 512}, "sliding_window_size=512 and sliding_window=4096"),
        ("gemma3_4b", {"tie_word_embeddings": False}, "tie_word_embeddings=False, and a Gemma 3 can only have True"),
        ("gemma3_270m", {"rope_scaling": {"rope_type": "su"}}, "rope_type='longrope' without 'short_factor'"),
        ("olmo3_7b", {"clip_qkv": 8.0}, "clip_qkv=8.0, which is not supported for an OLMo 3"),
        ("phi4_mini", {"num_attention_heads": 32}, "have 48 numbers, and heads have 36 rotary pairs"),
        ("phi4_mini", {"full_attn_mod": 2}, "full_attn_mod=2, and a Phi-3 can only have 1"),
        ("granite3_1_2b", {"hidden_act": "gelu"}, "hidden_act='gelu', which is not supported for a Granite"),
    ],
)
def test_config_json_that_cannot_be(name: str, change: Json, sentence: str):
    with pytest.raises(UserError, match=sentence):
        zoo.family(PRESETS[name]).from_hf(RELEASED[name] | change)


@pytest.mark.slow
def test_a_row_of_longrope_is_that_of_its_prompt_alone():
    """Short beside long, padded prompts, prompts in more tokens than a chunk has: as the full forward of each alone."""
    config = override(zoo.presets()["phi4_mini"], {
        "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "attention.num_heads": 2, "attention.num_kv_heads": 1,
        "attention.head_dim": 8, "attention.rope": Rope(10_000.0, LongRopeScaling((1.0, 1.1), (3.0, 9.0), 8, 1.2), 4),
        "feed_forward.intermediate_size": 24, "max_positions": 64,
    })  # fmt: skip
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=a.shape), jnp.float32) for name, a in abstract_params(config).items()}
    model = from_params(config, params, Compute(dtype="float32"))
    prompts = [rng.integers(0, 40, length).tolist() for length in (5, 30, 12, 4, 5, 5)]
    engine = Engine(model, rows=8, prefill_chunk=8)
    found = {engine.add(Request(tuple(prompt), SamplingConfig(3, 0.0))): [] for prompt in prompts}
    while not engine.idle:
        for piece in engine.step():
            found[piece.ticket] += piece.token_ids
    for prompt, new in zip(prompts, found.values(), strict=True):
        # No text begins below the old context's eight positions and ends beyond them.
        best = np.asarray(model(np.array([[*prompt, *new[:-1]]])))[0].argmax(-1)
        assert new == best[len(prompt) - 1 :].tolist()


def test_a_granite_without_factors_is_a_llama():
    """So that the wrong family is never taken for want of another."""
    llama = zoo.presets()["llama2_7b"]
    with pytest.raises(UserError, match=r"attention\.scale=None has no place in a Granite"):
        zoo.family("granite").to_hf(llama)
