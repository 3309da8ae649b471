"""Tokens a second without a gradient, ours and PyTorch's: the loss of batches, and the first token after long prompts.

python benchmarks/forward.py --torch-python .../bin/python
"""

from rounds import main
from works import FORWARD, FORWARD_VARIANTS

if __name__ == "__main__":
    title = "Compare the speed of evaluation and of prefill with the peers'."
    main(title, FORWARD, steps=3, peers=["torch"], variants=FORWARD_VARIANTS)
