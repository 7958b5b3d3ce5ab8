"""What of this package works here, and why not: by versions and devices, and by trying what is quick to try."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import trials
from .devices import why_no_cuda
from .versions import Package

_CORE = ("torch", "peft", "safetensors")
_TRAINER = (*_CORE, "transformers", "accelerate")


@dataclass(frozen=True)
class Feature:
    """One row of the table.

    Attributes:
        name: what it is.
        works: whether it does here.
        tried: whether it was tried, not judged by versions and devices.
        reason: why it does not, or what to know about it.
        what_to_do: how to make it work.
    """

    name: str
    works: bool
    tried: bool = False
    reason: str = ""
    what_to_do: str = ""


def features(
    packages: Mapping[str, Package],
    devices: Sequence[Mapping[str, Any]],
    plugins: Sequence[Mapping[str, Any]],
    try_it: bool,
    say: Callable[[str], None],
) -> list[Feature]:
    """Return a row for each feature; a feature is not tried where its packages are missing or of a wrong version."""
    look = _Look(packages, try_it, say)
    cuda = next((device for device in devices if device["device"].startswith("cuda")), None)
    quantized = (*_CORE, "bitsandbytes")
    int8 = "training is exact; bitsandbytes rounds the input in evaluation: 1 to 2 % off"
    return [
        look.at("dense adapters", _CORE, lambda: trials.train("cpu")),
        look.at("NF4 on CPU", quantized, lambda: trials.quantize_and_train("nf4", "cpu")),
        look.at("NF4 on CUDA", quantized, lambda: trials.quantize_and_train("nf4", "cuda"), why_no_cuda),
        look.at("INT8 on CPU", quantized, lambda: trials.quantize_and_train("int8", "cpu"), note=int8),
        look.at("INT8 on CUDA", quantized, lambda: trials.quantize_and_train("int8", "cuda"), why_no_cuda),
        look.at("16-bit compute on CPU", _CORE, lambda: trials.train("cpu", "bfloat16"), note=_cpu_16_bit(devices[0])),
        look.at(
            "16-bit compute on CUDA",
            _CORE,
            lambda: trials.train("cuda", "float16" if cuda and cuda["bf16"] is False else "bfloat16"),
            why_no_cuda,
            note="in fp16: this GPU has no bf16" if cuda and cuda["bf16"] is False else "in bf16",
        ),
        look.at("transformers' Trainer", _TRAINER, trials.import_trainer, lambda: _plugin(plugins, "transformers")),
        look.at("TRL", (*_TRAINER, "trl", "datasets"), None, lambda: _plugin(plugins, "transformers")),
        look.at("two or more processes", _CORE, trials.one_process_group, _no_distributed, note=_between),
    ]


class _Look:
    def __init__(self, packages: Mapping[str, Package], try_it: bool, say: Callable[[str], None]) -> None:
        self.packages, self.try_it, self.say = packages, try_it, say

    def at(
        self,
        name: str,
        needs: Sequence[str],
        trial: Callable[[], None] | None,
        obstacle: Callable[[], tuple[str, str]] = lambda: ("", ""),
        note: str | Callable[[], str] = "",
    ) -> Feature:
        """Return the row of one feature: the first thing in its way, or that it works."""
        for package in (self.packages[need] for need in needs):
            if package.problem:
                return Feature(name, False, False, f"{package.name}: {package.problem}", package.what_to_do)
        try:
            reason, what_to_do = obstacle()
            if reason:
                return Feature(name, False, False, reason, what_to_do)
            tried = self.try_it and trial is not None
            if tried and trial is not None:
                self.say(f"Trying {name}")
                trial()
            return Feature(name, True, tried, note() if callable(note) else note)
        except Exception as error:
            reason = f"{type(error).__name__}: {f'{error}'.strip()}".partition("\n")[0]
            names = " ".join(f"'{need}{self.packages[need].supported}'" for need in needs)
            return Feature(name, False, True, reason, f"pip install --force-reinstall {names}; else report this table")


def _plugin(plugins: Sequence[Mapping[str, Any]], name: str) -> tuple[str, str]:
    """Return why a plugin can't serve and what to do, ("", "") if it can."""
    found = next((plugin for plugin in plugins if plugin["name"] == name), None)
    if found is None:
        return f"there is no plugin {name!r}", "pip install --force-reinstall --no-deps lora-adapters"
    if found["state"] == "ready":
        return "", ""
    what_to_do = "Change that variable" if found["state"] == "blocked" else f"pip install 'lora-adapters[{name}]'"
    return f"plugin {name!r} is {found['state']}: {found['detail']}", what_to_do


def _cpu_16_bit(cpu: Mapping[str, Any]) -> str:
    how = {True: "in bf16", False: "in bf16, without instructions for it: slower than fp32", None: "in bf16"}
    return how[cpu["bf16"]]


def _no_distributed() -> tuple[str, str]:
    import torch.distributed

    if not torch.distributed.is_available():
        return "this torch is built without torch.distributed", "Install a build of torch that has it: pytorch.org"
    if not _backends():
        return "this torch has neither gloo nor nccl", "Install a build of torch that has it: pytorch.org"
    return "", ""


def _backends() -> list[str]:
    import torch.distributed as distributed

    nccl = distributed.is_nccl_available() and not why_no_cuda()[0]
    return [name for name, there in (("gloo", distributed.is_gloo_available()), ("nccl", nccl)) if there]


def _between() -> str:
    return f"over {' and '.join(_backends())}; start with torchrun --nproc_per_node 2"
