"""Makes tests/inspect/attentions.npz: attention weights that transformers computes for checkpoints of tests/parity.

Run where torch and transformers are installed: python tests/inspect/make_goldens.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "parity" / "goldens"
DECODERS = ("llama_gqa", "llama_rope_yarn", "gpt2", "mixtral", "glm", "deepseek_v2", "deepseek_v3", "deepseek_v32")
LENGTH = {"deepseek_v32": 24}  # more than its indexer chooses


@torch.no_grad()
def main() -> None:
    torch.use_deterministic_algorithms(True)
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 64, (2, 24)))
    found = {"ids": ids.numpy().astype(np.int32)}
    plain = {"attn_implementation": "eager", "dtype": torch.float32}
    for name in DECODERS:
        model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, **plain).eval()
        weights = model(ids[:, : LENGTH.get(name, 10)], output_attentions=True).attentions
        found[name] = np.stack([w.numpy() for w in weights])
    model = AutoModelForMaskedLM.from_pretrained(GOLDENS / "bert_mlm", **plain).eval()
    found["bert_mlm"] = np.stack([w.numpy() for w in model(ids[:, :10], output_attentions=True).attentions])
    model = AutoModelForSeq2SeqLM.from_pretrained(GOLDENS / "t5_v1_1", **plain).eval()
    out = model(input_ids=ids[:, :10], decoder_input_ids=ids[:, 10:17], output_attentions=True)
    for kind, weights in (
        ("self", out.decoder_attentions),
        ("cross", out.cross_attentions),
        ("encoder", out.encoder_attentions),
    ):
        found[f"t5_v1_1_{kind}"] = np.stack([w.numpy() for w in weights])
    np.savez_compressed(HERE / "attentions.npz", **found)


if __name__ == "__main__":
    main()
