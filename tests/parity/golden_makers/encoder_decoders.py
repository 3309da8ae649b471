"""Encoder-decoder families: T5, BART, Marian, Switch Transformers."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_makers.common import (
    GOLDENS,
    PLAIN,
    Tensors,
    check_reads,
    divide,
    greedy,
    numbered,
    outputs,
    own_config,
    padded,
    random_ids,
    randomize,
    released,
    search,
    write,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

SOURCE_LENGTH, SHORT, TARGET_LENGTH, NUM_POSITIONS = 18, 11, 14, 48
LONG_TARGETS, LONGEST = ((100, 200), (129, 300), (40, 260)), 300

T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 40,
    "d_kv": 8,
    "d_model": 24,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 4,
    "num_layers": 3,
    "output_past": True,
    "pad_token_id": 0,
    # Small, so that these few positions reach the logarithmic buckets and the last one.
    "relative_attention_num_buckets": 8,
    "task_specific_params": {"summarization": {"max_length": 200, "num_beams": 4, "prefix": "summarize: "}},
    "vocab_size": 64,
}
T5_V1_1 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 40,
    "d_kv": 8,
    "d_model": 24,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 3,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 12,
    "relative_attention_num_buckets": 8,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 64,
}
BART = {
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartForConditionalGeneration"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.1,
    "classifier_dropout": 0.0,
    "d_model": 24,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 3,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_position_embeddings": NUM_POSITIONS,
    "model_type": "bart",
    "normalize_before": False,
    "normalize_embedding": True,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "scale_embedding": False,
    "use_cache": True,
    "vocab_size": 64,
}
MARIAN = {
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["MarianMTModel"],
    "attention_dropout": 0.0,
    "bad_words_ids": [[63]],
    "bos_token_id": 0,
    "classif_dropout": 0.0,
    "d_model": 24,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 63,
    "dropout": 0.1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 3,
    "eos_token_id": 0,
    "forced_eos_token_id": 0,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "max_length": 512,
    "max_position_embeddings": NUM_POSITIONS,
    "model_type": "marian",
    "normalize_before": False,
    "normalize_embedding": False,
    "num_beams": 6,
    "num_hidden_layers": 3,
    "pad_token_id": 63,
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True,
    "use_cache": True,
    "vocab_size": 64,
}
SWITCH = {
    "add_router_probs": False,
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_ff": 20,
    "d_kv": 8,
    "d_model": 24,
    "decoder_sparse_step": 2,
    "decoder_start_token_id": 0,
    "dense_act_fn": "relu",
    "dropout_rate": 0.1,
    "encoder_sparse_step": 2,
    "eos_token_id": 1,
    "expert_capacity": 64,
    "feed_forward_proj": "relu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": False,
    "layer_norm_epsilon": 1e-06,
    "model_type": "switch_transformers",
    "num_decoder_layers": 4,
    "num_experts": 4,
    "num_heads": 4,
    "num_layers": 4,
    "num_sparse_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "pad_token_id": 0,
    "relative_attention_max_distance": 12,
    "relative_attention_num_buckets": 8,
    "router_aux_loss_coef": 0.001,
    "router_bias": False,
    "router_dtype": "float32",
    "router_ignore_padding_tokens": False,
    "router_jitter_noise": 0.01,
    "router_z_loss_coef": 0.001,
    "use_cache": True,
    "vocab_size": 64,
}


def inputs(config: Any) -> dict[str, torch.Tensor]:
    """Two sources, the second shorter; whole targets that begin with the start token."""
    highest = min(config.vocab_size, config.pad_token_id) if config.pad_token_id > 3 else config.vocab_size
    source, mask = padded(random_ids((2, SOURCE_LENGTH), highest), SHORT, config.pad_token_id)
    target = random_ids((2, TARGET_LENGTH), highest, seed=1)
    target[:, 0] = config.decoder_start_token_id
    return {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


def logits_of(model: Any) -> torch.Tensor:
    return model(**inputs(model.config)).logits


def generate(model: Any) -> tuple[torch.Tensor, float]:
    given = inputs(model.config)
    start = given.pop("decoder_input_ids")[:, :1]
    return greedy(lambda ids: model(**given, decoder_input_ids=ids).logits, start)


def generate_cached(model: Any) -> tuple[torch.Tensor, float]:
    """One token at a time, as the original decodes: what depends on a sequence's length sees one token."""
    given = inputs(model.config)
    start, states = given.pop("decoder_input_ids")[:, :1], {}
    given = {"encoder_outputs": model.get_encoder()(**given), "attention_mask": given["attention_mask"]}

    def next_logits(ids: torch.Tensor) -> torch.Tensor:
        found = model(**given, decoder_input_ids=ids[:, -1:], use_cache=True, **states)
        states["past_key_values"] = found.past_key_values
        return found.logits

    return greedy(next_logits, start)


def last_scale(model: Any) -> list[torch.Tensor]:
    """What scales the logits: the decoder's last norm, and the bias of the logits."""
    decoder = model.get_decoder()
    if hasattr(decoder, "final_layer_norm"):
        return [decoder.final_layer_norm.weight]
    return [*decoder.layers[-1].final_layer_norm.parameters(), model.final_logits_bias]


def settle(model: Any, embedding_gain: float) -> None:
    """A post-norm decoder of random weights says one token for ever: quieter attention, and none that always wins."""
    for name, parameter in model.named_parameters():
        if "attn.out_proj" in name:
            parameter *= 0.3 if "encoder_attn" in name else 0.5
        elif "decoder" in name and "fc1.weight" in name:
            parameter *= 2
        elif "decoder" in name and "fc2.weight" in name:
            parameter *= 1.5
        elif name.endswith("bias"):
            parameter *= 0.4
    model.model.shared.weight *= embedding_gain
    model.final_logits_bias -= logits_of(model).mean((0, 1))


def find(
    name: str,
    kind: Any,
    config: Any,
    *,
    untie: bool = False,
    gain: float = 1.5,
    embedding_gain: float | None = None,
    generate: Any = generate,
    accept: Any = lambda model: True,
) -> tuple[Any, dict[str, Any]]:
    config._attn_implementation = config._experts_implementation = "eager"

    def build(seed: int) -> Any:
        model = kind(config).float().eval()
        if untie:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        randomize(model, seed, gain)
        for module in model.modules():
            if hasattr(module, "relative_attention_num_buckets") and hasattr(module, "q"):
                module.q.weight.data *= module.key_value_proj_dim**-0.5  # as initialised: scores are not divided by it
        if embedding_gain is not None:
            settle(model, embedding_gain)
        divide(last_scale(model), logits_of(model).std())
        return model

    special = {config.pad_token_id, config.eos_token_id, config.decoder_start_token_id}
    return search(name, build, generate, special, accept)


def computed(model: Any) -> dict[str, Any]:
    """What the model computes. What stands at the source's padding is not to be compared."""
    given = inputs(model.config)
    encoder, decoder = model.get_encoder(), model.get_decoder()
    blocks = [stack.block if hasattr(stack, "block") else stack.layers for stack in (encoder, decoder)]
    with outputs(numbered("encoder_layer", blocks[0]) | numbered("layer", blocks[1])) as hidden:
        logits = model(**given).logits
    names = {"source": "input_ids", "source_mask": "attention_mask", "target": "decoder_input_ids"}
    return {ours: given[theirs] for ours, theirs in names.items()} | {"logits": logits, **hidden}


def make(name: str, kind: Any, config: Any, released_config: dict[str, Any] | None = None, **options: Any) -> None:
    model, found = find(name, kind, config, **options)
    expected = computed(model) | found
    folder = write(name, released_config or own_config(model), released(model), expected)
    check_reads(folder, kind, logits_of, expected["logits"])


def make_t5_v1_0() -> None:
    make("t5_v1_0", T5ForConditionalGeneration, T5Config.from_dict(T5))


def make_t5_v1_1() -> None:
    make("t5_v1_1", T5ForConditionalGeneration, T5Config.from_dict(T5_V1_1), T5_V1_1, untie=True, gain=1.0)


def with_copies(tensors: Tensors, shared: str, copies: list[str]) -> Tensors:
    return tensors | dict.fromkeys(copies, tensors[shared])


def make_t5_v1_0_bin() -> None:
    """As t5-small was released: the embedding under three names, and a bias of the cross attention that is not used."""
    tensors = load_file(GOLDENS / "t5_v1_0" / "model.safetensors")
    copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
    tensors = with_copies(tensors, "shared.weight", copies)
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    shape = (T5["relative_attention_num_buckets"], T5["num_heads"])
    tensors[unused] = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = np.load(GOLDENS / "t5_v1_0" / "expected.npz")
    folder = write("t5_v1_0_bin", T5, tensors, expected, pickled=True)
    logits = torch.from_numpy(expected["logits"])
    check_reads(folder, T5ForConditionalGeneration, logits_of, logits, (unused,))


def make_bart() -> None:
    make("bart", BartForConditionalGeneration, BartConfig.from_dict(BART), embedding_gain=0.6)


def make_bart_bin() -> None:
    """As bart-large was released: the embedding under its names, and the version of the tool that trained it."""
    tensors = load_file(GOLDENS / "bart" / "model.safetensors")
    copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    tensors = with_copies(tensors, "model.shared.weight", copies)
    tensors |= {"model.encoder.version": torch.tensor([3.0]), "model.decoder.version": torch.tensor([3.0])}
    expected = np.load(GOLDENS / "bart" / "expected.npz")
    folder = write("bart_bin", BART, tensors, expected, pickled=True)
    logits = torch.from_numpy(expected["logits"])
    check_reads(folder, BartForConditionalGeneration, logits_of, logits, ("version",))


def make_marian() -> None:
    make("marian", MarianMTModel, MarianConfig.from_dict(MARIAN), embedding_gain=0.5)


def make_marian_bin() -> None:
    """As opus-mt was released: the embedding under its names, and the sinusoids."""
    tensors = load_file(GOLDENS / "marian" / "model.safetensors")
    copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"]
    tensors = with_copies(tensors, "model.shared.weight", copies)
    model = MarianMTModel.from_pretrained(GOLDENS / "marian")
    for side in ("encoder", "decoder"):
        key = f"model.{side}.embed_positions.weight"
        tensors[key] = model.get_parameter(key).detach().clone()
    expected = np.load(GOLDENS / "marian" / "expected.npz")
    folder = write("marian_bin", MARIAN, tensors, expected, pickled=True)
    check_reads(folder, MarianMTModel, logits_of, torch.from_numpy(expected["logits"]))


def dropped(model: Any) -> dict[str, int]:
    """How many tokens found their expert full, in each sparse layer."""
    routers = {name: module for name, module in model.named_modules() if name.endswith("router")}
    with outputs(routers) as found:
        logits_of(model)
    return {name: int((mask.sum(-1) == 0).sum()) for name, mask in found.items()}


def make_switch_transformers() -> None:
    make(
        "switch_transformers",
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig.from_dict(SWITCH),
        SWITCH,
        accept=lambda model: not any(dropped(model).values()),
    )


def make_switch_transformers_dropping() -> None:
    """Experts take five tokens of a sequence: every sparse layer drops some. Decoding sees one token and drops none."""
    config = SWITCH | {"expert_capacity": 5}
    make(
        "switch_transformers_dropping",
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig.from_dict(config),
        config,
        generate=generate_cached,
        accept=lambda model: all(dropped(model).values()),
    )


def make_t5_long_source() -> None:
    """What the T5 of another golden makes of a source longer than its `n_positions`: one file."""
    model = T5ForConditionalGeneration.from_pretrained(GOLDENS / "t5_v1_0", attn_implementation="eager").eval()
    source, target = random_ids((1, 600), seed=7), random_ids((1, 9), seed=8)

    def logits(target: torch.Tensor) -> torch.Tensor:
        return model(input_ids=source, decoder_input_ids=target).logits

    generated, margin = greedy(logits, torch.zeros(1, 1, dtype=torch.long))
    found = {"source": source, "target": target, "logits": logits(target), "generated": generated}
    np.savez_compressed(GOLDENS / "t5_long_source.npz", **found, margin=np.float32(margin))


def lengthened(config: dict[str, Any], tensors: Tensors) -> tuple[dict[str, Any], Tensors]:
    """A golden with `LONGEST` positions: a learned table goes on from its beginning."""
    if "max_position_embeddings" not in config:
        return config, tensors
    special = 2  # rows that BART has before the first position
    tables = {key: t for key, t in tensors.items() if key.endswith("embed_positions.weight")}
    for key, table in tables.items():
        rows = [*range(special), *(special + i % NUM_POSITIONS for i in range(LONGEST))]
        tables[key] = table[rows]
    return config | {"max_position_embeddings": LONGEST}, tensors | tables


def make_long_targets() -> None:
    """Logits of a few places of targets longer than their sources, from the weights of other goldens.

    A file for each: `logits_S_T` at `places_S_T`, and the tokens as bytes.
    """
    kinds = {"bart": BartForConditionalGeneration, "marian": MarianMTModel, "t5_v1_0": T5ForConditionalGeneration}
    for name, kind in kinds.items():
        config = json.loads((GOLDENS / name / "config.json").read_text())
        config, tensors = lengthened(config, load_file(GOLDENS / name / "model.safetensors"))
        found: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            model = kind.from_pretrained(folder, **PLAIN).float().eval()
        for source_length, target_length in LONG_TARGETS:
            source, mask = padded(random_ids((2, source_length), 60), source_length * 2 // 3, config["pad_token_id"])
            target = random_ids((2, target_length), 60, seed=1)
            target[:, 0] = config["decoder_start_token_id"]
            logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
            # The last place of every stretch: what is lost in one block of queries is seen.
            places = np.arange(target_length - 1, 0, -30)
            tokens = {"source": source, "source_mask": mask, "target": target}
            arrays = {key: x.numpy().astype(np.uint8) for key, x in tokens.items()}
            arrays |= {"places": places.astype(np.int32), "logits": logits[:, places.copy()].numpy()}
            found |= {f"{key}_{source_length}_{target_length}": x for key, x in arrays.items()}
        np.savez_compressed(GOLDENS / f"long_targets_{name}.npz", **found)


CASES = {
    "t5_v1_0": make_t5_v1_0,
    "t5_long_source": make_t5_long_source,
    "t5_v1_1": make_t5_v1_1,
    "t5_v1_0_bin": make_t5_v1_0_bin,
    "bart": make_bart,
    "bart_bin": make_bart_bin,
    "marian": make_marian,
    "marian_bin": make_marian_bin,
    "switch_transformers": make_switch_transformers,
    "switch_transformers_dropping": make_switch_transformers_dropping,
    "long_targets": make_long_targets,
}
