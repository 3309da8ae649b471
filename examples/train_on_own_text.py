"""Train a small Llama on your own text files, then continue a prompt.

python examples/train_on_own_text.py TEXT_FILES RUN_DIRECTORY [key=value ...]
"""

import sys

import llama_jax


def main(texts: str, directory: str, *changes: str) -> None:
    """Train on `texts` (files, folders or globs) in `directory`; `changes` are dotted keys of the config."""
    config = llama_jax.load_config(
        "tiny_python",  # any name in configs/; its model, optimizer and tokenizer are only a start
        {
            "data.path": texts,
            "data.exclude": (),
            "num_steps": 200,
            "logging.sample_prompts": (),
            **dict(change.split("=", 1) for change in changes),
        },
    )
    print(f"{llama_jax.num_parameters(config.model):,} parameters")
    run = llama_jax.train(config, directory)  # called again, it continues from the last checkpoint
    print({name: value for name, value in run.metrics()[-1].items() if name in ("step", "loss", "val_loss")})
    prompt = "The "
    print(prompt + llama_jax.generate_text(run.load(), [prompt], max_new_tokens=40, temperature=0.8, seed=0)[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
