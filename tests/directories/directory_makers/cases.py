"""What stands in each directory: a tiny model's class and config, the tokenizer's files, what ends its texts."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import transformers
from directory_makers import tokenizer_files as files
from directory_makers.tokenizer_files import Files, added, as_json, written

TEXTS = (
    "the river sees a house",
    "Anna's letter, and then the king (at 12:30)\n\nslept.",
    " can't  hear ﬁve é",
)
# Transformers 5 gives a Llama text that begins with a space one of them; SentencePiece and transformers 4 give two.
NO_LEADING_SPACE = tuple(text.strip() for text in TEXTS)
CHAT = (
    {"role": "user", "content": "the sea finds Tom?"},
    {"role": "assistant", "content": "an hour."},
    {"role": "user", "content": "so it was"},
)
SYSTEM = ({"role": "system", "content": "the king is here."}, *CHAT)
# Splits as Llama 3 and GLM-4: digits in threes, contractions in either case.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
DEEPSEEK_SPLIT = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words by the case of their letters, as OpenAI's o200k.
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DECODER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LATENT = DECODER | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "tie_word_embeddings": True,
}
TEXT_TO_TEXT = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
TRANSLATOR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}
ENCODER = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A directory. `files` are those of the tokenizer as they are released; where `saved`, they are loaded and written
    again by `save_pretrained`. `generation` is added to the model's own generation config; None: there is no such file.
    `config` is called with the tokenizer. `missing_rows` of the vocabulary have no row in the model. Every text has
    `variety` different tokens, or is shorter.
    """

    kind: str
    config: Callable[[Any], dict[str, Any]]
    files: Files
    stops: tuple[str, ...] = ()
    saved: bool = False
    generation: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    config_stops: tuple[str, ...] | None = None
    texts: tuple[str, ...] = TEXTS
    conversations: tuple[tuple[dict[str, str], ...], ...] = ()
    missing_rows: int = 0
    extra_rows: int = 0
    variety: int = 4


def fixed(config: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda tokenizer: config


def named(config: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    """The config with the tokenizer's own BOS."""
    return lambda tokenizer: config | {"bos_token_id": tokenizer.bos_token_id}


def fast(settings: dict[str, Any], tokenizer: Any, **more: str | bytes) -> Files:
    return {"tokenizer.json": tokenizer.to_str(pretty=True) + "\n", "tokenizer_config.json": as_json(settings), **more}


def special_map(**names: str) -> str:
    return as_json({key: added(name) for key, name in names.items()})


def decoder_table(tokenizer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {str(tokenizer.token_to_id(name)): added(name) for name in names}


@functools.cache
def llama_model() -> bytes:
    return files.sentencepiece_model(340)


LLAMA_SPECIAL = ("<unk>", "<s>", "</s>")
LLAMA_SETTINGS = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": written("<s>"),
    "clean_up_tokenization_spaces": False,
    "eos_token": written("</s>"),
    "legacy": True,
    "model_max_length": 4096,
    "pad_token": None,
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": written("<unk>"),
}


def llama2() -> Case:
    """Llama 2: BOS by the post-processor; the second stop is an ordinary piece."""
    model = llama_model()
    tokenizer = {
        "tokenizer.model": model,
        "tokenizer.json": files.llama_json(model, ("<s>",), LLAMA_SPECIAL, legacy=True),
        "tokenizer_config.json": as_json(LLAMA_SETTINGS | {"chat_template": files.INST}),
        "special_tokens_map.json": special_map(bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    }
    return Case(
        "LlamaForCausalLM", named(DECODER), tokenizer, ("</s>", "."), texts=NO_LEADING_SPACE, conversations=(CHAT,)
    )


def llama_chatml() -> Case:
    """A fine-tune of Llama 2 with two more tokens, in all the files that may say so."""
    model, extra = llama_model(), ("<|im_end|>", "<|im_start|>")
    table = {str(i): added(name) for i, name in enumerate(LLAMA_SPECIAL)}
    table |= {"340": added(extra[0]), "341": added(extra[1])}
    settings = LLAMA_SETTINGS | {"added_tokens_decoder": table, "chat_template": files.CHATML, "legacy": False}
    settings |= {"bos_token": "<s>", "eos_token": extra[0], "pad_token": "</s>", "unk_token": "<unk>"}
    tokenizer = {
        "tokenizer.model": model,
        "tokenizer.json": files.llama_json(model, ("<s>",), LLAMA_SPECIAL, extra, legacy=False),
        "tokenizer_config.json": as_json(
            settings
            | {"bos_token": "<s>", "eos_token": extra[0], "legacy": False, "pad_token": "</s>", "unk_token": "<unk>"}
        ),
        "added_tokens.json": as_json({extra[0]: 340, extra[1]: 341}),
        "special_tokens_map.json": special_map(bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"),
    }
    tied = DECODER | {"tie_word_embeddings": True}
    return Case(
        "LlamaForCausalLM", named(tied), tokenizer, (extra[0], "</s>"), conversations=(CHAT, SYSTEM), extra_rows=2
    )


def llama_slow() -> Case:
    """tokenizer.model with added_tokens.json and nothing newer; no generation config."""
    settings = LLAMA_SETTINGS | {"chat_template": files.CHATML, "eos_token": "<|im_end|>"}
    tokenizer = {
        "tokenizer.model": llama_model(),
        "tokenizer_config.json": as_json(settings),
        "added_tokens.json": as_json({"<|im_end|>": 340, "<|im_start|>": 341}),
        "special_tokens_map.json": special_map(bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>"),
    }
    stops = ("</s>", "<|im_end|>")
    tied = DECODER | {"tie_word_embeddings": True}
    return Case(
        "LlamaForCausalLM",
        named(tied),
        tokenizer,
        stops,
        config_stops=stops,
        generation=None,
        texts=NO_LEADING_SPACE,
        conversations=(SYSTEM,),
    )


def llama_yi() -> Case:
    """Yi: a SentencePiece model with names of its own, and no BOS."""
    names = {"bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>"}
    model = files.sentencepiece_model(330, **names, user_defined_symbols=["<|im_start|>", "<|im_end|>"])
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(i): added(name)
            for i, name in enumerate(("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"))
        },
        "bos_token": "<|startoftext|>",
        "chat_template": files.CHATML,
        "eos_token": "<|im_end|>",
        "legacy": False,
        "pad_token": "<unk>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    tokenizer = {"tokenizer.model": model, "tokenizer_config.json": as_json(settings)}
    return Case(
        "LlamaForCausalLM",
        named(DECODER | {"tie_word_embeddings": True}),
        tokenizer,
        ("<|im_end|>", "<|endoftext|>"),
        config_stops=("<|endoftext|>",),
        texts=NO_LEADING_SPACE,
        conversations=(CHAT,),
    )


def llama3() -> Case:
    """Llama 3: bytes, BOS by the post-processor, three stops."""
    names = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    )
    tokenizer = files.byte_level(60, (), names, pattern=LLAMA3_SPLIT, prefix=names[:1])
    settings = {
        "added_tokens_decoder": decoder_table(tokenizer, names),
        "bos_token": names[0],
        "chat_template": files.HEADERS,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return Case(
        "LlamaForCausalLM",
        named(DECODER | {"rope_parameters": scaling, "tie_word_embeddings": True}),
        fast(settings, tokenizer),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        saved=True,
        config_stops=("<|eot_id|>",),
        conversations=(SYSTEM,),
    )


def llama_smollm2() -> Case:
    """SmolLM2: a Llama with GPT-2's files and no BOS."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer = files.byte_level(50, names, digits=True)
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": decoder_table(tokenizer, names),
        "bos_token": "<|im_start|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
        "vocab_size": tokenizer.get_vocab_size(),
    }
    more = files.gpt2_files(tokenizer) | {"chat_template.jinja": files.CHATML}
    return Case(
        "LlamaForCausalLM",
        named(DECODER | {"tie_word_embeddings": True}),
        fast(settings, tokenizer) | more,
        ("<|im_end|>",),
        conversations=(SYSTEM,),
    )


def mixtral() -> Case:
    model = llama_model()
    tokenizer = {
        "tokenizer.json": files.llama_json(model, ("<s>",), LLAMA_SPECIAL, legacy=True),
        "tokenizer.model": model,
        "tokenizer_config.json": as_json(LLAMA_SETTINGS | {"chat_template": files.INST}),
    }
    config = DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 12}
    return Case(
        "MixtralForCausalLM",
        named(config | {"tie_word_embeddings": True}),
        tokenizer,
        ("</s>", "▁the"),
        saved=True,
        conversations=(CHAT,),
    )


def gpt2_model() -> Any:
    return files.byte_level(60, (), ("<|endoftext|>",))


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


def gpt2() -> Case:
    tokenizer = gpt2_model()
    return Case(
        "GPT2LMHeadModel",
        named(GPT2),
        fast({"model_max_length": 1024}, tokenizer) | whole_gpt2_files(tokenizer),
        ("<|endoftext|>", "."),
    )


def whole_gpt2_files(tokenizer: Any) -> Files:
    """GPT-2's own vocab.json has <|endoftext|> as its last entry."""
    found = files.gpt2_files(tokenizer)
    vocab = files.json.loads(found["vocab.json"]) | {"<|endoftext|>": tokenizer.token_to_id("<|endoftext|>")}
    return found | {"vocab.json": as_json(vocab)}


def gpt2_slow() -> Case:
    """vocab.json, merges.txt and tokens that were added to them."""
    tokenizer = gpt2_model()
    end = tokenizer.get_vocab_size()
    found = whole_gpt2_files(tokenizer) | {
        "added_tokens.json": as_json({"<|im_start|>": end, "<|im_end|>": end + 1}),
        "special_tokens_map.json": as_json({"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}),
        "tokenizer_config.json": as_json(
            {
                "bos_token": "<|endoftext|>",
                "chat_template": files.CHATML,
                "eos_token": "<|im_end|>",
                "tokenizer_class": "GPT2Tokenizer",
                "unk_token": "<|endoftext|>",
            }
        ),
    }
    config = named(GPT2 | {"n_positions": 80})
    return Case("GPT2LMHeadModel", config, found, ("<|endoftext|>", "<|im_end|>"), conversations=(CHAT,), variety=2)


def glm() -> Case:
    """GLM-4: two tokens before every text; templates by name; three stops, in both configs."""
    names = (
        "<|endoftext|>",
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    )
    tokenizer = files.byte_level(50, (), names, pattern=LLAMA3_SPLIT, prefix=("[gMASK]", "<sop>"))
    settings = {
        "added_tokens_decoder": decoder_table(tokenizer, names),
        "additional_special_tokens": list(names),
        "chat_template": [{"name": "default", "template": files.GLM4}, {"name": "tool_use", "template": files.TOOLS}],
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizer",
    }
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    config = DECODER | {"head_dim": 8, "attention_bias": True, "pad_token_id": tokenizer.token_to_id("<|endoftext|>")}
    return Case(
        "GlmForCausalLM",
        fixed(config | {"tie_word_embeddings": True}),
        fast(settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, tokenizer),
        stops,
        config_stops=stops,
        conversations=(SYSTEM,),
    )


def deepseek(kind: str, changes: dict[str, Any], **options: Any) -> Case:
    names = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    tokenizer = files.byte_level(40, names, ("<｜EOT｜>",), pattern=LLAMA3_SPLIT, prefix=names[:1])
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": written(names[0]),
        "clean_up_tokenization_spaces": False,
        "eos_token": written(names[1]),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": written(names[1]),
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    settings |= options.pop("settings", {"chat_template": files.DEEPSEEK})
    return Case(
        kind,
        named(LATENT | changes),
        fast(settings, tokenizer),
        (names[1], "<｜EOT｜>"),
        config_stops=names[1:2],
        conversations=(SYSTEM,),
        **options,
    )


def deepseek_v2() -> Case:
    return deepseek("DeepseekV2ForCausalLM", {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0})


def deepseek_v3() -> Case:
    templates = [{"name": "default", "template": files.DEEPSEEK}, {"name": "tool_use", "template": files.TOOLS}]
    return deepseek("DeepseekV3ForCausalLM", {}, saved=True, settings={"chat_template": templates})


def deepseek_v32() -> Case:
    # With fewer heads a key that no head looks at is common, and such keys tie.
    return deepseek(
        "DeepseekV32ForCausalLM", {"index_head_dim": 8, "index_n_heads": 16, "index_topk": 6, "hidden_size": 16}
    )


THOUGHT = (*CHAT[:1], {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nan hour."}, *CHAT[2:])


def deepseek_r1() -> Case:
    """R1: its own splits, the marks of turns and of thoughts in the text, a template that begins a thought."""
    return thinking(files.DEEPSEEK_R1, ("<think>", "</think>"))


def deepseek_v31() -> Case:
    return thinking(files.DEEPSEEK_V31, ("<think>", "</think>"))


def thinking(template: str, marks: tuple[str, ...]) -> Case:
    names, turns = (
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
        ("<｜User｜>", "<｜Assistant｜>"),
    )
    tokenizer = files.byte_level(40, names, ("<｜EOT｜>",), prefix=names[:1], ordinary=(*turns, *marks))
    splits = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK_SPLIT)
    tokenizer.pre_tokenizer = files.split_by(*splits)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": written(names[0]),
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": written(names[1]),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": written(names[1]),
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }
    return Case(
        "DeepseekV3ForCausalLM",
        named(LATENT),
        fast(settings, tokenizer),
        names[1:2],
        texts=(*TEXTS, "12345 河へ行く"),
        conversations=(SYSTEM, THOUGHT),
    )


def glm4_moe() -> Case:
    """GLM-4.5: nothing before a text, thoughts in a template in a file of its own."""
    names = (
        *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
        *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    )
    ordinary = ("/nothink", "<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer = files.byte_level(50, (), names, pattern=LLAMA3_SPLIT, ordinary=ordinary)
    settings = {
        "additional_special_tokens": list(names),
        "clean_up_tokenization_spaces": False,
        "do_lower_case": False,
        "eos_token": "<|endoftext|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 128000,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config = DECODER | {
        "attention_bias": True,
        "head_dim": 8,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "tie_word_embeddings": True,
        "use_qk_norm": True,
    }
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    return Case(
        "Glm4MoeForCausalLM",
        fixed(config),
        fast(settings, tokenizer, **{"chat_template.jinja": files.GLM45}),
        stops,
        config_stops=stops,
        conversations=(SYSTEM, THOUGHT),
    )


def bart() -> Case:
    """BART: forced first and last tokens; as bart-large-cnn, one row less than tokens."""
    tokenizer = files.roberta_like(50)
    settings = {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": written("<mask>", lstrip=True),
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "tokenizer_class": "BartTokenizer",
        "unk_token": "<unk>",
    }
    return Case(
        "BartForConditionalGeneration",
        fixed(TRANSLATOR | {"decoder_start_token_id": 2, "forced_eos_token_id": None}),
        fast(settings, tokenizer) | files.gpt2_files(tokenizer),
        ("</s>", "."),
        generation={"forced_bos_token_id": 0, "forced_eos_token_id": 2, "decoder_start_token_id": 2},
        missing_rows=1,
    )


def marian() -> Case:
    """Marian: two SentencePiece models, one vocabulary, the pad forbidden and first in the target."""
    found = files.marian_files(140)
    pad = len(files.json.loads(found["vocab.json"])) - 1
    settings = {"source_lang": "en", "target_lang": "de", "tokenizer_class": "MarianTokenizer"}
    found |= {"tokenizer_config.json": as_json(settings)}
    config = TRANSLATOR | {
        "decoder_start_token_id": pad,
        "pad_token_id": pad,
        "eos_token_id": 0,
        "forced_eos_token_id": None,
        "activation_function": "swish",
        "scale_embedding": True,
        "static_position_embeddings": True,
    }
    generation = {"bad_words_ids": [[pad]], "forced_eos_token_id": 0, "decoder_start_token_id": pad}
    return Case("MarianMTModel", fixed(config), found, ("</s>", "."), generation=generation, variety=2)


@functools.cache
def t5_model() -> bytes:
    return files.sentencepiece_model(
        120,
        model_type="unigram",
        byte_fallback=False,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        remove_extra_whitespaces=True,
        normalized=True,
    )


T5_SETTINGS = {
    "additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)],
    "eos_token": "</s>",
    "extra_ids": 100,
    "pad_token": "<pad>",
    "tokenizer_class": "T5Tokenizer",
    "unk_token": "<unk>",
}


def t5_v1_0() -> Case:
    """Tied and scaled; a vocabulary padded beyond the tokenizer's, as all of them have."""
    tokenizer = {
        "spiece.model": t5_model(),
        "tokenizer.json": files.t5_json(t5_model()),
        "tokenizer_config.json": as_json(T5_SETTINGS),
    }
    generation = {"decoder_start_token_id": 0}
    config = fixed(TEXT_TO_TEXT)
    return Case(
        "T5ForConditionalGeneration", config, tokenizer, ("</s>", "."), saved=True, generation=generation, extra_rows=4
    )


def t5_v1_1() -> Case:
    """Gated, with a head of its own; spiece.model alone."""
    config = TEXT_TO_TEXT | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    tokenizer = {"spiece.model": t5_model(), "tokenizer_config.json": as_json({"tokenizer_class": "T5Tokenizer"})}
    return Case("T5ForConditionalGeneration", fixed(config), tokenizer, ("</s>",), generation=None, extra_rows=4)


def switch_transformers() -> Case:
    config = TEXT_TO_TEXT | {"num_experts": 2, "expert_capacity": 64, "d_ff": 12}
    config |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    tokenizer = {"tokenizer.json": files.t5_json(t5_model()), "tokenizer_config.json": as_json(T5_SETTINGS)}
    stops = ("</s>", "▁the")
    return Case("SwitchTransformersForConditionalGeneration", fixed(config), tokenizer, stops, extra_rows=4)


def bert() -> Case:
    tokenizer = files.wordpiece(110)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    found = {
        "vocab.txt": "".join(f"{name}\n" for name in vocab),
        "tokenizer_config.json": as_json({"do_lower_case": True, "model_max_length": 512}),
    }
    return Case("BertForMaskedLM", fixed(ENCODER), found)


def roberta() -> Case:
    tokenizer = files.roberta_like(40)
    found = fast({"model_max_length": 512}, tokenizer) | files.gpt2_files(tokenizer)
    return Case("RobertaForMaskedLM", fixed(ENCODER | {"type_vocab_size": 1}), found)


def gpt_oss() -> Case:
    """o200k_harmony: its split, its special tokens, harmony's template as a file, three stops."""
    names = ("<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|return|>", "<|constrain|>", "<|channel|>")
    names += ("<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|endofprompt|>")
    tokenizer = files.byte_level(60, (), names, pattern=O200K_SPLIT)
    settings = {
        "added_tokens_decoder": decoder_table(tokenizer, names),
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|return|>",
        "extra_special_tokens": {},
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    scaling = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 150000.0,
        "rope_type": "yarn",
        "truncate": False,
    }
    config = DECODER | {"head_dim": 4, "max_position_embeddings": 1024, "rope_parameters": scaling}
    config |= {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    said = (*CHAT[:1], {"role": "assistant", "content": "an hour."}, CHAT[2])
    return Case(
        "GptOssForCausalLM",
        named(config),
        fast(settings, tokenizer, **{"chat_template.jinja": files.HARMONY}),
        ("<|return|>", "<|endoftext|>", "<|call|>"),
        conversations=(said, SYSTEM),
    )


def distilbert() -> Case:
    """As released: a tokenizer.json, and settings that name no class."""
    tokenizer = files.wordpiece(110)
    tokenizer.post_processor = files.template(tokenizer, ("[CLS]",), ("[SEP]",))
    config = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 64}
    return Case(
        "DistilBertForMaskedLM", fixed(config), fast({"do_lower_case": True, "model_max_length": 512}, tokenizer)
    )


@functools.cache
def xlm_roberta_model() -> bytes:
    return files.sentencepiece_model(
        130,
        model_type="unigram",
        byte_fallback=False,
        hard_vocab_limit=False,
        remove_extra_whitespaces=True,
        normalized=True,
        split_digits=False,
    )


def xlm_roberta() -> Case:
    """Both of its files, and settings that name nothing."""
    model = xlm_roberta_model()
    found = {"sentencepiece.bpe.model": model, "tokenizer.json": files.xlm_roberta_json(model)}
    found["tokenizer_config.json"] = as_json({"model_max_length": 512})
    return Case("XLMRobertaForMaskedLM", fixed(ENCODER | {"type_vocab_size": 1}), found)


def xlm_roberta_slow() -> Case:
    """sentencepiece.bpe.model alone."""
    found: Files = {"sentencepiece.bpe.model": xlm_roberta_model()}
    return Case("XLMRobertaForMaskedLM", fixed(ENCODER | {"type_vocab_size": 1}), found)


def modernbert() -> Case:
    tokenizer = files.modernbert_json()
    names = {f"{name.lower()}_token": f"[{name}]" for name in files.BERT_NAMES}
    settings = {
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in files.json.loads(tokenizer)["added_tokens"]
        },
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
    }
    found: Files = {"tokenizer.json": tokenizer, "tokenizer_config.json": as_json(settings)}
    found["special_tokens_map.json"] = as_json({key: added(name) for key, name in names.items()})
    config = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24}
    config |= {"local_attention": 8, "max_position_embeddings": 64}

    def with_pad(tokenizer: Any) -> dict[str, Any]:
        return config | {"pad_token_id": tokenizer.pad_token_id}

    return Case("ModernBertForMaskedLM", with_pad, found, texts=(*TEXTS, "a   house    sees  "))


def mt5() -> Case:
    """A model with bytes; its sentinels are pieces that begin with a space."""
    model = files.sentencepiece_model(
        370,
        user_defined_symbols=[f"▁<extra_id_{i}>" for i in (2, 1, 0)],
        model_type="unigram",
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        remove_extra_whitespaces=True,
        normalized=True,
    )
    settings = {
        "additional_special_tokens": None,
        "eos_token": "</s>",
        "extra_ids": 0,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "tokenizer_file": None,
        "unk_token": "<unk>",
    }
    tokenizer: Files = {"spiece.model": model, "tokenizer_config.json": as_json(settings)}
    config = TEXT_TO_TEXT | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    # transformers gives <unk> for what SentencePiece writes in bytes.
    texts = ("the river sees a house", "Anna's letter, and then the king (at 12:30)\n\nslept.", "can't  hear ﬁve")
    return Case("MT5ForConditionalGeneration", fixed(config), tokenizer, ("</s>", "."), texts=texts, extra_rows=2)


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make
    for make in (
        llama2,
        llama_chatml,
        llama_slow,
        llama_yi,
        llama3,
        llama_smollm2,
        mixtral,
        gpt2,
        gpt2_slow,
        glm,
        deepseek_v2,
        deepseek_v3,
        deepseek_v32,
        deepseek_r1,
        deepseek_v31,
        glm4_moe,
        bart,
        marian,
        t5_v1_0,
        t5_v1_1,
        switch_transformers,
        bert,
        roberta,
        gpt_oss,
        distilbert,
        xlm_roberta,
        xlm_roberta_slow,
        modernbert,
        mt5,
    )
}


def model_class(case: Case) -> Any:
    return getattr(transformers, case.kind)
