"""A recipe's `adapter:` as `lora_adapters.attach` takes it."""

from __future__ import annotations

import re
from typing import Any

from ..error_text import did_you_mean
from ..errors import RequestError
from .sections import AdapterSection

#: A recipe's name of an adapter setting -> `attach`'s, where they differ.
_PEFT_NAMES = {"init": "init_lora_weights", "dora": "use_dora", "rslora": "use_rslora"}
#: Starts of A and B that a recipe can ask for, and those that need data or settings that it does not hold.
_STARTS = ("gaussian", "orthogonal", "pissa", "olora")
_STARTS_FROM_DATA = ("eva", "corda", "loftq", "lora_ga")


def attach_arguments(section: AdapterSection) -> dict[str, Any]:
    """Return the section as keyword arguments of `attach` and `plan`; what was left out is left to them."""
    given = {name: getattr(section, name) for name in type(section).model_fields}
    plain = {name: f.default for name, f in type(section).model_fields.items()}
    return {
        _PEFT_NAMES.get(name, name): value
        for name, value in given.items()
        if value != plain[name] or name in ("rank", "targets")
    }


def check_start(adapter: AdapterSection, quantization: Any) -> None:
    """Raise if A and B can't start as the recipe asks."""
    start = adapter.init
    if not isinstance(start, str):
        return
    if start in _STARTS_FROM_DATA:
        raise RequestError(
            f"adapter.init: {start!r} needs data or settings that a recipe can't give: use lora_adapters.attach in Python, "
            f"or take {', '.join(_STARTS)}."
        )
    if start not in _STARTS and not re.fullmatch(r"pissa_niter_[1-9]\d*", start):
        hint = did_you_mean(start, _STARTS)
        raise RequestError(f"adapter.init: there is no {start!r}.{hint} Take {', '.join(_STARTS)}, true or false.")
    if quantization is not None and start != "gaussian":
        raise RequestError(
            f"adapter.init: {start!r} is not for quantized bases (PEFT's needs dense weights): leave out "
            "model.quantization, or take adapter.init=true."
        )
