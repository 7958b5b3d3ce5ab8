"""Tensors kept by key, in memory or in files that a later run finds again."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from lora_adapters.errors import CheckpointError, RequestError
from lora_adapters.tensor_file import read_header, read_tensors

Tensors = dict[str, Tensor]


class MemoryStore:
    """Keeps tensors in memory, on the CPU."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensors] = {}

    def get(self, key: str) -> Tensors | None:
        """Return what was put under the key, None if nothing was."""
        return self._kept.get(key)

    def put(self, key: str, tensors: Tensors) -> None:
        """Keep CPU tensors under a key."""
        self._kept[key] = tensors


class FileStore:
    """Keeps each key's tensors in a file of its own, which appears whole or not at all; several processes may share it.

    Args:
        folder: made if missing. The keys, which are names of files, must say all that the tensors follow from.

    Raises:
        RequestError: the folder can't be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unwritable(error) from error

    def get(self, key: str) -> Tensors | None:
        """Return what a file holds; None where there is none, or a damaged one."""
        path = self._path(key)
        try:
            return read_tensors(path, read_header(path))[0]
        except CheckpointError:
            return None

    def put(self, key: str, tensors: Tensors) -> None:
        """Write CPU tensors as a file."""
        stage = self.folder / f".{key}.{secrets.token_hex(4)}"
        try:
            save_file({name: value.contiguous() for name, value in tensors.items()}, stage)
            os.replace(stage, self._path(key))
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            stage.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _unwritable(self, error: OSError) -> RequestError:
        return RequestError(f"The cache {self.folder} can't be written: {error}. Cache in memory, or free the disk.")


Store = MemoryStore | FileStore
