"""Adapter checkpoints on disk: where they are, writing one as one act, and (re-exported) the checked way to read one.

The format is stock PEFT's: adapter_config.json and adapter_model.safetensors with keys such as
`base_model.model.<module>.lora_A.weight`. The safetensors metadata also holds the package's version, a digest over the
tensors, a digest over the config's fields that give them meaning, and whatever the caller and plugins put there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME, meaning_digest, parse_config, read_config
from .adapter_file import (
    DIGEST_ENTRY,
    MEANING_ENTRY,
    PREFIX,
    VERSION_ENTRY,
    AdaptedModule,
    AdapterFile,
    check_copies,
    check_supported,
    check_tensors,
    inspect_adapter,
    read_adapter,
)
from .error_text import first_line
from .errors import CheckpointError, MissingDependencyError, RequestError, UnsupportedError
from .staging import remove_litter, write_files
from .tensor_file import NAMES, check_finite, digest_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

__all__ = [
    "PREFIX",
    "AdaptedModule",
    "AdapterFile",
    "adapter_folder",
    "check_adapter_name",
    "check_copies",
    "check_supported",
    "check_tensors",
    "inspect_adapter",
    "read_adapter",
    "read_config",
    "remove_litter",
    "resolve_adapter_path",
    "write_adapter",
]

README_NAME = "README.md"
_MAX_METADATA_BYTES = 2**20


def check_adapter_name(name: str) -> None:
    """Check that an adapter's name can be a module's name and a folder's name.

    Raises:
        RequestError: it is empty, longer than 128 characters, or holds anything but letters, digits, "_" and "-".
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w-]{0,127}|_[\w-]{1,127}", name):
        raise RequestError(
            f"The adapter name {str(name)[:80]!r} can't be used: take letters, digits, '_' and '-' (no dots, slashes "
            "or spaces), such as 'default'."
        )


def adapter_folder(root: str | Path, adapter_name: str) -> Path:
    """Folder of an adapter under `root`, as PEFT lays it out: `root` for "default", else `root/<adapter_name>`.

    Raises:
        RequestError: the name is not allowed.
        CheckpointError: the subfolder is a link out of `root`.
    """
    check_adapter_name(adapter_name)
    root = Path(root)
    folder = root if adapter_name == "default" else root / adapter_name
    if not folder.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{folder} is a link out of {root}, to {folder.resolve()}. Remove the link.")
    return folder


def resolve_adapter_path(
    name_or_path: str | Path, revision: str | None = None, token: str | None = None, subfolder: str | None = None
) -> Path:
    """Local folder of an adapter: the folder itself, or a Hub repository's downloaded (or cached) snapshot.

    Only adapter_config.json, adapter_model.safetensors and README.md are downloaded.

    Args:
        name_or_path: folder, or Hub name such as "me/adapter".
        revision: branch, tag or commit on the Hub; give a commit to be sure of what is loaded.
        token: Hub token; None takes the one of the login.
        subfolder: name of the adapter's folder inside, for repositories that hold several.

    Raises:
        CheckpointError: there is no such folder, or the Hub has none or can't be reached.
    """
    if subfolder is not None:
        check_adapter_name(subfolder)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if revision is not None:
            raise RequestError(f"{path} is a folder, which has no revisions. Leave out revision, or give a Hub name.")
        return adapter_folder(path, subfolder) if subfolder else path
    name = str(name_or_path)
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(
            f"{name} is not a folder. Give the folder a save wrote, or a Hub name such as me/adapter."
        )
    snapshot = _download(name, revision, token, f"{subfolder}/" if subfolder else "")
    return adapter_folder(snapshot, subfolder) if subfolder else snapshot


def _download(name: str, revision: str | None, token: str | None, prefix: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError("Hub names need huggingface_hub: pip install huggingface_hub.") from None
    wanted = [prefix + file for file in (CONFIG_NAME, WEIGHTS_NAME, README_NAME)]
    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=wanted))
    except Exception as error:  # Its errors share no base class: HTTP, validation, cache, offline, disk.
        reason = first_line(error)[:300]
        raise CheckpointError(
            f"There is no folder {name!r} here, and the Hub gave no such adapter ({reason}). Check the name and the "
            "revision; without a connection, download it first (huggingface-cli download) or give a local folder."
        ) from error


def write_adapter(
    folder: str | Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    readme: str | None = None,
) -> Path:
    """Write a PEFT checkpoint folder as one act; see `lora_adapters.staging`.

    Args:
        folder: made if missing. Other files in it stay.
        config: written with inference_mode=True, as PEFT does.
        tensors: keys and tensors as `peft.get_peft_model_state_dict` returns them, any device and dtype.
        metadata: string entries for the safetensors header (base fingerprint, plugins' own).
        readme: text of README.md; None leaves that file alone.

    Returns:
        The folder.

    Raises:
        RequestError: metadata is not strings, or uses this package's own names.
        CheckpointError: a tensor holds NaN or infinite values, or writing failed. The files are as they were before.
    """
    folder = Path(os.path.abspath(Path(folder).expanduser()))
    raw = _config_dict(config)
    text = json.dumps(raw, indent=2, sort_keys=True).encode()
    if len(text) > MAX_CONFIG_BYTES:
        raise CheckpointError(
            f"{CONFIG_NAME} would take {len(text)} bytes, more than restore accepts ({MAX_CONFIG_BYTES}). Use patterns "
            "instead of single module names in target_modules, rank_pattern and alpha_pattern."
        )
    with suppress(UnsupportedError):  # Variants of which only stock PEFT can load what is saved here.
        parse_config(text)
    # Separate copies: tied tensors share memory, which safetensors does not store.
    values = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    check_finite(values, "The adapter was not saved")
    entries = _entries(metadata or {}, values, raw)
    writers = {
        WEIGHTS_NAME: lambda path: _write_tensors(path, values, entries),
        CONFIG_NAME: lambda path: _write(path, text),
    }
    if readme is not None:
        writers[README_NAME] = lambda path: _write(path, readme.encode())
    write_files(folder, writers)
    return folder


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], entries: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata=entries)
    except SafetensorError as error:  # How it reports a full disk, among others.
        raise OSError(str(error)) from error


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _config_dict(config: LoraConfig) -> dict[str, Any]:
    raw = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    # Through JSON and back: enums become strings, so that the digest is over what a reader will see.
    return json.loads(json.dumps(raw | {"inference_mode": True}, default=str))


def _entries(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor], raw: dict[str, Any]) -> dict[str, str]:
    from . import __version__

    if unknown := {str(tensor.dtype) for tensor in tensors.values()} - {f"torch.{name}" for name in NAMES}:
        raise RequestError(f"safetensors can't store {', '.join(sorted(unknown))}. Convert these tensors first.")
    own = {
        "format": "pt",
        VERSION_ENTRY: __version__,
        DIGEST_ENTRY: digest_of(tensors),
        MEANING_ENTRY: meaning_digest(raw),
    }
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str) or key in own:
            raise RequestError(
                f"Metadata entry {key!r}: {value!r} can't be saved: names and values must be strings, and "
                f"{', '.join(own)} are taken. Rename it, or turn it into a string."
            )
    if sum(len(key) + len(value) for key, value in metadata.items()) > _MAX_METADATA_BYTES:
        raise RequestError("The metadata takes more than 1 MiB. Put a file's name or a digest there instead.")
    return own | dict(metadata)
