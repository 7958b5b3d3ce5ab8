"""BatchNorm's running statistics: kept as the base has them while an adapter is attached, or the adapter's own.

A BatchNorm in training mode changes statistics that no adapter's file holds, so the restored adapter would meet others
than it was trained with. `norm` says what becomes of them:

- "eval": every BatchNorm stays in evaluation mode, whatever `model.train()` says, until the adapter is taken off.
- "train": the adapter has copies, which training updates. They are modules that PEFT saves whole (modules_to_save), their
  weight and bias buffers in place of parameters: nothing trains those, whoever sets requires_grad.
- "affine": the same, weight and bias trained.

The base's own modules are never in training mode while an adapter is attached, so their statistics don't change.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import UnsupportedError
from .sharing import places_of


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module of the base's own BatchNorms that have running statistics, seen through PEFT's wrappers."""
    return {
        name.replace(".original_module", ""): module
        for name, module in model.named_modules()
        if ".modules_to_save" not in name and _has_statistics(module)
    }


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None


def check_separable(model: nn.Module, names: tuple[str, ...], meant: dict[str, nn.Module]) -> None:
    """Raise UnsupportedError unless PEFT, which goes by the ends of names, can save exactly these BatchNorms.

    Args:
        model: the base.
        names: of the BatchNorms.
        meant: name -> module of everything whose name ends in one of `names`.
    """
    # What has no values (an nn.Identity) may be wrapped along with them.
    holding = [name for name, module in meant.items() if any(True for _ in (*module.parameters(), *module.buffers()))]
    if other := next((name for name in holding if name not in names), None):
        end = next(name for name in names if other.endswith(name))
        raise UnsupportedError(
            f"The statistics of {end!r} can't be trained: PEFT takes modules by the ends of their names and would take "
            f"{other!r} too. Use norm='eval'."
        )
    places = places_of(model)
    if shared := next((name for name in names if len(places[id(model.get_submodule(name))]) > 1), None):
        raise UnsupportedError(
            f"The statistics of {shared!r} can't be trained: the model holds it in several places, and PEFT would train a "
            "copy in the first one only. Use norm='eval'."
        )


def note(mode: str, count: int) -> str:
    """Return what the plan says of `count` BatchNorms; "" if there is nothing to say."""
    if not count:
        return "" if mode == "eval" else f"norm={mode!r} has no effect: there is no BatchNorm with running statistics."
    if mode == "eval":
        return f"{count} BatchNorm layers stay in evaluation mode, with the base's running statistics (norm='eval')."
    what = "running statistics" if mode == "train" else "running statistics, weight and bias"
    return f"{count} BatchNorm layers are trained and saved with the adapter: {what} (norm={mode!r})."


# ---- on an attached model -------------------------------------------------------------------------------------------


def prepare_copies(model: nn.Module, adapter_name: str, names: tuple[str, ...], affine: bool) -> None:
    """Make an adapter's new copies train: not frozen as the originals are, weight and bias trained only if `affine`."""
    for name, module in model.named_modules():
        if f".modules_to_save.{adapter_name}" in name:
            _thaw(module, model.training)
    for name in names:
        copy: Any = model.get_submodule(f"{name}.modules_to_save.{adapter_name}")
        if not affine:
            for key in [key for key, value in copy._parameters.items() if value is not None]:
                copy._buffers[key] = copy._parameters.pop(key).detach()


def freeze(model: nn.Module) -> None:
    """Keep the base's own BatchNorms in evaluation mode, whatever `model.train()` says."""
    for module in batch_norms(model).values():
        # On the instance: its class stays what the model's own code asks for, and a copy or a pickle carries it along.
        vars(module)["train"] = functools.partial(_train_frozen, module)
        module.training = False


def _train_frozen(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand in for `nn.Module.train` on a frozen BatchNorm; children (an activation) follow the mode."""
    type(module).train(module, mode)
    module.training = False
    return module


def release(model: nn.Module) -> None:
    """Give every BatchNorm its own `train` back, in the mode that the model is in, and its weight as a parameter."""
    for module in _all(model):
        _thaw(module, model.training)
        for key in ("weight", "bias"):
            if (value := module._buffers.pop(key, None)) is not None:
                module._parameters[key] = nn.Parameter(value, requires_grad=False)


def _thaw(module: nn.Module, training: bool) -> None:
    if _has_statistics(module) and vars(module).pop("train", None) is not None:
        module.training = training


def _all(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, _BatchNorm))
