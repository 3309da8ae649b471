"""docs/zoo.md and the README's list of families are what `docs/zoo_table.py` writes."""

import re
from collections.abc import Callable

import pytest
import zoo_table

import llama_jax
from llama_jax import zoo
from llama_jax.data import objectives

PAGE, README = (path.read_text("utf-8") for path in (zoo_table.PAGE, zoo_table.README))
MEASURED = zoo_table.measured_of(zoo_table.written(PAGE, "families"))
FAMILIES = zoo.all_presets()
# Pairs of texts want a head that the released encoders are given or not.
OPTIONS = {"MaskedLM": {"next_sentence": False}}


@pytest.mark.parametrize(
    ("text", "part", "wanted"),
    [
        pytest.param(PAGE, "families", lambda: zoo_table.families_table(MEASURED), marks=pytest.mark.slow),
        (PAGE, "pieces", zoo_table.pieces_table),
        (README, "families", zoo_table.families_list),
    ],
    ids=["families", "pieces", "list"],
)
def test_tables_are_the_package_s(text: str, part: str, wanted: Callable[[], str]):
    """All but errors, which the parity tests bound, and speeds: measuring takes as long as those."""
    assert zoo_table.written(text, part) == wanted(), "run: python docs/zoo_table.py"


def test_the_table_but_for_numbers_of_parameters(monkeypatch: pytest.MonkeyPatch):
    """Which each family's tests compare with the published ones."""
    counts = dict(re.findall(r"`(\w+)` ([\d,]+)", zoo_table.written(PAGE, "families")))
    names = {config: name for name, config in llama_jax.presets().items()}
    counted = lambda config: int(counts[names[config]].replace(",", ""))  # noqa: E731
    monkeypatch.setattr(llama_jax, "num_parameters", counted)
    assert zoo_table.written(PAGE, "families") == zoo_table.families_table(MEASURED), "run: python docs/zoo_table.py"


def test_every_family_with_goldens_has_a_small_error():
    assert set(MEASURED) == set(zoo_table.model_types().values())
    assert all(0 < float(error) < 5e-5 and float(speed.replace(",", "")) > 0 for error, speed in MEASURED.values())


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
    assert all(0 < len(title) < 60 for title in titles)
    assert sum(len(family.presets) for family in FAMILIES.values()) == len(llama_jax.presets())
