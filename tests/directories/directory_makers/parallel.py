"""Directories of Pythia, Command R and BLOOM: byte-level tokenizers that differ in what they split and add."""

from directory_makers import tokenizer_files as files
from directory_makers.cases import CHAT, DECODER, SYSTEM, TEXTS, Case, fast, named, special_map
from directory_makers.tokenizer_files import added, as_json
from tokenizers import AddedToken, normalizers, processors

BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
SIZES = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
# A user and the model by turns, each between two tokens; what a system says comes first.
TURNS = (
    "{{ bos_token }}{% for message in messages %}{% set names = {'user': 'USER', 'assistant': 'CHATBOT', 'system': "
    "'SYSTEM'} %}{{ '<|START_OF_TURN_TOKEN|><|' + names[message['role']] + '_TOKEN|>' + message['content'].strip() + "
    "'<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)


def pythia() -> Case:
    """Runs of spaces, the longest first, are tokens that are no special ones."""
    tokenizer = files.byte_level(40, ("<|endoftext|>", "<|padding|>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(24, 1, -1)])
    settings = {
        "add_prefix_space": False,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "model_max_length": 1000000000000000019884624838656,
        "tokenizer_class": "GPTNeoXTokenizer",
        "unk_token": "<|endoftext|>",
    }
    texts = (*TEXTS, "Tom   sees\n        the sea.")
    special = {"special_tokens_map.json": special_map(bos_token="<|endoftext|>", eos_token="<|endoftext|>")}
    return Case(
        "GPTNeoXForCausalLM",
        named(SIZES | {"hidden_size": 32}),
        fast(settings, tokenizer, **special),
        ("<|endoftext|>",),
        texts=texts,
        extra_rows=8,
    )


def command_r() -> Case:
    """Digits one by one, BOS by the post-processor, templates by name; of a turn's tokens the stop alone is special."""
    first = ("<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>")
    start, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    roles = ("<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>")
    tokenizer = files.byte_level(40, first, digits=True)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(start, normalized=False)])
    tokenizer.add_special_tokens([AddedToken(end, normalized=False)])
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in roles])
    tokenizer.post_processor = files.template(tokenizer, ("<BOS_TOKEN>",))
    special = {*first, end}
    names = (*first, start, end, *roles)
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(name)): added(name, special=name in special) for name in names
        },
        "bos_token": "<BOS_TOKEN>",
        "chat_template": [{"name": "default", "template": TURNS}, {"name": "tool_use", "template": files.TOOLS}],
        "clean_up_tokenization_spaces": False,
        "eos_token": end,
        "legacy": True,
        "merges_file": None,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<PAD>",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "CohereTokenizer",
        "unk_token": None,
        "use_default_system_prompt": False,
        "vocab_file": None,
    }
    config = named(DECODER | {"logit_scale": 0.5})
    return Case("CohereForCausalLM", config, fast(settings, tokenizer), (end,), conversations=(CHAT, SYSTEM))


def bloom() -> Case:
    """Its own split; settings as the release names them; weights of a padded vocabulary."""
    tokenizer = files.byte_level(60, ("<unk>", "<s>", "</s>", "<pad>"), pattern=BLOOM_SPLIT)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "name_or_path": "bigscience/tokenizer",
        "pad_token": "<pad>",
        "padding_side": "left",
        "special_tokens_map_file": None,
        "tokenizer_class": "BloomTokenizerFast",
        "unk_token": "<unk>",
    }
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"hidden_size": 16, "n_head": 4, "n_layer": 2, "seq_length": 128, "tie_word_embeddings": False}
    return Case(
        "BloomForCausalLM",
        named(config),
        fast(settings, tokenizer, **{"special_tokens_map.json": as_json(names)}),
        ("</s>",),
        extra_rows=8,
    )


CASES = {make.__name__: make for make in (pythia, command_r, bloom)}
