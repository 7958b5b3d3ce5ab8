"""Where a timm model begins and ends: the layers that read the image, and the classifiers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

#: Patch embeddings at the top of a model. A convolutional network inside one ("backbone") is none.
_PATCH_EMBEDDING = re.compile(r"^(?:(?:encoder|model)\.)*(?:patch_embeds?\d*|pixel_embed|embeds)\.(?!backbone\.)")


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return what timm says of a model's weights (input size, first layer, classifier), {} if it says nothing."""
    config = getattr(model, "pretrained_cfg", None)
    return dict(config) if config else {}


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the modules that make the logits, as `get_classifier()` and pretrained_cfg give them.

    Several for distilled models and those with a head per branch or stage; none with num_classes=0, and none for a
    backbone that gives features only.
    """
    if not hasattr(model, "get_classifier"):
        return ()
    wanted = {id(part) for part in _flat(_classifier_of(model)) if _has_weights(part)}
    said = set(_words(pretrained_cfg(model).get("classifier")))
    names = [n for n, m in model.named_modules() if id(m) in wanted or (n in said and _has_weights(m))]
    outermost = [n for n in names if not any(n.startswith(other + ".") for other in names)]
    return tuple(inner for name in outermost for inner in _by_one_name(model, name))


def _by_one_name(model: nn.Module, name: str) -> Iterable[str]:
    """Yield a classifier's name, or those of its children if it also is the end of the name of something inside it.

    PEFT takes `modules_to_save` by the ends of names: "head" would mean RepViT's head.head a second time.
    """
    module = model.get_submodule(name)
    if not any(inner and f"{name}.{inner}".endswith(name) for inner, _ in module.named_modules()):
        yield name
        return
    for child, part in module.named_children():
        if _has_weights(part):
            yield f"{name}.{child}"


def _classifier_of(model: nn.Module) -> Any:
    try:
        return model.get_classifier()  # type: ignore[operator]
    except AttributeError:  # a model whose head was taken off by hand
        return None


def _flat(found: Any) -> Iterable[nn.Module]:
    if isinstance(found, (tuple, list, nn.ModuleList)):
        for part in found:
            yield from _flat(part)
    elif isinstance(found, nn.Module):
        yield found


def _words(given: Any) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def embeddings(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Return which of these layers turn the image into features: the first layer, and patch embeddings.

    The first layer is pretrained_cfg["first_conv"], by its whole name: "conv1" is not layer1.0.conv1. In a backbone that
    gives features (features_only) the names have changed, and the first one that still fits counts.
    """
    names = list(names)
    found = {n for n in names if _PATCH_EMBEDDING.search(n)}
    for first in _words(pretrained_cfg(model).get("first_conv")):
        fits = [n for n in names if n == first] or [n for n in names if _plain(n).endswith(_plain(first))]
        found |= set(fits[:1])
    return frozenset(found)


def _plain(name: str) -> str:
    """Return a name in which "stem_0", as a flattened backbone has it, is "stem.0"; a dot comes first."""
    return "." + name.replace("_", ".")
