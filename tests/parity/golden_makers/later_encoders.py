"""Families that came after BERT and T5: XLM-RoBERTa, DistilBERT, ModernBERT, mT5."""

from golden_makers import encoder_decoders
from golden_makers.encoders import CLASSES, NUM_POSITIONS, ROBERTA, make
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    MT5Config,
    MT5ForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaForSequenceClassification,
)

XLM_ROBERTA = ROBERTA | {
    "architectures": ["XLMRobertaForMaskedLM"],
    "model_type": "xlm-roberta",
    "output_past": True,
    "position_embedding_type": "absolute",
    "use_cache": True,
}
DISTILBERT = {
    "activation": "gelu",
    "architectures": ["DistilBertForMaskedLM"],
    "attention_dropout": 0.1,
    "dim": 24,
    "dropout": 0.1,
    "hidden_dim": 40,
    "initializer_range": 0.02,
    "max_position_embeddings": NUM_POSITIONS,
    "model_type": "distilbert",
    "n_heads": 4,
    "n_layers": 3,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "transformers_version": "4.10.0.dev0",
    "vocab_size": 64,
}
# Windows of 3 tokens to each side, and of more than a text has.
MODERNBERT = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 1,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 2,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 24,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "layer_norm_eps": 1e-05,
    "local_attention": 6,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "pad_token_id": 3,
    "position_embedding_type": "absolute",
    "sep_token_id": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 64,
}
# Biases everywhere, thetas of both kinds of layers, windows longer than a text: as transformers writes it today.
MODERNBERT_BIASES = {
    "attention_bias": True,
    "classifier_activation": "relu",
    "classifier_bias": True,
    "decoder_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 24,
    "intermediate_size": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "local_attention": 64,
    "max_position_embeddings": 64,
    "mlp_bias": True,
    "norm_bias": True,
    "norm_eps": 1e-06,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "rope_parameters": {
        "full_attention": {"rope_theta": 5000.0, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 100.0, "rope_type": "default"},
    },
    "vocab_size": 64,
}
MT5 = encoder_decoders.T5_V1_1 | {
    "architectures": ["MT5ForConditionalGeneration"],
    "model_type": "mt5",
    "tokenizer_class": "T5Tokenizer",
}


def make_xlm_roberta() -> None:
    config = XLMRobertaConfig.from_dict(XLM_ROBERTA)
    make("xlm_roberta", XLMRobertaForMaskedLM, config, released_config=XLM_ROBERTA, seed=6)


def make_xlm_roberta_classifier() -> None:
    config = XLMRobertaConfig.from_dict(XLM_ROBERTA | CLASSES)
    make("xlm_roberta_classifier", XLMRobertaForSequenceClassification, config, seed=7)


def make_distilbert() -> None:
    config = DistilBertConfig.from_dict(DISTILBERT)
    make("distilbert", DistilBertForMaskedLM, config, released_config=DISTILBERT, seed=8)


def make_distilbert_classifier() -> None:
    """With fixed sinusoids, which the file has."""
    config = DistilBertConfig.from_dict(DISTILBERT | CLASSES | {"sinusoidal_pos_embds": True})
    make("distilbert_classifier", DistilBertForSequenceClassification, config, seed=9)


def make_modernbert() -> None:
    config = ModernBertConfig.from_dict(MODERNBERT)
    make("modernbert", ModernBertForMaskedLM, config, released_config=MODERNBERT, seed=10)


def make_modernbert_biases() -> None:
    make("modernbert_biases", ModernBertForMaskedLM, ModernBertConfig(**MODERNBERT_BIASES), seed=11)


def make_mt5() -> None:
    config = MT5Config.from_dict(MT5)
    encoder_decoders.make("mt5", MT5ForConditionalGeneration, config, MT5, untie=True, gain=1.0)


CASES = {
    "xlm_roberta": make_xlm_roberta,
    "xlm_roberta_classifier": make_xlm_roberta_classifier,
    "distilbert": make_distilbert,
    "distilbert_classifier": make_distilbert_classifier,
    "modernbert": make_modernbert,
    "modernbert_biases": make_modernbert_biases,
    "mt5": make_mt5,
}
