"""docs/recipes.md says what is true."""

import re
import shlex

import pytest
import recipe_reference

from lora_adapters.errors import RequestError
from lora_adapters.recipes.reading import read_recipe

PAGE = recipe_reference.PAGE.read_text(encoding="utf-8")
RECIPE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_tables_are_those_of_the_models():
    assert recipe_reference.page() == PAGE, "run: python tests/recipe_reference.py"


def test_the_recipes_are_valid(tmp_path):
    path = tmp_path / "recipe.yaml"
    texts = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    found = []
    for text in texts:
        path.write_text(text)
        found.append(read_recipe(path))
    assert [recipe.task for recipe in found] == ["causal-lm", "image-classification", "dreambooth"]
    assert found[0].training.learning_rate == 2e-4


def test_the_keys_that_timm_calls_otherwise_are_there():
    """Each key of the table's right column is one of the recipe's."""
    from lora_adapters.recipes.messages import sections_of
    from lora_adapters.recipes.tasks import recipe_class, trainer_of

    sections = sections_of(recipe_class(trainer_of("image-classification")))
    table = re.search(r"\| timm's train\.py .*?\n\n", PAGE, re.DOTALL)[0]
    section, count = "", 0
    for row in table.strip().splitlines()[2:]:
        for key in re.findall(r"`([^`]*)`", row.split("|")[2]):
            first, _, last = key.partition(":")[0].partition(".")
            section = first or section
            assert last in sections[(section,)], key
            count += 1
    assert count == 28


def test_the_overrides_work(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    block = re.search(r"## Overrides.*?```\n(.*?)```", PAGE, re.DOTALL)[1]
    recipe = read_recipe(path, shlex.split(block, comments=True))
    assert recipe.data.train == ["a.jsonl", "b.jsonl"]
    assert recipe.adapter.targets == {"q": 8, "v": 16}
    assert recipe.model.quantization is None
    assert recipe.data.text == "{question}\n{answer}"


def test_the_errors_are_the_real_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [
        "schema: 1",
        "task: causal-lm",
        "model: {name: org/model}",
        "output: runs/first",
        "adapter:",
        "  targets: [q, 3]",
    ]
    lines += ["data: {train: data.jsonl}", "training:", "  learning_rat: 1e-4"]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    with pytest.raises(RequestError) as caught:
        read_recipe("recipe.yaml", ["training.rank=3"])
    assert f"Error: {caught.value}\n" in PAGE
