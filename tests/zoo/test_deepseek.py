"""DeepSeek: published sizes, configs both ways, what is refused; the table where heads are joined part by part."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from llama_jax import zoo
from llama_jax.checkpoint import open_source
from llama_jax.checkpoint.formats import Slices, Tensor, split
from llama_jax.config import UserError
from llama_jax.models import abstract_params, buffers, num_parameters
from llama_jax.nn import Rope

deepseek_v2 = zoo.family("deepseek_v2")

GOLDENS = Path(__file__).parent.parent / "parity" / "goldens"
COUNTS = {
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v2": 235_741_434_880,
    "deepseek_v3": 671_026_404_352,
    "deepseek_v32": 671_877_929_216,
}
FAMILY_OF = {"deepseek_v2_lite": "deepseek_v2"}


def family_of(preset: str):
    return zoo.family(FAMILY_OF.get(preset, preset))


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_number_of_parameters(name: str):
    config = zoo.presets()[name]
    assert num_parameters(config) == COUNTS[name]
    biases = sum(np.prod(abstract_params(config)[buffer].shape) for buffer in buffers(config))
    assert biases == (14_848 if "v3" in name else 0)


@pytest.mark.parametrize("name", COUNTS)
def test_presets_survive_hugging_face_config(name: str):
    family, config = family_of(name), zoo.presets()[name]
    data = family.to_hf(config)
    assert family.from_hf(json.loads(json.dumps(data))) == config


def test_v3_with_its_further_block():
    """Of the 685B parameters of the release, the further block and its copies of the embedding and the head."""
    config = dataclasses.replace(zoo.presets()["deepseek_v3"], num_mtp_layers=1)
    assert zoo.family("deepseek_v3").from_hf(zoo.family("deepseek_v3").to_hf(config)) == config
    block = num_parameters(config) - COUNTS["deepseek_v3"]
    d, vocabulary = 7168, 129_280
    one_layer = (
        COUNTS["deepseek_v3"] - 2 * vocabulary * d - d - 3 * (3 * d * 18432 - 257 * 3 * d * 2048 - d * 256)
    ) // 61
    assert block == one_layer + 2 * d * d + 3 * d


def test_what_only_training_knows_does_not_keep_a_model_from_hugging_face():
    config = zoo.presets()["deepseek_v32"]
    trained = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, index_loss_weight=0.5),
        feed_forward=dataclasses.replace(
            config.feed_forward, router=dataclasses.replace(config.feed_forward.router, bias_update_rate=0.0)
        ),
        mtp_weight=0.1,
    )
    assert zoo.family("deepseek_v32").from_hf(zoo.family("deepseek_v32").to_hf(trained)) == config


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("deepseek_v2", {"attention.rope": Rope(1e4, None, None), "norm_placement": "post"}, "norm_placement=post"),
        ("deepseek_v2", {"attention.rope": None}, "rope=None has no place"),
        ("deepseek_v2", {"attention.eps": 1e-5}, r"attention\.eps=1e-05 has no place in a DeepSeek-V2"),
        ("deepseek_v3", {"feed_forward.capacity_factor": 1.0}, r"feed_forward\.capacity_factor=1\.0 has no place"),
        ("deepseek_v32", {"attention.index_warmup": True}, r"attention\.index_warmup=True has no place"),
    ],
)
def test_models_that_the_families_cannot_express(name: str, change: dict, sentence: str):
    config = zoo.presets()[name]
    for path, value in change.items():
        part, _, field = path.rpartition(".")
        if part:
            config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **{field: value})})
        else:
            config = dataclasses.replace(config, **{field: value})
    with pytest.raises(UserError, match=sentence):
        family_of(name).to_hf(config)


def test_families_know_each_other_apart():
    presets = zoo.presets()
    for family, name, sentence in (
        ("deepseek_v2", "deepseek_v3", "SoftmaxTopK, and this model SigmoidTopK"),
        ("deepseek_v3", "deepseek_v32", "LatentAttention, and this model SparseLatentAttention"),
        ("deepseek_v32", "deepseek_v3", "SparseLatentAttention, and this model LatentAttention"),
        ("deepseek_v2", "llama2_7b", "LatentAttention, and this model GroupedQuery"),
    ):
        with pytest.raises(UserError, match=sentence):
            zoo.family(family).to_hf(presets[name])


def golden(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())


def test_greedy_choice_has_no_groups_whatever_is_said_of_them():
    config = deepseek_v2.from_hf(golden("deepseek_v2") | {"topk_method": "greedy"})
    assert (config.feed_forward.router.num_groups, config.feed_forward.router.top_groups) == (1, 1)


def test_files_that_transformers_wrote_itself():
    """It adds what other keys say already."""
    for name, more in (
        ("deepseek_v2", {"head_dim": 8, "qk_head_dim": 18, "mlp_bias": False, "output_router_logits": False}),
        ("deepseek_v3", {"head_dim": 8, "qk_head_dim": 18, "rope_interleave": True}),
        ("deepseek_v32", {"mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["indexed_attention"] * 3}),
    ):
        family, data = zoo.family(name), golden(name)
        assert family.from_hf(data | more) == family.from_hf(data)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32"])
def test_a_file_with_nothing_of_the_further_blocks_is_the_main_model(name: str, tmp_path: Path):
    """What transformers saves; one that has something of them has to have all."""
    said = golden(name) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").symlink_to(GOLDENS / name / "model.safetensors")
    assert open_source(tmp_path).config == zoo.family(name).from_hf(golden(name))
    after = f"model.layers.{said['num_hidden_layers']}."
    for names, blocks in ((["model.norm.weight"], 0), (["model.norm.weight", f"{after}enorm.weight"], 1)):
        assert zoo.family(name).with_tensors(zoo.family(name).from_hf(said), names).num_mtp_layers == blocks


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc': a DeepSeek-V2 has greedy or"),
        (
            "deepseek_v2",
            {"scoring_func": "sigmoid"},
            "scoring_func='sigmoid', and a DeepSeek-V2 can only",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2, and a DeepSeek-V2 can only have 4"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v2", {"index_topk": 6}, "index_topk=6, which is not supported for a DeepSeek-V2"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("deepseek_v3", {"kv_lora_rank": None}, "config.json lacks 'kv_lora_rank'"),
        ("deepseek_v32", {"index_topk": None}, "config.json lacks 'index_topk'"),
        ("deepseek_v32", {"mlp_layer_types": ["sparse"] * 3}, "mlp_layer_types="),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank=None leaves the indexer"),
        ("deepseek_v3", {"quantization_config": FP8 | {"quant_method": "gptq"}}, "weights quantized by GPTQ"),
        ("deepseek_v3", {"quantization_config": {"bits": 4}}, "quant_method=None, and only 'fp8'"),
        ("deepseek_v3", {"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt='e5m2', and only 'e4m3'"),
        ("deepseek_v3", {"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme='static'"),
        (
            "deepseek_v3",
            {"quantization_config": FP8 | {"weight_block_size": None}},
            "weight_block_size=None",
        ),
        (
            "deepseek_v3",
            {"quantization_config": FP8 | {"weight_block_size": [16]}},
            "weight_block_size=[16]",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_its_key(name: str, change: dict, sentence: str):
    with pytest.raises(UserError, match=re.escape(sentence)):
        zoo.family(name).from_hf(golden(name) | change)


HEAD_BY_HEAD = [w for w in deepseek_v2.names.weights if w.merged]


@pytest.mark.parametrize("weight", HEAD_BY_HEAD, ids=lambda w: w.name)
@given(data=st.data())
def test_reading_a_part_is_a_part_of_reading_all(weight, data: st.DataObject):
    sizes = {"n": 4, "h": 6, "d": 5, "c": 5}
    shape = tuple(sizes[axis] for axis in weight.pattern.split("->")[1].replace("(two p)", "h").split())
    source = np.random.default_rng(0).normal(size=weight.source_shape(shape))
    everything = tuple(slice(0, size) for size in shape)
    whole = weight.to_canonical(source[weight.source_slices(everything, shape)], everything, shape)
    np.testing.assert_array_equal(weight.to_source(whole), source)
    assert weight.in_file(source.shape) == (24, 5)
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in shape]
    slices = tuple(slice(*bound) for bound in bounds)
    part = weight.to_canonical(source[weight.source_slices(slices, shape)], slices, shape)
    np.testing.assert_array_equal(part, whole[slices])


@given(st.data())
def test_a_split_dimension_is_the_reshaped_one(data: st.DataObject):
    value = np.arange(60).reshape(12, 5)
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in (4, 3, 5)]
    slices = tuple(slice(*bound) for bound in bounds[: data.draw(st.integers(0, 3))])
    rows_read = []

    def fetch(part: Slices) -> np.ndarray:
        rows_read.append(value[part].shape[0])
        return value[part]

    tensor = split(Tensor(value.shape, value.dtype, fetch), 0, 4)
    assert (tensor.shape, tensor.dtype) == ((4, 3, 5), value.dtype)
    np.testing.assert_array_equal(tensor.read(slices), value.reshape(4, 3, 5)[slices])
    assert sum(rows_read) == 3 * len(range(4)[slices[0]] if slices else range(4)), "of the heads that are asked for"
