"""Each image and each caption is encoded once; then the VAE and the text encoders are not needed any more.

A key of the store follows from all that the result follows from: the encoder's weights and settings, and the very pixels or
tokens that go in. So nothing stale is ever found, whatever has changed: an image, its crop, the model or its adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lora_adapters.errors import RequestError, StateError
from lora_adapters.tensor_file import Digest

from ..wrappers import plain
from .family import Family
from .store import FileStore, MemoryStore, Store, Tensors

#: Settings of a VAE that are not in its config, and change what it makes of large images.
_TILING = ("use_tiling", "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor")


class CachedLatents:
    """Moments of the VAE's posterior, by image.

    Args:
        family: of the pipeline, with its VAE while `fill` runs.
        folder: where files are kept; None keeps all in memory.
    """

    def __init__(self, family: Family, folder: str | Path | None = None) -> None:
        self.family, self._store = family, _store(folder)
        self._made_by = ""
        if folder is not None:
            vae = plain(family.pipe.vae)
            self._made_by = _fingerprint([vae], [getattr(vae, name, None) for name in _TILING])
        self._names: dict[Hashable, str] = {}

    def fill(self, images: Iterable[tuple[Hashable, Tensor]]) -> None:
        """Encode what is not there yet.

        Args:
            images: (key, pixels (3, H, W) float32 in [-1, 1]). A key is what the caller calls the image later, such as
                (number, mirrored or not).

        Raises:
            StateError: the VAE is put away. RequestError: what it makes of an image is not finite, or the folder can't
                be written.
        """
        for key, pixels in images:
            pixels = pixels.detach().to("cpu", torch.float32).contiguous()
            name = _name(self._made_by, list(pixels.shape), pixels.numpy().tobytes())
            if self._store.get(name) is None:
                self._store.put(name, _one_row(self.family.moments(pixels[None]), f"The VAE makes of image {key}"))
            self._names[key] = name

    def moments(self, keys: Sequence[Hashable]) -> Tensors:
        """Return the moments of images of one size, each (B, C, h, w) float32 on the CPU: see `Family.moments`.

        Raises:
            StateError: an image was not encoded, or its file has gone.
        """
        return _stacked([_found(self._store, self._names.get(key), f"image {key}") for key in keys])


class CachedText:
    """What the denoiser is told of captions, by caption.

    Args:
        family: of the pipeline, with its text encoders while `fill` runs.
        folder: where files are kept; None keeps all in memory.
    """

    def __init__(self, family: Family, folder: str | Path | None = None) -> None:
        self.family, self._store = family, _store(folder)
        self._made_by = ""
        if folder is not None:
            longest, zeros = getattr(family, "max_sequence_length", None), "force_zeros_for_empty_prompt"
            settings = [family.name, longest, family.pipe.config.get(zeros)]
            self._made_by = _fingerprint([getattr(family.pipe, n) for n in family.text_encoder_names], settings)
        self._names: dict[str, str] = {}

    def fill(self, captions: Iterable[str]) -> None:
        """Encode what is not there yet; the empty caption too, where captions are dropped.

        Raises:
            StateError: a text encoder is put away. RequestError: what they make of a caption is not finite, or the folder
                can't be written.
        """
        for caption in captions:
            if caption in self._names:
                continue
            name = _name(self._made_by, [caption, self.family.tokenized(caption)])
            if self._store.get(name) is None:
                self._store.put(
                    name, _one_row(encode_each(self.family, [caption]), f"A text encoder makes of {caption!r}")
                )
            self._names[caption] = name

    def encode(self, captions: Sequence[str]) -> Tensors:
        """Return what `Family.encode` returns, on the CPU.

        Raises:
            StateError: a caption was not encoded, or its file has gone.
        """
        return _stacked([_found(self._store, self._names.get(c), f"caption {c!r}") for c in captions])


@torch.no_grad()
def encode_each(family: Family, captions: Sequence[str]) -> Tensors:
    """Return what `Family.encode` returns, without gradients, in the encoders' own dtype and one by one: what a caption
    gives does not depend on those beside it, and is to the bit what `CachedText` keeps.
    """
    device = next(getattr(family.pipe, family.text_encoder_names[0]).parameters()).device
    with torch.autocast(device.type, enabled=False):
        rows = [family.encode([caption]) for caption in captions]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _store(folder: str | Path | None) -> Store:
    return MemoryStore() if folder is None else FileStore(folder)


def _found(store: Store, name: str | None, what: str) -> Tensors:
    found = None if name is None else store.get(name)
    if found is None:
        why = "is not in the cache: fill it first" if name is None else "has gone from the cache's folder: start again"
        raise StateError(f"The {what} {why}.")
    return found


def _stacked(rows: list[Tensors]) -> Tensors:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _one_row(tensors: Tensors, maker: str) -> Tensors:
    """Return the only row of each tensor, on the CPU, checked to be finite."""
    if not all(value.isfinite().all() for value in tensors.values()):
        raise RequestError(
            f"{maker} values that are not finite: its weights are broken, or their dtype is too narrow (take bfloat16)."
        )
    return {name: value[0].cpu() for name, value in tensors.items()}


def _name(made_by: str, facts: Any, data: bytes = b"") -> str:
    return hashlib.sha256(json.dumps([made_by, facts]).encode() + data).hexdigest()


def _fingerprint(modules: Sequence[nn.Module], settings: Any = None) -> str:
    """Return what tells models from others that compute something else: weights, config, adapters and their scales."""
    versions = [module.__version__ for module in (torch, diffusers, transformers)]
    digest = Digest()
    digest.add(json.dumps([versions, settings], default=str, sort_keys=True), "", (), b"")
    for module in map(plain, modules):
        config: Any = module.config
        config = dict(config if isinstance(config, dict) else config.to_dict())
        facts = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.add(f"{type(module).__name__} {json.dumps(facts, default=str, sort_keys=True)}", "", (), b"")
        for key, value in sorted(module.state_dict().items()):
            if isinstance(value, Tensor):
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                digest.add(key, str(value.dtype), tuple(value.shape), data)
        for key, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer):
                digest.add(f"{key} {_use_of(layer)}", "", (), b"")
    return digest.text()


def _use_of(layer: Any) -> str:
    """Return how a layer's adapters are used: the weights do not say."""
    return repr([layer.active_adapters, layer.disable_adapters, layer.merged_adapters, getattr(layer, "scaling", {})])
