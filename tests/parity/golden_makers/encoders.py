"""Encoder-only families: BERT and RoBERTa, with each of their heads, and their oldest files."""

from typing import Any

import numpy as np
import torch
from golden_makers.common import (
    GOLDENS,
    check_reads,
    divide,
    numbered,
    outputs,
    own_config,
    padded,
    random_ids,
    randomize,
    released,
    write,
)
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

LENGTH, SHORT, NUM_LAYERS, NUM_POSITIONS = 20, 13, 3, 40

BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": NUM_POSITIONS,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 64,
}
ROBERTA = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": NUM_POSITIONS + 2,
    "model_type": "roberta",
    "num_attention_heads": 4,
    "num_hidden_layers": NUM_LAYERS,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 64,
}
CLASSES = {"num_labels": 3}


def inputs(config: Any) -> dict[str, torch.Tensor]:
    """Two rows, the second with padding; pairs of sentences where the model tells them apart."""
    ids, mask = padded(random_ids((2, LENGTH)), SHORT, config.pad_token_id)
    found = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        found["token_type_ids"] = (torch.arange(LENGTH) >= torch.tensor([[9], [6]])).long() * mask
    return found


def last_norm(model: Any) -> list[torch.Tensor]:
    """What scales the masked-LM logits: the head's norm and its bias."""
    if hasattr(model, "cls"):
        return [*model.cls.predictions.transform.LayerNorm.parameters(), model.cls.predictions.bias]
    if hasattr(model, "vocab_layer_norm"):
        return [*model.vocab_layer_norm.parameters(), model.vocab_projector.bias]
    if hasattr(model, "decoder"):
        return [*model.head.norm.parameters(), *([] if model.decoder.bias is None else [model.decoder.bias])]
    return [*model.lm_head.layer_norm.parameters(), model.lm_head.bias]


def mlm_logits(model: Any) -> torch.Tensor:
    found = model(**inputs(model.config))
    return found.prediction_logits if hasattr(found, "prediction_logits") else found.logits


def blocks(model: Any) -> Any:
    trunk = model.base_model
    return (
        trunk.layers
        if hasattr(trunk, "layers")
        else (trunk.transformer if hasattr(trunk, "transformer") else trunk.encoder).layer
    )


def encoded(model: Any) -> dict[str, Any]:
    """What an encoder and its heads compute. What stands at padding is not to be compared."""
    given = inputs(model.config)
    with outputs(numbered("layer", blocks(model))) as hidden:
        found = model(**given)
        pooled = getattr(model.base_model(**given), "pooler_output", None)
    expected = {"ids": given["input_ids"], "mask": given["attention_mask"], **hidden}
    if "token_type_ids" in given:
        expected["token_types"] = given["token_type_ids"]
    if pooled is not None:
        expected["pooled"] = pooled
    if hasattr(found, "prediction_logits"):
        expected |= {"logits": found.prediction_logits, "pair_logits": found.seq_relationship_logits}
    elif "Classification" in type(model).__name__:
        expected["class_logits"] = found.logits
    else:
        expected["logits"] = found.logits
    return expected


def make(name: str, kind: Any, config: Any, *, released_config: dict[str, Any] | None = None, seed: int = 0) -> None:
    config._attn_implementation = "eager"
    model = kind(config).float().eval()
    randomize(model, seed)
    if "Classification" not in kind.__name__:
        divide(last_norm(model), mlm_logits(model)[inputs(config)["attention_mask"] == 1].std())
    expected = encoded(model)
    folder = write(name, released_config or own_config(model), released(model), expected)
    check(folder, kind, expected)


def check(folder: Any, kind: Any, expected: Any, computed: Any = ()) -> None:
    key = "class_logits" if "Classification" in kind.__name__ else "logits"
    forward = mlm_logits if key == "logits" else lambda model: model(**inputs(model.config)).logits
    check_reads(folder, kind, forward, torch.as_tensor(expected[key]), computed)


def make_bert_pretraining() -> None:
    config = BERT | {"architectures": ["BertForPreTraining"]}
    make("bert_pretraining", BertForPreTraining, BertConfig.from_dict(BERT), released_config=config)


def make_bert_mlm() -> None:
    make("bert_mlm", BertForMaskedLM, BertConfig.from_dict(BERT), seed=1)


def make_bert_classifier() -> None:
    make("bert_classifier", BertForSequenceClassification, BertConfig.from_dict(BERT | CLASSES), seed=2)


def make_bert_bin() -> None:
    """As transformers saved for years: the tied head again, and the positions' numbers."""
    tensors = load_file(GOLDENS / "bert_pretraining" / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(NUM_POSITIONS)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"]
    expected = np.load(GOLDENS / "bert_pretraining" / "expected.npz")
    config = BERT | {"architectures": ["BertForPreTraining"]}
    folder = write("bert_bin", config, tensors, expected, pickled=True)
    check(folder, BertForPreTraining, expected, ("position_ids",))


def make_bert_old_names() -> None:
    """The first files, converted from TensorFlow: gamma and beta; the tied head's weight again, not its bias."""
    tensors = load_file(GOLDENS / "bert_pretraining" / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"]
    tensors = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    expected = np.load(GOLDENS / "bert_pretraining" / "expected.npz")
    newer = ("position_embedding_type", "use_cache", "transformers_version", "gradient_checkpointing")
    config = {key: value for key, value in BERT.items() if key not in newer}
    folder = write("bert_old_names", config, tensors, expected, pickled=True)
    check(folder, BertForPreTraining, expected)


def make_roberta_mlm() -> None:
    make("roberta_mlm", RobertaForMaskedLM, RobertaConfig.from_dict(ROBERTA), seed=3)


def make_roberta_classifier() -> None:
    make("roberta_classifier", RobertaForSequenceClassification, RobertaConfig.from_dict(ROBERTA | CLASSES), seed=4)


def make_roberta_bin() -> None:
    """As roberta-base was released: a pooler (unused by the head), the tied head again, the positions' numbers."""
    tensors = load_file(GOLDENS / "roberta_mlm" / "model.safetensors")
    width = ROBERTA["hidden_size"]
    generator = torch.Generator().manual_seed(5)
    tensors["roberta.pooler.dense.weight"] = torch.randn(width, width, generator=generator) * 1.5 / width**0.5
    tensors["roberta.pooler.dense.bias"] = torch.randn(width, generator=generator) * 0.5
    tensors["roberta.embeddings.position_ids"] = torch.arange(NUM_POSITIONS + 2)[None]
    tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"]
    expected = dict(np.load(GOLDENS / "roberta_mlm" / "expected.npz"))
    first = torch.from_numpy(expected[f"layer_{NUM_LAYERS - 1}"][:, 0])
    pooler = [tensors[f"roberta.pooler.dense.{part}"] for part in ("weight", "bias")]
    expected["pooled"] = torch.nn.functional.linear(first, *pooler).tanh()
    folder = write("roberta_bin", ROBERTA, tensors, expected, pickled=True)
    computed = ("position_ids", "pooler.dense.weight", "pooler.dense.bias")
    check(folder, RobertaForMaskedLM, expected, computed)


CASES = {
    "bert_pretraining": make_bert_pretraining,
    "bert_mlm": make_bert_mlm,
    "bert_classifier": make_bert_classifier,
    "bert_bin": make_bert_bin,
    "bert_old_names": make_bert_old_names,
    "roberta_mlm": make_roberta_mlm,
    "roberta_classifier": make_roberta_classifier,
    "roberta_bin": make_roberta_bin,
}
