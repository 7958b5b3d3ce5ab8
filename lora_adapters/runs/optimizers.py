"""Optimizers by name, groups of parameters with learning rates of their own, and the schedule of these."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..error_text import did_you_mean
from ..errors import RequestError
from ..hooks.manager import require
from ..recipes.sections import TrainingSection
from .schedule import learning_rate_share

#: Names besides those of torch.optim's classes: what each is, and the package and the extra it needs.
_NAMES = {"adamw": "AdamW", "sgd": "SGD", "adafactor": "Adafactor", "rmsprop": "RMSprop", "adam": "Adam"}
_PACKAGES = {"adamw_8bit": ("bitsandbytes", "bnb"), "prodigy": ("prodigyopt", "diffusers")}
#: Classes of torch.optim that do not fit the loop: a closure, or sparse gradients.
_UNFIT = ("LBFGS", "SparseAdam", "Optimizer")


def parameter_groups(
    models: Mapping[str, nn.Module], rates: Mapping[str, float], lora_plus: float | None = None
) -> list[dict[str, Any]]:
    """Return what is trained in groups for an optimizer, each with its "lr"; the order is that of the models.

    Args:
        models: name -> model; what requires a gradient in it is trained.
        rates: name -> learning rate.
        lora_plus: ratio of the learning rate of B to that of all else (LoRA+, arXiv:2402.12354); None is 1.
    """
    groups = []
    for name, model in models.items():
        trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
        others = [p for key, p in trained if lora_plus is None or not _is_b(key)]
        groups.append({"params": others, "lr": rates[name]})
        if lora_plus is not None:
            groups.append({"params": [p for key, p in trained if _is_b(key)], "lr": rates[name] * lora_plus})
    return [group for group in groups if group["params"]]


def _is_b(name: str) -> bool:
    return ".lora_B." in name or ".lora_embedding_B." in name


def make_optimizer(
    training: TrainingSection, parameters: Iterable[nn.Parameter] | Sequence[Mapping[str, Any]], **options: Any
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer.

    Args:
        training: says which by `optimizer`: "adamw"; "adamw_8bit" (bitsandbytes, arXiv:2110.02861); "prodigy", which finds
            its own step size, to which the learning rate is a factor (arXiv:2306.06101, by its authors' package); or a
            class of torch.optim by name. Its `learning_rate` and `weight_decay` hold where a group has none of its own.
        parameters: parameters, or groups.
        **options: other arguments of the class.

    Raises:
        RequestError: there is no such optimizer, it does not take an option, or prodigy is given several learning rates.
        MissingDependencyError: its package is missing.
    """
    name, given = training.optimizer, list(parameters)
    cls = _class_of(name)
    if name == "prodigy" and len({g["lr"] for g in given if isinstance(g, Mapping) and "lr" in g}) > 1:
        raise RequestError(
            "training.optimizer: prodigy finds one step size for all values: leave out text_learning_rate and lora_plus, "
            "or take another optimizer."
        )
    try:
        # Prodigy prints a line on stdout, which belongs to the command's own output.
        with contextlib.redirect_stdout(sys.stderr):
            return cls(
                given, **{"lr": training.learning_rate, **_decay(cls, training), **_fused(cls, given), **options}
            )
    except (TypeError, ValueError) as error:
        raise RequestError(f"training.optimizer_options: {name} does not take them: {error}") from error


def _class_of(name: str) -> Any:
    if name in _PACKAGES:
        package, extra = _PACKAGES[name]
        require((package,), extra, f"training.optimizer: {name}")
        if name == "prodigy":
            from prodigyopt import Prodigy  # type: ignore[import-not-found]

            return Prodigy
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit
    known = [key for key, value in vars(torch.optim).items() if isinstance(value, type) and key not in _UNFIT]
    found = _NAMES.get(name, name)
    if found in known:
        return getattr(torch.optim, found)
    names = [*_PACKAGES, *_NAMES, *known]
    hint = did_you_mean(name, names) or did_you_mean(name.lower(), names)
    raise RequestError(
        f"training.optimizer: there is no {name!r}.{hint} Take {', '.join(_PACKAGES)}, or a class of torch.optim: "
        f"{', '.join(known)}."
    )


def _fused(cls: Any, given: Sequence[Any]) -> dict[str, bool]:
    """Return the argument for AdamW's one kernel for many tensors on a GPU: an adapter is many small ones."""
    listed = [one["params"] if isinstance(one, Mapping) else [one] for one in given]
    devices = {parameter.device.type for parameters in listed for parameter in parameters}
    return {"fused": True} if cls in (torch.optim.AdamW, torch.optim.Adam) and devices == {"cuda"} else {}


def _decay(cls: Any, training: TrainingSection) -> dict[str, float]:
    """Return the weight decay where it is not 0: not every class has one, and some have another default."""
    import inspect

    takes = "weight_decay" in inspect.signature(cls.__init__).parameters
    if training.weight_decay and not takes:
        raise RequestError(f"training.weight_decay: {training.optimizer} has none: leave it out.")
    return {"weight_decay": training.weight_decay} if takes else {}


class Schedule:
    """Sets each group's learning rate to its share of what it had at first: `training.schedule` and `training.warmup`.

    Args:
        training: the recipe's section.
        optimizer: new, with its groups' highest learning rates.
        total: steps of the run.
    """

    def __init__(self, training: TrainingSection, optimizer: torch.optim.Optimizer, total: int) -> None:
        self.training, self.optimizer, self.total = training, optimizer, total
        self.highest = [group["lr"] for group in optimizer.param_groups]

    def step_update(self, done: int) -> None:
        """Set the learning rates of the step after `done` steps."""
        share = learning_rate_share(self.training, done, self.total)
        for group, rate in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = rate * share
