"""JSON Schema of recipes, for editors that complete and check while one types."""

from __future__ import annotations

from typing import Any

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(task: str | None = None) -> dict[str, Any]:
    """Return the schema of one task's recipes, or of all tasks': one alternative for each.

    Args:
        task: a task; None takes all that the plugins bring.

    Raises:
        RequestError: there is no such task.
    """
    from pydantic.json_schema import models_json_schema

    from ..hooks.manager import plugins
    from .tasks import recipe_class, trainer_of

    specs = [trainer_of(task)] if task else list(plugins().trainers().values())
    models = {spec.task: recipe_class(spec) for spec in specs}
    references, shared = models_json_schema([(model, "validation") for model in models.values()])
    whole: dict[str, Any] = {"$schema": _DIALECT, "title": "A recipe of lora-adapters"}
    chosen = [references[model, "validation"] for model in models.values()]
    if task:
        whole |= {"title": f"A {task} recipe of lora-adapters", **chosen[0]}
    else:
        mapping = {name: reference["$ref"] for name, reference in zip(models, chosen, strict=True)}
        whole |= {"oneOf": chosen, "discriminator": {"propertyName": "task", "mapping": mapping}}
    return whole | {"$defs": shared.get("$defs", {})}
