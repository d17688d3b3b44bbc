"""The bugs of mutations.json can be put in: a change of the code takes them along."""

import json

import pytest
from conftest import ROOT

MUTATIONS = json.loads((ROOT / "tests" / "mutations.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation["name"] for mutation in MUTATIONS])
def test_mutation_occurs_once(mutation):
    count = (ROOT / mutation["file"]).read_text(encoding="utf-8").count(mutation["old"])
    assert count == 1, f"{mutation['file']} has {mutation['old']!r} {count} times"
    assert mutation["new"] != mutation["old"]
    for test in mutation["tests"]:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert f"def {name.partition('[')[0]}(" in text if name else text, f"{test} is not there"


def test_names_differ():
    assert len({mutation["name"] for mutation in MUTATIONS}) == len(MUTATIONS)
