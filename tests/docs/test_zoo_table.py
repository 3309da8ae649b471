"""The README's table of the zoo is what `docs/zoo_table.py` writes."""

from pathlib import Path

import pytest
import zoo_table

import llama_jax
from llama_jax import zoo
from llama_jax.data import objectives

README = (Path(__file__).resolve().parents[2] / "README.md").read_text("utf-8")
FAMILIES = zoo.all_presets()
# Pairs of texts want a head that the released encoders are given or not.
OPTIONS = {"MaskedLM": {"next_sentence": False}}


def test_table_is_the_package_s():
    """All but the errors, which the parity tests bound: measuring takes as long as those."""
    found, errors = zoo_table.written(README)
    assert found == zoo_table.zoo_table(errors) + "\n", "run: python docs/zoo_table.py"


def test_every_family_with_goldens_has_a_small_error():
    _, errors = zoo_table.written(README)
    assert set(errors) == set(zoo_table.model_types().values())
    assert all(0 < float(error) < 5e-5 for error in errors.values())


def test_every_family_with_weights_has_goldens():
    assert set(zoo.families()) == set(zoo_table.model_types().values())


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_models_take_what_their_objectives_give(name):
    for objective in FAMILIES[name].objectives:
        fields = set(getattr(objectives, objective)(**OPTIONS.get(objective, {})).fields())
        for preset, config in FAMILIES[name].presets.items():
            assert fields <= config.batch_fields, (preset, objective)


def test_titles_tell_families_apart():
    titles = [family.title for family in FAMILIES.values()]
    assert len(set(titles)) == len(titles)
    assert all(0 < len(title) < 50 for title in titles)
    assert sum(len(family.presets) for family in FAMILIES.values()) == len(llama_jax.presets())
