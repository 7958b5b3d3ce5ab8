"""LoraPipeline: adapters on the parts of a diffusers pipeline, which stays a stock pipeline."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import lora_adapters as la
from lora_adapters.adapter import Adapter
from lora_adapters.errors import (
    CheckpointError,
    LoraAdaptersError,
    MergeError,
    RequestError,
    StateError,
    UnsupportedError,
)
from lora_adapters.inject import adapter_names, adopt, unwrap_empty
from lora_adapters.optimization import OptimizeReport

from . import loading, weights_file
from .exchange import as_folders, take_out
from .hotswap import prepare_swap
from .marks import mark_loaded
from .wrappers import plain, uncompiled, without_offload

if TYPE_CHECKING:
    from .dreambooth.in_memory import DreamBoothResult

#: Names that pipelines give their denoisers.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "dit")


class LoraPipeline:
    """LoRA on a diffusers pipeline's denoiser and text encoders.

    `pipe` stays a stock pipeline: calling it, load_lora_weights, set_adapters, fuse_lora, unload_lora_weights, offloading
    and compiling go on working, and see the adapters made here as they see their own.

    Attributes:
        pipe: the diffusers pipeline.
    """

    def __init__(self, pipe: Any, quantization: Mapping[str, Any] | None = None, **load_options: Any) -> None:
        """Take a pipeline, or load one.

        Args:
            pipe: a loaded pipeline; or what `loading.load_pipeline` takes: Hub name, folder, single file.
            quantization: component -> quantizer, such as {"unet": "nf4", "text_encoder": "nf4"}: its base weights are
                stored in 4 bits, convolutions too, in memory and layer by layer. Autoencoders stay dense.
            load_options: passed to diffusers' from_pretrained or from_single_file.

        Raises:
            RequestError: no pipeline, or an unknown component. UnsupportedError: diffusers gives this pipeline no LoRA
                methods.
        """
        if isinstance(pipe, (str, Path)):
            pipe = loading.load_pipeline(str(pipe), **load_options)
        elif load_options:
            raise RequestError(f"{next(iter(load_options))!r} is for loading a pipeline, and this one is loaded.")
        _check_pipeline(pipe)
        self.pipe = pipe
        self._adapters: dict[tuple[str, str], Adapter] = {}
        for name, wanted in (quantization or {}).items():
            loading.quantize(self._component(name), wanted)

    def __repr__(self) -> str:
        return f"<LoraPipeline around {type(self.pipe).__name__}: {self.adapters or 'no adapters'}>"

    # ---- what there is -----------------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, nn.Module]:
        """Return name -> module of the parts that can carry adapters, denoisers first."""
        names = sorted(self.pipe._lora_loadable_modules, key=lambda name: not _is_denoiser(name))
        found = {name: getattr(self.pipe, name, None) for name in names}
        return {name: plain(module) for name, module in found.items() if isinstance(module, nn.Module)}

    @property
    def denoiser(self) -> nn.Module:
        """Return the UNet or transformer."""
        return next(iter(self.components.values()))

    @property
    def adapters(self) -> dict[str, list[str]]:
        """Return component -> names of its adapters, whoever put them there; components without any are left out."""
        return {name: found for name, module in self.components.items() if (found := sorted(adapter_names(module)))}

    def adapter(self, component: str | None = None, adapter_name: str = "default") -> Adapter:
        """Return the handle of an adapter that `attach` or `load` made: summary(), parameters(), plan, ...

        Args:
            component: "unet", "text_encoder", ...; None means the denoiser.
            adapter_name: its name.
        """
        component = component or next(iter(self.components))
        handle = self._handle(component, adapter_name)
        if handle is None:
            have = ", ".join(f"{c}: {n}" for c, n in self._adapters) or "none"
            raise RequestError(f"No adapter {adapter_name!r} was attached to {component!r} here. There are: {have}.")
        return handle

    def _handle(self, component: str, name: str) -> Adapter | None:
        """Return a handle, unless other code has taken the adapter or the component away meanwhile."""
        module, found = self.components.get(component), self._adapters.get((component, name))
        if found is None or found._base is not module or name not in adapter_names(module):
            self._adapters.pop((component, name), None)
            return None
        return found

    def _component(self, name: str) -> nn.Module:
        if name not in self.components:
            raise RequestError(
                f"{type(self.pipe).__name__} has no part {name!r} for LoRA. It has: {[*self.components]}."
            )
        return self.components[name]

    def _carriers(self, name: str) -> dict[str, nn.Module]:
        found = {c: module for c, module in self.components.items() if name in adapter_names(module)}
        if not found:
            raise RequestError(f"There is no adapter {name!r}. There are: {self.adapters or 'none'}.")
        return found

    # ---- adding ------------------------------------------------------------------------------------------------------

    def attach(
        self,
        rank: int = 16,
        targets: Any = "auto",
        components: str | Sequence[str] | None = None,
        adapter_name: str = "default",
        **options: Any,
    ) -> dict[str, Adapter]:
        """Attach a new adapter to one or several components: all of them or none.

        Args:
            rank, targets, **options: as for `lora_adapters.attach`; targets={"attention": 16, "conv": 8} adapts a UNet's
                convolutions too. For other targets in another component call again with that one. "auto" means
                attention in text encoders too, as in diffusers' scripts.
            components: names; None means the denoiser.
            adapter_name: one name for all components, free in each.

        Returns:
            Component -> handle. Train `handle.parameters()`.

        Raises:
            RequestError, UnsupportedError: see `lora_adapters.attach`. The pipeline is unchanged.
        """
        names = [next(iter(self.components))] if components is None else _as_list(components)
        chosen = {name: self._component(name) for name in names}
        with without_offload(self.pipe):
            return self._all_or_none(
                (component, la.attach(module, rank=rank, targets=meant, adapter_name=adapter_name, **options))
                for component, module in chosen.items()
                for meant in ("attention" if targets == "auto" and not _is_denoiser(component) else targets,)
            )

    def _all_or_none(self, steps: Iterator[tuple[str, Adapter]]) -> dict[str, Adapter]:
        made: dict[str, Adapter] = {}
        try:
            for component, adapter in steps:
                made[component] = adapter
                mark_loaded(adapter)
        except BaseException:
            for adapter in made.values():
                adapter.detach()
            raise
        self._adapters |= {(component, adapter.name): adapter for component, adapter in made.items()}
        return made

    def load(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        adapter_name: str = "default",
        weight_name: str | None = None,
        revision: str | None = None,
    ) -> dict[str, Adapter]:
        """Load an adapter: all that the file holds, or an error and nothing.

        Args:
            source: a file or folder in diffusers' format, or its state dict (alpha = rank, as nothing else is said);
                a PEFT folder (adapter_config.json), which goes to the component that has its layers; or a Hub name.
            adapter_name: name it gets here.
            weight_name: file in the folder.
            revision: Hub revision.

        Raises:
            CheckpointError: damaged, incomplete, or made for another pipeline. UnsupportedError: another format.
        """
        with ExitStack() as stack:
            folders = stack.enter_context(as_folders(self.components, source, weight_name, revision))
            stack.enter_context(without_offload(self.pipe))
            made = self._all_or_none(
                (component, la.restore(self._component(component), folder, adapter_name=adapter_name))
                for component, folder in folders.items()
            )
            self._prepare_swaps(made)
        for adapter in made.values():  # new layers begin in training mode, with their dropout
            adapter.base.train(adapter.base.training)
        return made

    @staticmethod
    def _prepare_swaps(made: Mapping[str, Adapter]) -> None:
        """Do what `enable_lora_hotswap` promised for the first adapter."""
        for adapter in made.values():
            base: Any = adapter.base
            if (wanted := getattr(base, "_prepare_lora_hotswap_kwargs", None)) is not None:
                from peft.utils.hotswap import prepare_model_for_compiled_hotswap

                prepare_model_for_compiled_hotswap(base, **wanted)
                base._prepare_lora_hotswap_kwargs = None

    # ---- saving ------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        adapter_name: str = "default",
        format: str = "diffusers",
        weight_name: str = weights_file.WEIGHT_NAME,
    ) -> Path:
        """Write one adapter of all components that carry it.

        Args:
            path: a folder, made if missing, or a file that ends in ".safetensors".
            adapter_name: which adapter.
            format: "diffusers": one file, with ranks, alphas and rsLoRA in its metadata: `pipe.load_lora_weights`
                gives the same images. "peft": one PEFT folder for each component, `path/unet`, ...
            weight_name: name of the file in the folder.

        Returns:
            The file, or the folder for "peft".

        Raises:
            RequestError: no such adapter or format. StateError: it is fused. UnsupportedError: the format can't hold it.
        """
        carriers = self._carriers(adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in _layers(carriers.values())):
            raise StateError(f"Adapter {adapter_name!r} is fused: unfuse it before saving.")
        if format == "peft":
            for component in carriers:
                self.adapter(component, adapter_name).save(Path(path) / component)
            return Path(path)
        if format != "diffusers":
            raise RequestError(f"format must be 'diffusers' or 'peft', got {format!r}.")
        file = Path(path) if str(path).endswith(".safetensors") else Path(path) / weight_name
        weights_file.write(file, {name: take_out(module, adapter_name) for name, module in carriers.items()})
        return file

    # ---- training ----------------------------------------------------------------------------------------------------

    def dreambooth(
        self,
        images: Any,
        prompt: str | None = None,
        class_prompt: str | None = None,
        steps: int | None = None,
        output: str | Path | None = None,
        *,
        adapter_name: str = "default",
        quiet: bool = False,
        **options: Any,
    ) -> DreamBoothResult:
        """Teach the pipeline a subject (DreamBooth, arXiv:2208.12242); it carries the adapter afterwards.

        Args:
            images: a folder, a list of files, or a list of PIL images.
            prompt: what is said of each, with a rare word for the subject ("a photo of sks dog"). Files may have captions
                beside them.
            class_prompt: the same without the rare word ("a photo of a dog"): prior preservation, with images that the
                base generates.
            steps: optimizer steps; None means the recipe's epochs.
            output: folder for adapter/, report.html, samples and checkpoints; None keeps nothing.
            adapter_name: name that the adapter gets.
            quiet: show no progress.
            **options: keys of the recipe (docs/recipes.md, "dreambooth"): sections as mappings (samples={"every": 100})
                and single keys (rank=8, text_encoders=True, learning_rate=1e-4, ema=0.99, resume=True).

        Raises:
            RequestError: a wrong option or image; all that is wrong is said at once. InterruptedRunError, DivergedError:
                see `lora_adapters.runs.run.train`. Whatever is raised, the pipeline is as it was.
        """
        from .dreambooth.in_memory import dreambooth

        return dreambooth(self, images, prompt, class_prompt, steps, output, adapter_name, quiet, options)

    # ---- using -------------------------------------------------------------------------------------------------------

    def set(self, weights: str | Sequence[str] | Mapping[str, Any]) -> None:
        """Make adapters active, each with its weight; the others are off.

        Args:
            weights: {"a": 0.7, "b": 0.3}; a name, or names, mean weight 1. A weight may be diffusers' mapping of
                components and blocks: {"a": {"unet": {"down": 0.2, "mid": 1.0, "up": {"block_0": 0.5}}}}.

        Raises:
            RequestError: no such adapter, or a weight that is none. StateError: something is fused.
        """
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(_as_list(weights), 1.0)
        for name, weight in weights.items():
            self._carriers(name)
            if isinstance(weight, bool) or not isinstance(weight, (int, float, Mapping)):
                raise RequestError(f"The weight of {name!r} must be a number or a mapping of blocks, got {weight!r}.")
        if not weights:
            raise RequestError("Name at least one adapter; pipe.disable_lora() turns all of them off.")
        self._refuse_fused("Set weights")
        with uncompiled(self.pipe):
            try:
                # diffusers takes entries out of the mappings it is given.
                self.pipe.set_adapters(list(weights), copy.deepcopy(list(weights.values())))
            except ValueError as error:
                raise RequestError(f"diffusers does not take these weights: {error}") from error

    def fuse(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Fold adapters into the base weights, with the weights they are set to: all layers or none.

        Args:
            adapter_names: which; None means the active ones.

        Raises:
            MergeError: a layer can't take them; nothing is fused then. StateError: something is fused already.
        """
        self._refuse_fused("Fuse")
        names = None if adapter_names is None else _as_list(adapter_names)
        for name in names or ():
            self._carriers(name)
        carriers = {component: self.components[component] for component in self.adapters}
        if not carriers:
            raise RequestError("There is no adapter to fuse.")
        for layer in _layers(carriers.values()):
            adopt(layer)  # A stock layer would be unfused by subtraction, which does not give back the same bits.
        try:
            with uncompiled(self.pipe):
                self.pipe.fuse_lora(components=list(carriers), safe_fusing=True, adapter_names=names)
        except Exception as error:
            self.unfuse()
            raise (
                error if isinstance(error, LoraAdaptersError) else MergeError(f"Nothing was fused: {error}")
            ) from error

    def unfuse(self) -> None:
        """Give the base its own weights back, bit for bit."""
        with uncompiled(self.pipe), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already unmerged")
            self.pipe.unfuse_lora(components=list(self.components))

    def _refuse_fused(self, what: str) -> None:
        if any(layer.merged for layer in _layers(self.components.values())):
            raise StateError(f"{what} while no adapter is fused: call unfuse() first.")

    def delete(self, adapter_name: str) -> None:
        """Take one adapter off every component; where it was the last one, the base modules are as they were before."""
        self._refuse_fused("Delete")
        carriers = self._carriers(adapter_name)
        with without_offload(self.pipe):
            for component, module in carriers.items():
                handle = self._handle(component, adapter_name)
                if handle is not None:
                    handle.detach()
                    del self._adapters[component, adapter_name]
                    continue
                for layer in _layers([module]):
                    layer.delete_adapter(adapter_name)
                getattr(module, "peft_config", {}).pop(adapter_name, None)
                unwrap_empty(module)

    def hotswap(
        self,
        source: str | Path | Mapping[str, torch.Tensor],
        adapter_name: str = "default",
        weight_name: str | None = None,
    ) -> None:
        """Put another file's adapter in the place of one that is there, without new layers: compiled code stays valid.

        Layers that the new one does not adapt do nothing; its scale and rank may differ. Text encoders are swapped too.

        Args:
            source, weight_name: as for `load`.
            adapter_name: the adapter to replace.

        Raises:
            CheckpointError: the file adapts layers that the old adapter does not. Nothing is changed.
        """
        carriers = self._carriers(adapter_name)
        with ExitStack() as stack:
            folders = stack.enter_context(as_folders(self.components, source, weight_name))
            if set(folders) != set(carriers):
                raise CheckpointError(
                    f"The new adapter is for {sorted(folders)}, and {adapter_name!r} for {sorted(carriers)}: delete the "
                    "old one and load the new one."
                )
            swaps = {c: prepare_swap(carriers[c], folder, adapter_name) for c, folder in folders.items()}
            for component, swap in swaps.items():
                plan = swap()
                if (handle := self._handle(component, adapter_name)) is not None:
                    handle.plan = replace(handle.plan, layers=plan.layers)

    def optimize(self) -> dict[str, OptimizeReport]:
        """Make the LoRA layers that stock code loaded compute faster; see `lora_adapters.optimize`. Component -> report."""
        carriers = list(self.adapters)
        if not carriers:
            raise RequestError("There is no adapter yet. Load one first; those that come later are covered too.")
        return {component: la.optimize(self.components[component]) for component in carriers}


def _check_pipeline(pipe: Any) -> None:
    from diffusers import DiffusionPipeline
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(pipe, DiffusionPipeline):
        raise RequestError(
            f"LoraPipeline takes a diffusers pipeline, a Hub name, a folder or a file, got a {type(pipe).__name__}. For a "
            "model by itself call lora_adapters.attach(model)."
        )
    if not isinstance(pipe, LoraBaseMixin):
        raise UnsupportedError(
            f"diffusers gives {type(pipe).__name__} no LoRA methods, so it could not load what is saved here. Call "
            "lora_adapters.attach on its denoiser, and save PEFT folders."
        )


def _is_denoiser(name: str) -> bool:
    return name in DENOISERS


def _as_list(names: str | Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _layers(modules: Iterable[nn.Module]) -> list[Any]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, LoraLayer)]
