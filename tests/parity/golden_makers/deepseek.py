"""DeepSeek: V2-Lite, V2, V3 with its fp8 files and its multi-token prediction, V3.2's sparse attention."""

import math
from typing import Any

import numpy as np
import torch
from golden_makers.common import GOLDENS, PLAIN, Tensors, check_reads, divide, randomize, released, write
from golden_makers.decoders import IDS, decoded, find
from safetensors.torch import load_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)
from transformers.modeling_layers import MtpModel

NUM_LAYERS, FP8_BLOCK = 3, 16
# A small base, so that of the four pairs one is left alone, one is between, and two are stretched.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 8,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
    "type": "yarn",
}
COMMON = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "kv_lora_rank": 20,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": NUM_LAYERS,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 100,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 6,
    "vocab_size": 64,
}
V2 = COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModel": "modeling_deepseek.DeepseekV2Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    },
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
}
V2_LITE = V2 | {
    "n_group": 1,
    "q_lora_rank": None,
    "rope_scaling": YARN,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
}
V2_FULL = V2 | {
    "n_group": 4,
    "q_lora_rank": 24,
    # Copies of the released file disagree on the second: where they differ, cos and sin are scaled too.
    "rope_scaling": YARN | {"mscale_all_dim": 1.0},
    "routed_scaling_factor": 4.0,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}
V3 = COMMON | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "model_type": "deepseek_v3",
    "n_group": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 24,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 2,
    "topk_method": "noaux_tc",
}
# Moonshot's two: no groups; one without YaRN and without a latent of the queries, the other with YaRN's shortest ramp.
MOONLIGHT = V3 | {"n_group": 1, "n_shared_experts": 2, "q_lora_rank": None, "rope_scaling": None, "topk_group": 1}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
}
V32 = {key: value for key, value in V3.items() if key != "auto_map"}
V32 |= {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 12,
    "index_n_heads": 8,
    "index_topk": 6,
    "model_type": "deepseek_v32",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}


def logits_of(model: Any) -> torch.Tensor:
    return model(IDS).logits


def make(name: str, kind: Any, config: Any, data: dict[str, Any], **options: Any) -> Any:
    model, found = find(name, kind, config, **options)
    expected = decoded(model, model.model.layers) | found
    tensors = released(model)
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" in tensors
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in tensors or "v2" in name
    folder = write(name, data, tensors, expected)
    check_reads(folder, kind, logits_of, expected["logits"])
    return model, expected


def make_deepseek_v2_lite() -> None:
    make("deepseek_v2_lite", DeepseekV2ForCausalLM, DeepseekV2Config.from_dict(V2_LITE), V2_LITE)


def make_deepseek_v2() -> None:
    make("deepseek_v2", DeepseekV2ForCausalLM, DeepseekV2Config.from_dict(V2_FULL), V2_FULL)


def make_deepseek_v3() -> None:
    make("deepseek_v3", DeepseekV3ForCausalLM, DeepseekV3Config.from_dict(V3), V3)


def make_moonlight() -> None:
    make("moonlight", DeepseekV3ForCausalLM, DeepseekV3Config.from_dict(MOONLIGHT), MOONLIGHT)


def make_kimi_k2() -> None:
    """A DeepSeek-V3 in name too, for the library that computes it."""
    data = KIMI_K2 | {"model_type": "deepseek_v3"}
    model, expected = make("kimi_k2", DeepseekV3ForCausalLM, DeepseekV3Config.from_dict(data), data)
    write("kimi_k2", KIMI_K2, released(model), expected)


def expand(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A block's scale at each of its entries."""
    return scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)[: shape[0], : shape[1]]


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn, and what to multiply each block with."""
    rows, columns = (math.ceil(size / FP8_BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * FP8_BLOCK, columns * FP8_BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = padded.view(rows, FP8_BLOCK, columns, FP8_BLOCK).abs().amax((1, 3))
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return (weight / expand(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def make_deepseek_v3_fp8() -> None:
    """V3 rounded to what its fp8 file holds; what is expected is computed in float32 from just these values."""
    quantized: Tensors = {}

    def round_weights(model: Any) -> None:
        quantized.clear()

        def rounded(name: str, weight: torch.Tensor) -> torch.Tensor:
            values, scale = quantize(weight)
            quantized[name], quantized[f"{name}_scale_inv"] = values, scale
            return values.float() * expand(scale, weight.shape)

        for name, module in model.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(rounded(f"model.{name}.weight", module.weight))
            elif name.endswith("experts") and hasattr(module, "gate_up_proj"):
                for i, (gate_up, down) in enumerate(zip(module.gate_up_proj, module.down_proj, strict=True)):
                    parts = dict(zip(("gate_proj", "up_proj"), gate_up.chunk(2), strict=True)) | {"down_proj": down}
                    for part, weight in parts.items():
                        weight.copy_(rounded(f"model.{name}.{i}.{part}.weight", weight))

    model, found = find("deepseek_v3_fp8", DeepseekV3ForCausalLM, DeepseekV3Config.from_dict(V3), change=round_weights)
    expected = decoded(model, model.model.layers) | found
    tensors = released(model)
    assert {name for name in quantized if not name.endswith("_scale_inv")} <= set(tensors)
    config = V3 | {"quantization_config": FP8}
    write("deepseek_v3_fp8", config, tensors | quantized, expected)


def make_mtp(name: str, kind: Any, base: str, data: dict[str, Any]) -> None:
    """The golden `base` with a module that predicts the token after the next.

    Its input is the main model's hidden state after the final norm, as in every public inference code (and in the
    model code that some copies of the weights ship); the report leaves it open.
    """
    config, num_layers = kind.config_class.from_dict(data | {"num_nextn_predict_layers": 1}), data["num_hidden_layers"]
    main = kind.from_pretrained(GOLDENS / base, **PLAIN).float().eval()
    main.config.num_mtp_layers = config.num_mtp_layers
    modules = MtpModel(main, 1).float().eval()
    layer = modules.layers[0]
    layer.get_input_embeddings = layer.get_output_embeddings = lambda: None
    randomize(layer, 100, gain=1.0)

    def mtp_logits() -> torch.Tensor:
        hidden = main.model(IDS).last_hidden_state[:, :-1]
        positions = torch.arange(1, IDS.shape[1]).expand(IDS.shape[0], -1)
        return main.lm_head(modules.forward_layer(0, hidden, positions, None, input_ids=IDS[:, 1:]))

    divide([layer.post_norm.weight], mtp_logits().std())
    logits = mtp_logits()
    np.testing.assert_allclose(logits, own_mtp_logits(main, layer), atol=2e-6)

    own = load_file(GOLDENS / base / "model.safetensors")
    prefix = f"model.layers.{num_layers}."
    # Saved as the last layer of a model with one more, the block gets the names of the released files.
    longer = kind(kind.config_class.from_dict(data | {"num_hidden_layers": num_layers + 1}))
    longer.model.layers[num_layers].load_state_dict(layer.mtp_block.state_dict())
    tensors = own | {key: value for key, value in released(longer).items() if key.startswith(prefix)}
    tensors |= {
        f"{prefix}enorm.weight": layer.enorm.weight,
        f"{prefix}hnorm.weight": layer.hnorm.weight,
        f"{prefix}eh_proj.weight": layer.eh_proj.weight,
        f"{prefix}shared_head.norm.weight": layer.post_norm.weight,
        f"{prefix}shared_head.head.weight": own["lm_head.weight"].clone(),
        f"{prefix}embed_tokens.weight": own["model.embed_tokens.weight"].clone(),
    }
    expected = dict(np.load(GOLDENS / base / "expected.npz")) | {"mtp_logits": logits}
    write(name, data | {"num_nextn_predict_layers": 1}, tensors, expected)


def own_mtp_logits(main: Any, layer: Any) -> torch.Tensor:
    """The module's formula written out around the decoder block."""
    hidden = main.model(IDS).last_hidden_state[:, :-1]
    x = torch.cat([layer.enorm(main.model.embed_tokens(IDS[:, 1:])), layer.hnorm(hidden)], -1)
    length = x.shape[1]
    causal = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    angles = main.model.rotary_emb(x, torch.arange(length)[None])
    x = layer.mtp_block(layer.eh_proj(x), attention_mask=causal, position_embeddings=angles)
    return main.lm_head(layer.post_norm(x))


def index_scores(model: Any) -> list[torch.Tensor]:
    """What each layer's indexer chooses from: the scores that it ranks."""
    ranked: list[torch.Tensor] = []
    topk = torch.Tensor.topk

    def rank(scores: torch.Tensor, *args: Any, **options: Any) -> Any:
        ranked.append(scores)
        return topk(scores, *args, **options)

    def watch(*_: Any) -> None:
        torch.Tensor.topk = rank

    def leave(*_: Any) -> None:
        torch.Tensor.topk = topk

    for block in model.model.layers:
        block.self_attn.indexer.register_forward_pre_hook(watch)
        block.self_attn.indexer.register_forward_hook(leave)
    model(IDS)
    for block in model.model.layers:
        block.self_attn.indexer._forward_pre_hooks.clear()
        block.self_attn.indexer._forward_hooks.clear()
    return ranked


def clearly_selected(model: Any) -> bool:
    """Whether no choice is near a tie: scores that ReLU made zero are equal, and which is taken is nobody's word."""
    k = V32["index_topk"]
    best = torch.stack([scores.topk(k + 1).values for scores in index_scores(model)])[..., k:, :]
    return float((best[..., k - 1] - best[..., k]).min()) > 1e-3


def make_deepseek_v32() -> None:
    config = DeepseekV32Config.from_dict(V32)
    model, expected = make("deepseek_v32", DeepseekV32ForCausalLM, config, V32, accept=clearly_selected)
    for i, scores in enumerate(index_scores(model)):
        chosen = scores.topk(V32["index_topk"]).indices
        # The first positions have fewer to choose from.
        later = chosen > torch.arange(chosen.shape[1])[:, None]
        expected[f"indexer_topk_{i}"] = torch.where(later, -1, chosen)
    write("deepseek_v32", V32, released(model), expected)


CASES = {
    "deepseek_v2_lite": make_deepseek_v2_lite,
    "deepseek_v2": make_deepseek_v2,
    "deepseek_v3": make_deepseek_v3,
    "moonlight": make_moonlight,
    "kimi_k2": make_kimi_k2,
    "deepseek_v3_fp8": make_deepseek_v3_fp8,
    "deepseek_v3_mtp": lambda: make_mtp("deepseek_v3_mtp", DeepseekV3ForCausalLM, "deepseek_v3", V3),
    "deepseek_v32": make_deepseek_v32,
}
