"""What an adapter's file says of its timm model, beside PEFT's config: enough to build the model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lora_adapters.errors import CheckpointError

#: Where a model keeps how it was made: a JSON object of arguments of timm.create_model.
ARGUMENTS = "_lora_adapters_arguments"
_ARCHITECTURE, _MADE_WITH = "timm.architecture", "timm.arguments"


@dataclass(frozen=True)
class Facts:
    """Read off a model or a file.

    Attributes:
        architecture: what timm.create_model takes, with the tag of the pretrained weights if there is one; None if unknown.
        arguments: of timm.create_model.
    """

    architecture: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Facts:
        """Read off a timm model."""
        config: Any = getattr(model, "pretrained_cfg", None) or {}
        name, tag = config.get("architecture"), config.get("tag")
        arguments = json.loads(vars(model).get(ARGUMENTS, "{}"))
        classes = getattr(model, "num_classes", None)
        if isinstance(classes, int) and not arguments.get("features_only"):
            arguments["num_classes"] = classes
        return cls(f"{name}.{tag}" if name and tag else name, arguments)

    def entries(self) -> dict[str, str]:
        """Return what goes into a file's header."""
        found = {_MADE_WITH: json.dumps(dict(self.arguments))}
        return found | ({_ARCHITECTURE: self.architecture} if self.architecture else {})

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> Facts:
        """Read a file's header.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            arguments = json.loads(metadata.get(_MADE_WITH, "{}"))
        except ValueError as error:
            raise CheckpointError(f"The adapter's file holds a damaged {_MADE_WITH}: {error}") from error
        if not isinstance(arguments, dict):
            raise CheckpointError(f"The adapter's file holds a {_MADE_WITH} that is no mapping.")
        return cls(metadata.get(_ARCHITECTURE), arguments)
