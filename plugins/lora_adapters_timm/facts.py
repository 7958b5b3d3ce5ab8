"""What an adapter's file says of its timm model, beside PEFT's config: enough to build the model again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_adapters.adapter_config import parse_json
from lora_adapters.errors import CheckpointError

_ARCHITECTURE, _MADE_WITH = "timm.architecture", "timm.arguments"
_MAX_CHARACTERS = 2**14
#: Arguments that choose files, addresses or places: never written, and never taken from a file.
_NOT_KEPT = re.compile(r"pretrained.*|checkpoint.*|cache_dir|.*(file|url)|device|dtype|scriptable|exportable|no_jit")


@dataclass(frozen=True)
class Facts:
    """Read off a model or a file.

    Attributes:
        architecture: what timm.create_model takes, with the tag of the pretrained weights if there is one; None if unknown.
        arguments: of timm.create_model, num_classes among them.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """Read off a timm model. An argument that is no plain value (a class) can't be kept, so none is."""
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        name, tag = config.get("architecture"), config.get("tag")
        given = vars(model).get("_model_args", {})
        arguments = {key: value for key, value in given.items() if not _NOT_KEPT.fullmatch(key) and value is not None}
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and not arguments.get("features_only"):
            arguments["num_classes"] = classes
        if not all(map(_is_plain, arguments.values())):
            return cls()
        return cls(f"{name}.{tag}" if name and tag else name, arguments)

    def entries(self) -> dict[str, str]:
        """Return what goes into a file's header; nothing if the architecture is unknown."""
        text = json.dumps(dict(self.arguments))
        if self.architecture is None or len(text) > _MAX_CHARACTERS:
            return {}
        return {_ARCHITECTURE: self.architecture, _MADE_WITH: text}

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Facts:
        """Read a file's header. It is data of an untrusted file: bounded, typed, and without names of files.

        Raises:
            CheckpointError: it is damaged.
        """
        name, text = metadata.get(_ARCHITECTURE), metadata.get(_MADE_WITH, "{}")
        hint = "Get the adapter from its author again."
        if len(text) > _MAX_CHARACTERS or (name is not None and not re.fullmatch(r"[\w.-]{1,200}", name)):
            raise CheckpointError(f"The adapter's file holds a damaged {_ARCHITECTURE} or {_MADE_WITH}. {hint}")
        arguments = parse_json(text.encode("utf-8", "replace"), f"The entry {_MADE_WITH} of the adapter's file")
        strange = [key for key, value in arguments.items() if not _is_argument(key, value)]
        if strange:
            raise CheckpointError(f"The adapter's file holds a {_MADE_WITH} with {strange[0]!r:.100}. {hint}")
        return cls(name, arguments)


def _is_argument(name: str, value: Any) -> bool:
    return re.fullmatch(r"[A-Za-z]\w{0,99}", name) is not None and not _NOT_KEPT.fullmatch(name) and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 1000 and all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float) or (type(value) is str and len(value) <= 1000)
