"""The help of a config: its keys, with type, value and meaning."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType

from llama_jax.config import UserError, component_choices, field_docs, leaves
from llama_jax.values import near_keys, type_name


def key_help(args: argparse.Namespace, module: ModuleType, config: object, common: Sequence[str]) -> str:
    """Return keys of a config by section, with type, value and meaning: `common` ones, all, or those asked for.

    Raises UserError where no key matches a word.
    """
    docs: dict[str, str] = {}

    def collect(part: object, prefix: str) -> None:
        for field, text in field_docs(type(part)).items():
            docs[prefix + field] = text
            collect(getattr(part, field), f"{prefix}{field}.")

    collect(config, "")
    docs["run"] = "steps, batch and first values."
    entries: dict[str, str] = {}
    for key, annotation, value in leaves(config):
        shown = type(value).__name__ if dataclasses.is_dataclass(value) else value
        if isinstance(value, tuple):
            shown = ",".join(str(v) for v in value) or "(empty)"
        kind = type_name(annotation)
        if options := component_choices(annotation):
            kind += f": {'|'.join(options)}"
        entries[key] = f"  --{key.replace('_', '-')} <{kind}> = {shown}\n      {docs.get(key, '')}"
    sections: dict[str, list[str]] = {}
    wanted = set(entries if args.help == ["all"] else common if not args.help else keys_about(entries, args.help))
    for key in (key for key in entries if key in wanted):
        section = key.partition(".")[0]
        sections.setdefault(section if any(k.startswith(f"{section}.") for k in entries) else "run", []).append(
            entries[key]
        )
    lines = [f"{(module.__doc__ or '').strip()}\n", f"keys of {args.config}, with type, value and meaning:"]
    for section, texts in sections.items():
        about = f": {docs[section]}" if section in docs else ""
        lines += ["", f"{section}{about}", *texts]
    if args.help != ["all"]:
        lines.append(
            f"\n`--help all` lists all {len(entries)} keys, `--help optimizer` those of a section or about a word; "
            "`train.py --help` the flags."
        )
    return "\n".join(lines)


def keys_about(entries: Mapping[str, str], words: Sequence[str]) -> list[str]:
    """Return the keys in a section of this name, or with this last name, or else with the word in their text.

    Raises UserError for a word that is in none.
    """
    found: list[str] = []
    for word in words:
        name = word.lstrip("-").replace("-", "_").lower()
        about = [key for key in entries if f".{name}." in f".{key}."] or [key for key in entries if name in key]
        about = about or [key for key, text in entries.items() if word.lower() in text.lower()]
        if not about:
            near = near_keys("", name, [], list(entries))
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`--help all` lists all keys"
            raise UserError(f"no key is about '{word}': {hint}")
        found += about
    return found
