"""Recipes of any content: what is valid survives being written and read, what is not gives an error and nothing else."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_adapters_timm.recipes import ImageRecipe
from lora_adapters_transformers.recipes import CausalLMRecipe, ClassificationRecipe, RewardRecipe, Seq2SeqRecipe

from lora_adapters.errors import LoraAdaptersError
from lora_adapters.recipes.reading import dump, read_recipe, validate
from lora_adapters.recipes.sections import Recipe, Section
from lora_adapters.recipes.yaml_text import emit, parse

RECIPES = [CausalLMRecipe, Seq2SeqRecipe, ClassificationRecipe, RewardRecipe, ImageRecipe]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["yes", "null", "1e3", "2e-4", "0x10", "1_000", "2024-01-01", "~", "a: b", "{q}\n{a}", " x ", "=", "- a"]
    ),
)
# Python writes no lone surrogate to a file, so no recipe holds one.
TEXTS = TEXTS.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
settings.register_profile("recipes", deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))


def values(annotation: Any, bounds: Sequence[Any] = ()) -> st.SearchStrategy:
    """Values that a field's annotation allows."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    limits = {name: getattr(b, name) for b in bounds for name in ("ge", "gt", "le", "lt") if hasattr(b, name)}
    if origin is Annotated:
        return values(arguments[0], [part for extra in arguments[1:] for part in extra.metadata])
    if origin in (Union, types.UnionType):
        return st.one_of(*(values(argument, bounds) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(TEXTS, values(arguments[1]), max_size=3)
    if annotation is int:
        low, high = limits.get("ge", -(2**40)), limits.get("le", limits.get("lt", 2**40 + 1) - 1)
        return st.integers(low, high)
    if annotation is float:
        return st.floats(
            limits.get("ge", limits.get("gt", -1e300)),
            limits.get("le", limits.get("lt", 1e300)),
            exclude_min="gt" in limits,
            exclude_max="lt" in limits,
        )
    if annotation in (type(None), bool, str):
        return {type(None): st.none(), bool: st.booleans(), str: TEXTS}[annotation]
    assert issubclass(annotation, Section)
    return section(annotation)


def section(model: type[Section]) -> st.SearchStrategy:
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    drawn = {name: values(field.annotation, field.metadata) for name, field in fields.items()}
    required = {name: drawn.pop(name) for name, field in fields.items() if field.is_required()}
    return st.fixed_dictionaries(required, optional=drawn)


def one_form(recipe: dict[str, Any]) -> dict[str, Any]:
    """Leave out what contradicts something else."""
    data = recipe["data"]
    for one, others in [
        ("eval", ("eval_fraction", "eval_split")),
        ("eval_split", ("eval_fraction",)),
        ("messages", ("text", "prompt", "completion") if recipe["task"] == "causal-lm" else ()),
        ("text", ("prompt", "completion")),
    ]:
        if data.get(one) is not None:
            for other in others:
                data.pop(other, None)
    if recipe["task"] == "causal-lm" and (data.get("prompt") is None or data.get("completion") is None):
        data.pop("prompt", None)
        data.pop("completion", None)
    if recipe["task"] == "image-classification":
        augmentation, model = recipe.setdefault("augmentation", {}), recipe["model"]
        for name in ("scale", "ratio"):  # pairs in order
            augmentation.pop(name, None)
        if not augmentation.get("enabled", True):
            recipe["augmentation"] = {"enabled": False}
        if not model.get("pretrained", True):
            model.pop("checkpoint", None)
    if recipe.get("resume"):
        recipe.pop("overwrite", None)
    return recipe


recipes = st.one_of(*(section(model) for model in RECIPES)).map(one_form)
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def allowed(read, *arguments) -> None:
    """Assert that reading gives a recipe or an error meant for the user, whose lines are printable."""
    try:
        message, found = "-", read(*arguments)
    except LoraAdaptersError as error:
        message, found = str(error), None
    assert all(line.isprintable() and line for line in message.split("\n"))
    assert found is None or isinstance(found, Recipe)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@settings(settings.get_profile("recipes"))
@given(value=recipes)
def test_a_recipe_survives_being_written_and_read(file, value):
    recipe = validate(value)
    text = dump(recipe)
    file.write_text(text, encoding="utf-8", newline="")
    again = read_recipe(file)
    assert again == recipe
    assert dump(again) == text
    assert again.model_dump(by_alias=True, exclude_unset=False) == parse(text, "r").value


@settings(settings.get_profile("recipes"))
@given(value=junk)
def test_plain_values_survive_being_written_and_read(value):
    numbers = parse(emit([value]), "r").value if no_giant(value) else [value]
    assert repr(numbers) == repr([value])


def no_giant(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(no_giant, value.values()))
    if isinstance(value, list):
        return all(map(no_giant, value))
    return not isinstance(value, int) or len(str(value)) <= 24


@settings(settings.get_profile("recipes"))
@given(value=recipes, path=st.lists(st.integers(0, 30), min_size=1, max_size=4), new=junk, key=st.none() | TEXTS)
def test_a_recipe_with_something_else_in_one_place(value, path, new, key):
    place: Any = value
    for index in path:
        inside = [
            inner for inner in (place.values() if isinstance(place, dict) else place) if isinstance(inner, (dict, list))
        ]
        if not inside or not index:
            break
        place = inside[index % len(inside)]
    if isinstance(place, list):
        place.append(new)
    elif key is None and place:
        place[list(place)[path[-1] % len(place)]] = new
    else:
        place[key or ""] = new
    allowed(validate, value)


@settings(settings.get_profile("recipes"))
@given(value=recipes, data=st.data())
def test_a_file_with_wrong_characters(file, value, data):
    text = dump(validate(value))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        length = data.draw(st.integers(0, 6))
        new = data.draw(
            st.text(
                st.one_of(
                    st.sampled_from("\t\n :-[]{}&*!|>'\"%@`#,?\\\x00\x85\u2028\ufeff"), st.characters(codec="utf-8")
                ),
                max_size=4,
            )
        )
        text = text[:at] + new + text[at + length :]
    file.write_bytes(text.encode())
    allowed(read_recipe, file)


@settings(settings.get_profile("recipes"))
@given(
    content=st.one_of(
        st.binary(max_size=200),
        TEXTS.map(str.encode),
        st.text("ab:[]{}-\"'!&* \n\t#|>%?,0.e", max_size=40).map(str.encode),
    )
)
def test_a_file_of_anything(file, content):
    file.write_bytes(content)
    allowed(read_recipe, file)


KEYS = st.sampled_from(
    ["task", "model.name", "adapter.targets", "adapter.targets.q", "data.train", "training.epochs", "x"]
)


@settings(settings.get_profile("recipes"))
@given(value=recipes, overrides=st.lists(st.one_of(TEXTS, st.tuples(KEYS, TEXTS).map("=".join)), max_size=4))
def test_overrides_of_anything(file, value, overrides):
    file.write_text(dump(validate(value)), encoding="utf-8", newline="")
    allowed(read_recipe, file, overrides)
