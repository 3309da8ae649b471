"""SentencePiece models of XLM-RoBERTa, whose special tokens have the ids of fairseq's dictionary."""

from typing import Any

from sentencepiece import sentencepiece_model_pb2

# The wheel's classes are made when it is imported: type checkers do not see them.
ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]


def in_fairseq_order(model: bytes) -> bytes:
    """Return a model that begins with <s>, <pad>, </s> and <unk> and ends with <mask>, made of one as it is released.

    Raises ValueError for a model that does not begin with <unk>, <s> and </s>.
    """
    changed = ModelProto.FromString(model)
    if [piece.piece for piece in changed.pieces[:3]] != ["<unk>", "<s>", "</s>"]:
        raise ValueError("its first pieces are not <unk>, <s> and </s>, to which its class gives other ids")
    unk, bos, eos, *pieces = changed.pieces
    pad, mask = (ModelProto.SentencePiece(piece=name, type=bos.type) for name in ("<pad>", "<mask>"))
    del changed.pieces[:]
    changed.pieces.extend([bos, pad, eos, unk, *pieces, mask])
    for i, name in enumerate(("bos", "pad", "eos", "unk")):
        setattr(changed.trainer_spec, f"{name}_id", i)
    return changed.SerializeToString()
