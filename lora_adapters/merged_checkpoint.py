"""From a base checkpoint and a saved adapter to the folder of a plain model, as one act."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import merge
from .adapter_file import PREFIX, AdapterFile, inspect_adapter, read_adapter
from .api import framework_bars, loader_for, progress_bar, restore
from .checkpoint import resolve_adapter_path
from .errors import CheckpointError, LoraAdaptersError, RequestError, UnsupportedError
from .merge_place import check_apart, check_space, checked_folder
from .merged_pipeline import is_diffusion, merge_pipeline
from .saving import checked_plan
from .staging import new_folder
from .tensor_file import torch_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .formats.merging import MergePlan

#: What a backend must have, beside `load`.
_METHODS = ("skeleton", "adapter_options", "beside", "new_weights", "save")


class MergingBackend(Protocol):
    """What `merge_checkpoint` asks of a backend, beside `load` and `skeleton`."""

    name: str

    def adapter_options(
        self, name: str, file: AdapterFile, *, revision: str | None, trust_remote_code: bool, **given: Any
    ) -> dict[str, Any]:
        """Return the options of `load` that give the model which the adapter was trained on. `given` ones stay."""
        ...

    def beside(
        self, name: str, adapter: str, *, revision: str | None, adapter_revision: str | None, trust_remote_code: bool
    ) -> dict[str, Path]:
        """Return name in the new folder -> file to copy: what belongs to a model and is not the model (a tokenizer)."""
        ...

    def new_weights(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the weights of a loaded model that its checkpoint did not hold."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a plain model into an empty folder."""
        ...


@dataclass(frozen=True)
class MergedCheckpoint:
    """What `merge_checkpoint` wrote.

    Attributes:
        folder: where it is; the file, where the base is one file.
        base: the base that was loaded.
        base_from: "argument", or "adapter" if the adapter's config named it.
        model: the model's class; a diffusion model's family.
        dtype: dtype of its weights; of a diffusion model's that were merged into.
        layers: how many layers an adapter was merged into.
        trained: modules that came whole from the adapter's file, such as a new head.
        copied: names of the tokenizer's and the processor's files beside it; of a pipeline's files that are as they were.
        nbytes: bytes of the folder.
        notes: things worth knowing.
    """

    folder: Path
    base: str
    base_from: str
    model: str
    dtype: str
    layers: int
    trained: tuple[str, ...]
    copied: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Base:
    """Where the base comes from."""

    name: str
    chosen_by: str
    revision: str | None
    trust_remote_code: bool
    backend: str | None

    @property
    def source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def merge_checkpoint(
    base: str | Path | None,
    adapter: str | Path,
    out: str | Path,
    dtype: torch.dtype | str = "auto",
    *,
    backend: str | None = None,
    revision: str | None = None,
    adapter_revision: str | None = None,
    trust_remote_code: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    progress: bool | None = None,
    scale: float = 1.0,
    family: str | None = None,
    **options: Any,
) -> MergedCheckpoint:
    """Merge a saved adapter into its base and write a plain model that the base's framework loads.

    A base may also be a checkpoint of Stable Diffusion, SDXL, SD3 or Flux in one safetensors file, as UIs load it, or the
    folder of a diffusers pipeline or denoiser, with an adapter of any format of `lora_adapters.formats`: it is then written
    tensor by tensor under the same names, and what the adapter does not touch keeps its bits.

    The adapter's files, the place for the result and the base's layers are checked before a weight of the base is read.
    W + scaling * B @ A is summed in float32. The folder appears complete or not at all.

    Args:
        base: Hub name or folder of the model that the adapter was trained on, dense; None takes what the adapter's
            config names.
        adapter: folder of a saved adapter, or a Hub name. For a diffusion model a file or a folder.
        out: folder to write; it must not exist, or be empty. The file to write, where the base is one file.
        dtype: dtype to load the base in and to write; "auto" takes the checkpoint's.
        backend: "transformers", ...; None takes the first that can load the base.
        revision: Hub revision of the base.
        adapter_revision: Hub revision of the adapter.
        trust_remote_code: run code that the base brings. Off unless you trust its author.
        device: where to merge: "cpu", "cuda", "auto".
        overwrite: let `out`, if it is a model, make way for the result once that is complete.
        progress: say on stderr how far it is; None does in a terminal.
        scale: factor of the adapter, for diffusion models.
        family: what an adapter of a diffusion model is for, where neither its file nor the base tells: "sd1", "sd2", "sdxl",
            "sd3" or "flux".
        **options: passed to `load`, such as `task="image-classification"` for transformers, if the adapter does not say.

    Returns:
        What was written.

    Raises:
        RequestError: a wrong argument, or `out` is not free.
        CheckpointError: the adapter is damaged or made for another model, or writing failed.
        UnsupportedError: the backend can't write merged models, or the base is stored quantized.
        MergeError: the merged values are not finite.
        DoesNotFitError: too little memory, or too little space on the disk. `out` is as it was in each case.
    """
    if base is not None and backend in (None, "diffusers") and is_diffusion(base):
        _check_local(revision, adapter_revision, trust_remote_code, device, options)
        say = _Lines(progress)
        chosen: dict[str, Any] = {"dtype": dtype, "scale": scale, "family": family, "overwrite": overwrite}
        return _of_pipeline(str(base), *merge_pipeline(base, adapter, out, **chosen, say=say, show=say.show))
    if scale != 1 or family is not None:
        raise RequestError("scale and family are for diffusion models: a single file, or the folder of a pipeline.")
    if base is None and Path(adapter).expanduser().is_file():
        raise RequestError(f"{adapter} is one file, which does not name its base. Give it: base=... (--base).")
    folder = checked_folder(out, overwrite)
    file = inspect_adapter(resolve_adapter_path(adapter, adapter_revision))
    source = _source(base, file, revision, trust_remote_code, backend)
    check_apart(folder, (Path(source.name), file.folder, Path.cwd()))
    loader = _loader(source)
    options = loader.adapter_options(source.name, file, **source.source, **options)
    skeleton = loader.skeleton(source.name, dtype=dtype, **source.source, **options)
    plan = checked_plan(skeleton, file)
    read_adapter(file)
    check_space(folder, sum(p.numel() * p.element_size() for p in skeleton.parameters()))
    copies = loader.beside(
        source.name,
        str(file.folder if Path(adapter).expanduser().is_dir() else adapter),
        **source.source,
        adapter_revision=adapter_revision,
    )
    say = _Lines(progress)
    with framework_bars(loader, progress), new_folder(folder, replace=overwrite) as stage:
        say(f"loading {source.name}")
        model = loader.load(source.name, quantization=None, dtype=dtype, device=device, **source.source, **options)
        _check_weights_known(loader, model, file, source.name)
        _merge(model, file, say)
        say(f"writing {folder}")
        _write(loader, model, stage, copies)
        kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
        size = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    return MergedCheckpoint(
        folder=folder,
        base=source.name,
        base_from=source.chosen_by,
        model=type(model).__name__,
        dtype=str(kind).removeprefix("torch."),
        layers=len(plan.layers),
        trained=plan.trained,
        copied=tuple(copies),
        nbytes=size,
        notes=_notes(source, file, copies),
    )


def _check_local(
    revision: str | None, adapter_revision: str | None, trust_remote_code: bool, device: str, options: Mapping[str, Any]
) -> None:
    """Raise if what is only for other models was given for a diffusion model, which is merged on the CPU."""
    given = {"revision": revision, "adapter_revision": adapter_revision, "trust_remote_code": trust_remote_code}
    given |= {"device": device not in ("cpu", "auto"), **options}
    if wrong := [name for name, value in given.items() if value]:
        raise RequestError(
            f"{wrong[0]} has no meaning for a diffusion model, whose files are merged on the CPU as they are. Leave it out."
        )


def _of_pipeline(base: str, place: Path, plan: MergePlan) -> MergedCheckpoint:
    changed = [(file, key) for file in plan.files.values() for key in file.changes]
    kinds = dict.fromkeys(file.dtype or torch_name(file.header.tensors[key].dtype) for file, key in changed)
    size = sum(path.stat().st_size for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file())
    return MergedCheckpoint(
        folder=place,
        base=base,
        base_from="argument",
        model=plan.family or "diffusion model",
        dtype=", ".join(kinds),
        layers=plan.layers,
        trained=(),
        copied=tuple(plan.copies),
        nbytes=size,
        notes=plan.notes,
    )


def _source(
    base: str | Path | None, file: AdapterFile, revision: str | None, trust_remote_code: bool, backend: str | None
) -> _Base:
    if base is not None:
        path = Path(base).expanduser()
        name = str(path) if path.is_dir() else str(base)
        return _Base(name, "argument", revision, trust_remote_code, backend)
    named = file.config.get("base_model_name_or_path")
    if not named:
        raise RequestError("The adapter's config does not name its base. Give it: base=... (--base).")
    if trust_remote_code:
        raise RequestError(
            f"The base {named!r} is named by the adapter's config, which whoever made the adapter wrote. To run code "
            "that the base brings, give it yourself: base=... (--base)."
        )
    return _Base(named, "adapter", revision or file.config.get("revision"), False, backend)


def _loader(source: _Base) -> Any:
    try:
        loader = loader_for(source.name, source.backend, source.revision)
    except LoraAdaptersError as error:
        if source.chosen_by == "argument":
            raise
        hint = "That is the base which the adapter's config names. Give it where it is now: base=... (--base)."
        raise type(error)(f"{error} {hint}") from error
    if lacking := [name for name in _METHODS if not hasattr(loader, name)]:
        raise UnsupportedError(
            f"Backend {loader.name!r} can't write merged models (it lacks {lacking[0]!r}). Load the base yourself, then "
            "lora_adapters.restore(model, adapter).merge(unload=True), and save the model as its framework does."
        )
    return loader


def _check_weights_known(loader: MergingBackend, model: nn.Module, file: AdapterFile, base: str) -> None:
    """Raise if weights come from nowhere: neither the base nor the adapter has them, so their values are random."""
    given = {key.removeprefix(PREFIX) for key in (*file.saved, *file.biases)}
    if unknown := [name for name in loader.new_weights(model) if name not in given]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{base} has no {unknown[0]!r}{more}, and the adapter's file does not hold it either, so the merged model "
            "would compute with random values. Give the base that the adapter was trained on."
        )


def _merge(model: nn.Module, file: AdapterFile, say: _Lines) -> None:
    adapter = restore(model, file.folder)
    say(f"merging {len(adapter.layers)} layers")
    with progress_bar("Merging", None if say.show else False) as report:
        # The model is ours alone: nothing is kept to undo the merge, which would double the memory.
        merge.merge(adapter.model, model, [adapter.name], keep=False, report=report)
    adapter.merge(unload=True)


def _write(loader: MergingBackend, model: nn.Module, stage: Path, copies: Mapping[str, Path]) -> None:
    from safetensors import SafetensorError

    try:
        loader.save(model, stage)
        for name, path in copies.items():
            target = stage / name
            target.parent.mkdir(exist_ok=True)
            if not target.exists():
                shutil.copyfile(path, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Writing the merged model failed: {error}. What was there before is unchanged."
        ) from error


def _notes(source: _Base, file: AdapterFile, copies: Mapping[str, Path]) -> tuple[str, ...]:
    notes = []
    named = file.config.get("base_model_name_or_path")
    # Folders move; a name that also ends differently is worth a look.
    if source.chosen_by == "argument" and named and Path(named).name != Path(source.name).name:
        notes.append(f"the adapter's config names another base, {named!r}; its layers and shapes fit this one")
    if not copies:
        notes.append("neither the base nor the adapter holds tokenizer or processor files, so none were copied")
    return tuple(notes)


class _Lines:
    """Says on stderr what comes next."""

    def __init__(self, show: bool | None) -> None:
        self.show = sys.stderr.isatty() if show is None else show

    def __call__(self, line: str) -> None:
        if self.show:
            print(line, file=sys.stderr, flush=True)
