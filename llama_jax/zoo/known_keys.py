"""Keys of config.json that change no logit, whichever family has them, by the tool that writes them or their subject.

Collected from `PretrainedConfig` and `GenerationConfig` of transformers 4.0 to 5.23 and from released files. A key that
may change a logit is not here, even where the base class writes it (`is_decoder`, `pruned_heads`,
`tie_word_embeddings`...): a family reads it, or it is refused unless it is off.
"""

import re
from collections.abc import Callable
from typing import Any

KNOWN: dict[str, frozenset[str]] = {
    # Forms of outputs, the model's origin, labels, ways of computing.
    "transformers' base class": frozenset({
        "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal", "_auto_class",
        "_commit_hash", "_experts_implementation", "_experts_implementation_internal", "_flash_attn_2_enabled",
        "_from_auto", "_name_or_path", "_num_labels", "_output_attentions", "_post_init_done", "architectures",
        "attn_implementation", "auto_map", "chunk_size_feed_forward", "custom_pipelines", "dtype",
        "experts_implementation", "finetuning_task", "gradient_checkpointing", "id2label",
        "ignore_keys_at_rope_validation", "init_std", "initializer_factor", "initializer_range",
        "keys_to_ignore_at_inference", "label2id", "model_type", "name_or_path", "num_labels", "output_attentions",
        "output_hidden_states", "output_past", "output_router_logits", "prefix", "problem_type", "return_dict",
        "tf_legacy_loss", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16",
        "use_cache", "use_return_dict", "use_return_tuple",
    }),
    # Search for an answer. `checkpoint/generation.py` reads those that decide it.
    "transformers' generation settings": frozenset({
        "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
        "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_config",
        "cache_implementation", "compile_config", "constraints", "continuous_batching_config",
        "decoder_start_token_id", "disable_compile", "diversity_penalty", "do_sample", "dola_layers", "early_stopping",
        "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "eos_token_id", "epsilon_cutoff", "eta_cutoff",
        "exponential_decay_length_penalty", "force_bos_token_to_be_generated", "force_words_ids",
        "forced_bos_token_id", "forced_decoder_ids", "forced_eos_token_id", "generation_config", "guidance_scale",
        "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size",
        "max_new_tokens", "max_time", "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
        "num_return_sequences", "output_logits", "output_scores", "pad_token_id", "penalty_alpha",
        "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
        "repetition_penalty", "return_dict_in_generate", "sep_token_id", "sequence_bias", "speculation_type",
        "stop_strings", "suppress_tokens", "target_lookbehind", "task_specific_params", "temperature", "token_healing",
        "top_h", "top_k", "top_p", "typical_p", "use_mtp", "watermarking_config",
    }),
    # Settings of a tokenizer, some of which land in the model's file.
    "tokenizers": frozenset({
        "add_bos_token", "add_eos_token", "add_prefix_space", "chat_template", "clean_up_tokenization_spaces",
        "do_basic_tokenize", "do_lower_case", "lowercase", "max_seq_len", "max_seq_length", "max_sequence_length",
        "merges_file", "model_max_length", "pad_to_multiple_of", "pad_token_type_id", "padding", "padding_side",
        "return_tensors", "special_tokens_map", "stride", "truncation", "truncation_side", "vocab_file",
    }),
    # Heads that are not loaded, with the keys of their first releases.
    "other heads": frozenset({
        "classif_dropout", "classifier_activation", "n_special", "pooler_fc_size", "pooler_num_attention_heads",
        "pooler_num_fc_layers", "pooler_size_per_head", "predict_special_tokens", "summary_activation",
        "summary_first_dropout", "summary_hidden_size", "summary_proj_to_labels", "summary_type", "summary_use_proj",
    }),
    # Settings of a training or of the machine that it ran on.
    "training": frozenset({
        "adam_beta1", "adam_beta2", "adam_epsilon", "add_router_probs", "batch_size", "bf16", "bias_dropout_fusion",
        "data_seed", "deepspeed", "do_eval", "do_predict", "do_train", "ep_size", "epochs", "eval_batch_size",
        "evaluation_strategy", "fp16", "fp16_opt_level", "freeze_embeds", "freeze_encoder", "fsdp", "global_step",
        "gradient_accumulation_steps", "gradient_clip_val", "is_training", "label_smoothing", "label_smoothing_factor",
        "learning_rate", "line_by_line", "load_best_model_at_end", "local_rank", "lr", "lr_scheduler_type",
        "make_vocab_size_divisible_by", "max_grad_norm", "max_source_length", "max_steps", "max_target_length",
        "metric_for_best_model", "mlm", "mlm_probability", "n_gpu", "neftune_noise_alpha", "no_cuda", "num_proc",
        "num_train_epochs", "num_train_steps", "num_workers", "optimizer", "overwrite_output_dir",
        "per_device_eval_batch_size", "per_device_train_batch_size", "pretraining_tp", "remat", "replacing_rate",
        "report_to", "resume_from_checkpoint", "scan_layers", "seed", "shuffle", "sortish_sampler",
        "test_max_target_length", "tf32", "torch_compile", "train_batch_size", "use_kernel", "val_max_target_length",
        "warmup_ratio", "warmup_steps", "weight_decay", "world_size",
    }),
    "other tools": frozenset({
        "_mlx_version", "adapters", "base_model", "base_model_name_or_path", "base_model_prefix", "conversational",
        "custom_generate", "datasets", "finetuned_from", "framework", "hub_model_id", "language", "languages",
        "library_name", "license", "low_cpu_mem_usage", "model_creator", "model_name", "model_size", "name",
        "paraphrase", "pipeline_tag", "prediction_heads", "push_to_hub", "return_all_scores", "revision",
        "sbert_ce_default_activation_function", "sentence_transformers", "tags", "task", "transformers.js_config",
        "transformers_weights", "trust_remote_code", "unsloth_fixed", "use_auth_token", "use_safetensors",
        "vocab_size_or_config_json_file",
    }),
}  # fmt: skip

# Words of the pieces of a model. A key that has one may choose the piece, whatever its other words are.
_NO_PIECE = (
    r"(?!.*(?:^|_)(?:attn|attention|pos|positions?|rope|rotary|alibi|norm|layernorm|mlp|ffn|act|activation|gate|gating"
    r"|router|routing|experts?|capacity|heads?|logits?|emb|embed|embeddings?|layers?|blocks?|residual|skip|bias|mask"
    r"|qk|qkv|softmax|scale|scaling|factor|causal|bidirectional)(?:_|$))"
)
_FLOATS = re.compile(
    r"((torch|np|jnp|jax\.numpy)\.)?"
    r"(auto|half|single|double|((bfloat|float|bf|fp|tf)(8|16|32|64)(_?e\dm\d\w*)?|16|32|64)(-\w+)?)"
)
_KERNELS = re.compile(r"auto|eager|math|naive|torch|paged|(flash|flex|sdpa|xformers|triton|cudnn|te\b|mem).*")


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_number_type(value: Any) -> bool:
    return type(value) is bool or _FLOATS.fullmatch(str(value)) is not None


def _is_kernel(value: Any) -> bool:
    return type(value) is bool or (isinstance(value, str) and _KERNELS.fullmatch(value) is not None)


_ANY = (str, bool, int, float, list, dict)
_COUNT = (bool, int, str)
_NUMBER = (int, float, str)

# Patterns of names, and the types of their values or a test of them.
PATTERNS: dict[str, tuple[re.Pattern[str], tuple[type, ...] | Callable[[Any], bool]]] = {
    "tokenizers' settings": (re.compile(r"tokenizer_.*"), _ANY),
    "texts of tokens": (re.compile(r"(bos|eos|pad|unk|sep|cls|mask|additional)_tokens?"), (str, dict, list, bool)),
    "trainings' settings": (
        re.compile(
            _NO_PIECE + r"((train|training|eval|wandb|optimizer|scheduler|warmup|student|teacher)_.*"
            r"|(save|log|logging)_(steps?|every|strategy))"
        ),
        _ANY,
    ),
    "sizes of a distilled model": (re.compile(r"(student|teacher)_(encoder_|decoder_)?layers"), (int, list)),
    "rates of dropout": (re.compile(r"(.*_)?(dropout|pdrop|layerdrop|drop_path)(_(rate|prob|p|ratio))?"), _is_rate),
    "versions of software": (re.compile(_NO_PIECE + r"(.*_)?version"), (str,)),
    "special tokens": (re.compile(r"(.*_)?(token|tokens)_(id|ids|index)"), (int, list)),
    "weights of losses": (re.compile(r"(.*_)?loss(_(coef|coeff|weight|alpha|type|function))?"), _NUMBER),
    "first values": (re.compile(r"(init|initializer)_(.*_)?(std|range|factor|scale|method|fn|gain)"), _NUMBER),
    "types of numbers": (re.compile(r"(.*_)?(dtype|in_fp32|precision)"), _is_number_type),
    "kernels": (
        re.compile(
            r"_?(attn|attention)_impl(ementation)?"
            r"|_?(use_)?(flash_?att(n|ention)?|sdpa|xformers|mem(ory)?_eff(icient)?_att(n|ention)?)(_?[23])?(_enabled)?"
            r"|_?(use_)?flash_(rotary|rope)"
            r"|(use_)?fused_(bias_fc|mlp|swiglu|rope|rotary|softmax|cross_entropy|(dropout_)?(add_)?(rms_?|layer_?)?(norm|ln))"
            r"|(use_)?(triton|liger|fused)(_kernels?)?"
        ),
        _is_kernel,
    ),
    "memory": (re.compile(r"(.*_)?(gradient|activation|selective)_checkpoint(ing)?(_.*)?"), _COUNT),
    "parallel machines": (
        re.compile(
            r"(use_)?(tensor|sequence|pipeline|expert|context|data|model)_(model_)?parallel(ism)?"
            r"(_(world_)?(size|degree|rank|enabled|mode|group|rules))?|[tepcd]p_size"
        ),
        _COUNT,
    ),
    "devices": (
        re.compile(r"(.*_)?to_device|is_gpu|xla_device|device|device_map|use_(gpu|cuda|tpu|cpu)"),
        (*_COUNT, dict),
    ),
    "names and places": (
        re.compile(_NO_PIECE + r"(.*_)?(name_or_path|path|dir|repo_id|commit|hash|author|date|description)"),
        (str,),
    ),
    # Marks of the code that a model is for: the names of families.
    "marks of a converter": (
        re.compile(
            r"is_(llama|mistral|mixtral|gpt|gpt2|bert|roberta|bart|marian|t5|glm|chatglm|deepseek|qwen|qwen2)_?\d*_config"
            r"|unsloth_.*|transformers\..*"
        ),
        _ANY,
    ),
}  # fmt: skip


def origin(key: str, value: Any) -> str | None:
    """Return the tool that writes this key, or the matter it is about, if it changes no logit; else None."""
    for name, keys in KNOWN.items():
        if key in keys:
            return name
    for name, (pattern, values) in PATTERNS.items():
        fits = type(value) in values if isinstance(values, tuple) else values(value)
        if pattern.fullmatch(key) and fits:
            return name
    return None


def is_off(value: Any) -> bool:
    """Return whether a value switches a setting off: null, false or empty, but not 0, which may be an index."""
    return value is None or value is False or value in ("", [], {}, ())
