"""Mistral, Qwen, SmolLM3, Starcoder2, OPT and InternLM3: exact sizes, released configs, nothing ignored."""

import json

import pytest

from llama_jax import zoo
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
