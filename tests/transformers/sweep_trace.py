"""The sweep's oracle: what a model's projections do, read off one forward pass on the meta device.

It knows nothing of names. Every tensor carries a tag that says which weights it was last multiplied with; the tag
follows views, element-wise operations and reshapes through a TorchDispatchMode. A product of two activations that goes
through a softmax into another product is attention, and the tags of its operands say which projections made q, k and v.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_NONE: frozenset[Any] = frozenset()
_ACTIVATIONS = {"gelu", "silu", "relu", "sigmoid", "tanh", "erf", "hardtanh", "leaky_relu", "elu", "mish", "relu_"}
_SOFTMAXES = {"_softmax", "_safe_softmax", "softmax"}
#: Operations that multiply two operands: name -> positions of the operands.
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addbmm": (1, 2), "_grouped_mm": (0, 1)}
_PRODUCTS |= {"convolution": (0, 1), "embedding": (1, 0), "linear": (0, 1), "matmul": (0, 1), "mv": (0, 1)}
#: The count that a data-dependent operation is told, at most: its values don't exist on the meta device.
_MOST_ROWS = 64


@dataclass(frozen=True)
class Tag:
    """Where a tensor comes from: `sources` are the weights of the last products on every way to it."""

    sources: frozenset[str] = _NONE
    weights: frozenset[str] = _NONE
    attention: frozenset[int] = _NONE
    queries: frozenset[str] = _NONE
    keys: frozenset[str] = _NONE
    scored: bool = False
    softmaxed: bool = False
    activated: bool = False


_EMPTY = Tag()


def _union(tags: list[Tag]) -> Tag:
    tags = [t for t in tags if t is not _EMPTY]
    if not tags:
        return _EMPTY
    if len(tags) == 1:
        return tags[0]
    # A parameter that meets an activation (a norm's weight, a bias) is not a projection of it.
    only_weights = all(t.weights for t in tags)
    return Tag(
        sources=_NONE.union(*(t.sources for t in tags)),
        weights=_NONE.union(*(t.weights for t in tags)) if only_weights else _NONE,
        attention=_NONE.union(*(t.attention for t in tags)),
        queries=_NONE.union(*(t.queries for t in tags)),
        keys=_NONE.union(*(t.keys for t in tags)),
        scored=any(t.scored for t in tags),
        softmaxed=any(t.softmaxed for t in tags),
        activated=any(t.activated for t in tags),
    )


@dataclass
class Attention:
    """One softmax attention product; `out` gets the weights that read its result first."""

    q: frozenset[str]
    k: frozenset[str]
    v: frozenset[str]
    out: set[str] = field(default_factory=set)
    out_tensor: int = 0


@dataclass
class Trace:
    """What one forward pass showed. Names are those of parameters."""

    attentions: list[Attention] = field(default_factory=list)
    inputs: dict[str, Tag] = field(default_factory=dict)
    routed: set[str] = field(default_factory=set)
    read_directly: set[str] = field(default_factory=set)
    logits: frozenset[str] = _NONE
    hidden: frozenset[str] = _NONE

    def consumers(self, name: str) -> set[str]:
        """Return the weights whose input came from `name`."""
        return {other for other, tag in self.inputs.items() if name in tag.sources}


class Recorder(TorchDispatchMode):
    """Tags every tensor that a forward pass makes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.trace = Trace()
        self.active: list[str] = []
        self._tags: dict[int, Tag] = {}
        self._written: dict[int, Tag] = {}
        self._keep: list[Any] = []  # an id is only a name while its tensor lives
        self._aliases: dict[str, set[str]] = {}
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            own = first.setdefault(id(parameter), name)
            self._aliases.setdefault(own, set()).add(name.rpartition(".")[0])
            self.put(parameter, Tag(weights=frozenset((own,))))

    def put(self, tensor: Tensor, tag: Tag) -> None:
        self._tags[id(tensor)] = tag
        self._keep.append(tensor)

    def tag(self, tensor: Tensor) -> Tag:
        tag = self._tags.get(id(tensor), _EMPTY)
        written = self._written.get(tensor.untyped_storage()._cdata)
        return tag if written is None else _union([tag, written])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        out = _data_dependent(name, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        tag = self._tag_result(name, args, tensors, out)
        if tag is not _EMPTY:
            for result in tree_flatten(out)[0]:
                # Indices and masks choose what is read; they are not what is read.
                if isinstance(result, Tensor) and result.is_floating_point():
                    self.put(result, tag)
            if func._schema.is_mutable and tensors and tensors[0].is_floating_point():
                key = tensors[0].untyped_storage()._cdata
                self._written[key] = _union([self._written.get(key, _EMPTY), tag])
        else:
            self._keep.append(out)
        return out

    def _tag_result(self, name: str, args: Any, tensors: list[Tensor], out: Any) -> Tag:
        if name in _PRODUCTS:
            left, right = (args[i] for i in _PRODUCTS[name])
            return self._product(left, right, [t for t in tensors if t is not left and t is not right], out)
        tag = _union([self.tag(t) for t in tensors])
        if tag is _EMPTY or tag.weights:
            return tag
        if name in _SOFTMAXES and tag.scored:
            return Tag(**{**tag.__dict__, "softmaxed": True})
        if name == "topk":
            self.trace.routed |= self.tag(tensors[0]).sources
        if name in _ACTIVATIONS:
            return Tag(**{**tag.__dict__, "activated": True})
        return tag

    def _product(self, left: Tensor, right: Tensor, added: list[Tensor], out: Tensor) -> Tag:
        a, b = self.tag(left), self.tag(right)
        if a.weights and not b.weights:
            a, b, left, right = b, a, right, left
        if b.weights:
            return self._projection(left, a, b.weights)
        rest = [t for t in map(self.tag, added) if not t.weights]
        if a.softmaxed or b.softmaxed:
            scores, values = (a, b) if a.softmaxed else (b, a)
            self.trace.attentions.append(Attention(scores.queries, scores.keys, values.sources))
            return _union([Tag(attention=frozenset((len(self.trace.attentions) - 1,)), sources=frozenset()), *rest])
        if not (a.sources and b.sources):
            return _union([a, b, *rest])
        both = Tag(sources=a.sources | b.sources, queries=a.sources, keys=b.sources, scored=True)
        return _union([both, *rest])

    def _projection(self, x: Tensor, tag: Tag, names: frozenset[str]) -> Tag:
        for name in names:
            self.trace.inputs[name] = _union([self.trace.inputs.get(name, _EMPTY), tag])
            if self._aliases[name].isdisjoint(self.active):
                self.trace.read_directly.add(name)
        source = x.untyped_storage()._cdata
        for index in tag.attention:
            attention = self.trace.attentions[index]
            if not attention.out or attention.out_tensor == source:
                attention.out |= names
                attention.out_tensor = source
        return Tag(sources=names)


def _rows(count: int) -> int:
    return max(1, min(count, _MOST_ROWS))


def _data_dependent(name: str, args: Any, kwargs: Any) -> Any:
    """Answer for the operations whose result depends on values, as if every condition held."""
    x = args[0] if args and isinstance(args[0], Tensor) else None
    if x is None or x.device.type != "meta":
        return None
    if name == "_local_scalar_dense":
        return True if x.dtype is torch.bool else 1.0 if x.dtype.is_floating_point else 1
    if name == "nonzero":
        return x.new_empty((_rows(x.numel()), x.ndim), dtype=torch.long)
    if name == "equal":
        return True
    if name in ("_unique2", "unique_consecutive", "unique_dim"):
        return tuple(x.new_empty(_rows(x.numel()), dtype=d) for d in (x.dtype, torch.long, torch.long))
    if name == "bincount":
        return x.new_empty(kwargs.get("minlength", 0) or (args[2] if len(args) > 2 else 1), dtype=torch.long)
    if name == "masked_select":
        return x.new_empty(_rows(x.numel()))
    if name == "_grouped_mm":  # its meta kernel takes bfloat16 only
        return x.new_empty((x.shape[0], args[1].shape[-1]))
    if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type == "cpu":
        return torch.zeros(x.shape, dtype=kwargs.get("dtype") or x.dtype)
    if name == "repeat_interleave" and len(args) == 1:
        return x.new_empty(kwargs.get("output_size") or _rows(x.numel()), dtype=torch.long)
    if name in ("index", "index_put", "index_put_") and any(_is_mask(i) for i in args[1]):
        return _masked_index(name, args)
    return None


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _masked_index(name: str, args: Any) -> Tensor:
    x, indices = args[0], args[1]
    if name != "index":
        return x if name == "index_put_" else torch.empty_like(x)
    plain: list[Any] = []
    for index in indices:
        if _is_mask(index):
            plain += [torch.empty(index.numel(), dtype=torch.long, device="meta") for _ in range(index.ndim)]
        else:
            plain.append(index)
    return torch.ops.aten.index.Tensor(x, plain)


@contextlib.contextmanager
def _called_modules(model: nn.Module, active: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are being called, so that a weight used by anyone else stands out."""
    handles = []
    for name, module in model.named_modules(remove_duplicate=False):
        if next(module.parameters(recurse=False), None) is not None:
            handles.append(module.register_forward_pre_hook(lambda *_, n=name: active.append(n)))
            handles.append(module.register_forward_hook(lambda *_, n=name: active.remove(n), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def trace(model: nn.Module, inputs: dict[str, Any]) -> Trace:
    """Run `model(**inputs)` once and return what its projections did."""
    recorder = Recorder(model)
    for name, value in inputs.items():
        # Keys and values that another model made: no projection of this one is their source.
        for part in [] if isinstance(value, Tensor) else tree_flatten(value)[0]:
            recorder.put(part, Tag(sources=frozenset((f"input {name}",))))
    with torch.no_grad(), _called_modules(model, recorder.active), recorder:
        outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        recorder.trace.logits = recorder.tag(logits).sources
    recorder._keep.clear()
    tree_map_only(Tensor, lambda t: None, outputs)
    return recorder.trace
