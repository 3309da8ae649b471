"""Training steps a second, ours and the peers': forward, backward, clipping and AdamW in float32 on the CPU.

python benchmarks/train_step.py --torch-python .../bin/python --tunix-python .../bin/python
"""

from rounds import main
from works import TRAIN_STEP

if __name__ == "__main__":
    main("Compare the speed of a training step with the peers'.", TRAIN_STEP, steps=3, peers=["torch", "tunix"])
