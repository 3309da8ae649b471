# ruff: noqa: E501
"""More of them: llama2.c, Meta's params.json, config.json and the files beside it, adapters."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_cases import DEEP, GOLDENS, HUGE, LLAMA, Hostile, a_tensor, alone, as_zip, safetensors, text, with_file


# llama2.c, Meta.
def meta_cases() -> Iterator[Hostile]:
    for name, header in {
        "16 million layers": (8, 8, (1 << 24) - 1, 1, 1, 8, 8), "huge sizes": ((1 << 24) - 1,) * 7,
        "negative sizes": (-8, 8, 1, 1, 1, 8, 8), "no heads": (8, 8, 1, 0, 0, 8, 8), "the file is too short": (8, 8, 1, 1, 1, 8, 8),
    }.items():  # fmt: skip
        yield Hostile("llama2.c", name, alone("model.bin", struct.pack("<7i", *header)))
    good = {"dim": 16, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-5, "vocab_size": 340}
    for name, change in {
        "a billion layers": {"n_layers": 10**9}, "no heads": {"n_heads": 0}, "negative layers": {"n_layers": -1},
        "layers as text": {"n_layers": "2"}, "layers that are true": {"n_layers": True}, "eps of NaN": {"norm_eps": float("nan")},
        "eps of infinity": {"norm_eps": float("inf")}, "a width with 300 digits": {"dim": 10**300}, "a width that is a list": {"dim": [16]},
        "theta of 0": {"rope_theta": 0}, "theta of infinity": {"rope_theta": float("inf")}, "a negative head": {"n_heads": -4},
        "kv heads as text": {"n_kv_heads": "x"},
    }.items():  # fmt: skip

        def make(folder: Path, change: dict[str, Any] = change) -> Path:
            (folder / "params.json").write_text(json.dumps(good | change))
            (folder / "consolidated.00.pth").write_bytes(
                as_zip(b"\x80\x02}" + text("norm.weight") + a_tensor() + b"s.")
            )
            return folder

        yield Hostile("params.json", name, make)
    for name, content in {"deep JSON": DEEP, "a long number": f'{{"dim": {HUGE}}}'.encode(), "a list": b"[]"}.items():

        def raw(folder: Path, content: bytes = content) -> Path:
            (folder / "params.json").write_bytes(content)
            (folder / "consolidated.00.pth").write_bytes(
                as_zip(b"\x80\x02}" + text("norm.weight") + a_tensor() + b"s.")
            )
            return folder

        yield Hostile("params.json", name, raw)


def json_with(source: Path, **values: Any) -> str:
    return json.dumps(json.loads(source.read_text(encoding="utf-8")) | values)


def config_cases() -> Iterator[Hostile]:
    infinite, nan = float("inf"), float("nan")
    changes: dict[str, dict[str, Any]] = {
        "a billion layers": {"num_hidden_layers": 10**9}, "ten million layers": {"num_hidden_layers": 10**7},
        "eps of NaN": {"rms_norm_eps": nan}, "eps of infinity": {"rms_norm_eps": infinite}, "negative eps": {"rms_norm_eps": -1.0},
        "theta of NaN": {"rope_parameters": {"rope_theta": nan, "rope_type": "default"}},
        "theta of infinity": {"rope_parameters": {"rope_theta": infinite, "rope_type": "default"}},
        "negative theta": {"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}},
        "theta as text": {"rope_parameters": {"rope_theta": "1e4", "rope_type": "default"}},
        "a factor of NaN": {"rope_scaling": {"rope_type": "linear", "factor": nan}},
        "a factor of infinity": {"rope_scaling": {"rope_type": "linear", "factor": infinite}},
        "yarn of infinity": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10**300}},
        "a width of 0": {"hidden_size": 0}, "a negative width": {"hidden_size": -16}, "a huge width": {"hidden_size": 10**12},
        "a width with 100 digits": {"hidden_size": 10**100}, "a width that is true": {"hidden_size": True},
        "a width as text": {"hidden_size": "16"}, "a huge vocabulary": {"vocab_size": 10**12},
        "a width of NaN": {"hidden_size": nan}, "eps with 400 digits": {"rms_norm_eps": 10**400}, "no heads": {"num_attention_heads": 0},
        "a head of 0": {"head_dim": 0}, "huge positions": {"max_position_embeddings": 10**30},
        "a model_type that is a list": {"model_type": ["llama"]}, "a model_type with escapes": {"model_type": "\x1b[2J\r"},
        "architectures of numbers": {"architectures": [1]}, "an activation that is a list": {"hidden_act": ["silu"]},
        "quantized by a number": {"quantization_config": 3}, "blocks of 0": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 0]}},
        "scaling that is a list": {"rope_scaling": [1]}, "a kind of scaling that is a list": {"rope_scaling": {"rope_type": [1], "factor": 2.0}},
    }  # fmt: skip
    for name, values in changes.items():
        by_default = name in ("a head of 0", "a model_type that is a list")  # as if it were not there
        yield Hostile(
            "config.json",
            name,
            with_file("config.json", json_with(LLAMA / "config.json", **values)),
            refused=not by_default,
        )
    whole = {
        "deep JSON": DEEP,
        "a long number": f'{{"hidden_size": {HUGE}}}',
        "a list": "[]",
        "no UTF-8": b"\xff\xfe",
        "empty": b"",
    }
    for name, content in whole.items():
        yield Hostile("config.json", name, with_file("config.json", content))
    mixtral, deepseek = GOLDENS / "mixtral", GOLDENS / "deepseek_v3"
    for name, source, values in (
        ("a billion experts", mixtral, {"num_local_experts": 10**9}),
        ("a billion experts of DeepSeek", deepseek, {"n_routed_experts": 10**9}),
        ("a billion dense layers", deepseek, {"first_k_dense_replace": 10**9, "num_hidden_layers": 10**9}),
        ("a billion layers of T5", GOLDENS / "t5_v1_1", {"num_layers": 10**9}),
        ("a billion layers of GPT-2", GOLDENS / "gpt2_slow", {"n_layer": 10**9}),
        ("a billion layers of BERT", GOLDENS / "bert", {"num_hidden_layers": 10**9}),
        ("a billion layers of BART", GOLDENS / "bart", {"encoder_layers": 10**9}),
    ):
        yield Hostile(
            "config.json", name, with_file("config.json", json_with(source / "config.json", **values), source)
        )
    generation: dict[str, Any] = {
        "an id with 100 digits": {"eos_token_id": 10**100}, "an id that is text": {"eos_token_id": "x"}, "an id that is true": {"eos_token_id": True},
        "a penalty of NaN": {"repetition_penalty": nan}, "a penalty of infinity": {"repetition_penalty": infinite},
        "a negative length": {"min_length": -1}, "a penalty with 400 digits": {"repetition_penalty": 10**400},
        "words that are a number": {"bad_words_ids": 3}, "suppressed texts": {"suppress_tokens": ["x"]},
    }  # fmt: skip
    for name, values in generation.items():
        yield Hostile("generation_config.json", name, with_file("generation_config.json", json.dumps(values)))
    yield Hostile("generation_config.json", "deep JSON", with_file("generation_config.json", DEEP))
    yield Hostile(
        "generation_config.json", "a long number", with_file("generation_config.json", f'{{"eos_token_id": {HUGE}}}')
    )

    adapter = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(LLAMA), "lora_alpha": 4}
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": {"dtype": "F32", "shape": shape, "data_offsets": place}
        for side, shape, place in (("A", [2, 16], [0, 128]), ("B", [16, 2], [128, 256]))
    }  # fmt: skip
    for name, values in {
        "a base of 300 letters": {"base_model_name_or_path": "a" * 300}, "a base with NUL": {"base_model_name_or_path": "a\0"},
        "a base that is a list": {"base_model_name_or_path": [1]}, "alpha of NaN": {"lora_alpha": nan}, "alpha as text": {"lora_alpha": "4"},
        "alpha with 400 digits": {"lora_alpha": 10**400}, "a pattern that is no pattern": {"alpha_pattern": {"(": 1}}, "patterns of a list": {"alpha_pattern": [1]},
        "a pattern that takes for ever": {"alpha_pattern": {"(((\\w|\\.)+)+)+!": 1}},
    }.items():  # fmt: skip

        def make(folder: Path, values: dict[str, Any] = values) -> Path:
            (folder / "adapter_config.json").write_text(json.dumps(adapter | values))
            (folder / "adapter_model.safetensors").write_bytes(safetensors(weights, bytes(256)))
            return folder

        yield Hostile("adapter_config.json", name, make)
