"""What a memory simulation is made of: tensors without data, and a log of when their storages come and go."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import random
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import UnsupportedError

#: Operations whose inputs are all known (not simulated) run for real up to this many elements, so that a model may look
#: at its inputs ("is anything masked?"). Bigger ones are simulated.
_REAL_ELEMENTS = 1 << 20

#: CUDA's caching allocator hands out multiples of this many bytes.
_CUDA_BLOCK = 512


class Tracker(TorchDispatchMode):
    """Logs when storages made by operations come and go. Storages given to `ignore` are not logged."""

    def __init__(self, device: torch.device, simulated: bool, like_cuda: bool = False) -> None:
        super().__init__()
        self.device = device
        self.simulated = simulated
        self.block = _CUDA_BLOCK if like_cuda or device.type == "cuda" else 1
        self.constant_scalars = False  # answer .item() with 1.0: an optimizer's step counters steer no memory
        self.events: list[tuple[int, int]] = []  # (key of the storage, its bytes: negative when freed)
        self._alive: dict[int, tuple[weakref.ref[Any], int, int]] = {}  # id -> (ref, key, bytes)
        self._ignored: dict[int, Any] = {}
        self._keys = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.constant_scalars and func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        out = _simulate(func, args, kwargs) if self.simulated else func(*args, **kwargs)
        self.see(out)
        return out

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave these tensors' storages out of the log."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._ignored[id(storage)] = storage

    def see(self, tree: Any) -> None:
        """Log the storages of the tensors in a tree that were not seen yet."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            name, size = id(storage), _rounded(storage.nbytes(), self.block)
            if name not in self._ignored and name not in self._alive and size:
                self._keys += 1
                self._alive[name] = (weakref.ref(storage, self._on_death(name)), self._keys, size)
                self.events.append((self._keys, size))

    def bytes_of(self, tree: Any) -> dict[int, int]:
        """Return {key: bytes} of the logged storages among the storages of the tensors in a tree."""
        leaves = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        entries = [self._alive.get(id(t.untyped_storage())) for t in leaves]
        return {entry[1]: entry[2] for entry in entries if entry is not None}

    def peak(self, start: int, without: Collection[int] = ()) -> int:
        """Highest sum of bytes of storages that came after event number `start`."""
        mine: set[int] = set()
        current = highest = 0
        for key, change in self.events[start:]:
            if change > 0:
                mine.add(key)
            if key in mine and key not in without:
                current += change
                highest = max(highest, current)
        return highest

    def _on_death(self, name: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            _, key, size = self._alive.pop(name)
            self.events.append((key, -size))

        return gone


def keep_masks_as_cuda(model: nn.Module) -> None:
    """Make a simulated model's dropout keep what it keeps on CUDA, a byte an element.

    On CPUs it keeps a mask of the input's dtype. Modules only: an intercepted `F.dropout` would be missed where a
    checkpoint computes its forward again.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.forward = functools.partial(_native_dropout, module)


def _native_dropout(module: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    return torch.native_dropout(input, module.p, True)[0] if module.training and module.p else input


class Copier(TorchFunctionMode):
    """Copies a model with its structure and state, its tensors replaced by simulated ones on the target device."""

    def __init__(self, mode: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.mode = mode
        self.device = device
        self.originals: list[torch.Tensor] = []
        self.fakes: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return self._fake(args[0])
        return func(*args, **(kwargs or {}))

    def copy(self, model: nn.Module) -> nn.Module:
        """Return a copy without data; `originals` then holds every tensor that the model has.

        Raises:
            UnsupportedError: the model's structure can't be copied.
        """
        tensors = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {id(t): self._fake(t) for t in tensors}
        try:
            with self:
                for tensor in tensors:  # quantization statistics live in attributes of the parameter
                    vars(memo[id(tensor)]).update(copy.deepcopy(vars(tensor), memo))
                return copy.deepcopy(model, memo)
        except Exception as error:
            raise UnsupportedError(
                f"Memory of {type(model).__name__} can't be simulated: copying its structure failed "
                f"({type(error).__name__}: {error})."
            ) from error

    def input(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keep what is known of an input, so that the model may look at it; simulate the rest."""
        if tensor.device.type != "meta" and (self.device.type == "cpu" or torch.cuda.is_available()):
            with unset_fake_temporarily():
                return tensor.detach().to(self.device, copy=True).requires_grad_(tensor.requires_grad)
        return self._plain(tensor).requires_grad_(tensor.requires_grad)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        fake = self._plain(tensor)
        self.originals.append(tensor)
        self.fakes.append(fake)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def _plain(self, tensor: torch.Tensor) -> torch.Tensor:
        with unset_fake_temporarily():
            elem = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return FakeTensor(self.mode, elem, self.device)


def _simulate(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation without data, or for real where it is small and all it reads is known."""
    leaves = tree_leaves((args, kwargs))
    if any(isinstance(t, FakeTensor) for t in leaves):
        return func(*args, **kwargs)
    from_tensors = any(isinstance(t, torch.Tensor) for t in leaves)
    try:
        out = func(*args, **kwargs)
    except (DataDependentOutputException, DynamicOutputShapeException):
        if not from_tensors:
            raise
    else:
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = from_tensors or all(not t.is_floating_point() or t.numel() == 1 for t in made)
        if not known or sum(t.numel() for t in made) > _REAL_ELEMENTS or any(t.device.type == "meta" for t in made):
            return out
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _rounded(size: int, block: int) -> int:
    return -(-size // block) * block


def stored_bytes(tensors: Iterable[torch.Tensor], block: int) -> int:
    """Bytes of the tensors' storages, each storage once and rounded up to whole blocks."""
    storages = {s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(_rounded(size, block) for size in storages.values())


@contextlib.contextmanager
def rng_untouched() -> Iterator[None]:
    """Put every random state back, whatever dropout and checkpointing do."""
    state, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging a traceback for an error that is raised, and explained, anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = disabled
