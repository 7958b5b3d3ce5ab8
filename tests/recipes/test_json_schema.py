"""The JSON Schema that editors get says what reading a recipe says."""

import re

import pytest

from lora_adapters.errors import LoraAdaptersError, RequestError
from lora_adapters.hooks.manager import plugins
from lora_adapters.recipes.json_schema import json_schema
from lora_adapters.recipes.messages import sections_of
from lora_adapters.recipes.reading import validate
from lora_adapters.recipes.starters import starters
from lora_adapters.recipes.tasks import recipe_class
from lora_adapters.recipes.yaml_text import parse

TASKS = sorted(plugins().trainers())


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    if isinstance(node, list):
        for value in node:
            yield from references(value)


@pytest.mark.parametrize("task", [None, *TASKS])
def test_references_lead_somewhere(task):
    made = json_schema(task)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    found = set(references(made))
    assert found
    assert {re.fullmatch(r"#/\$defs/(\w+)", one)[1] for one in found} <= set(made["$defs"])


def test_all_tasks_are_alternatives_told_apart_by_task():
    made = json_schema()
    assert len(made["oneOf"]) == len(TASKS)
    assert sorted(made["discriminator"]["mapping"]) == TASKS
    for task, reference in made["discriminator"]["mapping"].items():
        assert made["$defs"][reference.rpartition("/")[2]]["properties"]["task"]["const"] == task


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_there_and_described(task):
    defs = json_schema()["$defs"]
    model = recipe_class(plugins().trainers()[task])
    names = {(): model.__name__}
    for path, fields in sections_of(model).items():
        if path:
            inner = defs[names[path[:-1]]]["properties"][path[-1]]
            names[path] = next(references(inner)).rpartition("/")[2]
        made = defs[names[path]]
        assert set(made["properties"]) == set(fields)
        assert made["additionalProperties"] is False
        assert made["description"]
        for name, one in made["properties"].items():
            # pydantic 2.8 wraps a $ref that has a default; a section that may be left out is one of two
            section = any(key in one for key in ("$ref", "allOf")) or "$ref" in one.get("anyOf", [{}])[0]
            assert section or (one["title"] and one["description"]), name


def test_an_unknown_task():
    with pytest.raises(RequestError, match="did you mean 'reward'"):
        json_schema("rewrd")


def test_a_validator_agrees_with_reading():
    jsonschema = pytest.importorskip("jsonschema")
    made = json_schema()
    jsonschema.Draft202012Validator.check_schema(made)
    check = jsonschema.Draft202012Validator(made)
    good = [parse(one.text, "r").value for one in starters().values()]
    bad = [
        {},
        good[0] | {"schema": 2},
        good[0] | {"rank": 3},
        good[0] | {"training": {"epochs": 0}},
        good[0] | {"training": {"batch_size": 1.5}},
        good[0] | {"adapter": {"targets": 3}},
        good[0] | {"adapter": {"dropout": 1}},
        good[0] | {"model": {}},
        good[0] | {"task": "rl"},
    ]
    for value in good + bad:
        try:
            validate(value)
            right = True
        except LoraAdaptersError:
            right = False
        assert check.is_valid(value) == right, value
