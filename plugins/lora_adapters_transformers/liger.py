"""Liger's kernels (github.com/linkedin/Liger-Kernel) in one model: norms, rotary embedding, gated MLPs, the loss.

Liger patches a model by binding its own forwards to the model's modules, and besides puts its classes and functions into
transformers' and torch's modules, where every other model of the process meets them. Here it does so once, to learn what
it would change; then everything is put back, and only what follows is done:

- Each forward of Liger's becomes one that asks at every call: on a GPU, in 32 or 16 bits and outside torch.compile (whose
  own fusion does the same) it is Liger's, anywhere else the module's own. So the model still runs on a CPU or the meta
  device, and an adapter that comes to the language model head later is not passed over.
- The rotary embedding is a function that attention looks up in its module, shared by all models of that type. It is
  replaced for as long as a model here uses it, by one that asks the same question.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

from lora_adapters.attach_plan import AttachPlan
from lora_adapters.errors import MissingDependencyError, StateError, UnsupportedError
from lora_adapters.snapshot import Changes, Snapshot

#: Where Liger's kernels run. ROCm's devices are called cuda, too.
DEVICES = ("cuda", "xpu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Liger's class -> the activation that it computes whatever the model's configuration says.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "GEGLU": functools.partial(nn.functional.gelu, approximate="tanh"),
    "SwiGLU": nn.functional.silu,
}


def find_kernels(model: nn.Module, plan: AttachPlan) -> LigerKernels:
    """Return Liger's kernels for `model`, not applied yet. Nothing is changed.

    Raises:
        MissingDependencyError: liger-kernel is not installed.
        UnsupportedError: there are none for this model or its device; the message says why.
    """
    if find_spec("liger_kernel") is None:
        raise MissingDependencyError("Liger's kernels need liger-kernel: pip install 'lora-adapters[liger]'.")
    if not type(model).__module__.startswith("transformers.models."):
        raise UnsupportedError(f"Liger knows transformers' own model classes only, not {type(model).__name__}.")
    devices = {parameter.device.type for parameter in model.parameters()}
    if not devices <= set(DEVICES):
        raise UnsupportedError(
            f"Liger's kernels run on CUDA and XPU devices; the model is on {', '.join(sorted(devices))}. Move it first."
        )
    return LigerKernels(model, plan, _patch_function(model))


def _patch_function(model: nn.Module) -> Callable[..., None]:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except Exception as error:
        raise UnsupportedError(
            f"liger-kernel can't be imported with these versions of torch, triton and transformers: {error}"
        ) from error
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    if model_type not in known:
        raise UnsupportedError(
            f"Liger has no kernels for model type {model_type!r}. It knows {', '.join(sorted(known))}."
        )
    return known[model_type]


# ---- applying and taking off ----------------------------------------------------------------------------------------


@dataclass
class _Applied:
    """What one model got, and how many adapters asked for it."""

    kernels: tuple[str, ...]
    changes: Changes
    end_sharing: Callable[[], Any]
    notes: tuple[str, ...]
    users: int = 0


_applied: weakref.WeakKeyDictionary[nn.Module, _Applied] = weakref.WeakKeyDictionary()


class LigerKernels:
    """Liger's kernels for one model. The adapters that asked for them share them; the last one takes them off."""

    def __init__(self, model: nn.Module, plan: AttachPlan, patch: Callable[..., None]) -> None:
        self._model, self._plan, self._patch = weakref.ref(model), plan, patch
        self._on = False

    def apply(self) -> tuple[str, ...]:
        """Bind the kernels to the model. Return notes for the plan: which, and what was left out and why.

        Raises:
            UnsupportedError: Liger failed, or nothing was left to apply. The model and the process are unchanged.
        """
        model = self._model()
        assert model is not None
        if model not in _applied:
            _applied[model] = _apply(model, self._plan, self._patch)
        state = _applied[model]
        state.users += 1
        self._on = True
        return (f"Liger's kernels: {', '.join(state.kernels)}", *state.notes)

    def revert(self) -> None:
        """Give the model its own forwards back, if no other adapter on it asked for the kernels."""
        model = self._model()
        if not self._on or model is None:
            return
        self._on = False
        state = _applied[model]
        state.users -= 1
        if state.users:
            return
        del _applied[model]
        state.end_sharing()
        state.changes.revert()
        # Modules that are trained whole are copies, with Liger's forward in them; who wrapped ours meanwhile stays.
        for module in model.modules():
            if _is_ours(vars(module).get("forward")):
                del module.__dict__["forward"]


@dataclass
class _Found:
    """What Liger changed in the model's modules and in shared functions, before it was all put back."""

    forwards: dict[nn.Module, FunctionType] = field(default_factory=dict)
    values: dict[nn.Module, dict[str, Any]] = field(default_factory=dict)
    functions: list[tuple[ModuleType, str, Any, Any]] = field(default_factory=list)


def _apply(model: nn.Module, plan: AttachPlan, patch: Callable[..., None]) -> _Applied:
    config, notes = _choice(model, plan, patch)
    found = _trial(model, config)
    snapshot = Snapshot(model)
    try:
        kernels, left_out = _bind_all(model, found)
        if not kernels and not found.functions:
            raise UnsupportedError("; ".join(left_out) or f"Liger changes nothing in {type(model).__name__}.")
        changes = snapshot.changes()
    except BaseException:
        snapshot.changes().revert()
        raise
    # `revert` takes forwards off by what they are: another tool may have wrapped one in the meantime.
    changes.attributes = [change for change in changes.attributes if change[1] != "forward"]
    words = [f"{count} x {name}" if count > 1 else name for name, count in kernels.items()]
    words += ["rotary embedding"] * bool(found.functions)
    return _Applied(tuple(words), changes, _share(model, found.functions), (*notes, *left_out))


def _choice(model: nn.Module, plan: AttachPlan, patch: Callable[..., None]) -> tuple[dict[str, bool], list[str]]:
    """Return what Liger is asked for besides its defaults, and notes."""
    options = inspect.signature(patch).parameters
    # Plain cross entropy is never asked for: Liger would replace torch's own for the whole process.
    config = {"cross_entropy": False} if "cross_entropy" in options else {}
    fused = options.get("fused_linear_cross_entropy")
    if fused is None or not fused.default:
        return config, []
    reason = _why_not_the_loss(model, plan)
    config["fused_linear_cross_entropy"] = not reason
    return config, [f"Liger's fused loss is left out: {reason}"] if reason else []


def _bind_all(model: nn.Module, found: _Found) -> tuple[Counter[str], list[str]]:
    """Bind what is right for the model. Return how many of which kernel, and what was left out and why."""
    kernels: Counter[str] = Counter()
    left_out: dict[str, None] = {}
    different = functools.cache(_different_norm)
    for module, liger in found.forwards.items():
        name = _kernel_name(model, module, liger)
        if "forward" in vars(module):
            reason = "other code has replaced its forward"
        elif name == "experts":
            reason = "it would compute gradients of frozen experts"
        elif name == "MLP":
            reason = _other_activation(module, liger)
        else:
            reason = ""
        if not reason:
            # Liger's in-place norm would write into a gradient that others may hold.
            vars(module).update({k: False if k == "in_place" else v for k, v in found.values[module].items()})
            _bind(model, module, liger, name)
            if name == "norm" and (reason := different(_Norm(module))):
                del module.__dict__["forward"]
        if reason:
            left_out[f"Liger's {name} kernel is left out for {type(module).__name__}: {reason}"] = None
        else:
            kernels[name] += 1
    return kernels, list(left_out)


def _trial(model: nn.Module, config: dict[str, bool]) -> _Found:
    """Let Liger patch the model, note what it changed, and put everything back: the model and the process."""
    from transformers.integrations.liger import apply_liger_kernel

    snapshot, found = Snapshot(model), _Found()
    with _process_unchanged() as changed:
        try:
            apply_liger_kernel(model, config)
            for module in model.modules():
                new = vars(module).get("forward")
                if _of_liger(getattr(new, "__func__", None)):
                    found.forwards[module] = new.__func__  # type: ignore[union-attr]
            changes = snapshot.changes()
            owners = {id(vars(module)): module for module in found.forwards}
            for module in found.forwards:
                found.values[module] = {}
            for container, key, _ in changes.attributes:
                if id(container) in owners and not callable(container.get(key)):
                    found.values[owners[id(container)]][key] = container[key]
        except Exception as error:
            # An assertion or AttributeError of Liger's, on a model it was not written for.
            raise UnsupportedError(
                f"Liger can't patch {type(model).__name__}: {type(error).__name__}: {error}"
            ) from error
        finally:
            snapshot.changes().revert()
    for owner, key, old, new in changed:
        if isinstance(owner, ModuleType) and isinstance(old, FunctionType) and _of_liger(new):
            found.functions.append((owner, key, old, new))
    return found


def _of_liger(thing: Any) -> bool:
    return isinstance(thing, FunctionType) and thing.__module__.startswith("liger_kernel.")


@contextmanager
def _process_unchanged() -> Iterator[list[tuple[Any, str, Any, Any]]]:
    """Put back what happens to torch.nn's and the models' modules inside. Fills (owner, name, old, new)."""
    import torch.nn.functional
    from transformers.loss import loss_utils

    owners: list[Any] = [torch.nn, torch.nn.functional, loss_utils]
    owners += [m for n, m in list(sys.modules.items()) if n.startswith("transformers.models.") and ".modeling_" in n]
    # A lazy module makes attributes when it is asked for one, so only what is there is looked at.
    before = [(owner, dict(vars(owner))) for owner in owners if isinstance(owner, ModuleType)]
    classes = {c for o, values in before for c in values.values() if isinstance(c, type) and c.__module__ == o.__name__}
    before += [(cls, dict(vars(cls))) for cls in classes]
    changed: list[tuple[Any, str, Any, Any]] = []
    try:
        yield changed
    finally:
        for owner, values in before:
            for key, old in values.items():
                new = vars(owner).get(key)
                if new is not old:
                    changed.append((owner, key, old, new))
                    setattr(owner, key, old)


# ---- each kernel ----------------------------------------------------------------------------------------------------


def _kernel_name(model: nn.Module, module: nn.Module, forward: FunctionType) -> str:
    if module is model:
        return "fused linear cross entropy"
    owner = forward.__qualname__.split(".")[0]
    if "Norm" in owner:
        return "norm"
    return "MLP" if owner.endswith("MLP") or "MLPFor" in owner else "experts"


def _why_not_the_loss(model: nn.Module, plan: AttachPlan) -> str:
    """Return why Liger's fused head and loss would be wrong for this model or this plan, or ""."""
    if not type(model).__name__.endswith(("ForCausalLM", "ForConditionalGeneration")):
        return f"{type(model).__name__} is no language model"
    head = getattr(model, "lm_head", None)
    names = {name for name, module in model.named_modules(remove_duplicate=False) if module is head}
    if names & {layer.name for layer in plan.layers}:
        return "it reads the head's weight directly and would pass over its adapter"
    if any(name == whole or name.endswith(f".{whole}") for name in names for whole in plan.trained):
        return "the head is trained whole, and Liger adds its gradient up in the weight's own precision"
    if names & plan.quantize.keys():
        return "the head is quantized"
    return _not_now(model)


def _not_now(model: nn.Module) -> str:
    """Return why the head and the loss have to be the model's own now, or "". Asked at every call."""
    head = getattr(model, "lm_head", None)
    if type(head) is not nn.Linear:
        return f"the head is no plain nn.Linear but {type(head).__name__}"
    if head.bias is not None:
        return "it would leave out the head's bias"
    if "forward" in vars(head) or head._forward_hooks or head._forward_pre_hooks:
        return "the head has hooks or a forward of its own, which would not run"
    autocast = torch.is_autocast_enabled(head.weight.device.type)
    dtype = torch.get_autocast_dtype(head.weight.device.type) if autocast else head.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        # It computes gradients in the forward pass, before a GradScaler has scaled the loss.
        return f"its gradients would not be scaled, which {dtype} needs"
    from transformers.loss.loss_utils import ForCausalLMLoss

    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return "the model has a loss function of its own"
    return ""


def _other_activation(mlp: nn.Module, forward: FunctionType) -> str:
    """Return why Liger's gated MLP is not this one, or "": it takes its activation for granted."""
    words = forward.__qualname__.split(".")[0]
    expected = next((function for word, function in _ACTIVATIONS.items() if word in words), None)
    own = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    x = torch.linspace(-6, 6, 97)
    if expected is None or own is None or not torch.allclose(own(x), expected(x), rtol=1e-5, atol=1e-6):
        return "its activation is another"
    return ""


class _Norm:
    """A norm, equal to others of its class, size and dtype: one of them is tried."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        weight = getattr(module, "weight", None)
        self.key = (type(module), *((weight.shape, weight.dtype, weight.device) if weight is not None else ()))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Norm) and other.key == self.key


def _different_norm(norm: _Norm) -> str:
    """Return why a norm, with Liger's forward bound, gives other results than its own forward; or ""."""
    module, weight = norm.module, getattr(norm.module, "weight", None)
    if weight is None:
        return "it has no weight"
    numbers = torch.randn((4, weight.shape[-1]), generator=torch.Generator().manual_seed(0)).to(weight)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    # So small that epsilon counts, and as large as activations are.
    for x in (numbers * 1e-3, numbers):
        try:
            with torch.no_grad():
                ours, own = module.forward(x), type(module).forward(module, x)
        except Exception as error:
            return f"its kernel fails ({type(error).__name__}: {error})"
        if not torch.allclose(ours.float(), own.float(), rtol=tolerance, atol=1e-5):
            return "its results differ"
    return ""


def _bind(model: nn.Module, module: nn.Module, liger_forward: FunctionType, name: str) -> None:
    own = type(module).forward
    choose = _loss_forward if module is model else _module_forward
    forward = choose(liger_forward, own, name == "MLP")
    functools.update_wrapper(forward, own)
    forward._liger = True  # type: ignore[attr-defined]
    # A bound method named forward: a copy's is the copy's, and a pickled module comes back with its class's.
    module.__dict__["forward"] = MethodType(forward, module)


def _is_ours(forward: Any) -> bool:
    return getattr(getattr(forward, "__func__", None), "_liger", False)


def _runs(*tensors: Any) -> bool:
    """Return True if Liger's kernels take these tensors as the model's own code does."""
    if torch.compiler.is_compiling():
        return False
    return all(type(x) is torch.Tensor and x.device.type in DEVICES and x.dtype in _DTYPES for x in tensors)


def _module_forward(liger: Callable, own: Callable, once: bool) -> Callable:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not _runs(args[0]):
            return own(self, *args, **kwargs)
        y = liger(self, args[0])
        return _only_once(y) if once else y

    return forward


def _loss_forward(liger: Callable, own: Callable, _: bool) -> Callable:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        wanted = kwargs.get("skip_logits")
        wanted = (self.training and wanted is None) or wanted
        weight = getattr(self.lm_head, "weight", None)
        # A plan may leave the head frozen, and its owner may not.
        unfit = weight is None or weight.requires_grad or not _runs(weight.detach()) or _not_now(self)
        if labels is None or not wanted or unfit:
            kwargs.pop("skip_logits", None)
            return own(self, *args, **kwargs)
        output = liger(self, *args, **kwargs)
        _only_once(output[0] if isinstance(output, tuple) else output.loss)
        return output

    return forward


def _only_once(y: torch.Tensor) -> torch.Tensor:
    """Raise when a graph is run backward a second time: Liger's kernels write their gradients over what they saved."""
    if y.grad_fn is not None:
        ran: list[bool] = []

        def check(_: Any) -> None:
            if ran:
                raise StateError(
                    "Liger's kernels overwrite what a second backward pass through the same graph (retain_graph=True) "
                    "needs. Attach with liger=False."
                )
            ran.append(True)

        y.grad_fn.register_prehook(check)
    return y


# ---- functions that all models of a type share ----------------------------------------------------------------------


class _SharedFunction:
    """A module's function that asks at each call whether Liger's can take its place, while somebody uses it."""

    def __init__(self, module: ModuleType, name: str, own: Callable, liger: Callable) -> None:
        self.module, self.name, self.own, self.users = module, name, own, 0
        # GPT-OSS gives half the angles; elsewhere half of them means that half of each head is rotated.
        parts = 2 if liger.__name__.endswith("gpt_oss") else 1

        @functools.wraps(own)
        def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
            plain = not args and kwargs.get("unsqueeze_dim", 1) == 1
            if plain and _runs(q, k, cos, sin) and q.dtype == cos.dtype and q.shape[-1] == parts * cos.shape[-1]:
                return liger(q, k, cos, sin)
            return own(q, k, cos, sin, *args, **kwargs)

        self.function = rotate


_shared: dict[tuple[str, str], _SharedFunction] = {}


def _share(model: nn.Module, functions: Iterable[tuple[ModuleType, str, Any, Any]]) -> Callable[[], Any]:
    """Put Liger's functions in, for as long as `model` lives or until the result is called."""
    keys = []
    for module, name, own, liger in functions:
        key = (module.__name__, name)
        if key not in _shared:
            _shared[key] = _SharedFunction(module, name, own, liger)
            setattr(module, name, _shared[key].function)
        _shared[key].users += 1
        keys.append(key)
    return weakref.finalize(model, _end_sharing, keys)


def _end_sharing(keys: Iterable[tuple[str, str]]) -> None:
    for key in keys:
        shared = _shared[key]
        shared.users -= 1
        if not shared.users:
            del _shared[key]
            if getattr(shared.module, shared.name) is shared.function:
                setattr(shared.module, shared.name, shared.own)
