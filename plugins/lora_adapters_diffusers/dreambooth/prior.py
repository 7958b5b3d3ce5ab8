"""Prior preservation (DreamBooth, arXiv:2208.12242, sec. 3.3): images of the class, generated with the base.

They are kept in a folder, each under the seed that it came from, so that a run that was killed goes on where it stopped and
a later one finds them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import Tensor, nn

from lora_adapters.cache_folder import cache_folder
from lora_adapters.errors import RequestError, StateError, UnsupportedError
from lora_adapters.modes import modes_kept
from lora_adapters.staging import write_file

from ..wrappers import plain
from .images import read_class
from .items import Item

if TYPE_CHECKING:
    from lora_adapters.runs.progress import Progress

    from ..recipes import Prior

#: Values of each tensor that tell one base from another.
_SAMPLED = 64


def class_images(pipe: Any, prior: Prior, *, resolution: int, seed: int, progress: Progress) -> list[Item]:
    """Return `prior.images` images of the class; generate those that are not in the folder.

    Images of the user's in `prior.folder` come first, in the order of their names, and count. Image i of those that are
    generated is the one of seed + i: it depends on nothing else but the base, `prior` and the resolution. Adapters are off
    meanwhile, and the pipeline is left as it was.

    Args:
        pipe: the pipeline, on its device.
        prior: the recipe's section.
        resolution: side of the images in pixels, one that the pipeline can make: that of the square bucket.
        seed: of the first image.
        progress: told of each batch.

    Raises:
        RequestError: the folder can't be made, or files in it are no images; or an image came out blank, by the safety
            checker or as the values are not finite. StateError: an adapter is fused. UnsupportedError: weights are
            offloaded layer by layer. CheckpointError: the disk is full. Images that were complete stay.
    """
    _check_not_fused(pipe)
    base = _fingerprint(pipe, prior, resolution)
    folder = Path(prior.folder).expanduser() if prior.folder else cache_folder("class-images", base)
    there = read_class(folder, prior.prompt)
    own = [item for item in there if not _is_generated(item)]
    wanted = [_file(folder, base, seed + i) for i in range(prior.images - len(own))]
    missing = [path for path in wanted if not path.is_file()]
    left = len(there) - min(len(own), prior.images) - (len(wanted) - len(missing))
    if left and prior.folder:  # in the cache, images of other seeds are nothing to be told of
        progress.say(f"{folder}: {left} images are not taken: more than prior.images, or made by another base or seed")
    if missing:
        _make(folder)
        numbers = [seed + i for i, path in enumerate(wanted) if path in missing]
        _generate(pipe, prior, resolution, numbers, folder, base, progress)
        there = read_class(folder, prior.prompt)
    found = {item.source: item for item in there}
    return [*own[: prior.images], *(found[path] for path in wanted)]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(
            f"prior: {folder} can't be made ({error.strerror}): give prior.folder another folder."
        ) from error


# ---- generating ------------------------------------------------------------------------------------------------------


def _generate(
    pipe: Any, prior: Prior, resolution: int, numbers: list[int], folder: Path, base: str, progress: Progress
) -> None:
    """Write the images of some seeds.

    Batches begin at multiples of their size and are whole, whatever is missing of them: on most devices the last bits of an
    image depend on how many are made at a time.
    """
    size, wanted = prior.batch_size, set(numbers)
    progress.start("class images", len(numbers))
    done = 0
    try:
        with _as_it_was(pipe):
            for first in sorted({number // size * size for number in numbers}):
                batch = range(first, first + size)
                for number, image in zip(batch, _images(pipe, prior, resolution, batch), strict=True):
                    if number in wanted:
                        _check(image, number)
                        write_file(_file(folder, base, number), lambda path, image=image: image.save(path, "PNG"))
                        done += 1
                progress.update(done)
    finally:
        progress.stop()


def _images(pipe: Any, prior: Prior, resolution: int, seeds: range) -> list[Image.Image]:
    guidance = {} if prior.guidance_scale is None else {"guidance_scale": prior.guidance_scale}
    return pipe(
        [prior.prompt] * len(seeds),
        height=resolution,
        width=resolution,
        num_inference_steps=prior.steps,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        **guidance,
    ).images


def _check(image: Image.Image, number: int) -> None:
    """Raise for an image of one colour: what safety checkers, and values that are not finite, give."""
    if all(low == high for low, high in image.convert("RGB").getextrema()):
        raise RequestError(
            f"prior: the class image of seed {number} is blank: the pipeline's safety checker refused it, or the dtype is "
            "too narrow (SDXL's VAE overflows in float16: take model.dtype=bfloat16). Change prior.prompt or the seed, "
            "load the pipeline without a safety checker, or put images into prior.folder."
        )


@contextmanager
def _as_it_was(pipe: Any) -> Iterator[None]:
    """Within this context the pipeline makes images as its base does; after it, it is as it was."""
    modules = [module for module in pipe.components.values() if isinstance(module, nn.Module)]
    switched = [layer for layer in _adapted(pipe) if not layer._disable_adapters]
    scheduler, shown = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    pipe.scheduler = copy.deepcopy(scheduler)  # it keeps timesteps, and old ones of some kinds change results
    pipe.set_progress_bar_config(disable=True)
    try:
        with modes_kept(*modules):
            for module in modules:
                module.eval()
            for layer in switched:
                layer._disable_adapters = True  # enable_adapters() would change requires_grad too
            yield
    finally:
        for layer in switched:
            layer._disable_adapters = False
        pipe.scheduler = scheduler
        if shown is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = shown


def _adapted(pipe: Any) -> list[Any]:
    modules = [plain(module) for module in pipe.components.values() if isinstance(module, nn.Module)]
    return [layer for module in modules for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _check_not_fused(pipe: Any) -> None:
    if any(layer.merged for layer in _adapted(pipe)):
        raise StateError("An adapter is fused, and class images are the base's: unfuse it first.")


# ---- names -----------------------------------------------------------------------------------------------------------


def _file(folder: Path, base: str, seed: int) -> Path:
    return folder / f"class-{base}-{seed:010}.png"


def _is_generated(item: Item) -> bool:
    return re.fullmatch(r"class-[0-9a-f]{16}-\d{10}\.png", Path(item.name).name) is not None


def _fingerprint(pipe: Any, prior: Prior, resolution: int) -> str:
    """Return a hash of all that an image follows from but its seed. Of each weight some values are looked at: bases that
    were trained apart differ in nearly all of them.
    """
    settings = [prior.prompt, prior.steps, prior.guidance_scale, resolution, diffusers.__version__]
    digest = hashlib.sha256(repr([type(pipe).__name__, settings]).encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} {_config(part)}".encode())
        if isinstance(part, nn.Module):
            for key, value in sorted(plain(part).state_dict().items()):
                if isinstance(value, Tensor) and not _of_adapter(key):
                    key = key.replace(".base_layer.", ".")
                    digest.update(f"{key} {value.dtype} {[*value.shape]}".encode() + _some(key, value))
    return digest.hexdigest()[:16]


def _config(part: Any) -> str:
    config = getattr(part, "config", None)
    if config is None:  # a tokenizer
        return ""
    values = dict(config) if isinstance(config, dict) else config.to_dict()
    facts = {key: value for key, value in values.items() if not key.startswith("_")}
    return json.dumps(facts, sort_keys=True, default=str)


def _of_adapter(key: str) -> bool:
    return ".lora_" in key or key.startswith("lora_")


def _some(key: str, value: Tensor) -> bytes:
    if value.is_meta:
        raise UnsupportedError(
            f"{key} is offloaded, so that class images can't be told from those of other bases: generate them before "
            "enable_sequential_cpu_offload."
        )
    flat = value.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
    return some.view(torch.uint8).numpy().tobytes() if some.numel() else b""
