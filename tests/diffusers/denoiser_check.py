"""Builds a tiny model of a denoiser class and checks that adapters on it do what they must."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from lora_adapters_diffusers.backend import DiffusersBackend
from lora_adapters_diffusers.targets import TARGET_MAPS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import lora_adapters as la
from lora_adapters.targets import Classification, ModelInfo, candidates

sys.path.append(str(Path(__file__).parents[1] / "transformers"))
from sweep_compare import check_against_trace
from sweep_trace import trace

#: Class name -> {"config": keyword arguments, "inputs": the forward's, see `_value`}, from diffusers' own model tests
#: (Apache-2.0), where it has some.
CASES: dict[str, Any] = json.loads((Path(__file__).parent / "denoisers.json").read_text(encoding="utf-8"))
ATTENTION = {"q", "k", "v", "o", "qkv", "kv"}


@dataclass
class Outcome:
    """One row of the table. `verdict` is ok, wrong, structure only (there is no tiny config) or not built."""

    name: str
    verdict: str
    roles: Counter[str] = field(default_factory=Counter)
    default: str = ""
    attentions: int = 0
    unreached: int = 0
    problems: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return a tiny model without dropout and its inputs, the same every time."""
    torch.manual_seed(0)
    case = CASES[name]
    model = getattr(diffusers, name)(**case["config"]).eval()
    for parameter in model.parameters():  # a layer that starts at zero would hide what is behind it
        if parameter.numel() and not torch.count_nonzero(parameter.detach()):
            nn.init.normal_(parameter, std=0.05)
    generator = torch.Generator().manual_seed(1)
    return model, {key: _value(value, generator) for key, value in case["inputs"].items()}


def _value(given: Any, generator: torch.Generator) -> Any:
    """Return a plain value, or the tensor or container that a one-key description stands for."""
    if not isinstance(given, dict):
        return given
    kind, what = next(iter(given.items()))
    shape = given.get("shape", ())
    if kind == "normal":
        return torch.randn(what, generator=generator)
    if kind in ("list", "tuple"):
        values = [_value(v, generator) for v in what]
        return values if kind == "list" else tuple(values)
    if kind == "dict":
        return {k: _value(v, generator) for k, v in what.items()}
    if kind == "true":
        return torch.ones(what, dtype=torch.bool)
    if kind == "upto":
        return torch.randint(what, shape, generator=generator)
    if kind in ("full", "fullint"):
        return torch.full(shape, what)
    dtype = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}[kind]
    return torch.tensor(what, dtype=dtype).reshape(shape)


def predict(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    """Return every floating tensor of the model's output."""
    torch.manual_seed(2)
    found = model(**inputs)
    return [t for t in tree_leaves(_plain(found)) if isinstance(t, Tensor) and t.is_floating_point()]


def _plain(found: Any) -> Any:
    return dict(found) if isinstance(found, dict) else found


def classify(model: nn.Module) -> tuple[ModelInfo, Classification]:
    """Return what the backend says about a model."""
    info = ModelInfo("diffusers", type(model).__name__, candidates(model), model)
    return info, DiffusersBackend().classify(info, TARGET_MAPS)


def check(name: str) -> Outcome:
    """Check one class: every point that does not hold is a problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(name)


def _check(name: str) -> Outcome:
    if name not in CASES:
        return _structure_only(name)
    model, inputs = build(name)
    outcome = _outcome(name, model, "ok")
    outcome.attentions, found = _check_trace(model, inputs)
    outcome.problems += found
    reached = _weights_with_gradients(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        bare = predict(model, inputs)
    words = {"attention": sum(outcome.roles[r] for r in ATTENTION), **outcome.roles}
    targets = "+".join(word for word in ("attention", "mlp", "conv", "time", "other") if words.get(word))
    adapter = la.attach(model, rank=1, targets=targets)
    with torch.no_grad():
        if not _close(predict(model, inputs), bare, 1e-6):
            outcome.problems.append("the forward pass changes while B = 0")
    outcome.problems += _check_gradients(model, inputs, adapter, reached)
    outcome.unreached = len(set(adapter.layers) - reached)
    outcome.problems += _check_merge(model, inputs, adapter, bare)
    adapter.detach()
    after = model.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(after[k], v) for k, v in before.items()):
        outcome.problems.append("the model is not as it was after detaching")
    outcome.verdict = "wrong" if outcome.problems else "ok"
    return outcome


def _structure_only(name: str) -> Outcome:
    try:
        with torch.device("meta"):
            model = getattr(diffusers, name)()
    except Exception as error:  # whatever the class raises is the reason the table shows
        return Outcome(name, "not built", problems=[f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"])
    outcome = _outcome(name, model, "structure only")
    if outcome.problems:
        outcome.verdict = "wrong"
    return outcome


def _outcome(name: str, model: nn.Module, verdict: str) -> Outcome:
    info, classes = classify(model)
    outcome = Outcome(name, verdict, Counter(classes.roles.values()), classes.default, notes=classes.notes)
    if missing := [n for n in info.modules if n not in classes.roles]:
        outcome.problems.append(f"no role: {missing[0]}")
    needed = {"attention": ATTENTION & set(outcome.roles), "mlp": outcome.roles["mlp"]}
    outcome.problems += [
        f"no {what} found" for what, found in needed.items() if not found and what not in WITHOUT.get(name, ())
    ]
    return outcome


#: What a class has none of.
WITHOUT = {"UNet1DModel": ("attention", "mlp"), "UNet2DModel": ("mlp",)}


#: Where roles and the trace differ on purpose: the difference -> why.
EXPLAINED = {
    r"single_transformer_blocks\.\d+\.proj_out: role mlp, the forward pass shows o": "it takes the results of attention and "
    "of the feed-forward as one, and is called mlp",
    r"\.(to_add_out|to_out_t|to_out\.0): role o, but no softmax attention uses it": "two streams attend as one, and the "
    "trace follows the result to one of them",
}


def _check_trace(model: nn.Module, inputs: dict[str, Any]) -> tuple[int, list[str]]:
    """Compare roles with what one forward pass does: it follows tensors through softmax attention, blind to names."""
    with sdpa_kernel(SDPBackend.MATH):
        seen = trace(model, inputs)
    problems = check_against_trace(model, *classify(model), seen)
    return len(seen.attentions), [p for p in problems if not any(re.search(e, p) for e in EXPLAINED)]


def _weights_with_gradients(model: nn.Module, inputs: dict[str, Any]) -> set[str]:
    """Return the names of modules whose weight the output depends on, by the bare model's own gradients."""
    model.requires_grad_(True)
    sum(t.float().square().mean() for t in predict(model, inputs)).backward()
    found = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    return found


def _check_gradients(model: nn.Module, inputs: dict[str, Any], adapter: Any, reached: set[str]) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    for layer in adapter.layers.values():
        b = layer.lora_B["default"].weight
        b.data.copy_(0.3 * torch.randn(b.shape, generator=generator))
    sum(t.float().square().mean() for t in predict(model, inputs)).backward()
    lost = []
    for name, layer in adapter.layers.items():
        pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        if name in reached and not all(p.grad is not None and p.grad.any() for p in pair):
            lost.append(name)
    model.zero_grad(set_to_none=True)
    return [f"{len(lost)} layers get no gradient, first {lost[0]}"] if lost else []


def _check_merge(model: nn.Module, inputs: dict[str, Any], adapter: Any, bare: list[Tensor]) -> list[str]:
    problems = []
    with torch.no_grad():
        adapted = predict(model, inputs)
        adapter.merge()
        merged = predict(model, inputs)
        adapter.unmerge()
        again = predict(model, inputs)
    if _close(adapted, bare, 1e-4):
        problems.append("the adapter changes nothing")
    if not _close(merged, adapted, 1e-4):
        problems.append(f"merged differs by {_distance(merged, adapted):.1e}")
    if not all(torch.equal(a, b) for a, b in zip(again, adapted, strict=True)):
        problems.append("unmerged differs")
    return problems


def _distance(mine: list[Tensor], theirs: list[Tensor]) -> float:
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(mine, theirs, strict=True))


def _close(mine: list[Tensor], theirs: list[Tensor], share: float) -> bool:
    return _distance(mine, theirs) <= share
