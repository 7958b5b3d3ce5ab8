"""An exponential moving average of what training changes: trainable values and BatchNorm statistics, not the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import RequestError, StateError
from .modes import modes_kept


class AdapterEma:
    """Averages of a model's trainable values over the steps of its training (Polyak and Juditsky, 1992).

        ema = AdapterEma(model, decay=0.999)
        for step, batch in enumerate(batches, start=1):
            ...
            optimizer.step()
            ema.update(model, step)
        with ema.applied(model):
            evaluate(model)  # or save it

    After each step average = decay * average + (1 - decay) * value, in float32 (float64 for float64 values). Before
    `update_after_step` the average is a copy of the values, and so it is after the first step that counts; with `warmup`
    the decay of the n-th step after that is 1 - (1 + n / warmup_gamma) ** -warmup_power, between `min_decay` and
    `decay`. These are the rules of timm.utils.ModelEmaV3, which averages a copy of the whole model.

    Averaged are the parameters that require a gradient and the running statistics of BatchNorm modules that are in
    training mode while the model is. Frozen values, a quantized base among them, are neither kept nor touched.

    Args:
        model: any module; its trainable parameters are what they will be in training. Here and in the methods it may also
            be its PeftModel, or a wrapper of DistributedDataParallel or torch.compile.
        decay: in [0, 1]; closer to 1 averages over more steps.
        min_decay, update_after_step, warmup, warmup_gamma, warmup_power: see above.
        device: where the averages are kept; None takes the device of each value.

    Raises:
        RequestError: a decay out of range, or a model without trainable values.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        *,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= min_decay <= decay <= 1:
            raise RequestError(f"0 <= min_decay <= decay <= 1 must hold, got {min_decay} and {decay}.")
        if update_after_step < 0 or warmup_gamma <= 0 or warmup_power <= 0:
            raise RequestError("update_after_step must not be negative; warmup_gamma and warmup_power must be above 0.")
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.warmup, self.warmup_gamma, self.warmup_power = warmup, warmup_gamma, warmup_power
        self.step = 0
        model = _unwrapped(model)
        self._statistics = tuple(_statistics_that_train(model))
        values = self._values(model)
        if not values:
            raise RequestError("The model has no trainable values to average. Attach an adapter first.")
        self._averages = {name: _copy(value, device) for name, value in values.items()}

    def decay_at(self, step: int) -> float:
        """Return the decay of a step; steps count from 1."""
        counted = step - self.update_after_step - 1
        if counted <= 0:
            return 0.0
        if not self.warmup:
            return self.decay
        return max(min(1 - (1 + counted / self.warmup_gamma) ** -self.warmup_power, self.decay), self.min_decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Take in the model's values after an optimizer step.

        Args:
            model: the model this was made for.
            step: number of the step, from 1; None counts the calls.

        Raises:
            StateError: other values train now than when this was made.
        """
        values = self._checked(model)
        self.step = self.step + 1 if step is None else step
        weight = 1 - self.decay_at(self.step)
        floating = [name for name, average in self._averages.items() if average.is_floating_point()]
        averages = [self._averages[name] for name in floating]
        # One launch for all of them on a GPU: an adapter is many small tensors.
        torch._foreach_lerp_(averages, [values[n].to(a) for n, a in zip(floating, averages, strict=True)], weight)
        for name in self._averages.keys() - set(floating):
            self._averages[name].copy_(values[name])  # a count of batches

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within this context the model has the averages as its values; after it, its own again, bit for bit.

        Raises:
            StateError: other values train now than when this was made.
        """
        values = self._checked(model)
        own = {name: value.clone() for name, value in values.items()}
        try:
            _fill(values, self._averages)
            yield model
        finally:
            _fill(values, own)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on exactly: the averages (not copies) by name, and the step."""
        return {"step": self.step, "averages": dict(self._averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            StateError: it is of another model. Nothing is changed.
        """
        averages = state["averages"]
        shapes = {name: average.shape for name, average in self._averages.items()}
        if {name: average.shape for name, average in averages.items()} != shapes:
            strange = next(iter(shapes.keys() ^ averages.keys()), "a value of another shape")
            raise StateError(
                f"These averages are of another model or adapter (first difference: {strange!r}). Start anew with "
                "AdapterEma(model), or build the model as it was."
            )
        _fill(self._averages, averages)
        self.step = int(state["step"])

    def _values(self, model: nn.Module) -> dict[str, torch.Tensor]:
        trained = {_plain(name): p.detach() for name, p in model.named_parameters() if p.requires_grad}
        buffers = {_plain(name): buffer for name, buffer in model.named_buffers()}
        return trained | {name: buffers[name] for name in self._statistics if name in buffers}

    def _checked(self, model: nn.Module) -> dict[str, torch.Tensor]:
        values = self._values(_unwrapped(model))
        different = [
            name
            for name in {**self._averages, **values}
            if name not in values or name not in self._averages or values[name].shape != self._averages[name].shape
        ]
        if different:
            raise StateError(
                f"The model's trainable values are not those that are averaged (first: {different[0]!r}). Make a new "
                "AdapterEma after a change of the model, its adapters or its head."
            )
        return values


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(inner := getattr(model, "module", None) or getattr(model, "_orig_mod", None), nn.Module):
        model = inner
    return model


def _statistics_that_train(model: nn.Module) -> Iterator[str]:
    """Yield the names of the running statistics that a forward in training mode changes."""
    with modes_kept(model):
        model.train()
        training = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.training]
    for name, module in training:
        if module.track_running_stats:
            yield from (_plain(f"{name}.{key}" if name else key) for key, _ in module.named_buffers(recurse=False))


def _plain(name: str) -> str:
    """Return the name that a tensor has in the model under a PeftModel, so that either may be given."""
    return name.removeprefix("base_model.model.")


def _copy(value: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    wide = value.is_floating_point() and value.dtype != torch.float64
    return value.to(device=device, dtype=torch.float32 if wide else value.dtype, copy=True)


@torch.no_grad()
def _fill(values: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        value.copy_(new[name])
