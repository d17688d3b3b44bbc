"""docs/configuration.md and its JSON schema are what the schema says."""

import json
import re

import pytest
from conftest import ROOT

from sidfast.config.describe import json_schema, markdown
from sidfast.config.schema import Config, build_config


def test_files_are_up_to_date():
    for name, text in (("configuration.md", markdown()), ("configuration.schema.json",
                                                          json.dumps(json_schema(), ensure_ascii=False) + "\n")):
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, f"docs/{name}: run `make docs`"


def keys(section, prefix=""):
    for name, field in section.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        yield from keys(field.annotation, f"{prefix}{name}.") if inner else [(prefix + name, field)]


def test_every_key_is_explained_with_its_default():
    sections = dict(re.findall(r"^## (.*)\n([^#]*)", markdown(), re.MULTILINE))
    tables = {name: text for names, text in sections.items() for name in names.split(", ")}
    for key, field in keys(Config):
        section, _, name = key.rpartition(".")
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        assert field.description, key
        if section:
            assert re.search(rf"^\| `{name}` \| .* \| {re.escape(default)} \| ..", tables[section], re.MULTILINE), key


@pytest.mark.parametrize("name", [path.name for path in (ROOT / "configs").glob("*.json")])
def test_shipped_configurations_have_the_schema_s_keys(name):
    """Their sections and keys are in the JSON schema, and what it requires is there."""
    values, schema = json.loads((ROOT / "configs" / name).read_text()), json_schema()
    build_config(values, name)

    def check(value, kind):
        kind = schema["$defs"][kind["$ref"].rpartition("/")[2]] if "$ref" in kind else kind
        if kind.get("additionalProperties") is False:
            assert set(kind.get("required", ())) <= value.keys() <= kind["properties"].keys()
            for key, inner in value.items():
                check(inner, kind["properties"][key])

    check(values, schema)
