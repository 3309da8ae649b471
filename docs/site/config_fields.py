"""Extension of griffe: a docstring's lines `name: meaning.` about fields become its section of attributes."""

import re

import griffe

FIELD = re.compile(r"(\w+): \S")


class ConfigFields(griffe.Extension):
    """Mark the lines about a dataclass's fields as its attributes."""

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        if cls.docstring is not None:
            cls.docstring.value = with_section(cls.docstring.value, set(cls.attributes))


def with_section(text: str, fields: set[str]) -> str:
    """Return the docstring with `Attributes:` before each run of lines about `fields`, and these indented."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        begins = (match := FIELD.match(line)) is not None and match[1] in fields
        if begins and not inside:
            lines += ["", "Attributes:"]
        inside = begins or (inside and line.startswith(" "))
        lines.append(f"    {line}" if begins else f"        {line.strip()}" if inside else line)
    return "\n".join(lines)
