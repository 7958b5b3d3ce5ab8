"""What an adapter's file of a diffusion model is, as the same facts that `inspect` has of PEFT folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from .adapter_file import VERSION_ENTRY
from .formats.factors import Factors
from .formats.low_rank import low_rank
from .formats.portable import PortableAdapter
from .inspection import AdapterFacts, LayerGroup, Norms, printable
from .norms import update_norm
from .tensor_file import NAMES

#: What says which program wrote a file -> its name.
_WRITERS = (("software", "ai-toolkit"), ("ss_network_module", "kohya's sd-scripts, or in its manner"))


def describe_portable(adapter: PortableAdapter, path: Path, format: str) -> AdapterFacts:
    """Return the facts of an adapter that `formats.read` returned.

    Args:
        adapter: it.
        path: where it was read from.
        format: the format it was in.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    metadata = {printable(key): printable(value) for key, value in adapter.metadata.items()}
    dtypes: dict[str, int] = {}
    for _, _, factors in adapter:
        for tensor in factors.tensors.values():
            name = NAMES[str(tensor.dtype).removeprefix("torch.")]
            dtypes[name] = dtypes.get(name, 0) + tensor.numel()
    base = metadata.get("ss_sd_model_name") or metadata.get("modelspec.architecture") or adapter.family
    return AdapterFacts(
        folder=str(path),
        format=format,
        written_by=_writer(metadata),
        base_model=base or None,
        base_revision=None,
        base_class=f"{adapter.family} ({', '.join(adapter.components)})"
        if adapter.family
        else ", ".join(adapter.components),
        peft_type=" and ".join(dict.fromkeys(factors.kind for _, _, factors in adapter)),
        task_type=None,
        variants=_variants(adapter),
        layers=len(adapter),
        groups=_groups(adapter),
        trained_whole=(),
        bias="none",
        biases=0,
        token_rows=(),
        base_copies=(),
        dtypes=dtypes,
        values=sum(dtypes.values()),
        file_bytes=sum(file.stat().st_size for file in files),
        digest=False,
        metadata=metadata,
        norms=_norms(adapter),
    )


def _writer(metadata: Mapping[str, str]) -> str:
    if VERSION_ENTRY in metadata:
        return f"lora_adapters {metadata[VERSION_ENTRY]}"
    return next((said for key, said in _WRITERS if key in metadata), "not said")


def _variants(adapter: PortableAdapter) -> tuple[str, ...]:
    said = {"DoRA": "DoRA", "Tucker": "Tucker cores"}
    found = [said[kind] for kind in adapter.kinds if kind in said]
    every = [factors for _, _, factors in adapter]
    if any(getattr(factors, "rank_stabilised", False) for factors in every):
        found.append("rank-stabilised")
    if any(getattr(factors, "bias", None) is not None for factors in every):
        found.append("bias of B")
    return tuple(found)


def _groups(adapter: PortableAdapter) -> tuple[LayerGroup, ...]:
    members: dict[tuple[str, str, str], list[Factors]] = {}
    for component, module, factors in adapter:
        kind = {2: "linear", 3: "conv1d", 4: "conv2d"}.get(len(factors.shape), "conv3d")
        last = module.rpartition(".")[2]
        if last.isdigit():
            last = ".".join(module.split(".")[-2:])
        members.setdefault((component, last, kind), []).append(factors)
    return tuple(
        LayerGroup(
            name=f"{component}: {last}",
            kind=kind,
            count=len(found),
            ranks=_different(factors.rank for factors in found),
            alphas=_different(factors.alpha for factors in found),
            scalings=_different(factors.scaling for factors in found),
            values=sum(tensor.numel() for factors in found for tensor in factors.tensors.values()),
        )
        for (component, last, kind), found in members.items()
    )


def _different(values: Iterable) -> tuple:
    return tuple(sorted(set(values)))


def _norms(adapter: PortableAdapter) -> Norms:
    found = {}
    for component, module, factors in adapter:
        lora = low_rank(factors)
        # In double precision no finite factors of a file overflow.
        found[f"{component}.{module}"] = update_norm(lora.a.double(), lora.b.double(), lora.scaling).item()
    largest = sorted(found.items(), key=lambda item: -item[1])[:5]
    return Norms(sum(found.values()) / len(found), largest[0][1], tuple(largest))
