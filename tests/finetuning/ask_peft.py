"""Write PEFT's logits of each adapter directory given: `python ask_peft.py DIRECTORY...`; needs torch and peft."""

import sys
from pathlib import Path

import numpy as np
import peft
import torch

for folder in map(Path, sys.argv[1:]):
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(np.load(folder / "tokens.npy"), dtype=torch.long)).logits
    np.save(folder / "logits.npy", logits.numpy())
