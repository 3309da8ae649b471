"""Load a released model from its directory and continue a prompt, greedily and by drawing.

python examples/sample_released_model.py DIRECTORY "The meaning of life is"
"""

import sys

import jax.numpy as jnp

import llama_jax


def main(directory: str, prompt: str) -> None:
    """Sample from `directory`: of Hugging Face, of Meta, a run, or llama2.c's .bin."""
    lm = llama_jax.load(directory)
    print(f"{type(lm.config).__name__}: {llama_jax.num_parameters(lm.config):,} parameters")

    tokens = jnp.array([lm.tokenizer.encode(prompt, bos=True)])
    logits = lm.model(tokens)  # float32 [1, T, V]
    likely = logits[0, -1].argsort()[::-1][:5]
    print("most likely next:", [lm.tokenizer.decode([int(i)]) for i in likely])

    greedy = llama_jax.generate_text(lm, [prompt], max_new_tokens=16, temperature=0.0)
    drawn = llama_jax.generate_text(lm, [prompt] * 2, max_new_tokens=16, temperature=0.8, top_p=0.9, seed=0)
    for text in [*greedy, *drawn]:  # all rows of a call are one batch
        print(prompt + text)


if __name__ == "__main__":
    main(*sys.argv[1:])
