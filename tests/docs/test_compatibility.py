"""docs/compatibility.md is what the package's own tables say."""

import compatibility


def test_page_is_the_package_s():
    assert compatibility.PAGE.read_text("utf-8") == compatibility.page(), "run: python docs/compatibility.py"
