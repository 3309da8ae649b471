"""docs/compatibility.md is what the package's own tables say."""

import compatibility

from llama_jax import zoo


def test_page_is_the_package_s():
    assert compatibility.PAGE.read_text("utf-8") == compatibility.page(), "run: python docs/compatibility.py"


def test_the_page_has_what_each_family_reads():
    keys = {name: set(compatibility.keys_read(zoo.family(name))) for name in zoo.families()}
    assert all({"architectures", "vocab_size", "tie_word_embeddings"} <= found for found in keys.values())
    assert {"num_labels", "classifier_dropout"} <= keys["bert"]
    assert [name for name in keys if zoo.family(name).meta] == ["llama", "ministral", "mistral", "mixtral"]
    assert "unsloth_fixed" in compatibility.harmless()["other tools"]
