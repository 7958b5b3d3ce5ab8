"""Building a timm model from a name, a folder or a checkpoint file, with errors that say what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from lora_adapters.error_text import did_you_mean, first_line
from lora_adapters.errors import LoraAdaptersError, RequestError

_HUB = ("hf-hub:", "hf_hub:")


def source_of(name: str, revision: str | None = None) -> str:
    """Return what timm.create_model takes for a name, after checking that the model is there.

    Args:
        name: a model of timm ("resnet50", "resnet50.a1_in1k"), "hf-hub:org/name" (or "org/name"), or a folder with
            config.json and weights (or "local-dir:folder").
        revision: of a model of the Hub.

    Raises:
        RequestError: there is no such folder, or timm registers no such model; the message names the nearest.
    """
    name = name.removeprefix("local-dir:")
    path = Path(name).expanduser()
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not path.is_dir():
        name = f"hf-hub:{name}"
    if name.startswith(_HUB):
        return name if revision is None else f"{name}@{revision}"
    if revision is not None:
        raise RequestError("Only models of the Hub have revisions: name one as hf-hub:org/name.")
    if path.is_dir() or path.is_absolute() or name.startswith((".", "~")):
        if not (path / "config.json").is_file():
            missing = "it holds no config.json" if path.is_dir() else "there is no such folder"
            raise RequestError(
                f"{name!r}: {missing}. Give a model of timm, hf-hub:org/name, or a folder with config.json and weights."
            )
        return f"local-dir:{path}"
    if not timm.is_model(name):
        hint = did_you_mean(name.partition(".")[0], timm.list_models())
        raise RequestError(f"timm has no model {name!r}, and it is no folder.{hint}")
    stem, _, tag = name.partition(".")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # how timm says that there is no such tag
        known = ", ".join(other.partition(".")[2] for other in timm.list_pretrained(f"{stem}.*")) or "none"
        raise RequestError(f"timm has no weights {tag!r} of {stem!r}. Known: {known}.") from None
    return name


def is_folder(name: str) -> bool:
    """Return True if `name` is a folder, which has weights of its own, not a name of timm or the Hub."""
    return Path(name.removeprefix("local-dir:")).expanduser().is_dir()


def create(
    name: str,
    *,
    revision: str | None = None,
    checkpoint: str | None = None,
    pretrained: bool = False,
    dtype: torch.dtype | None = None,
    keep_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a model on the CPU, or on the device of a surrounding `with torch.device(...)`.

    Args:
        name, revision: see `source_of`.
        checkpoint: a file with weights of this model, instead of those that timm knows for it; the classifier is new,
            unless `keep_head`, and then it must fit.
        pretrained: load weights; False leaves them random, from PyTorch's generator as it is.
        dtype: of the weights; None is the model's own.
        **options: what timm.create_model and the model take, such as num_classes or img_size.

    Raises:
        RequestError: no such model or file, or an argument that the model does not take.
        LoraAdaptersError: the weights can't be had.
    """
    source = source_of(name, revision)
    if checkpoint is not None:
        if not Path(checkpoint).is_file():
            raise RequestError(f"There is no file {checkpoint!r}.")
        overlay: dict[str, Any] = {"file": checkpoint, "num_classes": -1}
        if keep_head:
            overlay = {
                "file": checkpoint,
                **({"num_classes": classes} if (classes := options.get("num_classes")) else {}),
            }
        options["pretrained_cfg_overlay"] = overlay
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(source, pretrained=pretrained, **options)
    except TypeError as error:
        raise RequestError(f"{name} does not take an argument: {error}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if not pretrained and not source.startswith(_HUB):
            raise
        raise LoraAdaptersError(
            f"The weights of {checkpoint or name} can't be had: {first_line(error)} Give a file (checkpoint=) or a folder "
            "with them, or pretrained=False for random ones."
        ) from error
    if not hasattr(model, "_model_args"):  # newer versions of timm keep it
        vars(model)["_model_args"] = {key: value for key, value in options.items() if key != "pretrained_cfg_overlay"}
    if pretrained:
        # PEFT's config of an adapter takes the name of its base from here.
        vars(model)["name_or_path"] = checkpoint or _with_tag(source, model)
    return model if dtype is None else model.to(dtype)


def _with_tag(source: str, model: Any) -> str:
    """Return the name that loads the same weights again, also when timm has changed its default."""
    if ":" in source:
        return source.removeprefix("local-dir:")
    tag = (getattr(model, "pretrained_cfg", None) or {}).get("tag")
    return f"{source}.{tag}" if tag and "." not in source else source


def create_on_meta(name: str, **options: Any) -> nn.Module:
    """Return the model that `create` would, on the meta device; no weight is read. Raises as `create` does."""
    options = {**options, "pretrained": False, "checkpoint": None, "keep_head": False}
    try:
        with torch.device("meta"):
            return create(name, **options)
    except (NotImplementedError, RuntimeError):  # models that look at values while they are made
        return create(name, **options).to("meta")
