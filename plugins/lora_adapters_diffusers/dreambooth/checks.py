"""All that can be wrong with images is found before training, and said at once."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from PIL import Image

from lora_adapters.errors import LoraAdaptersWarning, RequestError
from lora_adapters.pictures import each

from .items import Item

#: Problems that an error names.
_NAMED = 20
#: Pixels a side of the difference hash, how many of its bits may differ, and by how much mean colours may.
_HASHED, _NEAR_BITS, _NEAR_COLOUR = 16, 10, 8


@dataclass(frozen=True)
class _Look:
    """What the check of one image found."""

    problem: str = ""
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    bits: int = 0
    colour: tuple[float, ...] = ()


def checked(
    items: list[Item], min_side: int, black_is_wrong: bool, key: str, problems: list[str], distinct: bool = True
) -> list[Item]:
    """Return the items with their sizes and digests.

    Args:
        items: the images, which are all decoded here.
        min_side: shortest side that will do.
        black_is_wrong: refuse masks that are black all over.
        key: what messages begin with.
        problems: found so far.
        distinct: no image may be there twice.

    Raises:
        RequestError: there are problems; the message names each.

    Warns:
        LoraAdaptersWarning: images that should be distinct look alike.
    """
    looks = each(lambda item: _look(item, min_side, black_is_wrong), items)
    problems = [*dict.fromkeys(problems), *(look.problem for look in looks if look.problem)]
    if distinct:
        problems += _twice(items, looks)
    if problems:
        more = f"\n... and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise RequestError(f"{key}: mend or remove these first:\n" + "\n".join(problems[:_NAMED]) + more)
    if distinct and (alike := _alike(items, looks)):
        shown = "; ".join(f"{one} and {other}" for one, other in alike[:_NAMED])
        more = f"; and {len(alike) - _NAMED} more pairs" if len(alike) > _NAMED else ""
        warnings.warn(
            f"{key}: images that look alike, which would count them double: {shown}{more}.",
            LoraAdaptersWarning,
            stacklevel=4,
        )
    return [replace(item, size=look.size, digest=look.digest) for item, look in zip(items, looks, strict=True)]


def _look(item: Item, min_side: int, black_is_wrong: bool) -> _Look:
    try:
        image, mask = item.open()
    except RequestError as error:
        return _Look(str(error))
    if min(image.size) < min_side:
        return _Look(f"{item.name}: it has {image.width} x {image.height} pixels, less than data.min_side={min_side}")
    if mask is not None and mask.size != image.size:
        sizes = f"{mask.width} x {mask.height} pixels, and the image {image.width} x {image.height}"
        return _Look(f"{item.name}: its mask {item.mask} has {sizes}")
    if mask is not None and black_is_wrong and not mask.getbbox():
        return _Look(f"{item.name}: its mask is black, so that nothing of it would count")
    digest = hashlib.sha256(repr(image.size).encode() + image.tobytes() + (mask.tobytes() if mask else b""))
    mean = np.asarray(image.resize((1, 1), Image.Resampling.BOX), dtype=float).reshape(-1)
    return _Look("", image.size, digest.hexdigest(), _difference_hash(image), tuple(mean.tolist()))


def _twice(items: Sequence[Item], looks: Sequence[_Look]) -> list[str]:
    same = defaultdict(list)
    for item, look in zip(items, looks, strict=True):
        if look.digest:
            same[look.digest].append(item.name)
    return [f"{' and '.join(names)}: the same image (data.repeats counts images more often)"
            for names in same.values() if len(names) > 1]  # fmt: skip


def _difference_hash(image: Image.Image) -> int:
    """Return whether each of 16 x 16 pixels is darker than its neighbour, as bits (dHash; N. Krawetz, "Kind of Like That",
    hackerfactor.com, 2013). Sizes and compression change few of them.
    """
    small = np.asarray(image.convert("L").resize((_HASHED + 1, _HASHED), Image.Resampling.BOX), dtype=int)
    return int.from_bytes(np.packbits(small[:, 1:] > small[:, :-1]).tobytes(), "big")


def _alike(items: Sequence[Item], looks: Sequence[_Look]) -> list[tuple[str, str]]:
    pairs = combinations(zip(items, looks, strict=True), 2)
    return [
        (one.name, other.name)
        for (one, a), (other, b) in pairs
        if (a.bits ^ b.bits).bit_count() <= _NEAR_BITS
        and max(abs(x - y) for x, y in zip(a.colour, b.colour, strict=True)) <= _NEAR_COLOUR
    ]
