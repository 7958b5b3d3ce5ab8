"""The adapters of a pipeline's denoiser and text encoders as one: planned, trained and saved together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import set_peft_model_state_dict
from torch import nn

import lora_adapters as la
from lora_adapters.adapter_file import PREFIX, inspect_adapter, read_adapter
from lora_adapters.attach_plan import AttachPlan, PlannedLayer
from lora_adapters.errors import RequestError
from lora_adapters.recipes.adapting import attach_arguments, check_start
from lora_adapters.recipes.sections import AdapterSection

from .. import exchange

if TYPE_CHECKING:
    from lora_adapters.adapter import Adapter

    from ..pipeline import LoraPipeline
    from ..recipes import PipelineAdapter

#: Starts of A and B that leave the base's weights as they are: one file holds the adapter then.
_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class PipelinePlan(AttachPlan):
    """Plans of several components as one; a layer's name begins with its component.

    Attributes:
        parts: component -> its own plan, the denoiser's first.
    """

    parts: Mapping[str, AttachPlan] = field(default_factory=dict)


def combined(parts: Mapping[str, AttachPlan]) -> PipelinePlan:
    """Return the plan of all components."""
    first = next(iter(parts.values()))
    shared = {f.name: getattr(first, f.name) for f in dataclasses.fields(AttachPlan)}

    def named(items: Any, component: str) -> list[Any]:
        return [dataclasses.replace(item, name=f"{component}.{item.name}") for item in items]

    return PipelinePlan(
        **{
            **shared,
            "layers": tuple(layer for name, plan in parts.items() for layer in named(plan.layers, name)),
            "skipped": tuple(layer for name, plan in parts.items() for layer in named(plan.skipped, name)),
            "quantize": {f"{name}.{k}": v for name, plan in parts.items() for k, v in plan.quantize.items()},
            "total_parameters": sum(plan.total_parameters for plan in parts.values()),
            "trained_parameters": sum(plan.trained_parameters for plan in parts.values()),
            "notes": tuple(dict.fromkeys(note for plan in parts.values() for note in plan.notes)),
        },
        parts=parts,
    )


# ---- what the recipe asks for ----------------------------------------------------------------------------------------


def encoders_to_train(section: PipelineAdapter, there: list[str]) -> list[str]:
    """Return the text encoders that get an adapter.

    Args:
        section: the recipe's.
        there: those that diffusers can load an adapter for.

    Raises:
        RequestError: it names another.
    """
    wanted = section.text_encoders
    if isinstance(wanted, bool):
        return there if wanted else []
    for name in wanted:
        if name not in there:
            raise RequestError(
                f"adapter.text_encoders: there is no {name!r} that diffusers loads adapters for. There are: "
                f"{', '.join(there) or 'none'}."
            )
    return [name for name in there if name in wanted]


def check_adapter(section: PipelineAdapter) -> None:
    """Raise if A and B can't start as the recipe asks."""
    check_start(section, None)
    if section.init not in _STARTS:
        raise RequestError(
            f"adapter.init: {section.init!r} changes the base's weights, which diffusers' file of an adapter does not say: "
            "take true, false, gaussian or orthogonal."
        )


def denoiser_arguments(section: PipelineAdapter, denoiser: nn.Module) -> dict[str, Any]:
    """Return what `attach` takes for the denoiser.

    With `blocks` every layer is named with its rank; its scale stays what the rank of its target gives.

    Raises:
        RequestError: a block that no layer to adapt lies in, or nothing is left.
    """
    given = _plain(section)
    if section.blocks is None:
        return given
    exact, used = {}, set()
    for layer in la.plan(denoiser, **given).layers:
        around = [block for block in section.blocks if layer.name == block or layer.name.startswith(f"{block}.")]
        used.update(around)
        rank = section.blocks[max(around, key=len)] if around else layer.rank
        if rank:
            exact[layer.name] = (rank, layer.alpha * _scale_kept(section, rank, layer.rank))
    if unknown := [name for name in section.blocks if name not in used]:
        raise RequestError(
            f"adapter.blocks: no layer to adapt lies in {unknown[0]!r}. Blocks are the beginnings of their names, such as "
            f"{', '.join(_blocks_of(denoiser))}."
        )
    if not exact:
        raise RequestError("adapter.blocks: nothing is left to adapt: give a block a rank above 0.")
    return {**given, "exact": exact}


def encoder_arguments(section: PipelineAdapter) -> dict[str, Any]:
    """Return what `attach` takes for a text encoder: the recipe's section with its own rank, the same scale, and targets."""
    given = _plain(section)
    rank = section.text_rank or section.rank
    if rank != section.rank:
        given["alpha"] = (section.alpha or section.rank) * _scale_kept(section, rank, section.rank)
    for name in ("layers", "exclude"):  # names and numbers of the denoiser
        given.pop(name, None)
    return {**given, "rank": rank, "targets": section.text_targets}


def _scale_kept(section: PipelineAdapter, rank: int, instead_of: int) -> float:
    """Return by what alpha grows with the rank so that the scale stays: alpha / rank, or alpha / sqrt(rank) with rsLoRA
    (arXiv:2312.03732).
    """
    return math.sqrt(rank / instead_of) if section.rslora else rank / instead_of


def check_file_can_hold(plan: AttachPlan) -> None:
    """Raise if diffusers' file has no place for a layer."""
    strange: PlannedLayer | None = next(
        (layer for layer in plan.layers if layer.kind not in ("linear", "conv2d")), None
    )
    if strange is not None:
        raise RequestError(
            f"adapter.targets: {strange.name} is of kind {strange.kind}, for which diffusers' file of an adapter has no "
            "place: leave it out."
        )


def _plain(section: PipelineAdapter) -> dict[str, Any]:
    return attach_arguments(AdapterSection(**{name: getattr(section, name) for name in AdapterSection.model_fields}))


def _blocks_of(denoiser: nn.Module) -> list[str]:
    return [name for name, module in denoiser.named_children() if any(True for _ in module.children())][:6]


# ---- what is trained -------------------------------------------------------------------------------------------------


class Adapters:
    """One adapter on several components of a pipeline; see `lora_adapters.runs.loop.Trained`.

    Attributes:
        handles: component -> its adapter.
        model: holds the components, under their names.
        plan: of all of them.
    """

    def __init__(self, lora: LoraPipeline, handles: Mapping[str, Adapter]) -> None:
        self.lora, self.handles = lora, dict(handles)
        self.name = next(iter(handles.values())).name
        self.model = nn.ModuleDict({name: handle.base for name, handle in handles.items()})
        self.plan = combined({name: handle.plan for name, handle in handles.items()})

    @property
    def base(self) -> nn.Module:
        """Return what the plan's names are of."""
        return self.model

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over what is trained, the denoiser's first."""
        return (p for handle in self.handles.values() for p in handle.parameters())

    def norms(self) -> dict[str, float]:
        """Return mean and largest norm of scaling * B @ A over all layers."""
        found = [(handle.norms(), len(handle.plan.layers)) for handle in self.handles.values()]
        count = sum(number for _, number in found)
        return {
            "mean": sum(norms["mean"] * number for norms, number in found) / count,
            "max": max(norms["max"] for norms, _ in found),
        }

    def save(self, path: Path) -> Path:
        """Write diffusers' file of all components into a folder."""
        return self.lora.save(path, self.name)

    def take_values(self, folder: Path) -> None:
        """Take the values of what `save` wrote, in place."""
        with exchange.as_folders(self.lora.components, self.lora.family, folder) as folders:
            for component, path in folders.paths.items():
                values = {k.removeprefix(PREFIX): v for k, v in read_adapter(inspect_adapter(path)).items()}
                set_peft_model_state_dict(self.handles[component].base, values, adapter_name=self.name)

    def detach(self) -> None:
        """Take all of it off the pipeline, which is as it was before."""
        self.lora.delete(self.name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the pipeline computes as if it were not there."""
        with ExitStack() as stack:
            for handle in self.handles.values():
                stack.enter_context(handle.disabled())
            yield
