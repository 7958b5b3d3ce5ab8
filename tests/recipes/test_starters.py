"""The recipes to start from: every one is valid as it is, and filling them in leaves the comments alone."""

import warnings

import pytest

from lora_adapters.errors import RequestError
from lora_adapters.hooks.manager import plugins
from lora_adapters.recipes.reading import read_recipe, validate
from lora_adapters.recipes.starters import data_key, filled, starter, starters
from lora_adapters.recipes.yaml_text import parse, replace

NAMES = sorted(starters())


def test_every_task_has_one():
    assert {one.task for one in starters().values()} == set(plugins().trainers())
    assert {"causal-lm", "causal-lm-chat", "causal-lm-text", "seq2seq", "text-classification", "reward"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_explained(name, tmp_path):
    one = starter(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(one.text)
    assert read_recipe(path).task == one.task
    assert name == one.task or name.startswith(f"{one.task}-")
    assert one.summary
    # What is commented out works as well.
    lines = one.text.splitlines()
    for index, line in enumerate(lines):
        bare = line.strip().removeprefix("# ")
        key = bare.partition(":")[0]
        if line.strip().startswith("#") and key in ("quantization", "system", "labels", "text_pair") and ": " in bare:
            indent = line[: len(line) - len(line.lstrip())]
            without_note = bare.split("  #")[0]
            path.write_text("\n".join([*lines[:index], indent + without_note, *lines[index + 1 :]]))
            read_recipe(path)
    assert all(len(line) <= 120 for line in lines)


@pytest.mark.parametrize("value", ["org/model", "a, b", "x: y", "#", "yes", "", "1e3", "[a]", "é\n", "'", '"', "C:\\x"])
@pytest.mark.parametrize("name", NAMES)
def test_filling_in_changes_that_value_only(name, value):
    text = starter(name).text
    data = data_key(starter(name).task)
    paths = [("model", "name"), data, ("output",)]
    new = filled(text, dict.fromkeys(paths, value))
    recipe = validate(parse(new, "r").value)
    assert [recipe.model.name, getattr(recipe.data, data[1]), recipe.output] == [value] * 3
    changed = [(a, b) for a, b in zip(text.splitlines(), new.splitlines(), strict=True) if a != b]
    assert len(changed) == 3
    assert all(a.split(":")[0] == b.split(":")[0] for a, b in changed)


@pytest.mark.parametrize("value", ["a, b", "a}", "x", None, 3, True, 2e-5, "yes"])
def test_replacing_inside_braces(value):
    new = replace("a: {b: 1, c: [d]} # kept\ne: 2", ("a", "b"), value)
    assert parse(new, "r").value == {"a": {"b": value, "c": ["d"]}, "e": 2}
    assert "# kept" in new
    with pytest.raises(KeyError):
        replace("a: 1", ("a", "b"), value)


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(RequestError, match=r"Did you mean 'causal-lm-chat'\?"):
        starter("causal-lm-cht")


def test_a_plugin_whose_recipes_are_missing_takes_nothing_from_the_others():
    from lora_adapters.errors import PluginWarning
    from lora_adapters.hooks import hookimpl
    from lora_adapters.hooks.specs import TrainerSpec

    class Plugin:
        LORA_ADAPTERS_HOOK_API = 1

        @hookimpl
        def lora_adapters_trainers(self):
            return [TrainerSpec("mine", "Mine.", "a:B", "a:C", examples="no_such_package:examples")]

    plugins().register(Plugin(), "mine")
    try:
        with pytest.warns(PluginWarning, match="no_such_package:examples are left out"):
            found = starters()
    finally:
        plugins().unregister("mine")
    assert sorted(found) == NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sorted(starters()) == NAMES
