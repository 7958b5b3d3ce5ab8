"""The functions a user calls: argument handling only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import inject
from .adapter import Adapter, peft_model_of
from .attach_plan import AttachPlan
from .backends import unwrap
from .base_kernels import with_kernels
from .errors import LoraAdaptersError, RequestError, UnsupportedError
from .hooks.manager import load_object, plugins, require
from .planning import make_plan
from .request import _UNSET, AttachRequest, check_fused, check_liger
from .saving import restore_adapter

if TYPE_CHECKING:
    import torch
    from torch import nn


def plan(
    model: nn.Module, rank: int = _UNSET, *, targets: Any = _UNSET, config: Any = None, **options: Any
) -> AttachPlan:
    """Return what `attach` would do with the same arguments. Changes nothing; works on a meta-device model.

    Print it for a table; `.memory(batch_size, sequence_length)` predicts what a training step takes.
    """
    return make_plan(model, AttachRequest.make(config, rank=rank, targets=targets, **options))


def attach(
    model: nn.Module,
    rank: int = _UNSET,
    alpha: float | None = _UNSET,
    targets: str | Sequence[str] | Mapping[str, Any] = _UNSET,
    dropout: float = _UNSET,
    quantization: Any = _UNSET,
    adapter_name: str = _UNSET,
    modules_to_save: Sequence[str] | None = _UNSET,
    config: Any = None,
    *,
    fused: Any = _UNSET,
    liger: Any = _UNSET,
    norm: str = _UNSET,
    progress: bool | None = None,
    **lora_config_fields: Any,
) -> Adapter:
    r"""Attach a LoRA adapter to a model, in place.

    Args:
        model: any nn.Module, or a PeftModel that carries LoRA.
        rank: rank of A and B (default 16).
        alpha: scale times rank; None (default) means alpha = rank, a scale of 1.
        targets: what to adapt. "auto" (default): the target map's choice for this model. A role expression:
            "attention", "attention+mlp", "all-linear", "conv", "q+v". Where q, k and v are fused in one layer whose rows
            the backend knows, "q" adapts these rows alone, by ranks of their own (the layer's rank is then the sum), and
            "attention" the whole layer. Names: ["q_proj", "v_proj"]. A mapping of any of
            these to a rank or {"rank": r, "alpha": a}; later entries override earlier ones. "re:..." is a regular
            expression searched in module names.
        dropout: probability of zeroing an input of A.
        quantization: None, "nf4", "fp4", "int8", a plugin's quantizer, a BitsAndBytesConfig, or a mapping role ->
            quantizer. Quantizes the base in memory, one layer at a time; heads and embeddings stay dense.
        adapter_name: a second adapter needs another name; the new one becomes the active one.
        modules_to_save: modules to train and save whole, by the ends of their names (PEFT's rule: "norm" means
            "input_layernorm" too). None (default) takes a new task head, if the model has one; an empty list trains
            none. A classifier whose head is left out gets no task_type, in the saved config too: PEFT's classes for
            these tasks would train the head again. The head then belongs to the base and is not in the adapter's file;
            PeftModel and AutoPeftModel load it, AutoPeftModelForSequenceClassification and its like do not.
        config: a peft.LoraConfig instead of the arguments above.
        fused: "auto" (default) computes each layer in the fastest way that is exact; `adapter.summary()` says which and
            why. False runs PEFT's own forward in every layer of this adapter, also for other adapters on them.
        liger: Liger's kernels for the base's norms, gated MLPs, rotary embedding and loss; transformers models on a GPU.
            False (default), "auto" (where there are some: `adapter.summary()` says which, or why not) or True (an error
            where there are none). While a model that has them trains on labels, its outputs hold no logits, and a graph
            kept by retain_graph=True can't be run backward twice (an error). Other models of its type in this process
            share the rotary kernel until the last adapter that asked is detached.
        norm: BatchNorm's running statistics, which an adapter's file does not hold by itself. "eval" (default): every
            BatchNorm stays in evaluation mode, whatever `model.train()` says, until the adapter is taken off. "train":
            training updates the statistics of copies, which are saved with the adapter. "affine": their weight and bias
            are trained as well. The base's own statistics never change while an adapter is attached.
        progress: show a progress bar while quantizing; None shows it in a terminal.
        **lora_config_fields: also `layers` (block indices), `exclude` (names), `seed`, `dtype`; PEFT's names for the
            arguments above (`r`, `lora_alpha`, `target_modules`, ...); and any other field of peft.LoraConfig.

    Returns:
        The adapter's handle. `adapter.model` is a PeftModel over the same modules.

    Raises:
        RequestError: a wrong or contradictory argument. UnsupportedError: it can't be done here.
        StateError: other code has merged an adapter into one of these layers.
        MissingDependencyError: an optional package is missing. The model is unchanged in each case.
    """
    request = AttachRequest.make(
        config,
        rank=rank,
        alpha=alpha,
        targets=targets,
        dropout=dropout,
        quantization=quantization,
        adapter_name=adapter_name,
        modules_to_save=modules_to_save,
        fused=fused,
        liger=liger,
        norm=norm,
        **lora_config_fields,
    )
    base = unwrap(model)
    inject.check_free_name(base, request.adapter_name)
    carrier = _peft_model(model, base)
    with with_kernels(base, make_plan(model, request)) as (made, kernels):
        with progress_bar("Quantizing", progress) as report:
            inject.quantize(base, made, report)
        peft_model, changes = inject.apply(base, made, carrier)
    return _attached(base, peft_model, made, changes, kernels)


def _peft_model(model: nn.Module, base: nn.Module) -> Any:
    """Return the PeftModel that carries LoRA adapters on `base` already, ours or one the user made; else None."""
    given: Any = getattr(model, "_orig_mod", model)
    found = peft_model_of(base) or (given if given is not base else None)
    # Prompt and prefix tuning stand beside LoRA in a PeftModel of their own.
    return None if found is None or found.active_peft_config.is_prompt_learning else found


def _attached(base: nn.Module, peft_model: Any, made: AttachPlan, changes: Any, kernels: Any) -> Adapter:
    adapter = Adapter(base, peft_model, made, changes, kernels)
    plugins().notify("lora_adapters_attached", adapter=adapter, plan=made)
    return adapter


class progress_bar:
    """A progress bar on stderr that appears in a terminal, or when asked for."""

    def __init__(self, title: str, show: bool | None) -> None:
        import sys

        self.title, self.show = title, sys.stderr.isatty() if show is None else show

    def __enter__(self) -> Callable[[int, int, str], None] | None:
        if not self.show:
            return None
        from rich.console import Console
        from rich.progress import Progress

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task(self.title)
        return lambda done, total, name: self.bar.update(task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        if self.show:
            self.bar.stop()


def restore(
    model: nn.Module,
    path: str | Path,
    adapter_name: str = "default",
    revision: str | None = None,
    *,
    fused: Any = "auto",
    liger: Any = False,
) -> Adapter:
    """Attach a saved adapter. Everything in the files is checked before the model is touched.

    Args:
        model: the base the adapter was trained on, dense or quantized.
        path: a PEFT checkpoint folder, or a Hub name.
        adapter_name: name the adapter gets here.
        revision: Hub revision.
        fused, liger: as for `attach`.

    Raises:
        RequestError: a wrong argument.
        CheckpointError: the files are damaged, unsafe, incomplete or made for another model. The model is unchanged.
    """
    check_fused(fused)
    check_liger(liger)
    base = unwrap(model)
    inject.check_free_name(base, adapter_name)
    ways = {"fused": fused, "liger": liger}
    return _attached(base, *restore_adapter(base, _peft_model(model, base), path, adapter_name, revision, ways))


def load(
    name: str,
    backend: str | None = None,
    quantization: Any = None,
    dtype: torch.dtype | str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Load a base model through a backend, quantized if asked, after checking that it fits in memory.

    Args:
        name: Hub name or folder.
        backend: "transformers", ...; None tries each backend that can load by name.
        quantization: None, "nf4", "fp4", "int8", a BitsAndBytesConfig or a mapping role -> quantizer.
        dtype: dtype of dense weights; "auto" takes the checkpoint's.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes an accelerator if there is one.
        revision: Hub revision.
        trust_remote_code: run code that the checkpoint brings. Off unless you trust its author.
        progress: False keeps the backend's framework from showing progress bars meanwhile, True makes it show them; None
            leaves that as it is set.
        **options: backend specific, such as `task="text-classification"`, `num_labels=` or `plan=` (store the base as an
            AttachPlan made on its `skeleton` does) for transformers.

    Raises:
        DoesNotFitError: it needs more memory than is free; the message lists settings that would fit.
        RequestError, MissingDependencyError: a wrong argument, or a missing package.
    """
    loader = loader_for(name, backend, revision)
    with framework_bars(loader, progress):
        return loader.load(
            name,
            quantization=quantization,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            **options,
        )


def framework_bars(loader: Any, show: bool | None) -> AbstractContextManager[None]:
    """Return a context in which the framework of a backend shows its own progress bars or not; None changes nothing."""
    make = getattr(loader, "progress_bars", None)
    return nullcontext() if show is None or make is None else make(show)


def skeleton(
    name: str,
    backend: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """Return the model that `load` would load, on the meta device: to plan with, before any weight is read.

    Args:
        name, backend, dtype, revision, trust_remote_code, **options: as for `load`.

    Raises:
        UnsupportedError: the backend can't build models without their weights.
    """
    loader = loader_for(name, backend, revision)
    build = getattr(loader, "skeleton", None)
    if build is None:
        raise UnsupportedError(f"Backend {loader.name!r} can't build {name!r} without its weights: load it instead.")
    return build(name, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, **options)


def loader_for(name: str, backend: str | None, revision: str | None) -> Any:
    """Return the backend object that loads `name`."""
    specs = plugins().backends()
    if backend is not None:
        specs = [spec for spec in specs if spec.name == backend]
        if not specs:
            known = ", ".join(spec.name for spec in plugins().backends()) or "none"
            raise RequestError(f"There is no backend {backend!r}. Installed: {known}.")
    errors: list[str] = []
    for spec in specs:
        try:
            require(spec.requires, spec.extra, f"Backend {spec.name!r}")
            loader = load_object(spec.target)()
            if backend is None and not loader.can_load(name, revision=revision):
                errors.append(f"{spec.name} does not recognise it")
                continue
        except Exception as error:
            # A backend that can't be used here must not keep the next one from loading the model.
            if backend is not None:
                raise
            errors.append(f"{spec.name} can't be used ({error})")
            continue
        return loader
    raise LoraAdaptersError(f"No backend can load {name!r}: {'; '.join(errors) or 'no backend is installed'}.")
