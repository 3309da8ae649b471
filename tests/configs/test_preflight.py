"""The preflight of every file of configs/ at its own sequence lengths: of fewer rows, fewer and smaller heads."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.config import config_names
from llama_jax.data.objectives.base import FLOATS
from llama_jax.nn.attention import attend as kernels
from llama_jax.nn.attention.attend import Call
from llama_jax.run import load_config
from llama_jax.training import kernel_check, preflight
from llama_jax.training.kernel_check import Agreement, PreflightFailed

ROWS, MOST_HEADS, MOST_HEAD_DIM = 2, 2, 16
# Targets and sources of encoder-decoders beside their config's own.
LENGTHS = [(200, 100), (300, 129), (129, 300), (512, 114)]

config_of = functools.cache(load_config)
compare, compared = kernel_check.compare, dict[str, Agreement | None]()


def compare_once(call: Call) -> Agreement | None:
    """Its comparison, or that of an equal call of another config: narrow calls of the Llamas are the same."""
    key = str(call)
    if key not in compared:
        compared[key] = compare(call)
    return compared[key]


def narrow(call: Call) -> Call:
    """The call with one group of heads, and small ones."""

    def smaller(aval: Any, heads_axis: int, heads: int) -> Any:
        shape = list(aval.shape)
        shape[heads_axis], shape[3] = heads, min(shape[3], MOST_HEAD_DIM)
        return aval.update(shape=tuple(shape))

    group = min(call.q.shape[2] // call.k.shape[1], MOST_HEADS)
    q, k, v = smaller(call.q, 2, group), smaller(call.k, 1, 1), smaller(call.v, 1, 1)
    return dataclasses.replace(call, q=q, k=k, v=v, scale=q.shape[3] ** -0.5)


def without_dropout(piece: Any) -> Any:
    """With dropout of its weights attention is the reference, which needs no preflight."""
    fields = {field.name: getattr(piece, field.name) for field in dataclasses.fields(piece)}
    changed = {name: without_dropout(part) for name, part in fields.items() if dataclasses.is_dataclass(part)}
    return dataclasses.replace(piece, **changed | ({"dropout": 0.0} if "dropout" in fields else {}))


def check(name: str, lengths: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch) -> list[Agreement]:
    """The preflight of a config, without dropout, with rows of so many target and source tokens."""
    config = config_of(name)
    model, (target, source) = without_dropout(config.model), lengths
    shapes = dict.fromkeys((*config.data.objective.fields(), "segment_ids"), target)
    if source is not None:
        shapes |= dict.fromkeys(("source_tokens", "source_positions", "source_segment_ids"), source)
    batch = {
        field: jnp.zeros((ROWS, length), jnp.float32 if field in FLOATS else jnp.int32)
        for field, length in shapes.items()
    }
    calls = kernel_check.attention_calls
    monkeypatch.setattr(kernel_check, "attention_calls", lambda *args: [narrow(call) for call in calls(*args)])
    return preflight(model, config.compute, batch)


def own_lengths(name: str) -> tuple[int, int | None]:
    config = config_of(name)
    return config.sequence_length, config.data.objective.source_length


@pytest.mark.quick("t5_small", "tiny_gru", "tiny_lstm", "tiny_ngram", "tiny_rnn")
@pytest.mark.parametrize("name", config_names())
def test_a_config_passes_at_its_own_lengths(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_check, "compare", compare_once)
    agreements = check(name, own_lengths(name), monkeypatch)
    if own_lengths(name)[0] > 128 and hasattr(config_of(name).model.attention, "num_heads"):
        assert agreements, "nothing was compared"


ENCODER_DECODERS = [name for name in config_names() if own_lengths(name)[1] is not None]


@pytest.mark.slow
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_an_encoder_decoder_passes_at_other_lengths(name: str, lengths, monkeypatch: pytest.MonkeyPatch):
    agreements = check(name, lengths, monkeypatch)
    assert agreements
    assert max(error for agreement in agreements for error in agreement.errors.values()) < 1e-2


def test_the_documents_of_a_source_are_those_of_its_target(monkeypatch: pytest.MonkeyPatch):
    """In every row there are both, some target has no source and some source no target."""
    calls = []
    monkeypatch.setattr(kernel_check, "compare", lambda call: calls.append(call))
    check("transformer_base", (200, 100), monkeypatch)
    (call,) = (call for call in calls if call.ctx.mask.key_segment_ids is not None)
    drawn = kernel_check._drawn(call)
    for target, source in zip(drawn["segment_ids"], drawn["key_segment_ids"], strict=True):
        of_target, of_source = set(target) - {0}, set(source) - {0}
        assert len(of_target & of_source) > 1
        assert of_target - of_source
        assert of_source - of_target
        for segments in (target, source):
            assert (np.diff(segments[segments > 0]) >= 0).all()


def test_cross_attention_that_loses_keys_is_refused(monkeypatch: pytest.MonkeyPatch):
    def loses(q, k, v, mask, *, scale):
        last = np.arange(k.shape[2]) == k.shape[2] - 1
        return kernels.blockwise_attention(q, jnp.where(last[:, None], 0, k).astype(k.dtype), v, mask, scale=scale)

    monkeypatch.setitem(kernels.KERNELS, "blockwise", kernels.Kernel(loses))
    with pytest.raises(PreflightFailed, match="'blockwise' disagrees with the reference"):
        check("transformer_base", (200, 100), monkeypatch)
