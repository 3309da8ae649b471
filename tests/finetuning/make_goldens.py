"""Make the goldens of this folder with PEFT and TRL: `python tests/finetuning/make_goldens.py`.

Needs torch, transformers 5.23, peft 0.21 and trl 1.16; writes below `goldens/`: tiny bases with adapters and the logits
of PEFT, and the loss and metrics of TRL's DPO.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import peft
import tokenizers
import torch
import transformers

HERE = Path(__file__).parent / "goldens"
TOKENS = (np.arange(24).reshape(2, 12) * 7 + 3) % 64
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}


def models() -> dict:
    llama = SMALL | {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    return {
        "llama": (
            transformers.LlamaConfig(**llama, tie_word_embeddings=False),
            {
                "target_modules": r".*\.(q_proj|v_proj|down_proj)",
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
                "alpha_pattern": {"down_proj": 5},
                "modules_to_save": ["lm_head"],
            },
        ),
        "llama_with_biases": (  # which are trained, too
            transformers.LlamaConfig(**llama, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
            {"target_modules": "all-linear", "bias": "all", "use_rslora": True},
        ),
        "gpt2": (
            transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32),
            {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
        ),
        "mixtral": (
            transformers.MixtralConfig(**llama, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
            {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
        ),
        "glm": (
            transformers.GlmConfig(**llama, head_dim=4, pad_token_id=0, tie_word_embeddings=False),
            {"target_modules": ["gate_up_proj", "k_proj"]},
        ),
    }


def make_adapter(name: str, config, options: dict) -> None:
    torch.manual_seed(0)
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    base = transformers.AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = "../base"
    lora = peft.LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        logits = model.eval()(torch.tensor(TOKENS)).logits.numpy()
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    np.save(folder / "logits.npy", logits)
    for file in ("README.md", "generation_config.json"):
        (folder / "adapter" / file).unlink(missing_ok=True)
        (folder / "base" / file).unlink(missing_ok=True)
    print(name, json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"])


def make_dpo(beta: float = 0.3) -> None:
    """Write the loss and the metrics of TRL's trainer on two pairs, with the base of `llama` and another policy."""
    import datasets
    import trl

    pairs = [
        {"prompt_ids": [1, 7, 9], "chosen_ids": [11, 12, 13, 2], "rejected_ids": [21, 2]},
        {"prompt_ids": [1, 30], "chosen_ids": [31, 2], "rejected_ids": [41, 42, 43, 44, 2]},
    ]
    base = transformers.AutoModelForCausalLM.from_pretrained(HERE / "llama" / "base", dtype=torch.float32)
    policy = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(HERE / "llama" / "base", dtype=torch.float32),
        HERE / "llama" / "adapter",
    ).merge_and_unload()
    policy.requires_grad_(True)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(64)}, "t0")),
        eos_token="t2",
        pad_token="t0",
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.DPOConfig(
            output_dir=folder, beta=beta, use_cpu=True, report_to=[], per_device_train_batch_size=2, bf16=False
        )
        texts = datasets.Dataset.from_list([{"prompt": "t1", "chosen": "t3", "rejected": "t4"}])
        trainer = trl.DPOTrainer(policy, base, arguments, train_dataset=texts, processing_class=tokenizer)
        batch = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)(pairs)
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen")
        metrics = {name: trainer._metrics["train"][name][0] for name in (*names, "logps/rejected")}
    norm = trainer.model.model.layers[0].self_attn.q_proj.weight.grad.norm().item()
    found = {"beta": beta, "pairs": pairs, "loss": loss.item(), "metrics": metrics, "q_proj_gradient_norm": norm}
    (HERE / "dpo.json").write_text(json.dumps(found, indent=1) + "\n")
    print(found)


if __name__ == "__main__":
    for name, (config, options) in models().items():
        make_adapter(name, config, options)
    make_dpo()
