r"""Tokens generated a second, ours and the peers': greedy, after a prompt of 8 tokens, in float32 on the CPU.

python benchmarks/decode.py --torch-python .../bin/python --tunix-python .../bin/python \
    --llamacpp-python .../bin/python
"""

from rounds import main
from works import DECODE, DECODE_VARIANTS

PEERS = ["torch", "tunix", "llamacpp"]

if __name__ == "__main__":
    main(
        "Compare the speed of greedy decoding with the peers'.", DECODE, steps=3, peers=PEERS, variants=DECODE_VARIANTS
    )
