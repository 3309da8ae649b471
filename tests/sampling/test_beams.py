"""Beam search: the sequences and scores of transformers, whatever stands around a prompt and on any mesh."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_jax.checkpoint import LanguageModel, load
from llama_jax.config import UserError
from llama_jax.models import DecoderConfig, Model
from llama_jax.parallel import make_mesh
from llama_jax.sampling import Encoded, SamplingConfig, completed, generate, generate_text

HERE = Path(__file__).parent
GOLDENS = json.loads((HERE / "beam_goldens.json").read_text())


@pytest.mark.quick("22")
@pytest.mark.parametrize("number", range(len(GOLDENS["cases"])))
def test_sequences_and_scores_are_those_of_transformers(number: int, tmp_path: Path, lm: LanguageModel):
    name, settings, arguments, expected = GOLDENS["cases"][number]
    folder = Path(shutil.copytree(HERE.parent / "parity" / "goldens" / name, tmp_path / name))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    lm = dataclasses.replace(load(folder), tokenizer=lm.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": GOLDENS["new"], **arguments}
    eos, samples = GOLDENS["eos"][: options.pop("eos")], options.get("num_samples", 1)
    encoded = [Encoded(prompt, tuple(eos)) for prompt in GOLDENS["prompts"]]
    groups = completed(lm, ["", ""], encoded, [SamplingConfig.of(**options)] * 2)
    texts = [text for group in groups for text in group]
    assert [text.token_ids for text in texts] == [sequence for sequence, _ in expected]
    np.testing.assert_allclose([text.score for text in texts], [score for _, score in expected], rtol=1e-5)
    found = generate(lm, GOLDENS["prompts"], eos_id=eos, **options)  # rows of different lengths
    starts = np.repeat([1, 1] if lm.config.has_source else [len(p) for p in GOLDENS["prompts"]], samples)
    for row, start, (sequence, _) in zip(found, starts, expected, strict=True):
        end = start + len(sequence)
        assert row[start:end].tolist() == sequence
        assert (row[end:] == eos[0]).all()


@pytest.mark.slow
def test_one_prompt_alone_and_a_mesh_change_nothing(two_layers: DecoderConfig, model: Model, make_model):
    prompts, options = [[5, 9, 3, 2, 7], [1, 3, 4], [8]], {"num_beams": 3, "num_samples": 2, "max_new_tokens": 6}
    together = generate(model, prompts, eos_id=[2, 7], **options)
    alone = generate(model, prompts[1:2], eos_id=[2, 7], **options)
    np.testing.assert_array_equal(together[2:4, :9], alone[:, :9])
    assert not (together[0] == together[1]).all()
    sharded = make_model(two_layers, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    np.testing.assert_array_equal(generate(sharded, prompts, eos_id=[2, 7], **options), together)


def test_texts_of_beams(lm: LanguageModel):
    """No draw is made, whatever the default temperature of texts."""
    first, second = generate_text(lm, ["one fish", "blue"], num_beams=4, num_samples=2, max_new_tokens=5)
    assert len(first) == len(second) == 2
    assert generate_text(lm, ["blue", "one fish"], num_beams=4, max_new_tokens=5, seed=9) == [second[0], first[0]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0.5}, "temperature=0.5 does not go with num_beams"),
        ({"temperature": 0, "logprobs": 1}, "logprobs=1 does not go with num_beams"),
        ({"temperature": 0, "num_samples": 3}, "num_samples=3 must be at most num_beams=2"),
    ],
)
def test_what_does_not_go_with_beams(options: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        SamplingConfig.of(num_beams=2, **options)
