"""What the sweep asks of one model: everything an adapter does in its life, on a dense base and on one in NF4."""

from __future__ import annotations

import copy
import gc
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_oracle import NotApplicableError, check_layout
from lora_adapters_timm.backend import TimmBackend
from sweep_cases import Case, build, images
from torch import nn
from torch.utils._pytree import tree_leaves

import lora_adapters as la
from lora_adapters.targets import Classification, ModelInfo, candidates

RANK = 4
#: Merged and unmerged models differ by rounding only.
TOLERANCE = 1e-4
#: Two runs of one model may differ by this much, as torch's CPU kernels round by where a tensor lies in memory.
ROUNDING = 1e-6
BACKEND = TimmBackend()


@dataclass
class Outcome:
    """What became of one case.

    Attributes:
        case: the model.
        roles: role -> number of layers.
        default: what targets="auto" means.
        adapted: layers that "auto" adapts.
        read, uncalled: layers whose weight is read without a call, and layers that are never used.
        problems: format ("fp32", "nf4", "roles") -> what went wrong.
        notes: facts for the table.
        seconds: time it took.
    """

    case: Case
    roles: Counter[str] = field(default_factory=Counter)
    default: str = ""
    adapted: int = 0
    quantized: int = 0
    read: int = 0
    uncalled: int = 0
    problems: dict[str, list[str]] = field(default_factory=lambda: {"roles": [], "fp32": [], "nf4": []})
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return not any(self.problems.values())

    @contextmanager
    def step(self, what: str, name: str) -> Iterator[None]:
        """Note an exception as this step's problem."""
        try:
            yield
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = str(error).splitlines()[0][:200] if str(error) else ""
            self.problems[what].append(f"{name}: {type(error).__name__} {reason} ({place.name}:{place.lineno})")


def check(case: Case, formats: tuple[str, ...] = ("fp32", "nf4")) -> Outcome:
    """Check a case from roles to reset_classifier."""
    outcome, start = Outcome(case), time.monotonic()
    base = build(case)
    image = images(case, 2)
    with outcome.step("roles", "classify"):
        check_roles(base, image, outcome)
    for number, what in enumerate(formats):
        last = number == len(formats) - 1
        with outcome.step(what, "life"):
            _Life(base if last else copy.deepcopy(base), image, what, outcome).run()
    gc.collect()
    outcome.seconds = time.monotonic() - start
    return outcome


def classify(model: nn.Module) -> Classification:
    """Return the plugin's classification of a model."""
    return BACKEND.classify(ModelInfo("timm", BACKEND.family(model), candidates(model), model), ())


def check_roles(model: nn.Module, image: torch.Tensor, outcome: Outcome) -> None:
    """Count the roles, and ask the oracle about each kind of fused projection."""
    classes = classify(model)
    outcome.roles, outcome.default = Counter(classes.roles.values()), classes.default
    outcome.read, outcome.uncalled = len(classes.reads), len(classes.never)
    outcome.notes += classes.notes
    heads = BACKEND.heads_to_train(model)
    has_classes = outcome.case.options.get("num_classes") != 0 and not outcome.case.options.get("features_only")
    if has_classes != bool(heads):
        outcome.problems["roles"].append(f"heads are {heads}")
    seen = set()
    for name, role in classes.roles.items():
        if role not in ("qkv", "kv"):
            continue
        kind = (type(model.get_submodule(name.rpartition(".")[0])).__name__, role, name.rpartition(".")[2])
        if kind in seen:
            continue
        seen.add(kind)
        if name not in classes.parts:
            outcome.problems["roles"].append(f"{name} has no layout")
            continue
        try:
            if problem := check_layout(model, image[:1], name, classes.parts[name]):
                outcome.problems["roles"].append(f"{name}: {problem}")
        except NotApplicableError as why:
            outcome.notes.append(f"layout not checked: {why}")


class _Life:
    """An adapter's life on one base."""

    def __init__(self, base: nn.Module, image: torch.Tensor, what: str, outcome: Outcome) -> None:
        self.base, self.image, self.what, self.outcome = base, image, what, outcome
        self.quantization = None if what == "fp32" else what

    def problem(self, text: str) -> None:
        self.outcome.problems[self.what].append(text)

    def run(self) -> None:
        twin = copy.deepcopy(self.base)
        before = _state(self.base)
        at_start = self.output(self.base)
        adapter = la.attach(self.base, rank=RANK, quantization=self.quantization, seed=0)
        self.outcome.adapted = len(adapter.plan.layers)
        self.outcome.quantized = max(self.outcome.quantized, len(adapter.plan.quantize))
        if self.quantization is not None:
            with adapter.disabled():
                at_start = self.output(self.base)
        self.same("attached: the output changed", self.output(self.base), at_start)
        with self.outcome.step(self.what, "gradients"):
            self.gradients(adapter)
        trained = self.output(self.base)
        if _difference(trained, at_start) == 0:
            self.problem("the adapter changes nothing")
        with self.outcome.step(self.what, "merge"):
            adapter.merge()
            error = _difference(self.output(self.base), trained)
            if not error < TOLERANCE:
                self.problem(f"merged differs by {error:.1e}")
            adapter.unmerge()
            self.same("unmerged: the output changed", self.output(self.base), trained)
        with tempfile.TemporaryDirectory() as folder, self.outcome.step(self.what, "save and restore"):
            adapter.save(folder)
            if self.quantization is not None:
                la.attach(twin, rank=1, quantization=self.quantization, modules_to_save=[]).detach()
            restored = la.restore(twin, folder)
            self.same("restored: another output", self.output(twin), trained)
            with self.outcome.step(self.what, "reset_classifier"):
                self.reset_classifier(twin, restored)
        adapter.detach()
        self.same("detached: another output", self.output(self.base), at_start)
        if self.quantization is None:
            after = _state(self.base)
            if changed := [n for n in before if n not in after or not torch.equal(before[n], after[n])]:
                self.problem(f"detached: {changed[0]} is not as it was")

    def output(self, model: nn.Module) -> list[torch.Tensor]:
        model.eval()
        with torch.no_grad():
            return [t for t in tree_leaves(model(self.image)) if isinstance(t, torch.Tensor)]

    def same(self, what: str, now: list[torch.Tensor], before: list[torch.Tensor]) -> None:
        """Require equal bits, or what torch's matrix products differ by from one place in memory to another."""
        if all(torch.equal(a, b) for a, b in zip(now, before, strict=True)):
            return
        error = _difference(now, before)
        if error < ROUNDING:
            self.outcome.notes.append(f"{self.what}, {what} to rounding ({error:.1e})")
        else:
            self.problem(f"{what} (by {error:.1e})")

    def gradients(self, adapter: Any) -> None:
        """Run a training step with an adapter that matters; every factor must get a gradient."""
        generator = torch.Generator().manual_seed(3)
        factors = {n: p for n, p in self.base.named_parameters() if ".lora_" in n}
        with torch.no_grad():
            for name, factor in factors.items():
                if ".lora_B." in name:
                    factor.copy_(0.02 * torch.randn(factor.shape, generator=generator))
        kept = {n: b.clone() for n, b in self.base.named_buffers()}
        self.base.train()
        leaves = [t for t in tree_leaves(self.base(self.image)) if isinstance(t, torch.Tensor)]
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in leaves).backward()
        for name, buffer in self.base.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])
        dead = [n for n, p in factors.items() if p.grad is None or not p.grad.abs().sum() > 0]
        wrong = [n for n, p in factors.items() if p.grad is not None and not p.grad.isfinite().all()]
        if dead or wrong:
            self.problem(
                f"{len(dead)} of {len(factors)} factors have no gradient, {len(wrong)} no finite one: {(dead + wrong)[0]}"
            )
        with torch.no_grad():
            for parameter in self.base.parameters():
                if parameter.grad is not None:
                    size = parameter.grad.norm()
                    if size > 0:  # a step of one hundredth in the gradient's direction
                        parameter.sub_(0.01 * parameter.grad / size)
                    parameter.grad = None

    def reset_classifier(self, model: nn.Module, adapter: Any) -> None:
        if not hasattr(model, "reset_classifier"):
            return
        model.reset_classifier(7)
        outputs = self.output(model)
        if outputs[0].shape[-1] != 7:
            self.problem(f"reset_classifier: {tuple(outputs[0].shape)} logits")
        lost = [layer.name for layer in adapter.plan.layers if not hasattr(model.get_submodule(layer.name), "lora_A")]
        if lost:
            self.problem(f"reset_classifier: {lost[0]} lost its adapter")


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _difference(now: list[torch.Tensor], before: list[torch.Tensor]) -> float:
    """Return the largest |now - before| relative to the largest |before|, over all outputs."""
    gaps = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(now, before, strict=True)]
    return max(gap.item() for gap in gaps)
