"""Memory of one training step: predicted without computing anything, or measured.

Both run the same step (forward, backward, optimizer) under one tracker that sees every tensor storage an operation
makes and when it dies. The prediction runs on a copy of the model that has shapes but no data, so it works for models
on the meta device, costs no memory and leaves the model as it is.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import RequestError, UnsupportedError
from .modes import modes_kept
from .simulation import Copier, Tracker, keep_masks_as_cuda, quiet, rng_untouched, stored_bytes

#: Makes an optimizer for the trainable parameters, as torch.optim's classes do.
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one training step takes on its device, from the second step on (optimizer state exists by then).

    Attributes:
        weights: frozen parameters, buffers and quantization statistics, as they are stored.
        adapter: trainable parameters.
        gradients: gradients of the trainable parameters.
        optimizer: the optimizer's state.
        activations: highest sum of everything else alive during forward and backward: the inputs, what autograd saves,
            and temporary tensors.
        total: peak of the whole step, all of the above. At most the sum of the parts, plus the optimizer's
            temporary tensors: gradients come while activations go.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    total: int


def predict_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    checkpointing: bool | None = None,
    optimizer: str | OptimizerFactory | None = "adamw",
    autocast: torch.dtype | None = None,
    device: str | torch.device | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> StepMemory:
    """Predict the memory of a training step. Nothing is computed, and the model is not changed.

    Within 3 % of CUDA's allocator for steps that compute in 16 bits, with or without CUDA here, and of the CPU's. Worse
    for one kind: in fp32 without autocast CUDA may compute attention as whole matrices (grouped keys and values),
    whose temporaries inside one operation are not seen (up to 15 % low), and without CUDA here not at all (a third).

    Args:
        model: the model as it will be trained, on any device, "meta" included.
        inputs: keyword arguments of the forward. Real tensors are better than meta tensors: a model that looks at its
            inputs' values (whether an attention mask masks anything) then takes the branch it will take in training.
        checkpointing: True turns gradient checkpointing on (needs `gradient_checkpointing_enable`), None leaves it as
            it is configured on the model.
        optimizer: "adamw", "adamw_fused", "adamw_8bit", "prodigy", "sgd", "adafactor", a function from parameters to a
            torch.optim optimizer, or None for a step without an optimizer.
        autocast: dtype of torch.autocast around the forward, as Trainer's bf16=True sets; None for none.
        device: device the step will run on; the model's own by default, "cpu" for a meta model. "cuda" without CUDA
            takes the CPU's kernels for CUDA's and counts dropout's masks as CUDA keeps them.
        loss: function from the forward's output to a scalar; by default the output's `.loss`, else the sum of its
            first floating tensor.

    Raises:
        RequestError: nothing is trainable, or an unknown optimizer.
        UnsupportedError: the model's step can't run without data; the message names the module and the reason.
    """
    _check_trainable(model)
    target = _target_device(model, device)
    factory = _optimizer_factory(optimizer, target)
    stand_in = target.type == "cuda" and not torch.cuda.is_available()
    if stand_in:
        target = torch.device("cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copier = Copier(mode, target)
    with rng_untouched(), quiet(), mode:
        try:
            fake = copier.copy(model)
            if stand_in:
                keep_masks_as_cuda(fake)
            if checkpointing:
                _enable_checkpointing(fake)
            given = tree_map_only(torch.Tensor, copier.input, dict(inputs))
            tracker = Tracker(target, simulated=True, like_cuda=stand_in)
            return _Step(fake.train(), given, copier.originals, copier.fakes, tracker, autocast, loss).run(factory)
        except (RequestError, UnsupportedError):
            raise
        except Exception as error:
            raise UnsupportedError(_explain(error, model)) from error


def measure_step(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    optimizer: str | OptimizerFactory | None = "adamw",
    autocast: torch.dtype | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
) -> StepMemory:
    """Measure the memory of a training step by running two; the second counts.

    On CUDA `total` is what torch.cuda.max_memory_allocated saw of this model and step; on the CPU it is the tracker's
    peak (temporary memory inside one operation is not seen there). Parameters, buffers, gradients, modes and random
    states are put back afterwards.

    Args:
        model: a model with weights, on the device to measure.
        inputs: keyword arguments of the forward, on the same device.
        optimizer, autocast, loss: as for `predict_step`.

    Raises:
        RequestError: nothing is trainable, an unknown optimizer, or a model on the meta device.
    """
    _check_trainable(model)
    if any(p.device.type == "meta" for p in model.parameters()):
        raise RequestError("measure_step needs a model with weights; this one is on the meta device. Use predict_step.")
    target = _target_device(model, None)
    factory = _optimizer_factory(optimizer, target)
    if isinstance(factory, _StateBytes):
        raise RequestError(f"measure_step runs the optimizer: pass a function that makes it instead of {optimizer!r}.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copier = Copier(mode, target)
    with mode:
        copier.copy(model)  # only to find every tensor that the model holds
    with rng_untouched(), _restored(model):
        model.train()
        model.zero_grad(set_to_none=True)
        tracker = Tracker(target, simulated=False)
        return _Step(model, dict(inputs), copier.originals, copier.originals, tracker, autocast, loss).run(factory)


@dataclass
class _Step:
    """A training step of a model, real or simulated, run under a tracker."""

    model: nn.Module
    inputs: dict[str, Any]
    originals: list[torch.Tensor]  # every tensor of the user's model
    held: list[torch.Tensor]  # every tensor of `model`: the same, or their simulated copies
    tracker: Tracker
    autocast: torch.dtype | None
    loss: Callable[[Any], torch.Tensor] | None

    def run(self, factory: OptimizerFactory | _StateBytes | None) -> StepMemory:
        """Run the step and return its memory. A measured step runs twice: optimizer state exists in the second."""
        tracker, device = self.tracker, self.tracker.device
        params = [p for p in self.model.parameters() if p.requires_grad]
        tracker.ignore(self.held)
        optimizer = factory(params) if callable(factory) else None
        with tracker:
            if not tracker.simulated:
                self._forward_backward()
                self._optimize(optimizer)
                self.model.zero_grad(set_to_none=True)
            held = self._reset_cuda_peak()
            first = len(tracker.events)
            tracker.see(self.inputs)
            self._forward_backward()
            peak = tracker.peak(first)
            grads = tracker.bytes_of([p.grad for p in params])
            activations = tracker.peak(first, without=grads)
            if tracker.simulated:
                self._optimize(optimizer)  # makes the state, which the step that counts already has
            second = len(tracker.events)
            self._optimize(optimizer)
        given, gradients = sum(tracker.bytes_of(self.inputs).values()), sum(grads.values())
        peak = max(peak, given + gradients + tracker.peak(second))
        if held is not None:
            peak = torch.cuda.max_memory_allocated(device) - held + given
        state = sum(tracker.bytes_of(list(optimizer.state.values())).values()) if optimizer else 0
        if isinstance(factory, _StateBytes):
            state = factory.of(params)
        adapter = stored_bytes([p for p in self.originals if p.requires_grad], tracker.block)
        weights = stored_bytes(self.originals, tracker.block) - adapter
        return StepMemory(weights, adapter, gradients, state, activations, weights + adapter + state + peak)

    def _reset_cuda_peak(self) -> int | None:
        """Return the bytes allocated now, where the allocator is to be asked for the peak."""
        if self.tracker.simulated or self.tracker.device.type != "cuda":
            return None
        gc.collect()  # what the first step left in reference cycles would count as held before the second
        torch.cuda.reset_peak_memory_stats(self.tracker.device)
        return torch.cuda.memory_allocated(self.tracker.device)

    def _forward_backward(self) -> None:
        with torch.autocast(self.tracker.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            loss = self._loss(self.model(**self.inputs))
        loss.backward()

    def _loss(self, output: Any) -> torch.Tensor:
        if self.loss is not None:
            return self.loss(output)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if found is not None:
            return found
        floating = [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]
        if not floating:
            raise UnsupportedError(
                f"The model returns {type(output).__name__} without a loss or a floating tensor. Pass loss=, a "
                "function from the model's output to a scalar."
            )
        return floating[0].sum()

    def _optimize(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is not None:
            self.tracker.constant_scalars = self.tracker.simulated
            optimizer.step()
            self.tracker.constant_scalars = False


@dataclass(frozen=True)
class _StateBytes:
    """An optimizer whose state is known from a formula: bytes of one parameter's state."""

    of_param: Callable[[nn.Parameter], int]

    def of(self, params: Iterable[nn.Parameter]) -> int:
        return sum(self.of_param(p) for p in params)


def _adamw_8bit_state(param: nn.Parameter) -> int:
    """bitsandbytes' rule: two 8-bit moments with an fp32 scale per 256 elements; fp32 moments below 4096 elements."""
    count = param.numel()
    return 8 * count if count < 4096 else 2 * (count + 4 * -(-count // 256))


def _prodigy_state(param: nn.Parameter) -> int:
    """Two moments, the weighted sum of gradients, and the first values; of B, which starts at zero, these are one number."""
    return 4 * param.numel() * param.element_size()


def _optimizer_factory(optimizer: str | OptimizerFactory | None, device: torch.device) -> Any:
    foreach = device.type == "cuda"  # torch's own default, which it does not see for simulated parameters
    named: dict[str, Any] = {
        "adamw": lambda params: torch.optim.AdamW(params, foreach=foreach),
        "adamw_fused": lambda params: torch.optim.AdamW(params, fused=True),
        "adamw_8bit": _StateBytes(_adamw_8bit_state),
        "prodigy": _StateBytes(_prodigy_state),
        "sgd": lambda params: torch.optim.SGD(params, foreach=foreach),
        "adafactor": lambda params: torch.optim.Adafactor(params, foreach=foreach),
    }
    if not isinstance(optimizer, str):
        return optimizer
    if optimizer not in named:
        raise RequestError(f"Unknown optimizer {optimizer!r}; use one of {', '.join(named)}, a function or None.")
    return named[optimizer]


def _check_trainable(model: nn.Module) -> None:
    if not any(p.requires_grad for p in model.parameters()):
        raise RequestError("No parameter of the model is trainable, so there is no training step. Attach an adapter.")


def _target_device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        kinds = {p.device for p in model.parameters()} - {torch.device("meta")}
        if len(kinds) > 1:
            raise UnsupportedError(f"The model is spread over {sorted(map(str, kinds))}; one device is simulated.")
        device = kinds.pop() if kinds else "cpu"
    target = torch.device(device)
    return torch.device("cuda", target.index or 0) if target.type == "cuda" else target


def _enable_checkpointing(model: nn.Module) -> None:
    if callable(enable := getattr(model, "gradient_checkpointing_enable", None)):
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif callable(enable := getattr(model, "set_grad_checkpointing", None)):
        enable(True)
    else:
        raise UnsupportedError(f"{type(model).__name__} has no gradient_checkpointing_enable; pass checkpointing=None.")


def _explain(error: Exception, model: nn.Module) -> str:
    """Say which module of the simulated model failed, and why."""
    where = ""
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            where = type(owner).__name__
        traceback = traceback.tb_next
    place = f" in {where}" if where else ""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"The step of {type(model).__name__} can't be simulated: {type(error).__name__}{place}: {reason}"


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Put trained parameters, buffers, gradients and train/eval modes back."""
    kept = [*(p for p in model.parameters() if p.requires_grad), *model.buffers()]
    values = [t.detach().to("cpu", copy=True) for t in kept]
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        with modes_kept(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(kept, values, strict=True):
                tensor.copy_(value)
        for param, grad in grads:
            param.grad = grad
