"""One rule for the keys of config.json in all families: what changes no logit is taken, what may change one is not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from llama_jax import zoo
from llama_jax.config import UserError
from llama_jax.models import ModelConfig, num_parameters
from llama_jax.zoo import known_keys
from llama_jax.zoo.reading import without_keys

TRANSFORMERS = json.loads(Path(__file__).with_name("transformers_configs.json").read_text(encoding="utf-8"))
# A config.json of each family, as this package writes it.
CONFIGS = {name: zoo.family(name).to_hf(next(iter(zoo.family(name).presets.values()))) for name in zoo.families()}
# As the base class of transformers 4 writes them, and values that people have set.
BASE = {
    "_attn_implementation_autoset": True, "_commit_hash": "f0a1", "_name_or_path": "somewhere/model",
    "_num_labels": 3, "bad_words_ids": [[5]], "begin_suppress_tokens": [1], "bos_token_id": 1,
    "chunk_size_feed_forward": 16, "cross_attention_hidden_size": None, "diversity_penalty": 0.5, "do_sample": True,
    "dtype": "bfloat16", "early_stopping": True, "encoder_no_repeat_ngram_size": 3, "eos_token_id": [1, 2],
    "exponential_decay_length_penalty": [2, 1.5], "finetuning_task": "mnli", "forced_bos_token_id": 0,
    "forced_eos_token_id": 2, "gradient_checkpointing": True, "id2label": {"0": "no", "1": "yes"},
    "is_decoder": False, "label2id": {"no": 0, "yes": 1}, "length_penalty": 2.0, "max_length": 142, "min_length": 56,
    "no_repeat_ngram_size": 3, "num_beam_groups": 2, "num_beams": 4, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_past": True, "output_scores": True,
    "prefix": "summarize: ", "problem_type": "multi_label_classification", "pruned_heads": {},
    "remove_invalid_values": True, "repetition_penalty": 1.2, "return_dict": False, "return_dict_in_generate": True,
    "sep_token_id": 2, "suppress_tokens": [7], "task_specific_params": {"chat": {"max_length": 1000}},
    "temperature": 0.7, "tf_legacy_loss": True, "tie_encoder_decoder": False, "tokenizer_class": "MyTokenizer",
    "top_k": 40, "top_p": 0.9, "torch_dtype": "float16", "torchscript": True, "transformers_version": "4.31.0",
    "typical_p": 0.9, "use_bfloat16": True, "use_cache": False,
}  # fmt: skip
TOOLS = {
    "unsloth_version": "2025.1", "unsloth_fixed": True, "transformers.js_config": {"dtype": "q4"},
    "is_llama_config": True, "internal_version": "7b-v2", "use_flash_attention": True, "flash_attn": True,
    "selective_checkpoint_enabled": True, "sequence_parallel_enabled": True, "move_model_to_device": True,
    "is_gpu": True, "truncation": True, "return_tensors": "pt", "auto_map": {"AutoModel": "modeling.Model"},
    "lora_dropout": 0.1, "kv_cache_dtype": "fp8", "router_z_loss_weight": 0.1, "init_method_std": 0.006,
    "image_token_id": 9, "softmax_in_fp32": True, "model_name_or_path": "a/b",
    "tokenizer_padding_side": "right", "neftune_noise_alpha": 5, "xla_device": True, "name": "Bert",
    "adapters": {"a": 1}, "sbert_ce_default_activation_function": "torch.nn.Identity", "replacing_rate": 0,
    "pad_token": "<pad>", "train_args": {"lr": 1e-4}, "attn_implementation": "sdpa", "kv_cache_precision": 16,
    "fused_bias_fc": True, "fused_dropout_add_ln": True, "use_flash_attention_2": True, "use_flash_attn": True,
    "tensor_model_parallel_size": 8, "sequence_parallel": True, "training_seq_len": 512, "student_decoder_layers": 3,
    "save_step": 58, "output_dir": "out", "torch_version": "2.1", "eval_strategy": "steps", "use_liger_kernel": True,
    "matmul_precision": "bf16-mixed", "is_mistral_config": True, "residual_in_fp32": True,
    "vocab_size_or_config_json_file": -1, "label_smoothing": 0.1, "sortish_sampler": True, "max_target_length": 56,
    "vocab_file": "vocab.txt", "trust_remote_code": True, "freeze_encoder": True, "eos_token_ids": [50256],
}  # fmt: skip
# What changes what a model computes, in other families, in the base class or in somebody's own code.
CHANGING = {
    "is_encoder_decoder": "either", "pruned_heads": {"0": [1]}, "tie_encoder_decoder": True,
    "cross_attention_hidden_size": 32, "quantization_config": {"quant_method": "gptq", "bits": 4},
    "quantization": {"group_size": 64, "bits": 4}, "final_logit_softcapping": 20.0, "use_qk_norm": True,
    "residual_multiplier": 0.3, "alibi": True, "num_memory_blocks": 2, "attention_sinks": 4, "expert_offset": 0,
    "position_encoding": "alibi", "logits_scaling": 7, "layer_types": ["sliding_attention", "full_attention"],
    "a_new_trick": 1, "share_layers": [0, 0, 1],
    # Named like what is harmless.
    "token_dropout": True, "num_dropout": 3, "use_expert_parallel_shared": True, "use_flash_attention_bias": True,
    "fused_bias": True, "fused_gate": True, "activation_path": "relu", "weight_precision": 4, "weight_dtype": "int4",
    "eval_capacity_factor": 2.0, "train_rope_scaling": {"factor": 2}, "rope_version": "v2", "attention_impl": "local",
    "mask_tokens": 5, "is_causal_config": True, "sequence_parallel_mixing": True, "logit_scale_init_value": 2.6,
    "qkv_bias": True, "attention_multiplier": 0.01, "no_rope_layers": [1, 0], "embedding_size": 16, "clip_qkv": 8.0,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_that_change_no_logit_are_taken(name: str):
    family, data = zoo.family(name), CONFIGS[name]
    assert len(BASE) >= 50
    # What a family does read may have changed the model, and nothing else may.
    own = {key for key in BASE if key in data}
    assert family.from_hf(data | {key: value for key, value in (BASE | TOOLS).items() if key not in own}) == (
        family.from_hf(data)
    )


# Those that a family can only have with these values.
OWN = {("glm4_moe", "use_qk_norm"), ("qwen3_moe", "use_qk_norm"), ("qwen2_moe", "qkv_bias")}


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_that_may_change_a_logit_are_refused_by_name(name: str):
    """Or a family has them, and they give another model."""
    family, data = zoo.family(name), CONFIGS[name]
    config = family.from_hf(data)
    for key, value in ((key, value) for key, value in CHANGING.items() if (name, key) not in OWN):
        if key == "is_encoder_decoder" or data.get(key) == value:
            value = not data.get(key, False)
        try:
            found = family.from_hf(data | {key: value})
        except UserError as error:
            found = str(error)
        if isinstance(found, str):
            assert key in found
        else:
            assert key in data, f"{key} of other families is taken"
            assert found != config, key


@settings(max_examples=25)
@given(data=st.data())
def test_the_sentence_says_how_to_leave_a_key_out_and_that_does_it(data: st.DataObject):
    name = data.draw(st.sampled_from(sorted(CONFIGS)))
    key = data.draw(st.from_regex(r"zz_[a-z_.]{1,8}x", fullmatch=True))
    value = data.draw(st.one_of(st.integers(), st.floats(allow_nan=False), st.just(True), st.text(min_size=1)))
    config = CONFIGS[name] | {key: value}
    with pytest.raises(UserError) as error:
        zoo.family(name).from_hf(config)
    assert f"--ignore-config-keys {key}" in str(error.value)
    assert zoo.family(name).from_hf(without_keys(config, [key])) == zoo.family(name).from_hf(CONFIGS[name])
    for nothing in (None, False, "", [], {}):
        assert zoo.family(name).from_hf(config | {key: nothing}) == zoo.family(name).from_hf(CONFIGS[name])


def test_a_key_inside_of_another_is_left_out_and_one_that_is_not_there_is_named():
    config = {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}, "transformers.js_config": 3}
    left = without_keys(config, ["rope_scaling.odd", "transformers.js_config"])
    assert left == {"rope_scaling": {"type": "linear", "factor": 2.0}}
    with pytest.raises(UserError, match=r"'rope_scaling\.even'"):
        without_keys(config, ["rope_scaling.even"])


def test_everything_that_the_base_class_and_generation_write_is_known_or_read():
    read = {
        "is_encoder_decoder", "rope_parameters", "rope_theta", "partial_rotary_factor", "tie_word_embeddings",
    }  # fmt: skip
    for key in (*TRANSFORMERS["base"], *TRANSFORMERS["generation"]):
        assert key in read or any(key in keys for keys in known_keys.KNOWN.values()), key


# -- as transformers writes them


def _transformers() -> Iterator[tuple[str, str]]:
    return ((name, key) for name, data in TRANSFORMERS["families"].items() for key in data)


def _complete(name: str) -> dict[str, Any]:
    """A config of the library's defaults, with a choice of experts where it leaves that open."""
    data = TRANSFORMERS["families"][name]
    if name == "glm4_moe":  # its 96 heads are 42.7 wide there
        data = data | {"head_dim": 128}
    return data | {"num_experts_per_tok": data["num_experts_per_tok"] or 2} if "num_experts_per_tok" in data else data


@pytest.mark.parametrize("name", TRANSFORMERS["families"])
def test_a_key_that_is_left_out_means_what_it_means_there(name: str):
    """Or it is asked for by name."""
    family, data = zoo.family(name), _complete(name)
    whole = family.from_hf(data)
    for key in data:
        try:
            found = family.from_hf({k: value for k, value in data.items() if k != key})
        except UserError as error:
            found = str(error)
        # Whether there are further blocks, and a latent of V2's queries, the tensors tell.
        told = key in ("num_nextn_predict_layers", "q_lora_rank")
        # mT5's head is its own, whatever transformers 5 writes there; GLM-4.5's heads are not its width's share.
        told |= (name, key) in (("mt5", "tie_word_embeddings"), ("glm4_moe", "head_dim"))
        assert told or found == whole or (isinstance(found, str) and key in found), (key, found)


@pytest.mark.parametrize("name", TRANSFORMERS["aliases"])
def test_other_names_of_sizes(name: str):
    family, data = zoo.family(name), _complete(name)
    whole = family.from_hf(data)
    for alias, key in TRANSFORMERS["aliases"][name].items():
        if key not in data or "token" in alias:  # which token has which meaning changes no logit
            continue
        renamed = {k: value for k, value in data.items() if k != key} | {alias: data[key]}
        assert family.from_hf(renamed) == whole, alias
        assert family.from_hf(data | {alias: data[key]}) == whole, alias
        with pytest.raises(UserError, match=alias):
            family.from_hf(data | {alias: data[key] + 1})


@pytest.mark.parametrize("name", TRANSFORMERS["families"])
def test_dropouts_of_training_are_the_model_s_or_nothing(name: str):
    family, data = zoo.family(name), _complete(name)
    rates = [key for key, value in data.items() if "drop" in key and isinstance(value, float) and "layer" not in key]
    for key in rates:
        assert num_parameters(family.from_hf(data | {key: 0.25})) > 0
    for key, field in (("attention_dropout", "dropout"), ("attn_pdrop", "dropout")):
        attention = family.from_hf(data | {key: 0.25}).attention if key in data else None
        if hasattr(attention, field):
            assert getattr(attention, field) == 0.25


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gpt2", {"n_ctx": 512, "n_vocab": 50257, "reorder_and_upcast_attn": True}),
        ("switch_transformers", {"router_type": "tokens_masked", "num_selected_experts": 1}),
    ],
)
def test_keys_of_first_releases(name: str, keys: dict[str, Any]):
    family, data = zoo.family(name), CONFIGS[name]
    assert family.from_hf(data | keys) == family.from_hf(data)
    for key, value in keys.items():
        if isinstance(value, int) and key not in ("n_ctx", "reorder_and_upcast_attn"):
            with pytest.raises(UserError, match=key):
                family.from_hf(data | {key: value + 1})


# -- heads


@pytest.mark.parametrize("name", CONFIGS)
def test_classes_are_told_by_their_names(name: str):
    family, data = zoo.family(name), CONFIGS[name]
    config = family.from_hf(data)
    own = data["architectures"][0]
    for spelling in (own, own.upper(), f"TF{own}", f"Flax{own}"):
        assert family.from_hf(data | {"architectures": [spelling]}) == config
        without = {key: value for key, value in data.items() if key != "model_type"}
        found = zoo.model_type_of(without | {"architectures": [spelling]}, "config.json")
        # Kimi K2 has DeepSeek-V3's class, Gemma 3's text model is in both of its directories.
        assert found in (name, data["model_type"]) or zoo.family(found).architectures == family.architectures
    for other in ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice"):
        with pytest.raises(UserError, match=f"{other}.*--ignore-config-keys architectures"):
            family.from_hf(data | {"architectures": [own.partition("For")[0] + other]})


def test_a_config_of_nothing_is_refused():
    with pytest.raises(UserError, match="'here' has no model_type, and no architectures"):
        zoo.model_type_of({"hidden_size": 3, "architectures": ["MambaForCausalLM"]}, "here")


# -- released ones

# Those that are refused, and why.
REFUSED = {"roberta-base": "RobertaForQuestionAnswering"}


def test_released_configs_are_read_and_have_the_published_number_of_parameters(shared_data: Path):
    lines = (shared_data / "released_configs" / "configs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) >= 90
    counted: dict[ModelConfig, int] = {}
    refused = {}
    for line in lines:
        entry = json.loads(line)
        data, published = entry["config"], entry["published_parameters"]
        try:
            config = zoo.family(zoo.model_type_of(data, entry["model"])).from_hf(data)
        except UserError as error:
            refused[entry["model"]] = str(error)
            continue
        if published is not None:
            if config not in counted:
                counted[config] = num_parameters(config)
            assert counted[config] == published, entry["model"]
    assert len(counted) >= 15
    assert refused.keys() == REFUSED.keys()
    assert all(reason in refused[model] for model, reason in REFUSED.items())


@pytest.mark.parametrize(
    ("name", "key", "spellings"),
    [
        ("gpt2", "activation_function", ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")),
        ("bart", "activation_function", ("silu", "swish")),
        ("bert", "hidden_act", ("gelu", "gelu_python")),
        ("llama", "hidden_act", ("silu", "swish")),
    ],
)
def test_activations_have_several_names(name: str, key: str, spellings: tuple[str, ...]):
    family = zoo.family(name)
    assert len({family.from_hf(CONFIGS[name] | {key: spelling}) for spelling in spellings}) == 1
    with pytest.raises(UserError, match=f"{key}='gelu_11'"):
        family.from_hf(CONFIGS[name] | {key: "gelu_11"})
