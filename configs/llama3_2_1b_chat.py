"""Supervised fine-tuning of Llama-3.2 1B on conversations: all weights, a loss at the answers alone.

python train.py llama3_2_1b_chat --init-from Llama-3.2-1B --tokenizer.path Llama-3.2-1B --data.path chats.jsonl

Llama-3.2-1B is the released directory, chats.jsonl has lines {"messages": [{"role": "user", "content": ...}, ...]}. Of
another model give its config (model=llama_jax.load(PATH).config in a notebook), and the chat template that it will be
sampled with. 1,000 steps take 64 rows of 2048 tokens each: set num_steps to two or three epochs of the data.

Memory: parameters and two moments in float32, 14.8 GB before activations. Expected result: not run to the end with this
package; nothing is claimed.
"""

from llama_jax.data import DataConfig
from llama_jax.data.chat import Llama3Chat
from llama_jax.data.objectives import Chat
from llama_jax.models import Compute
from llama_jax.parallel import MeshConfig
from llama_jax.run import RunConfig
from llama_jax.tokenizers import TokenizerConfig
from llama_jax.training import AdamW
from llama_jax.zoo import presets


def get_config() -> RunConfig:
    return RunConfig(
        model=presets()["llama3_2_1b"],
        tokenizer=TokenizerConfig(path=None, kind="bpe", vocab_size=128_256),
        data=DataConfig(
            path=(), fields=("messages",), chat_template=Llama3Chat(), objective=Chat(), packing="best_fit"
        ),
        optimizer=AdamW(learning_rate=1e-5, warmup_steps=30, weight_decay=0.0, beta2=0.999),
        num_steps=1000,
        global_batch_size=64,
        sequence_length=2048,
        mesh=MeshConfig(fsdp=-1),
        compute=Compute(remat="attention"),
    )
