"""An adapter in no file's form: component -> module -> factors, in diffusers' names. Formats read and write it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from ..errors import RequestError
from .factors import Factors

#: A part of a pipeline that an adapter can be for: what the _lora_loadable_modules of diffusers' pipelines name.
COMPONENT = re.compile(r"(unet|transformer|text_encoder)(_[0-9]+)?|transformer_ref|prior|connectors|text_conditioner")


@dataclass(frozen=True)
class PortableAdapter:
    """What an adapter's file holds.

    Attributes:
        components: "unet", "transformer", "text_encoder", "text_encoder_2", ... -> module name in diffusers -> factors.
            CLIP's modules are named "text_model.encoder...", whichever transformers names them.
        family: "sd1", "sd2", "sdxl", "sd3", "flux", or "" where the file does not tell. Only writing kohya's names needs it.
        metadata: the file's string entries about base model and training (ss_*, modelspec.*, ...). Untrusted.
        notes: what reading changed, and by how much.
    """

    components: Mapping[str, Mapping[str, Factors]]
    family: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for component in self.components:
            if not COMPONENT.fullmatch(component):
                raise RequestError(
                    f"{component[:60]!r} is no component of a pipeline. Name it unet, transformer, text_encoder, "
                    "text_encoder_2 or text_encoder_3."
                )

    def __iter__(self) -> Iterator[tuple[str, str, Factors]]:
        """Yield (component, module, factors)."""
        for component, modules in self.components.items():
            for module, factors in modules.items():
                yield component, module, factors

    def __len__(self) -> int:
        return sum(len(modules) for modules in self.components.values())

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its layers are, such as ("LoRA", "LoHa", "DoRA", "Tucker")."""
        found: dict[str, None] = {}
        for _, _, factors in self:
            found[factors.kind] = None
            if factors.magnitude is not None:
                found["DoRA"] = None
            if getattr(factors, "mid", None) is not None or getattr(factors, "t2", None) is not None:
                found["Tucker"] = None
        return tuple(found)

    def with_components(self, components: Mapping[str, Mapping[str, Factors]], *notes: str) -> PortableAdapter:
        """Return a copy with other factors, and notes on what changed."""
        return replace(self, components=components, notes=(*self.notes, *notes))
