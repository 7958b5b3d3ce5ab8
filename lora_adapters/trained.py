"""The modules that are trained and saved whole, beside the adapter: what modules_to_save means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .attach_plan import PlannedLayer
from .backends import base_of
from .errors import NoTargetError, RequestError, UnsupportedError
from .request import AttachRequest
from .sharing import places_of

if TYPE_CHECKING:
    from torch import nn


#: PEFT's task type -> what its class for the task trains whole, asked or not, by the ends of the names.
PEFT_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def modules_meant(model: nn.Module, key: str) -> dict[str, nn.Module]:
    """Return name -> module of what PEFT takes a `modules_to_save` entry to mean, seen through its wrappers."""
    return {
        name: getattr(module, "original_module", module)  # type: ignore[misc]
        for name, module in model.named_modules()
        if name.endswith(key) and ".modules_to_save" not in name and ".original_module" not in name
    }


def trained_names(model: nn.Module, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Return full names of the modules that `modules_to_save` means."""
    from .weights import store_for

    found: dict[str, nn.Module] = {}
    for key in wanted:
        matched = modules_meant(model, key)
        if not matched:
            raise NoTargetError(f"modules_to_save {key!r} matches no module of {type(model).__name__}.")
        found |= matched
    for name, module in found.items():
        stores = (store_for(part) for part in module.modules())
        if any(store is not None and store.format != "dense" for store in stores):
            raise UnsupportedError(
                f"{name!r} can't be trained whole: it is quantized. Adapt it instead (name it in targets), or load the "
                "model with this module dense: quantization as a mapping of the roles to quantize, or a "
                "BitsAndBytesConfig with llm_int8_skip_modules."
            )
    return tuple(found)


def task_type_without_head(
    model: nn.Module, trained: tuple[str, ...], task_type: str | None, request: AttachRequest
) -> tuple[str | None, tuple[str, ...]]:
    """Return the task type to give PEFT, and notes about it.

    PEFT's classes for some tasks train the head whole, asked or not, also in a loaded adapter. Where `trained` (full
    names) leaves the head out, no task type is the form that means the same here and in stock PEFT.

    Raises:
        RequestError: the user asked for that task type.
    """
    heads = (name for key in PEFT_HEADS.get(task_type or "", ()) for name in modules_meant(model, key))
    head = next((name for name in heads if name not in trained), None)
    if head is None:
        return task_type, ()
    kind = getattr(task_type, "value", task_type)
    if request.peft_fields.get("task_type") and request.exact is None:
        raise RequestError(
            f"task_type={kind!r} makes PEFT train {head!r} whole, and modules_to_save leaves it out. Add it to "
            "modules_to_save, or leave out task_type."
        )
    note = (
        f"{head!r} is not trained whole, which PEFT's class for {kind} would do: the adapter gets no task type, and its "
        "file holds no head, so load it onto a base with this one."
    )
    return None, (note,)


def refuse_shared(trained: tuple[str, ...], model: nn.Module) -> None:
    """Raise if a module to train whole is registered more than once: PEFT would train a copy in the first place only."""
    places = places_of(model) if trained else {}
    for name in trained:
        count = len(places.get(id(model.get_submodule(name)), ()))
        if count > 1:
            raise UnsupportedError(
                f"{name!r} can't be trained whole: the model holds it in {count} places, and PEFT would train a copy in "
                "the first one while the others keep the old weights. Adapt it instead: leave it out of modules_to_save "
                "(modules_to_save=[] trains none) and name it in targets."
            )


def inside(name: str, parents: tuple[str, ...]) -> bool:
    """Return True if `name` is one of `parents` or lies in one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def count_trained(
    model: nn.Module, trained: tuple[str, ...], request: AttachRequest, layers: list[PlannedLayer]
) -> int:
    """Return the number of values that train beside the adapter: those modules, and biases."""
    modules = (model.get_submodule(name) for name in trained)
    # A module that an earlier adapter trains too is counted as the base has it: each adapter gets a copy of that.
    plain = [getattr(module, "original_module", module) for module in modules]
    parameters = {id(p): p for module in plain for p in module.parameters()}
    bias = request.peft_fields.get("bias", "none")
    if bias == "all":
        parameters |= {id(p): p for n, p in model.named_parameters() if n == "bias" or n.endswith(".bias")}
    elif bias == "lora_only":
        biases = (getattr(base_of(model.get_submodule(layer.name)), "bias", None) for layer in layers)
        parameters |= {id(p): p for p in biases if p is not None}
    return sum(p.numel() for p in parameters.values())
