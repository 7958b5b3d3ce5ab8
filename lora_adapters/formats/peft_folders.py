"""PEFT folders: one for each component, `unet/adapter_config.json` and `unet/adapter_model.safetensors`.

Each is what `PeftModel.from_pretrained(pipe.unet, folder)` loads, read with the core's checks. Folders of LoHa and LoKr
layers are read too; what is written is LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..adapter_config import CONFIG_NAME
from ..adapter_file import VERSION_ENTRY, AdapterFile, check_supported, inspect_adapter, peft_type_of, read_adapter
from ..checkpoint import PREFIX, write_adapter
from ..errors import CheckpointError, RequestError, UnsupportedError
from ..staging import new_folder
from .diffusers_file import place_of
from .factors import Factors, LoraFactors
from .families import FAMILIES, family_in_metadata, family_of, header_entries
from .keys import factors_of, layers_of, tensors_for
from .peft_fields import LoraComponent, as_lora, with_config
from .peft_lycoris import KINDS, read_folder
from .portable import COMPONENT, PortableAdapter
from .source import Source, is_peft_root
from .text_encoder_names import with_text_model, without_text_model

#: Families whose first text encoder is a CLIPTextModelWithProjection, which keeps its text_model in transformers 5.
_WITH_PROJECTION = ("sd3",)


#: What is kept of a folder's header: about base, training and writer. The rest is about the folder's own two files.
_KEPT = ("ss_", "modelspec.", VERSION_ENTRY)


class PeftFolders:
    """The format "peft"."""

    def detect(self, source: Source) -> bool:
        """True for a PEFT folder, and for a folder of them."""
        return source.folder is not None and is_peft_root(source.folder)

    def read(self, source: Source) -> PortableAdapter:
        """Read every component's folder; a single PEFT folder's component is known by its layers' names."""
        adapter = _assembled(source, source.family)
        found = source.family or family_in_metadata(adapter.metadata) or family_of(adapter)
        if found != source.family and set(adapter.kinds) & {"LoHa", "LoKr"}:
            # A flattened convolution's kernel follows from the family.
            adapter = _assembled(source, found)
        return replace(adapter, family=found)

    def write(self, adapter: PortableAdapter, path: Path, family: str) -> tuple[str, ...]:
        """Write a folder with one for each component, all as one act; an existing folder of adapters is replaced."""
        made = {component: as_lora(component, modules) for component, modules in adapter.components.items()}
        metadata = header_entries(FAMILIES[family], adapter, "networks.lora", {}) if family in FAMILIES else {}
        with new_root(path) as place:
            for component, lora in made.items():
                if component == "text_encoder" and family not in _WITH_PROJECTION:
                    lora = replace(
                        lora, modules={without_text_model(name): factors for name, factors in lora.modules.items()}
                    )
                write_component(place / component, lora, metadata)
        return tuple(note for lora in made.values() for note in lora.notes)


def component_folders(root: Path) -> list[Path]:
    """Return the PEFT folders that a root means: itself, or its subfolders, which are named after components.

    Raises:
        CheckpointError: a subfolder has another name.
    """
    if (root / CONFIG_NAME).is_file():
        return [root]
    found = [path for path in sorted(root.iterdir()) if (path / CONFIG_NAME).is_file()]
    if strange := [path.name for path in found if not COMPONENT.fullmatch(path.name)]:
        raise CheckpointError(
            f"{root} holds PEFT folders that are no components of a pipeline: {', '.join(strange[:5])}. Give one of them, "
            "or name them unet, transformer, text_encoder, ..."
        )
    return found


@contextmanager
def new_root(path: Path) -> Iterator[Path]:
    """Yield an empty folder for components' folders, which takes the place of `path` as one act.

    Raises:
        RequestError: `path` is a file, or a folder that holds anything but components' folders.
    """
    if path.exists() and not path.is_dir():
        raise RequestError(f"{path} is a file, and this format is a folder. Give another place.")
    if path.exists() and not all(COMPONENT.fullmatch(one.name) for one in path.iterdir()):
        raise RequestError(f"{path} holds other files than adapters of components. Give a folder of its own.")
    with new_folder(path, replace=True) as place:
        yield place


def write_component(folder: Path, lora: LoraComponent, metadata: Mapping[str, str]) -> None:
    """Write one component's PEFT folder.

    Args:
        folder: made if missing.
        lora: what `as_lora` returned; its modules may have been renamed to the ends or the whole of what they were.
        metadata: string entries of the header.
    """
    from peft import LoraConfig

    tensors = {
        f"{PREFIX}{name}{end}": tensor
        for name, factors in lora.modules.items()
        for end, tensor in tensors_for(factors, "peft").items()
    }
    write_adapter(folder, LoraConfig(**lora.fields), tensors, metadata)


def _assembled(source: Source, family: str) -> PortableAdapter:
    assert source.folder is not None
    components: dict[str, Mapping[str, Factors]] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    for folder in component_folders(source.folder):
        if peft_type_of(folder) in KINDS:
            found = read_folder(folder, family)
            modules, header = found.modules, found.metadata
            notes += found.notes
        else:
            file = inspect_adapter(folder)
            _check_holds(file)
            modules, header = _modules(file), file.metadata
        component = folder.name if folder != source.folder else _component(folder, modules)
        components[component] = {with_text_model(component, name): factors for name, factors in modules.items()}
        metadata |= {key: value for key, value in header.items() if key.startswith(_KEPT)}
    return PortableAdapter(components, family, metadata, tuple(notes))


def _check_holds(file: AdapterFile) -> None:
    """Check that a folder holds nothing that a PortableAdapter can't."""
    check_supported(file)
    for what, found in (("modules trained whole", file.saved), ("trained biases of the base", file.biases)):
        if found:
            raise UnsupportedError(
                f"{file.folder} holds {what} ({found[0]!r}), which formats of diffusion models have no place for. Merge it "
                "into its base, or train it without."
            )
    others = ("fan_in_fan_out", "use_qalora", "velora_config", "alora_invocation_tokens")
    if strange := [name for name in others if file.config.get(name)]:
        raise UnsupportedError(f"{file.folder} is an adapter with {strange[0]}, which only PEFT folders hold.")
    if embeddings := [name for name, module in file.modules.items() if module.kind == "embedding"]:
        raise UnsupportedError(f"{file.folder} adapts the embedding {embeddings[0]!r}, which only PEFT folders hold.")


def _modules(file: AdapterFile) -> dict[str, LoraFactors]:
    tensors: Mapping[str, Tensor] = {key.removeprefix(PREFIX): tensor for key, tensor in read_adapter(file).items()}
    made = {name: factors_of(layer, str(file.folder)) for name, layer in layers_of(tensors, str(file.folder)).items()}
    lora = {name: factors for name, factors in made.items() if isinstance(factors, LoraFactors)}
    return with_config(lora, file.config, str(file.folder))


def _component(folder: Path, modules: Mapping[str, Factors]) -> str:
    first = next(iter(modules))
    if COMPONENT.fullmatch(folder.name):
        return folder.name
    place = place_of(first)
    if place and not place[2]:
        return place[0]
    if with_text_model("text_encoder", first).startswith("text_model."):
        return "text_encoder"
    raise CheckpointError(
        f"{folder} adapts {first!r}, which is no layer of a pipeline's denoiser or CLIP text encoder that is known here. "
        "Put the folder into one named after its component (unet, transformer, text_encoder, ...) and give that."
    )
