"""Is the base model that a recipe names there? If not, what was meant?"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_adapters.error_text import did_you_mean
from lora_adapters.errors import LoraAdaptersError, RequestError

from ..loading import read_config


def check_model(section: Any) -> None:
    """Raise unless the base model's config can be read: a folder that is not there is told with its nearest neighbour."""
    path = Path(section.name)
    looks_local = path.is_absolute() or section.name.startswith((".", "~")) or section.name.count("/") > 1
    if looks_local and not path.exists():
        raise RequestError(f"model.name: there is no folder {section.name!r}{_near(path)}")
    try:
        read_config(section.name, {}, {"revision": section.revision, "trust_remote_code": section.trust_remote_code})
    except LoraAdaptersError as error:
        known = [name for name in (*_folders_here(), *_cached_models()) if name != section.name]
        raise RequestError(f"model.name: {error}{did_you_mean(section.name, known)}") from error


def _near(path: Path) -> str:
    near = get_close_matches(path.name, [p.name for p in path.parent.glob("*") if p.is_dir()], n=1, cutoff=0.5)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ": give a folder, or a name on the Hub."


def _folders_here() -> list[str]:
    return [p.parent.name for p in Path().glob("*/config.json")]


def _cached_models() -> list[str]:
    """Return the names of models in the Hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [p.name.removeprefix("models--").replace("--", "/") for p in Path(HF_HUB_CACHE).glob("models--*")]
