"""docs/configuration.md and docs/configuration.schema.json, written from the schema: `python -m sidfast.config.describe
docs` (make docs)."""

import json
import re
import sys
from pathlib import Path

from sidfast.config.schema import Config

_LARGE = 10**6                                           # bounds from here on only keep numbers representable
_HEAD = """# Configuration

<!-- Written by `make docs` from sidfast/config/schema.py and sections.py. -->

A configuration is a JSON file of sections that names what differs from the defaults. `sidfast train --config FILE`
takes its path, or the bare name of one that comes with the package (`ddpm` is `configs/ddpm.json`).
`--set section.key=value` overrides a key; `--dry-run` prints the result with all defaults. Unknown keys, other types
and numbers that are not finite are refused in one line. Editors can check a file against
[configuration.schema.json](configuration.schema.json).

A path that begins with `assets/` or `configs/` means the file in the working directory; where that does not have it, it
means the package's own. All other paths are relative to the working directory.

Sections and equations below are those of [method.md](method.md).
"""


def markdown():
    """The text of docs/configuration.md."""
    schema = json_schema()
    return "\n".join([_HEAD, *_sections("", Config.model_fields, schema, schema["$defs"])])


def json_schema():
    """The JSON schema of a configuration file, as a dictionary."""
    return _without_titles(Config.model_json_schema())


def _without_titles(value):
    """A schema without pydantic's titles, which repeat the keys, and without defaults of sections."""
    if isinstance(value, dict):
        titled = isinstance(value.get("title"), str)
        return {key: _without_titles(item) for key, item in value.items()
                if not (key == "title" and titled) and not (key == "default" and "$ref" in value)}
    return [_without_titles(item) for item in value] if isinstance(value, list) else value


def _sections(prefix, names, section, types):
    """Lines of every section below `section`; sections of one type share a table, under the names of all of them."""
    by_type = {}
    for name in names:
        if "$ref" in section["properties"][name]:
            by_type.setdefault(section["properties"][name]["$ref"].rpartition("/")[2], []).append(name)
    for kind, same in by_type.items():
        yield f"## {', '.join(f'{prefix}{name}' for name in same)}\n"
        yield _plain(types[kind]["description"]) + "\n"
        keys = {key: value for key, value in types[kind]["properties"].items() if "$ref" not in value}
        if keys:
            yield "| key | type | default | |\n|---|---|---|---|"
            yield from (_row(key, value, key in types[kind].get("required", ())) for key, value in keys.items())
            yield ""
        yield from _sections(f"{prefix}{same[0]}.", types[kind]["properties"], types[kind], types)
    for name in names:
        if not prefix and "$ref" not in section["properties"][name]:
            yield f"## {name}\n\n{_plain(section['properties'][name]['description'])}."


def _row(key, value, required):
    default = "required" if required else f"`{json.dumps(value['default'])}`"
    cells = [f"`{key}`", ", ".join(_types(value)), default, _plain(value["description"])]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _types(value):
    """The types that a key may have, in words."""
    if "anyOf" in value:
        return [word for kind in value["anyOf"] for word in _types(kind)]
    if "const" in value or "enum" in value:
        return [f"`{json.dumps(word)}`" for word in value.get("enum", [value.get("const")])]
    if value["type"] == "null":
        return ["null"]
    if "examples" in value:
        return [f"`{json.dumps(word)}`" for word in value["examples"]]
    bounds = [f"{sign} {value[name]:g}" for name, sign in (
        ("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in value and abs(value[name]) < _LARGE]
    return [" ".join([value["type"], " and ".join(bounds)]).strip()]


def _plain(text):
    """A description on one line, with a link where it names a page."""
    return re.sub(r"(?:docs/)?\b(method|ablations|evaluation)\.md", r"[\1.md](\1.md)", " ".join(text.split()))


def write(folder):
    """Write both files to a folder."""
    (Path(folder) / "configuration.md").write_text(markdown(), encoding="utf-8")
    (Path(folder) / "configuration.schema.json").write_text(json.dumps(json_schema(), ensure_ascii=False) + "\n",
                                                            encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1])
