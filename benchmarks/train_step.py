"""Training steps a second, ours and the peers': forward, backward, clipping and AdamW, float32 and bfloat16.

python benchmarks/train_step.py --torch-python .../bin/python --tunix-python .../bin/python
python benchmarks/train_step.py --guard benchmarks/results/plain.json  # after a change; needs no peer
"""

from rounds import main
from works import TRAIN_STEP, TRAIN_VARIANTS

if __name__ == "__main__":
    title = "Compare the speed of a training step with the peers'."
    main(title, TRAIN_STEP, steps=3, peers=["torch", "tunix"], variants=TRAIN_VARIANTS, plain=True)
